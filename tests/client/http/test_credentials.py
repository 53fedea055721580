"""
What a request authenticates itself with, and that nobody sees it: not in errors, reprs, logs, pickles, nor in the frame
locals of a raised error, which error trackers upload.
"""

from __future__ import annotations

import base64
import logging
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import anyio
import httpx
import pytest

import runqueue
from runqueue.errors import AuthError, StoreError
from runqueue.http._credentials import Credentials
from runqueue.http._signing import Outgoing
from runqueue.settings._config import Config
from runqueue.stores._protocol import LOG_BATCH, Traffic
from runqueue.stores._rest import HttpStore
from support.mlflow_server import HOST, free_port
from support.proxy import Fault, ScriptedServer

SECRET = "s3cret"
ENCODED = base64.b64encode(f"user:{SECRET}".encode()).decode()


def basic(user: str, password: str) -> str:
    """The header of a user and password (RFC 7617)."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def call(uri: str, times: int = 1, **settings: Any) -> None:
    """So many calls to one store."""

    async def main() -> None:
        store = HttpStore(Config(**settings), uri, Traffic())
        try:
            for _ in range(times):
                await store.call(LOG_BATCH, b"{}")
        finally:
            await store.aclose()

    anyio.run(main)


def failure(uri: str, **settings: Any) -> StoreError:
    """The error of one call."""
    with pytest.raises(StoreError) as caught:
        call(uri, **settings)
    return caught.value


def with_user(uri: str, user_info: str = f"user:{SECRET}") -> str:
    """The URI with user info in it."""
    return uri.replace("://", f"://{user_info}@")


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it is said to come from."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def frames(traceback: TracebackType | None) -> Iterator[dict[str, Any]]:
    """The locals of every frame but those of the tests."""
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename != __file__:
            yield traceback.tb_frame.f_locals
        traceback = traceback.tb_next


def assert_redacted(error: BaseException) -> None:
    """The secret is nowhere in the error, its causes, its pickle, or the locals of the frames it came through."""
    for each in chain(error):
        for text in (str(each), repr(each), repr(each.__dict__), repr(each.args)):
            assert SECRET not in text and ENCODED not in text, text
        for names in frames(each.__traceback__):
            for name, value in names.items():
                text = repr(value)
                assert SECRET not in text and ENCODED not in text, f"{name} = {text}"
    pickled = pickle.dumps(error)
    assert SECRET.encode() not in pickled and ENCODED.encode() not in pickled


# -- which -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["httpx", "auto"])
@pytest.mark.parametrize(
    ("user_info", "header"),
    [
        ("user:pw", basic("user", "pw")),
        ("us%40er:p%3Aw%2F", basic("us@er", "p:w/")),
        ("user:%C3%BC", basic("user", "ü")),
        ("user", basic("user", "")),
        ("user:", basic("user", "")),
    ],
)
def test_user_info_moves_from_the_uri_to_the_header(
    server: ScriptedServer, transport: str, user_info: str, header: str
) -> None:
    """Unescaped; the request line and the Host header have none of it."""
    call(with_user(server.uri, user_info), transport=transport)
    (request,) = server.requests
    assert request.headers["authorization"] == header
    assert "@" not in request.target and "@" not in request.headers["host"]


@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_a_token_is_a_bearer_token(server: ScriptedServer, transport: str) -> None:
    """Given as text, or by a callable that is asked once."""
    asked: list[int] = []

    def token() -> str:
        asked.append(1)
        return "from a callable"

    call(server.uri, token="text", transport=transport)
    call(server.uri, token=token, times=3, transport=transport)
    assert [request.headers["authorization"] for request in server.requests] == [
        "Bearer text",
        *["Bearer from a callable"] * 3,
    ]
    assert len(asked) == 1


def test_the_uri_comes_before_the_constructor_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """And in each place a user and password before a token."""
    bare, full = "http://host", "http://u:p@host"
    assert Credentials(bare, None).header() is None
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "env")
    assert Credentials(bare, None).header() == "Bearer env"
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "eu")
    assert Credentials(bare, None).header() == "Bearer env"
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "ep")
    assert Credentials(bare, None).header() == basic("eu", "ep")
    assert Credentials(bare, "given").header() == "Bearer given"
    assert Credentials(full, None).header() == basic("u", "p")


def test_an_environment_that_changes_is_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is renewed in a run is found at the next request."""
    credentials = Credentials("http://host", None)
    for token in ("first", "second"):
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", token)
        assert credentials.header() == f"Bearer {token}"
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
    assert credentials.header() is None


# -- 401 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_a_401_is_answered_once_with_a_fresh_token(server: ScriptedServer, transport: str) -> None:
    """The callable is asked again, and what it gives is kept for later calls."""
    tokens = iter(["old", "new", "never"])
    server.fail("", Fault.answer(401), when=lambda request: request.headers["authorization"] == "Bearer old")
    call(server.uri, token=lambda: next(tokens), times=2, transport=transport)
    assert [request.headers["authorization"] for request in server.requests] == [
        "Bearer old",
        "Bearer new",
        "Bearer new",
    ]


@pytest.mark.parametrize("settings", [{}, {"token": SECRET}, {"token": lambda: SECRET}])
def test_a_401_that_stays_is_an_auth_error(server: ScriptedServer, settings: dict[str, Any]) -> None:
    """After two requests at most; what the server says is in the text."""
    server.fail("", Fault.answer(401, {"error_code": "UNAUTHENTICATED", "message": "go away"}), times=None)
    error = failure(server.uri, **settings)
    assert type(error) is AuthError and "go away" in str(error)
    assert not error.retriable
    assert server.count() <= 2


def test_a_401_ends_the_flush_and_loses_nothing(server: ScriptedServer) -> None:
    """Entries stay queued; with credentials that suffice the next flush stores them."""
    tokens = iter(["bad", "bad", "good"])
    server.fail(
        "", Fault.answer(401), when=lambda request: request.headers["authorization"] != "Bearer good", times=None
    )
    with runqueue.Client(server.uri, token=lambda: next(tokens)) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
        (left,) = caught.value.failures
        assert isinstance(left.error, AuthError) and not left.final
        assert client.statistics().pending == 1
        client.flush()
        assert client.statistics().stored == 1


def test_a_token_callable_that_fails_loses_nothing(server: ScriptedServer) -> None:
    """The provider of tokens has outages too; its words may hold secrets and are not shown."""
    answers: list[Callable[[], str]] = [_raise, lambda: "good"]
    with runqueue.Client(server.uri, token=lambda: answers.pop(0)(), retry_timeout=0) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
        (left,) = caught.value.failures
        assert not left.final
        assert "token" in str(left.error) and SECRET not in str(caught.value)
        client.flush()
        assert client.statistics().stored == 1


def _raise() -> str:
    raise RuntimeError(f"no token for {SECRET}")


# -- never shown -----------------------------------------------------------------------------------------------------

FAULTS: dict[str, Fault] = {
    "page": Fault.answer(200, "<html>"),
    "401": Fault.answer(401, {"error_code": "X", "message": "no"}),
    "400": Fault.answer(400, {"error_code": "X", "message": "no"}),
    "503": Fault.answer(503),
    "too large": Fault.answer(200, b" " * 1_000_001),
    "coding": Fault.answer(200, b"{}", {"Content-Encoding": "br"}),
    "broken coding": Fault.answer(200, b"{}", {"Content-Encoding": "gzip"}),
    "cut": Fault.cut_before_commit(),
    "cut body": Fault.answer(200, {"a": "b"}, cut_at=3),
    "other origin": Fault.answer(307, b"", {"Location": "http://other.invalid/"}),
    "nowhere": Fault.answer(307),
    "GET": Fault.answer(302, b"", {"Location": "/login"}),
    "loop": Fault.answer(307, b"", {"Location": "/loop"}),
}


@pytest.mark.parametrize("transport", ["httpx", "auto"])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("place", ["uri", "token", "headers", "environment"])
def test_no_error_and_no_frame_of_it_holds_the_secret(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: str, fault: Fault, place: str
) -> None:
    """Wherever the credentials come from, and whatever goes wrong."""
    server.fail("", fault, times=None)
    settings: dict[str, Any] = {"transport": transport}
    uri = with_user(server.uri) if place == "uri" else server.uri
    if place == "token":
        settings["token"] = SECRET
    elif place == "headers":
        settings["headers"] = {"X-Api-Key": SECRET}
    elif place == "environment":
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    assert_redacted(failure(uri, **settings))
    assert any(SECRET in text or ENCODED in text for text in server.requests[0].headers.values())


@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_no_error_of_a_connection_holds_the_secret(transport: str) -> None:
    """Refused, unknown, or too slow."""
    for uri in (f"http://{HOST}:{free_port()}", "http://nothing.invalid"):
        assert_redacted(failure(with_user(uri), transport=transport, headers={"X-Api-Key": SECRET}))
    with socket.create_server((HOST, 0)) as silent:
        uri = f"http://{HOST}:{silent.getsockname()[1]}"
        assert_redacted(failure(with_user(uri), transport=transport, request_timeout=0.1))


BAD_TOKENS = [f"{SECRET}\r\nX-Evil: 1", f"{SECRET}\0", f"{SECRET}\N{SNOWMAN}"]


@pytest.mark.parametrize("token", BAD_TOKENS)
def test_a_token_that_no_header_can_hold_is_refused_at_once(token: str) -> None:
    """As every bad value of the constructor, and without showing it."""
    with pytest.raises(runqueue.ConfigError) as caught:
        runqueue.Client("http://127.0.0.1:1", token=token)
    assert "token" in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["bad name", "", "X-Ü", "X:", "X\n"])
def test_a_header_whose_name_is_none_is_refused_at_once(name: str) -> None:
    """It is named; its value is not."""
    with pytest.raises(runqueue.ConfigError) as caught:
        runqueue.Client("http://127.0.0.1:1", headers={name: SECRET})
    assert "headers" in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize("value", BAD_TOKENS)
def test_a_header_whose_value_is_none_is_refused_at_once(value: str) -> None:
    """Its name is in the text, its value is not."""
    with pytest.raises(runqueue.ConfigError) as caught:
        runqueue.Client("http://127.0.0.1:1", headers={"X-Api-Key": value})
    assert "X-Api-Key" in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize("transport", ["httpx", "auto"])
@pytest.mark.parametrize("token", BAD_TOKENS)
def test_a_callables_token_that_no_header_can_hold_is_not_shown(
    server: ScriptedServer, transport: str, token: str
) -> None:
    """Nothing is sent with it, and it is not retried: the same token would be refused again."""
    error = failure(server.uri, token=lambda: token, transport=transport)
    assert_redacted(error)
    assert not error.retriable
    assert server.count() == 0


@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_the_line_break_of_a_tokens_file_is_no_part_of_it(server: ScriptedServer, transport: str) -> None:
    """What is read from a file ends with one easily."""
    call(server.uri, token=lambda: f"{SECRET}\n", transport=transport)
    assert server.requests[0].headers["authorization"] == f"Bearer {SECRET}"


@pytest.mark.parametrize("face", [runqueue.Client, runqueue.AsyncClient])
def test_no_repr_and_no_log_holds_the_secret(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, face: type[runqueue.Client | runqueue.AsyncClient]
) -> None:
    """Of clients, settings, stores, credentials; nor what the logger says, or any other at the level of debugging."""
    uri = with_user(server.uri)
    caplog.set_level(logging.DEBUG)
    config = Config(tracking_uri=uri, token=SECRET, headers={"X-Api-Key": SECRET})
    store = HttpStore(config, uri, Traffic())
    client = face(uri, token=SECRET, headers={"X-Api-Key": SECRET})
    shown = [repr(each) for each in (config, store, Credentials(uri, SECRET), client, client._engine)]
    shown += [client.tracking_uri, str(config)]
    assert [text for text in shown if SECRET in text] == []
    assert "***" in repr(config) and "***" in client.tracking_uri
    anyio.run(store.aclose)
    server.fail("", Fault.answer(500), times=1)
    with runqueue.Client(uri, token=SECRET, retry_timeout=5) as syncing:
        syncing.log_metric("r", "m", 1.0)
    assert server.count() >= 1
    assert SECRET not in caplog.text and ENCODED not in caplog.text


def test_what_a_server_echoes_is_not_shown(server: ScriptedServer) -> None:
    """Debug pages of proxies print the request's headers."""
    page = f"<html>You sent: Authorization: Bearer {SECRET} and {basic('user', SECRET)}</html>"
    server.fail("", Fault.answer(502, page), times=None)
    assert_redacted(failure(server.uri, token=SECRET))
    assert_redacted(failure(with_user(server.uri)))
    server.fail("", Fault.answer(400, {"error_code": "X", "message": page}), times=None)
    assert_redacted(failure(server.uri, headers={"X-Api-Key": SECRET}))


# -- proxies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["httpx", "auto"])
@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_used(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: str, variable: str
) -> None:
    """With its own credentials, which the target never sees."""
    if variable == "HTTP_PROXY" and "REQUEST_METHOD" in os.environ:
        pytest.skip("in a CGI environment")
    monkeypatch.setenv(variable, with_user(server.uri, "pu:pp"))
    call("http://nothing.invalid:8080", token="t", transport=transport)
    (request,) = server.requests
    assert request.target == "http://nothing.invalid:8080/api/2.0/mlflow/runs/log-batch"
    assert request.headers["host"] == "nothing.invalid:8080"
    assert request.headers["authorization"] == "Bearer t"
    assert request.headers["proxy-authorization"] == basic("pu", "pp")


@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_no_proxy_names_hosts_that_are_reached_directly(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """As every other client reads it."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{free_port()}")
    monkeypatch.setenv("NO_PROXY", HOST)
    call(server.uri, transport=transport)
    assert server.requests[0].target.startswith("/api/")


@pytest.mark.parametrize("transport", ["httpx", "auto"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses_or_is_not_there_is_named_without_its_password(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, transport: str, scheme: str
) -> None:
    """Neither can have stored anything where the proxy could not be reached."""
    server.fail("", Fault.answer(407), times=None)
    monkeypatch.setenv(f"{scheme}_proxy", with_user(server.uri))
    assert_redacted(failure(f"{scheme}://nothing.invalid", transport=transport))
    monkeypatch.setenv(f"{scheme}_proxy", with_user(f"http://{HOST}:{free_port()}"))
    error = failure(f"{scheme}://nothing.invalid", transport=transport)
    assert_redacted(error)
    assert (error.retriable, error.ambiguous) == (True, False)


def test_a_token_that_takes_its_time_holds_up_nobody_else(server: ScriptedServer) -> None:
    """It is asked for in a worker thread: deadlines hold meanwhile, and what is queued stays queued."""
    asked, go_on = threading.Event(), threading.Event()

    def token() -> str:
        asked.set()
        go_on.wait(20)
        return SECRET

    client = runqueue.Client(server.uri, token=token)
    try:
        client.log_metric("a" * 32, "m", 1.0)
        begin = time.monotonic()
        with pytest.raises(runqueue.FlushError, match="1 of them are still queued"):
            client.flush(timeout=0.2)
        assert time.monotonic() - begin < 5
        assert asked.is_set()
        go_on.set()
        client.flush()
        assert client.statistics().stored == 1
    finally:
        go_on.set()
        client.close()


def test_a_token_that_never_comes_is_said_to_be_what_is_missing(server: ScriptedServer) -> None:
    """Within the time of a request, and without a request."""
    go_on = threading.Event()

    def token() -> str:
        go_on.wait(20)
        return SECRET

    try:
        error = failure(server.uri, token=token, request_timeout=0.2)
        assert "no credentials to be had within 0.2 s" in str(error)
        assert error.retriable and not error.ambiguous
        assert server.count() == 0
    finally:
        go_on.set()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_token_that_takes_its_time_is_asked_for_once(backend: str) -> None:
    """Whoever comes meanwhile waits for the call that is under way, also when nobody else does any longer."""
    asked: list[int] = []
    go_on = threading.Event()

    def token() -> str:
        asked.append(1)
        go_on.wait(20)
        return f"token {len(asked)}"

    async def main() -> None:
        credentials = Credentials("http://host", token)
        signed: list[str] = []

        async def sign() -> None:
            request = Outgoing("POST", "http://host", b"", {})
            await credentials.sign(request, fresh=True)
            signed.append(request.headers["Authorization"])

        for _ in range(3):
            with anyio.move_on_after(0.05):
                await sign()
        assert (len(asked), signed) == (1, [])
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(sign)
            await anyio.wait_all_tasks_blocked()
            go_on.set()
        assert (len(asked), signed) == (1, ["Bearer token 1"] * 3)
        await sign()
        assert (len(asked), signed[-1]) == (2, "Bearer token 2")

    try:
        anyio.run(main, backend=backend)
    finally:
        go_on.set()


def test_a_call_that_never_returns_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it gives after all is not taken for the latest token."""
    answers = iter(["old", "new"])
    begun, go_on, over = threading.Event(), threading.Event(), threading.Event()

    def token() -> str:
        answer = next(answers)
        begun.set()
        if answer == "old":
            go_on.wait(20)
            over.set()
        return answer

    async def main() -> None:
        credentials = Credentials("http://host", token)
        with anyio.move_on_after(0.05):
            await credentials.sign(Outgoing("POST", "http://host", b"", {}), fresh=False)
        assert begun.is_set() and credentials.header() is None
        monkeypatch.setattr("runqueue.http._credentials._CALL_TIMEOUT", 0.0)
        await credentials.sign(Outgoing("POST", "http://host", b"", {}), fresh=False)
        call = credentials._call
        go_on.set()
        over.wait(20)
        assert call is not None and call.done() and credentials.header() == "Bearer new"

    try:
        anyio.run(main)
    finally:
        go_on.set()


@pytest.mark.parametrize("given", [b"s3cret", ["s3cret"], 5])
def test_a_callable_that_gives_no_text_is_said(server: ScriptedServer, given: Any) -> None:
    """By its type; nothing is sent."""
    error = failure(server.uri, token=lambda: given)
    assert f"gave {type(given).__name__}" in str(error)
    assert_redacted(error)
    assert server.count() == 0


@pytest.mark.parametrize("raised", [SystemExit(SECRET), KeyboardInterrupt(SECRET), ValueError(SECRET)], ids=repr)
def test_whatever_a_token_raises_ends_the_request_only(server: ScriptedServer, raised: BaseException) -> None:
    """And says no more than its kind."""

    def token() -> str:
        raise raised

    error = failure(server.uri, token=token)
    assert isinstance(error, AuthError)
    assert type(raised).__name__ in str(error)
    assert_redacted(error)


def test_a_defect_on_the_way_shows_no_secret() -> None:
    """The frames of an error that nobody has foreseen hold the request's headers; its place is named instead."""

    def broken(_: httpx.Request) -> httpx.Response:
        raise LookupError(f"Bearer {SECRET}{SECRET}")

    error = failure("http://nothing.invalid", token=SECRET * 2, transport=httpx.MockTransport(broken))
    assert "LookupError at test_credentials.py:" in str(error)
    assert_redacted(error)
