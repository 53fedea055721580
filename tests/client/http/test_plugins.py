"""
What plugins of mlflow's add to a request's headers, and its workspace: as it arrives at a server, through httpx and
through aiohttp. The ways of authentication are in `test_request_auth.py`.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest
from mlflow.tracking.request_header import registry
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider
from mlflow.utils.workspace_context import WorkspaceContext, set_workspace

import runqueue
from runqueue.errors import AuthError, ConfigError, StoreError
from runqueue.http import _plugins
from runqueue.settings._config import Config
from runqueue.stores._protocol import Traffic
from runqueue.stores._resolve import make_store
from runqueue.stores._rest import HttpStore
from support.mlflow_server import clean_environment
from support.proxy import Fault, ScriptedServer
from support.store_calls import call
from support.toy_plugin import install

SECRET = "s3cret-word"
BOTH = pytest.mark.parametrize("transport", ["httpx", "auto"])

Register: TypeAlias = Callable[[Callable[[], dict[Any, Any]]], None]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Register:
    """Registers a provider with the mlflow that is imported; a later one is asked later."""

    def one(give: Callable[[], dict[Any, Any]]) -> None:
        class Provider(RequestHeaderProvider):
            def in_context(self) -> bool:
                return True

            def request_headers(self) -> dict[Any, Any]:
                return give()

        kept = registry._request_header_provider_registry
        monkeypatch.setattr(kept, "_registry", [*kept._registry, Provider()])

    return one


def sent(server: ScriptedServer, **settings: Any) -> dict[str, str]:
    """The headers of one call."""
    call(server.uri, **settings)
    return server.requests[-1].headers


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Ours."""
    return [record.getMessage() for record in caplog.records if record.name == "runqueue"]


# -- none ------------------------------------------------------------------------------------------------------------

PLAIN = """
import sys, runqueue
with runqueue.Client(sys.argv[1]) as client:
    client.log_metric("r", "m", 1.0)
print(*(name for name in ("mlflow", "requests") if name in sys.modules))
"""


def run(script: str, *arguments: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a process of its own."""
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    return done


def test_without_plugins_mlflow_is_not_imported(server: ScriptedServer, tmp_path: Path) -> None:
    """Nor requests, which only plugins need."""
    done = run(PLAIN, server.uri, environment=clean_environment() | {"HOME": str(tmp_path)})
    assert done.stdout.split() == []
    assert server.count("runs/log-batch") == 1


def test_mlflows_own_providers_are_no_plugins(server: ScriptedServer) -> None:
    """They are registered in this process; nothing of theirs is sent, and nobody is asked."""
    assert list(registry._request_header_provider_registry)
    assert _plugins.header_plugins() == []
    store = make_store(Config(), server.uri, Traffic())
    assert isinstance(store, HttpStore)
    assert [type(signer).__name__ for signer in store._signers] == ["Credentials", "Workspace"]
    anyio.run(store.aclose)


# -- headers ---------------------------------------------------------------------------------------------------------


@BOTH
def test_what_a_registered_provider_gives_is_sent(server: ScriptedServer, register: Register, transport: str) -> None:
    """Asked again for every request; beside what is sent anyway."""
    turns = iter("123")
    register(lambda: {"X-Turn": next(turns)})
    call(server.uri, times=3, transport=transport)
    assert [request.headers["x-turn"] for request in server.requests] == ["1", "2", "3"]
    assert server.requests[0].headers["content-type"] == "application/json"
    assert "x-mlflow-client-version" not in server.requests[0].headers


def test_values_of_one_header_are_joined_as_mlflow_does(server: ScriptedServer, register: Register) -> None:
    """In the order in which the providers were registered."""
    register(lambda: {"X-Team": "vision"})
    register(lambda: {"X-Team": "nightly"})
    assert sent(server)["x-team"] == "vision nightly"


@BOTH
def test_the_user_agent_stays_ours_and_plugins_extend_it(
    server: ScriptedServer, register: Register, transport: str
) -> None:
    """MLflow's own says mlflow-python-client, which we are not."""
    register(lambda: {"X-Team": "vision"})
    plain = sent(server, transport=transport)["user-agent"]
    assert plain.startswith("runqueue/") and "mlflow" not in plain
    register(lambda: {"User-Agent": "team/2.0"})
    assert sent(server, transport=transport)["user-agent"] == f"{plain} team/2.0"
    register(lambda: {"user-agent": "other/3"})
    assert sent(server, transport=transport)["user-agent"] == f"{plain} team/2.0 other/3"
    assert sent(server, transport=transport, headers={"User-Agent": "mine"})["user-agent"] == "mine"


@BOTH
def test_what_is_sent_already_wins(server: ScriptedServer, register: Register, transport: str) -> None:
    """The constructor's headers, those of the body, the credentials; whatever the capitals."""
    register(
        lambda: {
            "x-team": "plugin's",
            "content-type": "text/plain",
            "Accept-Encoding": "br",
            "Content-Length": "1",
            "authorization": "Bearer plugin's",
        }
    )
    headers = sent(server, transport=transport, headers={"X-Team": "mine"}, token="mine")
    assert headers["x-team"] == "mine"
    assert headers["content-type"] == "application/json"
    assert headers["accept-encoding"] == "identity"
    assert headers["content-length"] == "2"
    assert headers["authorization"] == "Bearer mine"


def test_an_authorization_of_a_plugins_counts_where_there_are_no_credentials(
    server: ScriptedServer, register: Register, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also before ~/.netrc, which comes last; and a server that echoes it is not quoted with it."""
    (tmp_path / "netrc").write_text("default login u password p\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    register(lambda: {"authorization": f"Custom {SECRET}"})
    assert sent(server)["authorization"] == f"Custom {SECRET}"
    server.fail("", Fault.answer(400, {"error_code": "X", "message": f"what is {SECRET}?"}))
    with pytest.raises(StoreError, match=r"what is \*\*\*\?"):
        call(server.uri)


def test_what_no_header_can_hold_is_left_out_with_one_warning(
    server: ScriptedServer, register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    """The rest is sent, and nothing is lost. None means "no header", as it does to requests."""
    bad = {"X-Line": f"{SECRET}\r\nX-Evil: 1", "X Blank": "x", "X-Snow": "\N{SNOWMAN}", "X-Number": 1, 5: "x"}
    register(lambda: {**bad, "X-None": None, "X-Bytes": b"b", "X-Team": " vision "})
    call(server.uri, times=3)
    for request in server.requests:
        assert request.headers["x-team"] == "vision" and request.headers["x-bytes"] == "b"
        assert not {"x-line", "x blank", "x-snow", "x-number", "x-evil", "x-none"} & set(request.headers)
    told = warnings(caplog)
    assert len(told) == len(bad) and all(repr(name) in text for name, text in zip(bad, told, strict=True))
    assert SECRET not in caplog.text


# -- providers that fail ---------------------------------------------------------------------------------------------


def test_a_provider_that_fails_costs_only_its_header(server: ScriptedServer, register: Register) -> None:
    """MLflow says so in its log and goes on, and so does the request."""

    def fail() -> dict[Any, Any]:
        raise ValueError("no")

    register(fail)
    register(lambda: {"X-Team": "vision"})
    assert sent(server)["x-team"] == "vision"


def test_a_provider_that_would_end_the_process_ends_one_flush(server: ScriptedServer, register: Register) -> None:
    """Its words are not shown; everything stays queued."""
    answers: list[BaseException | None] = [SystemExit(SECRET), None]

    def give() -> dict[Any, Any]:
        error = answers.pop(0)
        if error is not None:
            raise error
        return {"X-Team": "vision"}

    register(give)
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError, match="request headers raised SystemExit") as caught:
            client.flush()
        (left,) = caught.value.failures
        assert isinstance(left.error, AuthError) and not left.final
        assert SECRET not in str(caught.value)
        client.flush()
    assert [request.headers["x-team"] for request in server.requests] == ["vision"]


def test_a_provider_that_never_answers_holds_to_the_deadline(server: ScriptedServer, register: Register) -> None:
    """It is asked in a worker thread; nothing was sent, so the request is tried again."""
    go_on = threading.Event()

    def wait() -> dict[Any, Any]:
        go_on.wait(20)
        return {}

    register(wait)
    try:
        with pytest.raises(StoreError, match=r"no credentials to be had within 0\.2 s") as caught:
            call(server.uri, request_timeout=0.2)
        assert caught.value.retriable and not caught.value.ambiguous
        assert server.count() == 0
    finally:
        go_on.set()


def test_plugins_without_mlflow_are_said_to_be_left_out(
    server: ScriptedServer, register: Register, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's own client would not run there at all."""
    import importlib.util

    register(lambda: {"X-Team": "vision"})
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    assert "x-team" not in sent(server, transport="httpx")
    (text,) = warnings(caplog)
    assert "Provider" in text and "mlflow is not installed" in text


# -- workspaces ------------------------------------------------------------------------------------------------------


@BOTH
def test_the_workspace_of_the_environment_is_sent(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """As MLflow sends it; the constructor's headers win."""
    assert "x-mlflow-workspace" not in sent(server, transport=transport)
    monkeypatch.setenv("MLFLOW_WORKSPACE", " team-a ")
    assert sent(server, transport=transport)["x-mlflow-workspace"] == "team-a"
    mine = {"x-mlflow-workspace": "mine"}
    assert sent(server, transport=transport, headers=mine)["x-mlflow-workspace"] == "mine"


def test_a_workspace_that_is_set_later_is_taken_over(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `mlflow.set_workspace`, when the client stands already."""
    monkeypatch.delenv("MLFLOW_WORKSPACE", raising=False)
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        client.flush()
        try:
            set_workspace("team-b")
            client.log_metric("r", "m", 2.0)
            client.flush()
        finally:
            set_workspace(None)
    assert [request.headers.get("x-mlflow-workspace") for request in server.requests] == [None, "team-b"]


def test_a_client_stays_in_the_workspace_that_it_was_made_in(server: ScriptedServer) -> None:
    """What is queued there is sent there, also after MLflow's context was left."""
    with WorkspaceContext("team-c"):
        client = runqueue.Client(server.uri)
        client.log_metric("r", "m", 1.0)
    client.close()
    assert server.requests[0].headers["x-mlflow-workspace"] == "team-c"


def test_a_workspace_that_no_header_can_hold_is_refused(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once; where it comes later, nothing is sent: without it the runs would be stored elsewhere."""
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        monkeypatch.setenv("MLFLOW_WORKSPACE", "t\u00e9am")
        with pytest.raises(ConfigError, match="MLFLOW_WORKSPACE"):
            runqueue.Client(server.uri)
        with pytest.raises(runqueue.FlushError, match="MLFLOW_WORKSPACE"):
            client.flush()
        assert server.count() == 0
        monkeypatch.delenv("MLFLOW_WORKSPACE")
    assert server.count() == 1


# -- installed -------------------------------------------------------------------------------------------------------

INSTALLED = """
import json, sys, runqueue
with runqueue.Client(sys.argv[1]) as client:
    early = "mlflow" in sys.modules
    for run in "abc":
        client.log_metric(run, "m", 1.0)
print(json.dumps({"early": early, "stored": client.statistics().stored}))
"""


def test_an_installed_plugin_is_found_by_its_entry_points(server: ScriptedServer, tmp_path: Path) -> None:
    """Both kinds in one distribution; mlflow is imported when the first request is made, and not before."""
    environment = install(tmp_path) | {"MLFLOW_TRACKING_AUTH": "toy", "MLFLOW_TRACKING_TOKEN": SECRET}
    done = run(INSTALLED, server.uri, environment=environment)
    assert json.loads(done.stdout) == {"early": False, "stored": 3}
    assert len(server.requests) == 3
    for request in server.requests:
        assert request.headers["x-toy-team"] == "vision"
        assert request.headers["user-agent"].startswith("runqueue/")
        assert request.headers["user-agent"].endswith(" toy/1.0")
        assert request.headers["authorization"] == signature(request.body)


def test_what_is_installed_is_looked_at_once_a_process(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Autologging makes a client for each fit, and the look takes longer than the rest of it; a new path counts."""
    looks: list[object] = []
    look = importlib.metadata.entry_points

    def noted(**words: Any) -> Any:
        looks.append(words)
        return look(**words)

    monkeypatch.setattr(importlib.metadata, "entry_points", noted)
    _plugins._installed.cache_clear()
    for _ in range(2):
        with runqueue.Client(server.uri) as client:
            client.log_metric("a" * 32, "m", 1.0)
    assert (len(server.requests), len(looks)) == (2, 1)
    install(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [_plugins.header_plugins() for _ in range(2)] == [["toy"], ["toy"]]
    assert len(looks) == 2


def signature(body: bytes) -> str:
    """What the toy's way of authentication makes of a body."""
    import hashlib

    return f"Toy {hashlib.sha256(body).hexdigest()}"


def test_an_installed_plugin_without_the_variable_adds_headers_only(server: ScriptedServer, tmp_path: Path) -> None:
    """The credentials are then those of the variables."""
    environment = install(tmp_path) | {"MLFLOW_TRACKING_TOKEN": SECRET}
    run(INSTALLED, server.uri, environment=environment)
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {SECRET}"}
    assert {request.headers["x-toy-team"] for request in server.requests} == {"vision"}


def test_the_level_of_debugging_shows_no_secret(
    server: ScriptedServer, register: Register, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in logs, nor in the signers' own words."""
    caplog.set_level(logging.DEBUG)
    register(lambda: {"X-Api-Key": SECRET})
    store = make_store(Config(), server.uri, Traffic())
    assert isinstance(store, HttpStore)
    assert SECRET not in repr(store._signers)
    anyio.run(store.aclose)
    assert sent(server)["x-api-key"] == SECRET
    assert SECRET not in caplog.text
