"""
The REST store over real sockets, through httpx and through aiohttp: what is sent, how connections end, and what a
library might do by itself (decompress, follow, repeat). Answers that need no socket are in
`tests/client/http/test_response.py`.

Rules of this file: every test runs for both transports; one call of the store is one attempt (two after a 401, more
for redirects), so that what the server saw is counted exactly.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeAlias

import anyio
import pytest

from runqueue.errors import StoreError, UnavailableError, UnexpectedAnswerError
from runqueue.settings._config import Config
from runqueue.stores._protocol import CREATE_RUN, GET_RUN, LOG_BATCH, Endpoint, Traffic
from runqueue.stores._rest import HttpStore
from support.answers import gzip_bomb
from support.mlflow_server import HOST, free_port
from support.proxy import Fault, ScriptedServer

BODY = b'{"run_id":"r","metrics":[]}'
Transport: TypeAlias = Any

pytestmark = pytest.mark.parametrize("transport", ["httpx", "auto"])


@contextlib.asynccontextmanager
async def opened(uri: str, **settings: Any) -> AsyncIterator[HttpStore]:
    """A store that is closed at the end."""
    store = HttpStore(Config(**settings), uri, Traffic())
    try:
        yield store
    finally:
        await store.aclose()


def call(
    uri: str, *, endpoint: Endpoint = LOG_BATCH, body: bytes = BODY, times: int = 1, **settings: Any
) -> dict[str, Any]:
    """What the last of so many calls to one store answers."""

    async def main() -> dict[str, Any]:
        answer: dict[str, Any] = {}
        async with opened(uri, **settings) as store:
            for _ in range(times):
                answer = await store.call(endpoint, body if endpoint.method == "POST" else b"", QUERY.get(endpoint))
        return answer

    return anyio.run(main)


QUERY = {GET_RUN: {"run_id": "r 1&x=ü"}}


def failure(uri: str, **settings: Any) -> StoreError:
    """The error of one call."""
    with pytest.raises(StoreError) as caught:
        call(uri, **settings)
    return caught.value


@contextlib.contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads one request a connection, and then does as told with the socket."""
    listener = socket.create_server((HOST, 0))
    stopped = threading.Event()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                if stopped.is_set():
                    return
                connection.recv(65_536)
                answer(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{listener.getsockname()[1]}"
    finally:
        stopped.set()
        with contextlib.suppress(OSError):
            socket.create_connection(listener.getsockname(), 1).close()  # wakes accept()
        listener.close()
        thread.join(10)


# -- a good call -----------------------------------------------------------------------------------------------------


def test_a_header_of_the_users_takes_the_place_of_ours_in_any_capitals(
    server: ScriptedServer, transport: Transport
) -> None:
    """But not what says how the body is written; of two names that differ in capitals only, the last counts."""
    given = {"user-agent": "mine", "content-type": "x/y", "ACCEPT-ENCODING": "gzip", "X-Team": "a", "x-team": "b"}
    call(server.uri, transport=transport, headers=given)
    (request,) = server.requests
    sent = [(name, request.headers[name]) for name in ("user-agent", "content-type", "accept-encoding", "x-team")]
    assert [value for _, value in sent] == ["mine", "application/json", "identity", "b"]


def test_a_call_is_one_post_with_its_headers(server: ScriptedServer, transport: Transport) -> None:
    """Path, body, length, content type, agent; no credentials where there are none."""
    assert call(f"{server.uri}/base/", transport=transport, headers={"X-Team": "vision"}) == {}
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", "/base/api/2.0/mlflow/runs/log-batch")
    assert request.body == BODY
    assert request.headers["content-type"] == "application/json"
    assert request.headers["content-length"] == str(len(BODY))
    assert request.headers["user-agent"].startswith("runqueue/")
    assert request.headers["x-team"] == "vision"
    assert "authorization" not in request.headers and "cookie" not in request.headers
    assert "transfer-encoding" not in request.headers
    assert request.headers["host"] == server.uri.removeprefix("http://")


def test_a_query_is_escaped(server: ScriptedServer, transport: Transport) -> None:
    """A GET carries its arguments in the query, and no body."""
    call(server.uri, endpoint=GET_RUN, transport=transport)
    (request,) = server.requests
    assert request.method == "GET" and request.body == b""
    assert request.target in (
        "/api/2.0/mlflow/runs/get?run_id=r+1%26x%3D%C3%BC",
        "/api/2.0/mlflow/runs/get?run_id=r%201%26x%3D%C3%BC",
    )


def test_the_connection_is_kept(server: ScriptedServer, transport: Transport) -> None:
    """Ten calls go over one connection."""
    call(server.uri, times=10, transport=transport)
    assert {request.connection for request in server.requests} == {0}
    assert server.count() == 10


# -- answers that are cut --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [{"run": {"info": {"run_id": "1" * 100}}}, {"a": "b"}])
def test_a_body_that_is_cut_is_no_answer(server: ScriptedServer, transport: Transport, body: dict[str, Any]) -> None:
    """The connection ends before the length that was announced: it may have been stored, and is tried again."""
    server.fail("", Fault.answer(200, body, cut_at=5))
    error = failure(server.uri, transport=transport)
    assert type(error) is UnavailableError
    assert (error.retriable, error.ambiguous) == (True, True)


def test_an_answer_cut_in_its_chunks_is_no_answer(transport: Transport) -> None:
    """Chunked, complete JSON so far, but without the last chunk."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n")

    with raw_server(answer) as uri:
        error = failure(uri, transport=transport)
    assert (type(error), error.ambiguous) == (UnavailableError, True)


def test_an_answer_that_is_no_http_is_no_answer(transport: Transport) -> None:
    """Some other service listens there."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    with raw_server(answer) as uri:
        error = failure(uri, transport=transport)
    assert isinstance(error, StoreError)
    assert error.ambiguous


# -- sizes and codings -----------------------------------------------------------------------------------------------


def test_a_gzip_bomb_is_capped(server: ScriptedServer, transport: Transport) -> None:
    """400 MB in 0.4 MB fail as too large; memory does not grow with them."""
    server.fail("", Fault(reply=gzip_bomb(), forwards=False))
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        error = failure(server.uri, transport=transport)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert type(error) is UnexpectedAnswerError and "too large" in str(error)
    assert peak < 20_000_000


@pytest.mark.parametrize(
    ("coding", "encode"),
    [("gzip", gzip.compress), ("GZip", gzip.compress), ("deflate", zlib.compress), ("identity", bytes), ("", bytes)],
    ids=["gzip", "GZip", "deflate", "identity", "empty"],
)
def test_an_honest_coding_is_read(
    server: ScriptedServer, transport: Transport, coding: str, encode: Callable[[bytes], bytes]
) -> None:
    """Although it was not asked for, as HTTP defines it and as servers do it (RFC 9110, 8.4.1)."""
    body = {"a": "ü" * 10_000}
    server.fail("", Fault.answer(200, encode(json.dumps(body).encode()), {"Content-Encoding": coding}))
    assert call(server.uri, transport=transport) == body
    assert server.requests[0].headers["accept-encoding"] == "identity"


# -- connections -----------------------------------------------------------------------------------------------------


def test_a_connection_refused_is_not_ambiguous(transport: Transport) -> None:
    """Nothing was sent, so nothing can have been stored."""
    error = failure(f"http://{HOST}:{free_port()}", transport=transport)
    assert type(error) is UnavailableError
    assert (error.retriable, error.ambiguous) == (True, False)
    assert "connect" in str(error)


def test_an_unknown_host_is_not_ambiguous(transport: Transport) -> None:
    """It may be known later: name servers have outages too."""
    error = failure("http://nothing.invalid", transport=transport)
    assert type(error) is UnavailableError
    assert (error.retriable, error.ambiguous) == (True, False)


def test_a_connection_closed_without_an_answer_is_ambiguous(server: ScriptedServer, transport: Transport) -> None:
    """The request was there; what became of it nobody knows. It is not sent a second time here."""
    server.fail("", Fault.cut_before_commit(), times=None)
    error = failure(server.uri, transport=transport)
    assert type(error) is UnavailableError
    assert (error.retriable, error.ambiguous) == (True, True)
    assert server.count() == 1


@pytest.mark.parametrize("endpoint", [LOG_BATCH, GET_RUN])
def test_a_kept_connection_that_breaks_is_replaced_at_once(
    server: ScriptedServer, transport: Transport, endpoint: Endpoint
) -> None:
    """The server may have closed it just when it was used: one more request, on a fresh connection."""
    server.fail("", Fault.passed())
    server.fail("", Fault.cut_before_commit())
    assert call(server.uri, times=2, endpoint=endpoint, transport=transport) == {}
    assert [request.connection for request in server.requests] == [0, 0, 1]
    assert len({(request.method, request.target, request.body) for request in server.requests}) == 1


@pytest.mark.parametrize("endpoint", [LOG_BATCH, GET_RUN])
def test_a_fresh_connection_that_breaks_too_is_ambiguous(
    server: ScriptedServer, transport: Transport, endpoint: Endpoint
) -> None:
    """One request is repeated once at most, whatever its method: no library repeats one of its own accord."""
    server.fail("", Fault.passed())
    server.fail("", Fault.cut_before_commit(), times=None)
    error = failure(server.uri, times=2, endpoint=endpoint, transport=transport)
    assert (error.retriable, error.ambiguous) == (True, True)
    assert server.count() == 3


def test_no_get_is_repeated_before_the_server_has_answered(server: ScriptedServer, transport: Transport) -> None:
    """No connection can have been kept."""
    server.fail("", Fault.cut_before_commit())
    assert failure(server.uri, endpoint=GET_RUN, transport=transport).ambiguous
    assert server.count() == 1


def test_create_run_is_never_repeated_at_once(server: ScriptedServer, transport: Transport) -> None:
    """It could make a second run. Its tag settles whether it was stored."""
    server.fail("", Fault.passed())
    server.fail("", Fault.cut_before_commit(), times=None)
    error = failure(server.uri, times=2, endpoint=CREATE_RUN, transport=transport)
    assert (error.retriable, error.ambiguous) == (True, True)
    assert server.count() == 2


def test_what_breaks_in_the_answers_body_is_not_repeated(server: ScriptedServer, transport: Transport) -> None:
    """The server has done the work, or is at it."""
    server.fail("", Fault.passed())
    server.fail("", Fault.cut_in_body(), times=None)
    assert failure(server.uri, times=2, transport=transport).ambiguous
    assert server.count() == 2


def test_a_slowly_dripping_answer_meets_one_deadline(transport: Transport) -> None:
    """Every byte comes in time, the answer does not: the attempt ends at its deadline."""
    stop = threading.Event()

    def answer(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not stop.wait(0.02):
            connection.sendall(b" ")

    with raw_server(answer) as uri:
        began = time.monotonic()
        error = failure(uri, request_timeout=0.4, transport=transport)
        took = time.monotonic() - began
        stop.set()
    assert type(error) is UnavailableError and "0.4 s" in str(error)
    assert (error.retriable, error.ambiguous) == (True, True)
    assert 0.4 <= took < 5


def test_a_server_that_never_answers_meets_the_deadline(transport: Transport) -> None:
    """As does one that accepts and says nothing."""
    stop = threading.Event()

    def silent(_: socket.socket) -> None:
        stop.wait(10)

    with raw_server(silent) as uri:
        error = failure(uri, request_timeout=0.2, transport=transport)
        stop.set()
    assert (type(error), error.ambiguous) == (UnavailableError, True)


# -- redirects -------------------------------------------------------------------------------------------------------


@pytest.fixture
def other() -> Iterator[ScriptedServer]:
    """Another origin, which says "done" to everything."""
    with ScriptedServer() as other:
        yield other


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_is_not_followed(
    server: ScriptedServer, other: ScriptedServer, transport: Transport, status: int
) -> None:
    """Neither headers nor body go there, whatever the status; the error says where it led."""
    server.fail("", Fault.answer(status, b"", {"Location": f"{other.uri}/api?token=s3cret"}))
    error = failure(server.uri, token="s3cret", transport=transport)
    assert type(error) is UnexpectedAnswerError
    assert other.requests == ()
    assert str(status) in str(error) and other.uri in str(error) and "s3cret" not in str(error)


@pytest.mark.parametrize("status", [307, 308])
@pytest.mark.parametrize("relative", [True, False])
def test_a_redirect_that_keeps_the_method_is_followed(
    server: ScriptedServer, transport: Transport, status: int, relative: bool
) -> None:
    """Within the origin: the same method, body and headers."""
    target = "/moved/here?x=1"
    server.fail("", Fault.answer(status, b"", {"Location": target if relative else server.uri + target}))
    assert call(server.uri, token="t", transport=transport) == {}
    first, second = server.requests
    assert second.target == target
    assert (second.method, second.body) == ("POST", BODY)
    for name in ("content-type", "authorization", "user-agent"):
        assert second.headers[name] == first.headers[name]


@pytest.mark.parametrize("location", [None, "http://[", "http://:x/", "\x7f://"])
def test_a_redirect_that_leads_nowhere_is_named(
    server: ScriptedServer, transport: Transport, location: str | None
) -> None:
    """Without a Location, or with one that is none."""
    server.fail("", Fault.answer(307, b"", {} if location is None else {"Location": location}))
    error = failure(server.uri, transport=transport)
    assert type(error) is UnexpectedAnswerError and "307" in str(error)
