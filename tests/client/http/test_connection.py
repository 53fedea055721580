"""One HTTP/1.1 connection, against servers that say what they like, when they like."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import h11
import httpx
import pytest

from runqueue.http._connection import Connection, connect

Serve: TypeAlias = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
PATIENCE = 10.0
MUCH = 8_000_000  # bytes, more than both sides' buffers hold


async def head(reader: asyncio.StreamReader) -> bytes:
    return await reader.readuntil(b"\r\n\r\n")


def against(serve: Serve, use: Callable[[int], Awaitable[Any]]) -> Any:
    """What `use` makes of the port on which each connection is served so."""

    async def main() -> Any:
        served: set[asyncio.Task[None]] = set()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            served.add(task)
            try:
                await serve(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass  # the client has had enough
            finally:
                writer.transport.abort()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            return await asyncio.wait_for(use(server.sockets[0].getsockname()[1]), PATIENCE)
        finally:
            server.close()
            for task in served:
                task.cancel()
            await asyncio.gather(*served, return_exceptions=True)

    return asyncio.run(main())


def answering(*answers: bytes) -> Serve:
    """One of these after each request's head."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await head(reader)
            writer.write(answer)
            await writer.drain()

    return serve


async def exchange(connection: Connection, body: Any = b"", length: int = 0) -> tuple[int, bytes]:
    fields = [(b"Host", b"h"), (b"Content-Length", b"%d" % (length or len(body)))]
    answer = await connection.send("POST", b"/", fields, body)
    return answer.status_code, b"".join([chunk async for chunk in connection])


async def once(port: int) -> tuple[int, bytes]:
    connection = await connect("127.0.0.1", port, None)
    try:
        return await exchange(connection)
    finally:
        connection.abort()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (OK, (200, b"{}")),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK, (200, b"{}")),
        (b"HTTP/1.1 503 Busy\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n", (503, b"abcde")),
        (b"HTTP/1.0 200 OK\r\n\r\nas long as it lasts", (200, b"as long as it lasts")),
        (b"HTTP/1.1 204 No Content\r\n\r\n", (204, b"")),
    ],
)
def test_an_answer_is_read_to_its_end(answer: bytes, expected: tuple[int, bytes]) -> None:
    async def in_pieces(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        for at in range(len(answer)):
            writer.write(answer[at : at + 1])
            await writer.drain()

    assert against(answering(answer), once) == expected
    assert against(in_pieces, once) == expected


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"", httpx.RemoteProtocolError, "without sending a response"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", httpx.RemoteProtocolError, "peer unexpectedly closed connection"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}", httpx.RemoteProtocolError, "received 2 bytes, expected 9"),
        (b"not HTTP\r\n\r\n", httpx.RemoteProtocolError, "illegal status line"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"a" * 200_000, httpx.RemoteProtocolError, "Receive buffer too long"),
    ],
)
def test_what_is_no_answer_is_an_error_of_httpxs(answer: bytes, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        against(answering(answer), once)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.0 200 OK\r\n\r\nas long as"])
def test_a_connection_that_is_reset_says_so(said: bytes) -> None:
    """It is no end of an answer that has no length."""

    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(said)
        await writer.drain()
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    with pytest.raises(httpx.ReadError, match="reset"):
        against(reset, once)


def test_an_answer_counts_though_the_connection_breaks_after_it() -> None:
    async def use(port: int) -> tuple[int, bytes]:
        connection = await connect("127.0.0.1", port, None)
        connection._busy = True
        connection._http.send(h11.Request(method="POST", target="/", headers=[("Host", "h")]))
        connection._http.send(h11.EndOfMessage())
        connection.data_received(OK)
        connection.connection_lost(ConnectionResetError("reset"))
        answer = await connection._head()
        read = b"".join([chunk async for chunk in connection])
        connection.abort()
        return answer.status_code, read

    assert against(answering(), use) == (200, b"{}")


def test_nobody_listens() -> None:
    async def gone(port: int) -> int:
        return port

    async def nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    port = against(nothing, gone)
    with pytest.raises(httpx.ConnectError):
        asyncio.run(once(port))


def test_a_connection_is_used_again() -> None:
    async def twice(port: int) -> list[tuple[int, bytes]]:
        connection = await connect("127.0.0.1", port, None)
        answers = [await exchange(connection)]
        assert repr(connection) == "<Connection busy>"
        assert connection.rest()
        assert connection.fresh
        assert repr(connection) == "<Connection idle>"
        answers.append(await exchange(connection))
        connection.abort()
        return answers

    assert against(answering(OK, OK), twice) == [(200, b"{}")] * 2


def test_an_idle_connection_that_is_told_anything_is_not_used_again() -> None:
    """A proxy's 408 to nobody would pass for the answer to the next request."""

    idle = asyncio.Event()

    async def give_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(OK)
        await idle.wait()
        writer.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        assert await reader.read() == b"", "it was used again"

    async def use(port: int) -> None:
        connection = await connect("127.0.0.1", port, None)
        await exchange(connection)
        assert connection.rest()
        idle.set()
        while not connection._ended:  # noqa: ASYNC110 - no event is set when it is lost
            await asyncio.sleep(0)
        assert not connection.fresh
        assert repr(connection) == "<Connection lost>"

    against(give_up, use)


def test_what_follows_an_answer_at_once_ends_the_connection() -> None:
    async def twice_as_much(port: int) -> bool:
        connection = await connect("127.0.0.1", port, None)
        assert await exchange(connection) == (200, b"{}")
        rests = connection.rest()
        connection.abort()
        return rests

    assert against(answering(OK + OK), twice_as_much) is False


def sending_much(streamed: bool) -> Callable[[int], Awaitable[tuple[int, bytes, bool]]]:
    """The answer to a large body, and whether the connection can be used again."""

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(MUCH // 1_000):
            yield b"x" * 1_000

    async def use(port: int) -> tuple[int, bytes, bool]:
        connection = await connect("127.0.0.1", port, None)
        answer = await exchange(connection, pieces() if streamed else b"x" * MUCH, MUCH)
        rests = connection.rest()
        connection.abort()
        return (*answer, rests)

    return use


@pytest.mark.parametrize("streamed", [False, True])
def test_a_large_body_arrives_whole(streamed: bool) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        body = await reader.readexactly(MUCH)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n%d" % body.count(b"x"))
        await writer.drain()
        await reader.read()

    assert against(count, sending_much(streamed)) == (200, b"8000000", True)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_server_that_answers_without_reading_on_is_heard(streamed: bool) -> None:
    """413, say: to wait until all is sent would be to wait for ever."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await head(reader)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        await asyncio.Event().wait()

    assert against(refuse, sending_much(streamed)) == (413, b"", False)


def test_a_body_shorter_than_was_said_is_an_error_and_not_a_wait() -> None:
    async def short() -> AsyncIterator[bytes]:
        yield b"x"

    async def use(port: int) -> None:
        connection = await connect("127.0.0.1", port, None)
        try:
            await exchange(connection, short(), 2)
        finally:
            connection.abort()

    with pytest.raises(httpx.LocalProtocolError, match="Too little data"):
        against(answering(OK), use)
