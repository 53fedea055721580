"""
Answers and redirects, in memory: what counts as MLflow's answer, how much of one is read, and where none leads to.

Rules of this file: one call of the store is one attempt (two after a 401, more for redirects), so that the requests
that the server saw are counted exactly.
"""

from __future__ import annotations

import gzip
from typing import Any

import anyio
import httpx
import pytest

from runqueue.errors import AuthError, StoreError, UnavailableError, UnexpectedAnswerError
from runqueue.http._client import MAX_REDIRECTS
from runqueue.settings._config import Config
from runqueue.stores._protocol import GET_RUN, LOG_BATCH, SEARCH_RUNS, Endpoint, Traffic
from runqueue.stores._rest import HttpStore
from support.answers import LOGIN_PAGE, login_page
from support.memory_server import MemoryServer
from support.proxy import Fault


@pytest.fixture
def server() -> MemoryServer:
    """Says "done" to everything."""
    return MemoryServer()


def call(
    uri: str, *, endpoint: Endpoint = LOG_BATCH, transport: httpx.MockTransport, **settings: Any
) -> dict[str, Any]:
    """The answer to one call."""

    async def main() -> dict[str, Any]:
        store = HttpStore(Config(transport=transport, **settings), uri, Traffic())
        try:
            if endpoint.method == "GET":
                return await store.call(endpoint, query={"run_id": "r"})
            return await store.call(endpoint, b"{}")
        finally:
            await store.aclose()

    return anyio.run(main)


def failure(uri: str, **settings: Any) -> StoreError:
    """The error of one call."""
    with pytest.raises(StoreError) as caught:
        call(uri, **settings)
    return caught.value


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (200, LOGIN_PAGE, ["200", "text/html", "Sign in"]),
        (200, b"", ["200", "empty"]),
        (204, b"", ["204", "empty"]),
        (206, {}, ["206"]),
        (304, b"", ["304"]),
        (200, {"error_code": "INVALID_STATE", "message": "no"}, ["200", "INVALID_STATE", "no"]),
        (200, b"[]", ["200", "[]"]),
    ],
)
def test_what_is_not_mlflows_done_is_named(server: MemoryServer, status: int, body: Any, words: list[str]) -> None:
    """The error says what came in its place."""
    server.fail("", Fault.answer(status, body))
    error = failure(server.uri, transport=server.transport)
    assert type(error) is UnexpectedAnswerError
    assert not error.retriable
    assert [word for word in words if word not in str(error)] == []


@pytest.mark.parametrize("size", [1_000_000, 1_000_001])
def test_an_answer_is_read_up_to_its_cap(server: MemoryServer, size: int) -> None:
    """1,000,000 bytes are read, one more is not."""
    body = b'{"a":"' + b"x" * (size - 8) + b'"}'
    server.fail("", Fault.answer(200, body))
    if size <= LOG_BATCH.cap:
        assert len(call(server.uri, transport=server.transport)["a"]) == size - 8
    else:
        assert "1,000,000" in str(failure(server.uri, transport=server.transport))


def test_searches_may_answer_more(server: MemoryServer) -> None:
    """Up to 64 MB."""
    body = b'{"a":"' + b"x" * 2_000_000 + b'"}'
    server.fail("", Fault.answer(200, body), times=2)
    assert call(server.uri, endpoint=SEARCH_RUNS, transport=server.transport)
    assert call(server.uri, endpoint=GET_RUN, transport=server.transport)


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "nonsense"])
def test_an_unknown_coding_is_named(server: MemoryServer, coding: str) -> None:
    """What cannot be read proves nothing."""
    server.fail("", Fault.answer(200, b"{}", {"Content-Encoding": coding}))
    error = failure(server.uri, transport=server.transport)
    assert type(error) is UnexpectedAnswerError and coding in str(error)


@pytest.mark.parametrize("body", [b"{}", b"", gzip.compress(b'{"a": "' + b"x" * 999 + b'"}', mtime=0)[:-12]])
def test_a_broken_coding_is_no_answer(server: MemoryServer, body: bytes) -> None:
    """Neither what is no gzip at all, nor one that ends early."""
    server.fail("", Fault.answer(200, body, {"Content-Encoding": "gzip"}))
    error = failure(server.uri, transport=server.transport)
    assert isinstance(error, (UnexpectedAnswerError, UnavailableError)) and error.ambiguous


@pytest.mark.parametrize(
    "location", ["https://{host}/x", "//other.invalid/x", "ftp://{host}/x", "http://u:s3cret@other.invalid/"]
)
def test_scheme_host_and_port_make_the_origin(server: MemoryServer, location: str) -> None:
    """Each of them alone makes another one."""
    server.fail("", Fault.answer(307, b"", {"Location": location.format(host=server.uri.removeprefix("http://"))}))
    error = failure(server.uri, transport=server.transport)
    assert type(error) is UnexpectedAnswerError and "s3cret" not in str(error)
    assert server.count() == 1


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_would_make_it_a_get_is_not_followed(server: MemoryServer, status: int) -> None:
    """The page it leads to would answer 200, and nothing would be stored."""
    server.fail("", Fault.answer(status, b"", {"Location": "/login"}))
    error = failure(server.uri, transport=server.transport)
    assert type(error) is UnexpectedAnswerError and "GET" in str(error) and "/login" in str(error)
    assert server.count() == 1


@pytest.mark.parametrize("status", [300, 304, 305, 306, 310])
def test_a_3xx_that_is_no_redirect_is_an_answer_like_others(server: MemoryServer, status: int) -> None:
    """Also with a Location."""
    server.fail("", Fault.answer(status, b"", {"Location": "/x"}))
    assert type(failure(server.uri, transport=server.transport)) is UnexpectedAnswerError
    assert server.count() == 1


def test_a_redirect_loop_ends(server: MemoryServer) -> None:
    """After a few rounds."""
    server.fail("", Fault.answer(307, b"", {"Location": "/again"}), times=None)
    error = failure(server.uri, transport=server.transport)
    assert type(error) is UnexpectedAnswerError and "redirect" in str(error)
    assert server.count() <= MAX_REDIRECTS + 1


def test_a_login_page_behind_a_get_is_no_run(server: MemoryServer) -> None:
    """A GET may be redirected within the origin, and what comes is judged all the same."""
    server.fail("", Fault.answer(302, b"", {"Location": "/login"}))
    server.fail("", Fault(reply=login_page(), forwards=False))
    error = failure(server.uri, endpoint=GET_RUN, transport=server.transport)
    assert type(error) is UnexpectedAnswerError and "Sign in" in str(error)


def test_a_401_is_still_the_answer_after_a_redirect(server: MemoryServer) -> None:
    """Both are followed to their end."""
    server.fail(
        "", Fault.answer(307, b"", {"Location": "/moved"}), when=lambda request: request.path != "/moved", times=2
    )
    server.fail("", Fault.answer(401), times=2)
    assert type(failure(server.uri, token="t", transport=server.transport)) is AuthError
    assert server.count() == 4
