"""
MLflow's variables and its credentials file: values, order of precedence, and the errors for bad ones.

The variables for retries are tested on the engine, in virtual time.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import attrs
import pytest
from mlflow.utils.credentials import read_mlflow_creds

import runqueue
from runqueue.errors import AuthError, ConfigError
from runqueue.http._credentials import Credentials, read_file
from runqueue.queueing import Accumulator, StoreError
from runqueue.queueing.delivery._retry import RetryPolicy
from runqueue.queueing.delivery._sender import Sender
from runqueue.settings._config import Config
from runqueue.stores._rest import HttpStore
from support import store_calls
from support.engine import ETERNITY, FakeStore, bounds, encode, fill, points
from support.mlflow_server import HOST, free_port
from support.proxy import Fault, ScriptedServer
from support.virtual_time import VirtualTimeLoop

TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
FACTOR = "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR"
JITTER = "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER"
USER, PASSWORD, TOKEN = (f"MLFLOW_TRACKING_{each}" for each in ("USERNAME", "PASSWORD", "TOKEN"))

# -- numbers ---------------------------------------------------------------------------------------------------------


def read_setting(name: str) -> float | None:
    """The setting that the variable leads to."""
    if name == TIMEOUT:
        return Config().seconds_per_request()
    retrying = Config().retry_settings()
    return {RETRIES: retrying.retries, FACTOR: retrying.base, JITTER: retrying.jitter}[name]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        (TIMEOUT, None, 60),
        (TIMEOUT, "", 60),
        (TIMEOUT, "120", 120),
        (TIMEOUT, "0.5", 0.5),
        (RETRIES, None, None),
        (RETRIES, "", None),
        (RETRIES, "0", 0),
        (RETRIES, "7", 7),
        (RETRIES, " 7\n", 7),
        (FACTOR, None, 0.5),
        (FACTOR, "", 0.5),
        (FACTOR, "0", 0),
        (FACTOR, "2", 2),
        (FACTOR, "0.25", 0.25),
        (JITTER, None, 0),
        (JITTER, "", 0),
        (JITTER, "0", 0),
        (JITTER, "1.0", 1),
    ],
)
def test_a_number_is_read_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, value: float | None
) -> None:
    """An empty variable counts as not set."""
    if text is not None:
        monkeypatch.setenv(name, text)
    assert read_setting(name) == value


@pytest.mark.parametrize("face", [runqueue.Client, runqueue.AsyncClient])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        *itertools.product((TIMEOUT, RETRIES, FACTOR, JITTER), ("abc", "-1", "inf", "nan", "1s", "1,5")),
        (TIMEOUT, "0"),
        (RETRIES, "1.5"),
        (RETRIES, "1e3"),
        (RETRIES, "٣"),
        (RETRIES, "9" * 5_000),
    ],
)
def test_a_bad_number_raises_at_construction(monkeypatch: pytest.MonkeyPatch, face: Any, name: str, text: str) -> None:
    """The message names the variable, and no request is sent."""
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError) as caught:
        face("http://127.0.0.1:1")
    assert name in str(caught.value) and len(str(caught.value)) < 300


def test_the_timeout_applies_to_each_request(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error's text names it."""
    server.fail("", Fault.hold(), times=None)
    monkeypatch.setenv(TIMEOUT, "0.2")
    with pytest.raises(StoreError, match=r"0\.2 s"):
        call(server.uri)
    server.let_go()


# -- retries, in virtual time ----------------------------------------------------------------------------------------


def attempts(retry_after: float | None = None, **settings: Any) -> list[float]:
    """Virtual seconds from the first attempt to each attempt, at a server that always answers 503."""

    async def main() -> list[float]:
        store = FakeStore(lambda _: StoreError("503", retriable=True, retry_after=retry_after), seconds=0)
        policy = RetryPolicy(**attrs.asdict(Config(**settings).retry_settings()))
        accumulator = Accumulator(encode)
        with anyio.fail_after(ETERNITY):
            async with Sender(accumulator, store, bounds=bounds(), max_workers=8, retry=policy) as sender:
                fill(accumulator.open("r", run_exists=True), points(1))
                report = await sender.flush()
        assert report.not_stored == 1 and not any(failure.final for failure in report.failures)
        return store.times()

    return anyio.run(main, backend_options={"loop_factory": VirtualTimeLoop})


def waits(times: list[float]) -> list[float]:
    """Seconds between successive attempts."""
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize("retries", [0, 1, 3, 12])
def test_max_retries_bounds_the_attempts_exactly(monkeypatch: pytest.MonkeyPatch, retries: int) -> None:
    """There are exactly that many attempts after the first, even if time is left. The batch stays queued."""
    monkeypatch.setenv(RETRIES, str(retries))
    assert len(attempts(retry_timeout=100_000.0)) == retries + 1


def test_max_retries_does_not_extend_the_retry_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit that is reached first ends retrying. Without the variable, only the time is limited."""
    expected = [float(second) for second in range(11)]
    monkeypatch.setenv(FACTOR, "0")
    assert attempts(1.0, retry_timeout=10) == expected
    monkeypatch.setenv(RETRIES, "1000")
    assert attempts(1.0, retry_timeout=10) == expected


def test_max_retries_applies_to_each_flush(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two retries, three requests are sent; the next flush after the outage sends the rest."""
    monkeypatch.setenv(RETRIES, "2")
    monkeypatch.setenv(FACTOR, "0")
    server.fail("", Fault.answer(503), times=3)
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError):
            client.flush()
        assert (server.count(), client.statistics().pending) == (3, 1)
        client.flush()
        assert (server.count(), client.statistics().stored) == (4, 1)


@pytest.mark.parametrize("factor", [0.0, 0.125, 2.0])
def test_the_back_off_factor_bounds_the_waits(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The n-th wait is random, at most factor * 2**(n-1) seconds and at most 30."""
    monkeypatch.setenv(FACTOR, str(factor))
    monkeypatch.setenv(RETRIES, "14")
    found = waits(attempts(retry_timeout=100_000.0))
    assert len(found) == 14
    assert all(0 <= wait <= min(30, factor * 2**n) + 1e-6 for n, wait in enumerate(found))
    if factor:
        assert len(set(found)) > 7
        assert max(found) > factor * 2  # all 14 below it: a chance of 1 in billions


def test_the_jitter_is_added_to_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A uniform random time is added: here to waits of zero, and to the server's Retry-After."""
    monkeypatch.setenv(FACTOR, "0")
    monkeypatch.setenv(RETRIES, "200")
    monkeypatch.setenv(JITTER, "3")
    found = waits(attempts(retry_timeout=100_000.0))
    assert all(0 <= wait <= 3 + 1e-6 for wait in found)
    assert min(found) < 0.5 and max(found) > 2.5
    assert math.isclose(sum(found) / len(found), 1.5, abs_tol=0.5)
    assert all(wait >= 2 - 1e-6 for wait in waits(attempts(2.0, retry_timeout=100_000.0)))


# -- ~/.mlflow/credentials -------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The path of the credentials file in a temporary home. It does not exist yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    yield tmp_path / ".mlflow" / "credentials"


def write_credentials(
    file: Path, user: str | None = "fu", password: str | None = "fp", section: str = "mlflow"
) -> None:
    """Write the file as MLflow's documentation shows it."""
    lines = [f"[{section}]"]
    lines += [f"mlflow_tracking_username = {user}"] if user is not None else []
    lines += [f"mlflow_tracking_password = {password}"] if password is not None else []
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


call = partial(store_calls.call, make=HttpStore)  # without plugins


def basic(user: str, password: str) -> str:
    """The Authorization header for a user and a password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def header(uri: str = "http://host", token: str | None = None) -> str | None:
    """The Authorization header that is sent to this URI."""
    return Credentials(uri, token).header()


@pytest.mark.parametrize("in_file", list(itertools.product([None, "", "fu"], [None, "", "fp"])))
@pytest.mark.parametrize("in_variables", list(itertools.product([None, "", "vu"], [None, "", "vp"])))
def test_user_and_password_come_from_variables_or_the_file(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_file: tuple[str | None, str | None],
    in_variables: tuple[str | None, str | None],
) -> None:
    """Each comes from its variable, else from the file. If one is missing, the token is used."""
    write_credentials(file, *in_file)
    for name, value in zip((USER, PASSWORD), in_variables, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv(TOKEN, "t")
    user, password = read_mlflow_creds()
    assert header() == (basic(user, password) if user and password else "Bearer t")


def test_the_file_comes_after_the_variables_and_before_the_token_variable(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URI's user info, the constructor's token and the variables come before it."""
    assert header() is None
    monkeypatch.setenv(TOKEN, "t")
    assert header() == "Bearer t"
    write_credentials(file)
    assert header() == basic("fu", "fp")
    monkeypatch.setenv(USER, "vu")
    monkeypatch.setenv(PASSWORD, "vp")
    assert header() == basic("vu", "vp")
    assert header(token="given") == "Bearer given"
    assert header("http://u:p@host", token="given") == basic("u", "p")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[other]\nmlflow_tracking_username = x\nmlflow_tracking_password = y\n",
        "[DEFAULT]\nmlflow_tracking_username = x\n[mlflow]\nmlflow_tracking_password = y\n",
        "[mlflow]\nMLFLOW_TRACKING_USERNAME: x\nmlflow_tracking_password: y ; z\n",
        "[mlflow]\nmlflow_tracking_username = x\nmlflow_tracking_password = a%%b\n",
        "[mlflow]\nmlflow_tracking_username = x\nmlflow_tracking_password = %(mlflow_tracking_username)s\n",
        "# comment\n[mlflow]\nmlflow_tracking_username=ü\nmlflow_tracking_password=p=q:r\n",
    ],
)
def test_the_file_is_read_as_mlflow_reads_it(file: Path, text: str) -> None:
    """With its section, comments and escapes."""
    file.write_text(text)
    assert read_file() == tuple(read_mlflow_creds())


@pytest.mark.parametrize("password", ["50%", "%", "a%b", "%(x)s", "%s"])
def test_a_single_percent_sign_is_taken_literally(file: Path, password: str) -> None:
    """MLflow itself fails to read such a file."""
    write_credentials(file, password=password)
    assert header() == basic("fu", password)


def test_without_a_home_there_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have no known home."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert header() is None


@pytest.mark.parametrize("text", ["no section", "[mlflow]\nsecret\n", "[mlflow]\na = secret\na = secret\n", None])
def test_a_broken_file_is_reported_without_its_content(
    file: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """It is an AuthError, so everything stays queued. The file is not read if the variables or the URI suffice."""
    if text is None:
        file.mkdir()
    else:
        file.write_text(text)
    with pytest.raises(AuthError, match=r"~/\.mlflow/credentials") as caught:
        header()
    assert "secret" not in str(caught.value) and not caught.value.retriable
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    assert header("http://u:p@host") == basic("u", "p")
    monkeypatch.setenv(USER, "vu")
    monkeypatch.setenv(PASSWORD, "vp")
    assert header() == basic("vu", "vp")


def test_a_file_without_read_permission_is_reported(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file exists, and would have been used."""
    write_credentials(file)

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(AuthError, match="PermissionError"):
        header()


def test_everything_stays_queued_until_an_unreadable_file_is_fixed(server: ScriptedServer, file: Path) -> None:
    """Nothing is sent meanwhile, and the next flush reads the file again."""
    file.write_text("no section")
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError, match="credentials"):
            client.flush()
        assert (server.count(), client.statistics().pending) == (0, 1)
        write_credentials(file)
        client.flush()
    (request,) = server.requests
    assert request.headers["authorization"] == basic("fu", "fp")


def test_the_file_is_read_again_after_a_401(server: ScriptedServer, file: Path) -> None:
    """Only then. The request is sent once more with the new credentials."""
    write_credentials(file)
    server.fail("", Fault.passed())
    server.fail(
        "", Fault.answer(401), when=lambda request: request.headers["authorization"] == basic("fu", "fp"), times=None
    )
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        client.flush()
        write_credentials(file, password="new")
        client.log_metric("r", "m", 2.0)
        client.flush()
        client.log_metric("r", "m", 3.0)
    old, new = basic("fu", "fp"), basic("fu", "new")
    assert [request.headers["authorization"] for request in server.requests] == [old, old, new, new]


# -- proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["httpx", "auto"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", [f"http://{HOST}:1", "socks5://nothing.invalid", "no:proxy:at:all"])
def test_proxies_of_the_environment_can_be_ignored(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: Any, variable: str, proxy: str
) -> None:
    """Also those that no request could be sent through."""
    monkeypatch.setenv(variable, proxy)
    with runqueue.Client(server.uri, proxies=False, transport=transport) as client:
        client.log_metric("r", "m", 1.0)
    (request,) = server.requests
    assert request.target == "/api/2.0/mlflow/runs/log-batch"


@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_proxies_of_the_environment_are_used_by_default(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: Any
) -> None:
    """The proxy in this test does not exist."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{free_port()}")
    with pytest.raises(StoreError, match="cannot connect"):
        call(server.uri, transport=transport)
    call(server.uri, transport=transport, proxies=False)
    assert server.count() == 1
