"""The file of requests, ~/.netrc: the last place where credentials are looked for, as MLflow's own client does it."""

from __future__ import annotations

import base64
import logging
from pathlib import Path
from typing import Any

import anyio
import pytest
from requests.utils import get_netrc_auth

import runqueue
from runqueue.errors import StoreError
from runqueue.http._credentials import Credentials
from runqueue.settings._config import Config
from runqueue.stores._protocol import LOG_BATCH, Traffic
from runqueue.stores._rest import HttpStore
from support.mlflow_server import HOST
from support.proxy import Fault, ScriptedServer

SECRET = "s3cret-word"
HERE = f"machine {HOST} login nu password {SECRET}\n"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file's path in a home of the test's own; it is not there yet."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("NETRC", raising=False)
    return tmp_path / ".netrc"


def basic(user: str, password: str) -> str:
    """The header of a user and password."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def header(uri: str = f"http://{HOST}:5000", token: str | None = None) -> str | None:
    """What is sent there."""
    return Credentials(uri, token).header()


def call(uri: str, **settings: Any) -> None:
    """One call of one store."""

    async def main() -> None:
        store = HttpStore(Config(**settings), uri, Traffic())
        try:
            await store.call(LOG_BATCH, b"{}")
        finally:
            await store.aclose()

    anyio.run(main)


# -- what is taken ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        HERE,
        "machine other.invalid login u password p\n",
        "default login du password dp\n",
        f"machine other.invalid login u password p\n{HERE}default login du password dp\n",
        f"machine {HOST}\n  login nu\n  password 'p w'\n",
        f'machine {HOST} login nu password "p w"\n',
        f"machine {HOST} login nu\n",
        f"machine {HOST} password p\n",
        f"machine {HOST} account a password p\n",
        f"# words\nmachine {HOST} login nu password p#q\n",
    ],
)
def test_the_file_is_read_as_requests_reads_it(file: Path, text: str) -> None:
    """Hosts, defaults, quotes and all."""
    file.write_text(text)
    found = get_netrc_auth(f"http://{HOST}:5000/x")
    assert header() == (None if found is None else basic(*found))


@pytest.mark.parametrize("name", [".netrc", "_netrc"])
def test_both_names_of_the_file_are_known(file: Path, name: str) -> None:
    """In the user's home."""
    file.with_name(name).write_text(HERE)
    assert header() == basic("nu", SECRET)


def test_a_variable_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And then it alone; a name of nothing switches the file off."""
    file.write_text(HERE)
    other = file.with_name("other")
    other.write_text("default login other password p\n")
    monkeypatch.setenv("NETRC", "~/other")
    assert header() == basic("other", "p")
    monkeypatch.setenv("NETRC", str(file.with_name("missing")))
    assert header() is None
    monkeypatch.setenv("NETRC", "")
    assert header() is None


def test_the_file_comes_last(file: Path, monkeypatch: pytest.MonkeyPatch, server: ScriptedServer) -> None:
    """After the URI, the constructor, the variables, MLflow's file, and a header of the constructor's."""
    file.write_text(HERE)
    assert header("http://u:p@127.0.0.1") == basic("u", "p")
    assert header(token="t") == "Bearer t"
    call(server.uri, headers={"authorization": "mine"})
    assert server.requests[0].headers["authorization"] == "mine"
    mlflows = file.with_name(".mlflow")
    mlflows.mkdir()
    (mlflows / "credentials").write_text("[mlflow]\nmlflow_tracking_username=fu\nmlflow_tracking_password=fp\n")
    assert header() == basic("fu", "fp")
    (mlflows / "credentials").unlink()
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "v")
    assert header() == "Bearer v"


def test_the_file_is_read_again_after_a_401(server: ScriptedServer, file: Path) -> None:
    """And only then."""
    file.write_text(HERE)
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        client.flush()
        file.write_text(HERE.replace(SECRET, "new"))
        client.log_metric("r", "m", 2.0)
        client.flush()
        server.fail("", Fault.answer(401))
        client.log_metric("r", "m", 3.0)
    old, new = basic("nu", SECRET), basic("nu", "new")
    assert [request.headers["authorization"] for request in server.requests] == [old, old, old, new]


# -- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [f"{SECRET} x\n", f"machine {HOST} login u {SECRET}\n", b"\xff\xfe\x00", None])
def test_a_file_that_cannot_be_read_is_said_once_and_not_used(
    server: ScriptedServer, file: Path, caplog: pytest.LogCaptureFixture, text: str | bytes | None
) -> None:
    """Without its content. Requests passes over it in silence; the request goes on, as there."""
    if text is None:
        file.mkdir()
    elif isinstance(text, bytes):
        file.write_bytes(text)
    else:
        file.write_text(text)
    caplog.set_level(logging.DEBUG)
    server.fail("", Fault.answer(401), times=2)
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError):
            client.flush()
        client.flush()
    assert all("authorization" not in request.headers for request in server.requests)
    told = [record.getMessage() for record in caplog.records if record.name == "runqueue"]
    assert len([text for text in told if "~/.netrc is not used" in text]) == 1
    assert SECRET not in caplog.text


def test_what_a_server_echoes_of_it_is_not_shown(server: ScriptedServer, file: Path) -> None:
    """Neither the password nor the header."""
    file.write_text(HERE)
    page = f"{SECRET} and {basic('nu', SECRET)}"
    server.fail("", Fault.answer(400, {"error_code": "X", "message": page}))
    with pytest.raises(StoreError) as caught:
        call(server.uri)
    assert SECRET not in str(caught.value) and basic("nu", SECRET)[6:] not in str(caught.value)


def test_a_user_whose_home_is_closed_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container under another user."""
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    assert header() is None
