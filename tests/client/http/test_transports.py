"""
The default transports against servers that answer as they please, over local sockets: the client must get whole
answers, keep connections in step with requests, and fail instead of waiting for ever.

Rules of this file: the server runs in the same loop, one coroutine a connection. A test that runs over one library
alone says what the other one does.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import anyio
import httpx
import pytest

from runqueue.errors import StoreError, UnavailableError
from runqueue.http._body import Streamed
from runqueue.http._client import HttpClient
from runqueue.http._failures import is_broken_connection
from runqueue.http._transports import make_route
from runqueue.settings._config import Config

Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Use: TypeAlias = Callable[[HttpClient, str], Awaitable[Any]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
PATIENCE = 10.0
MUCH = 8_000_000
"""Bytes, more than both sides' buffers hold."""
BATCH = 1_000_000
"""Bytes of the largest batch."""

BOTH = pytest.mark.parametrize("transport", ["aiohttp", "httpx"])


class File:
    """A large file, in memory."""

    def read(self, offset: int, count: int) -> bytes:
        return b"x" * count


async def head(reader: asyncio.StreamReader) -> bytes:
    """Read the head of a request, and its body if the head says how long it is."""
    found = await reader.readuntil(b"\r\n\r\n")
    for line in found.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            await reader.readexactly(int(line.partition(b":")[2]))
    return found


def against(serve: Serve, use: Use, transport: Any) -> Any:
    """The result of `use`, which gets a client and the URL of a server that serves each connection so."""

    async def main() -> Any:
        served: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            served.add(task)
            try:
                await serve(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass  # the client has closed the connection
            finally:
                writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        client = HttpClient(
            Config(transport=transport, request_timeout=PATIENCE), url, (), lambda body: None, connections=4
        )
        try:
            with anyio.fail_after(PATIENCE):
                return await use(client, url)
        finally:
            await client.aclose()
            server.close()
            for task in served:
                task.cancel()
            await asyncio.gather(*served, return_exceptions=True)

    return asyncio.run(main())


def answering(*answers: bytes) -> Serve:
    """One of these for each request of a connection, which is closed after the last one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await head(reader)
            writer.write(answer)
            await writer.drain()

    return serve


async def once(client: HttpClient, url: str) -> tuple[int, bytes]:
    """Status and body of one POST."""
    answer = await client.exchange("POST", url, b"{}", cap=1_000)
    return answer.status, answer.body


@BOTH
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (OK, (200, b"{}")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, (200, b"{}")),
        (b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", (503, b"abcde")),
        (b"HTTP/1.0 200 OK\r\n\r\nas long as it lasts", (200, b"as long as it lasts")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
    ],
    ids=["length", "100", "chunked", "1.0", "204"],
)
def test_an_answer_is_read_to_its_end(transport: str, answer: bytes, expected: tuple[int, bytes]) -> None:
    """Also one that arrives byte by byte."""

    async def in_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        for at in range(len(answer)):
            writer.write(answer[at : at + 1])
            await writer.drain()

    assert against(answering(answer), once, transport) == expected
    assert against(in_pieces, once, transport) == expected


@BOTH
@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
        b"not HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000,
    ],
    ids=["nothing", "half a head", "half a body", "no HTTP", "an endless head"],
)
def test_what_is_no_answer_is_an_ambiguous_failure(transport: str, answer: bytes) -> None:
    """The server may have stored what it was sent."""
    with pytest.raises(UnavailableError, match="the connection broke") as caught:
        against(answering(answer), once, transport)
    assert (caught.value.retriable, caught.value.ambiguous) == (True, True)


@pytest.mark.parametrize(
    ("transport", "sent"),
    [
        ("aiohttp", b""),
        ("httpx", b""),
        # aiohttp takes the reset for the end of such a body. Half of MLflow's JSON is none, so it never counts as done.
        ("httpx", b"HTTP/1.0 200 OK\r\n\r\nas long as"),
    ],
)
def test_a_reset_is_no_end_of_an_answer(transport: str, sent: bytes) -> None:
    """Not even of one that has no length."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(sent)
        await writer.drain()
        await asyncio.sleep(0.05)  # the client reads what was sent; a reset discards what it has not read
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    with pytest.raises(UnavailableError, match="the connection broke") as caught:
        against(reset, once, transport)
    assert caught.value.ambiguous


@BOTH
def test_a_connection_that_breaks_is_told_from_one_that_was_never_there(transport: Any) -> None:
    """By the error that the transport raises."""

    async def use(_: HttpClient, url: str) -> tuple[bool, bool]:
        found: list[bool] = []
        for place in (url, "http://127.0.0.1:1/"):
            route = make_route(Config(transport=transport), httpx.URL(place), 1)
            try:
                await route.transport.handle_async_request(httpx.Request("GET", place))
            except httpx.TransportError as error:
                found.append(is_broken_connection(error))
            await route.transport.aclose()
        return found[0], found[1]

    assert against(answering(b""), use, transport) == (True, False)


@BOTH
def test_an_idle_connection_that_brings_anything_is_not_used_again(transport: str) -> None:
    """
    A proxy's 408 to nobody would pass for the answer to the next request. The proxy closes the connection after it,
    which is what aiohttp goes by; httpcore goes by the bytes.
    """
    idle, closed = asyncio.Event(), asyncio.Event()
    connections = 0

    async def give_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await head(reader)
        writer.write(OK)
        if connections == 1:
            await idle.wait()
            writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            if transport == "aiohttp":
                writer.close()
            closed.set()
            assert await reader.read() == b"", "it was used again"

    async def use(client: HttpClient, url: str) -> list[tuple[int, bytes]]:
        found = [await once(client, url)]
        idle.set()
        await closed.wait()
        await asyncio.sleep(0.05)  # the loop delivers what has arrived
        return [*found, await once(client, url)]

    assert against(give_up, use, transport) == [(200, b"{}")] * 2
    assert connections == 2


def test_what_follows_an_answer_at_once_is_no_answer() -> None:
    """The next request gets its own answer, by aiohttp. httpcore takes what came first; no server that keeps to HTTP does so."""
    served = 0

    async def twice_as_much(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        while True:
            await head(reader)
            served += 1
            number = b"%d" % served
            wrong = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong"
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(number), number) + wrong)
            await writer.drain()

    async def use(client: HttpClient, url: str) -> list[bytes]:
        found = []
        for _ in range(3):
            found.append((await once(client, url))[1])
            await asyncio.sleep(0.02)  # the loop delivers what has arrived
        return found

    assert against(twice_as_much, use, "aiohttp") == [b"1", b"2", b"3"]


async def send_file(client: HttpClient, url: str) -> tuple[int, bytes]:
    """Status and body of the answer to a large body."""
    answer = await client.exchange("PUT", url, Streamed(File(), 0, MUCH, lambda count: None), cap=1_000)
    return answer.status, answer.body


async def send_batch(client: HttpClient, url: str) -> tuple[int, bytes]:
    """Status and body of the answer to the largest body that is sent from memory."""
    answer = await client.exchange("POST", url, b"x" * BATCH, cap=1_000)
    return answer.status, answer.body


@BOTH
@pytest.mark.parametrize(("size", "send"), [(MUCH, send_file), (BATCH, send_batch)], ids=["file", "batch"])
def test_a_large_body_arrives_whole(transport: str, size: int, send: Use) -> None:
    """With its length in the head, and not in chunks."""

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fields = (await reader.readuntil(b"\r\n\r\n")).lower()
        assert b"content-length: %d\r\n" % size in fields and b"transfer-encoding" not in fields
        body = await reader.readexactly(size)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n%07d" % body.count(b"x"))
        await writer.drain()

    assert against(count, send, transport) == (200, b"%07d" % size)


@BOTH
@pytest.mark.parametrize("send", [send_file, send_batch], ids=["file", "batch"])
def test_an_answer_counts_that_comes_before_the_whole_body_is_sent(transport: str, send: Use) -> None:
    """
    A 413, say. aiohttp reads it while it sends; httpcore sends to the end first, so here the server reads the rest, as
    servers do for a while before they close the connection.
    """

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        if transport == "httpx":
            while await reader.read(65_536):
                pass
        await reader.read(1)  # until the client closes the connection

    assert against(refuse, send, transport) == (413, b"")


@BOTH
def test_a_file_that_fails_ends_the_request_with_its_own_error(transport: str) -> None:
    """The server is not left waiting for the rest, and neither is the client."""

    class Failing(File):
        def read(self, offset: int, count: int) -> bytes:
            if offset:
                raise StoreError("the file has changed")
            return super().read(offset, count)

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # to the end of the connection

    async def use(client: HttpClient, url: str) -> None:
        await client.exchange("PUT", url, Streamed(Failing(), 0, MUCH, lambda count: None), cap=1_000)

    with pytest.raises(StoreError, match="the file has changed"):
        against(wait, use, transport)


@BOTH
def test_cookies_are_not_kept(transport: str) -> None:
    """A load balancer's cookie would bind all requests of a client to one machine."""
    heads: list[bytes] = []

    async def bake(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            heads.append((await head(reader)).lower())
            writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b; Path=/\r\nContent-Length: 2\r\n\r\n{}")
            await writer.drain()

    async def twice(client: HttpClient, url: str) -> None:
        await once(client, url.replace("127.0.0.1", "localhost"))
        await once(client, url.replace("127.0.0.1", "localhost"))

    against(bake, twice, transport)
    assert len(heads) == 2 and not any(b"cookie" in each for each in heads)
