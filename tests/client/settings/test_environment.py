"""
MLflow's variables and its file of credentials: what each value means, which come first, and which are refused by name.
The retries' variables are tried on the engine, in virtual time.
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


def read(name: str) -> float | None:
    """What the settings make of the variable."""
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
def test_a_number_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str | None, value: float | None
) -> None:
    """An empty variable counts as one that is not set."""
    if text is not None:
        monkeypatch.setenv(name, text)
    assert read(name) == value


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
def test_a_bad_number_is_refused_at_once_by_name(
    monkeypatch: pytest.MonkeyPatch, face: Any, name: str, text: str
) -> None:
    """Without asking anybody."""
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError) as caught:
        face("http://127.0.0.1:1")
    assert name in str(caught.value) and len(str(caught.value)) < 300


def test_the_timeout_holds_for_each_request(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the error's text."""
    server.fail("", Fault.hold(), times=None)
    monkeypatch.setenv(TIMEOUT, "0.2")
    with pytest.raises(StoreError, match=r"0\.2 s"):
        call(server.uri)
    server.let_go()


# -- retries, in virtual time ----------------------------------------------------------------------------------------


def attempts(retry_after: float | None = None, **settings: Any) -> list[float]:
    """Virtual seconds from the first to each attempt for one batch, at a server that always says "later"."""

    async def main() -> list[float]:
        store = FakeStore(lambda _: StoreError("503", retriable=True, retry_after=retry_after), seconds=0)
        policy = RetryPolicy(**attrs.asdict(Config(**settings).retry_settings()))
        accumulator = Accumulator(encode)
        with anyio.fail_after(ETERNITY):
            async with Sender(accumulator, store, bounds=bounds(), max_workers=8, retry=policy) as sender:
                fill(accumulator.open("r", opened=True), points(1))
                report = await sender.flush()
        assert report.not_stored == 1 and not any(failure.final for failure in report.failures)
        return store.times()

    return anyio.run(main, backend_options={"loop_factory": VirtualTimeLoop})


def waits(times: list[float]) -> list[float]:
    """Seconds between each attempt and the next."""
    return [after - before for before, after in pairwise(times)]


@pytest.mark.parametrize("retries", [0, 1, 3, 12])
def test_max_retries_bounds_the_attempts_exactly(monkeypatch: pytest.MonkeyPatch, retries: int) -> None:
    """So many after the first one, however much time is left; what was not stored stays queued."""
    monkeypatch.setenv(RETRIES, str(retries))
    assert len(attempts(retry_timeout=100_000.0)) == retries + 1


def test_max_retries_does_not_lengthen_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever ends first holds; without the variable only the time does."""
    expected = [float(second) for second in range(11)]
    monkeypatch.setenv(FACTOR, "0")
    assert attempts(1.0, retry_timeout=10) == expected
    monkeypatch.setenv(RETRIES, "1000")
    assert attempts(1.0, retry_timeout=10) == expected


def test_max_retries_is_a_bound_for_each_flush(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the wire: two retries are three requests; the next flush after the outage sends the rest."""
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
    """The n-th is at most factor * 2**(n-1) seconds, 30 at most; and it is drawn, so not always the same."""
    monkeypatch.setenv(FACTOR, str(factor))
    monkeypatch.setenv(RETRIES, "14")
    found = waits(attempts(retry_timeout=100_000.0))
    assert len(found) == 14
    assert all(0 <= wait <= min(30, factor * 2**n) + 1e-6 for n, wait in enumerate(found))
    if factor:
        assert len(set(found)) > 7
        assert max(found) > factor * 2  # all 14 below it: a chance of 1 in billions


def test_the_jitter_is_added_to_the_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evenly, up to so many seconds; here to none, and to those that the server asked for."""
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
    """The file's path in a home of the test's own; it is not there yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    yield tmp_path / ".mlflow" / "credentials"


def write(file: Path, user: str | None = "fu", password: str | None = "fp", section: str = "mlflow") -> None:
    """As the documentation of MLflow shows it."""
    lines = [f"[{section}]"]
    lines += [f"mlflow_tracking_username = {user}"] if user is not None else []
    lines += [f"mlflow_tracking_password = {password}"] if password is not None else []
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


call = partial(store_calls.call, make=HttpStore)  # without plugins


def basic(user: str, password: str) -> str:
    """The header of a user and password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def header(uri: str = "http://host", token: str | None = None) -> str | None:
    """What is sent there."""
    return Credentials(uri, token).header()


@pytest.mark.parametrize("in_file", list(itertools.product([None, "", "fu"], [None, "", "fp"])))
@pytest.mark.parametrize("in_variables", list(itertools.product([None, "", "vu"], [None, "", "vp"])))
def test_user_and_password_come_from_where_mlflow_takes_them(
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    in_file: tuple[str | None, str | None],
    in_variables: tuple[str | None, str | None],
) -> None:
    """Each from its variable, else from the file; and a token where one of them is missing."""
    write(file, *in_file)
    for name, value in zip((USER, PASSWORD), in_variables, strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv(TOKEN, "t")
    user, password = read_mlflow_creds()
    assert header() == (basic(user, password) if user and password else "Bearer t")


def test_the_file_comes_last_and_still_before_a_token(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After user info in the URI, a token of the constructor's, and the variables."""
    assert header() is None
    monkeypatch.setenv(TOKEN, "t")
    assert header() == "Bearer t"
    write(file)
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
    """Section, comments, escapes and all."""
    file.write_text(text)
    assert read_file() == tuple(read_mlflow_creds())


@pytest.mark.parametrize("password", ["50%", "%", "a%b", "%(x)s", "%s"])
def test_a_single_percent_sign_is_one(file: Path, password: str) -> None:
    """MLflow itself fails at it; here the password counts as it stands."""
    write(file, password=password)
    assert header() == basic("fu", password)


def test_no_home_is_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have none that is known."""
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert header() is None


@pytest.mark.parametrize("text", ["no section", "[mlflow]\nsecret\n", "[mlflow]\na = secret\na = secret\n", None])
def test_a_file_that_cannot_be_read_is_said_without_its_content(
    file: Path, monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    """An error of the credentials: nothing is lost. It does not matter where the variables or the URI suffice."""
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


def test_a_file_that_may_not_be_opened_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there, and would have been used."""
    write(file)

    def closed(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", closed)
    with pytest.raises(AuthError, match="PermissionError"):
        header()


def test_an_unreadable_file_leaves_all_queued_until_it_is_mended(server: ScriptedServer, file: Path) -> None:
    """Nothing is sent meanwhile; the next flush reads it again."""
    file.write_text("no section")
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError, match="credentials"):
            client.flush()
        assert (server.count(), client.statistics().pending) == (0, 1)
        write(file)
        client.flush()
    (request,) = server.requests
    assert request.headers["authorization"] == basic("fu", "fp")


def test_the_file_is_read_again_after_a_401(server: ScriptedServer, file: Path) -> None:
    """And only then: the request is sent once more, with what it holds now."""
    write(file)
    server.fail("", Fault.passed())
    server.fail(
        "", Fault.answer(401), when=lambda request: request.headers["authorization"] == basic("fu", "fp"), times=None
    )
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        client.flush()
        write(file, password="new")
        client.log_metric("r", "m", 2.0)
        client.flush()
        client.log_metric("r", "m", 3.0)
    old, new = basic("fu", "fp"), basic("fu", "new")
    assert [request.headers["authorization"] for request in server.requests] == [old, old, new, new]


# -- proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["httpx", "auto"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize("proxy", [f"http://{HOST}:1", "socks5://nothing.invalid", "no:proxy:at:all"])
def test_proxies_of_the_environment_can_be_passed_over(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: Any, variable: str, proxy: str
) -> None:
    """Also those that no request could be sent by."""
    monkeypatch.setenv(variable, proxy)
    with runqueue.Client(server.uri, proxies=False, transport=transport) as client:
        client.log_metric("r", "m", 1.0)
    (request,) = server.requests
    assert request.target == "/api/2.0/mlflow/runs/log-batch"


@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_proxies_of_the_environment_count_where_nothing_else_is_said(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: Any
) -> None:
    """Here one that is not there."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{free_port()}")
    with pytest.raises(StoreError, match="cannot connect"):
        call(server.uri, transport=transport)
    call(server.uri, transport=transport, proxies=False)
    assert server.count() == 1
