"""
An HTTP/1.1 connection on asyncio's transports; the protocol is h11's, by which httpcore, and so httpx, speak it too.

    connect -> busy: a request and its answer -> idle -> busy ... -> lost

What httpcore has around h11 is not wanted here: it guards each read and each write with a scope and a time-out, and each
change of state with a lock that costs a turn of the loop. Here one deadline guards the whole attempt (see `_rest`),
and a connection has one user. Nor are asyncio's streams: they keep what an idle connection is sent for the next answer.

Rules of this file: whatever goes wrong is an error of httpx's; an idle connection that is told anything is not used again.
"""

from __future__ import annotations

import asyncio
import select
import ssl
import time
from collections.abc import AsyncIterable
from typing import Any, Final, TypeAlias

import h11
import httpx

Content: TypeAlias = bytes | AsyncIterable[bytes]
"""An iterable gives a length by the header Content-Length."""

_NEXT_ADDRESS: Final = 0.25
"""Seconds after which a host's next address is tried too; source: RFC 8305, section 8."""
KEPT: Final = 5.0
"""Seconds for which an idle connection is used again; httpx's own default, below what servers keep them for."""
_LARGEST_HEAD: Final = 102_400
"""Bytes of an answer's headers; as httpcore has it."""


async def connect(host: str, port: int, context: ssl.SSLContext | None) -> Connection:
    """
    In the running asyncio loop.

    Args:
        context: For https.

    Raises:
        httpx.ConnectError: There is no such host, nobody listens, or TLS is not agreed on.
    """
    try:
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, host, port, ssl=context, happy_eyeballs_delay=_NEXT_ADDRESS
        )
    except (OSError, UnicodeError) as error:  # idna's, of a host that is no name
        raise httpx.ConnectError(str(error)) from error
    return connection


class Connection(asyncio.Protocol):
    """Made by [connect][]."""

    def __init__(self) -> None:
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_LARGEST_HEAD)
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[None] | None = None  # of whoever reads or writes; there is one at a time
        self._busy = self._heard = self._paused = self._ended = False
        self._fault: Exception | None = None
        self._rested_at = 0.0

    def __repr__(self) -> str:
        state = "lost" if self._ended else "busy" if self._busy else "idle"
        return f"<Connection {state}>"

    # -- asyncio's calls -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if not self._busy:  # a 408, say: it would pass for the next request's answer
            self._end(None)
            self.abort()
            return
        self._heard = True
        self._http.receive_data(data)
        self._wake()

    def eof_received(self) -> bool:
        self._end(None)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._wake()

    def _end(self, fault: Exception | None) -> None:
        if not self._ended:
            self._ended, self._fault = True, fault
            if fault is None:  # the end of an answer without a length; a broken connection is none
                self._http.receive_data(b"")
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    # -- ours ------------------------------------------------------------------------------------------------------------

    @property
    def fresh(self) -> bool:
        """Whether it is idle, and the server has not closed it as far as the system knows, where the loop has not looked."""
        usable = not (self._busy or self._ended) and time.monotonic() - self._rested_at <= KEPT
        return usable and not _readable(self._transport.get_extra_info("socket"))

    async def send(self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], body: Content) -> h11.Response:
        """
        Send a request, and read the head of its answer.

        Raises:
            httpx.TransportError: Of some kind.
        """
        self._busy, self._heard = True, False
        try:
            head = self._http.send(h11.Request(method=method, target=target, headers=headers)) or b""
            if isinstance(body, bytes):
                self._transport.writelines((head, self._http.send(h11.Data(data=body)) or b"") if body else (head,))
            else:
                self._transport.write(head)
                async for chunk in body:
                    await self._drained()
                    if self._heard or self._ended:  # it refuses, or is gone: the rest is wasted
                        return await self._head()
                    self._transport.write(self._http.send(h11.Data(data=chunk)) or b"")
            self._transport.write(self._http.send(h11.EndOfMessage()) or b"")
        except h11.LocalProtocolError as error:
            raise httpx.LocalProtocolError(str(error)) from error
        await self._drained()
        return await self._head()

    def __aiter__(self) -> Connection:
        """The pieces of the answer's body. Not a generator: one that is left early waits for the garbage collector."""
        return self

    async def __anext__(self) -> bytes:
        event = await self._event()
        if isinstance(event, h11.Data):
            return bytes(event.data)
        raise StopAsyncIteration

    def rest(self) -> bool:
        """Whether another request may follow; if so, it is idle from now on."""
        states = self._http.our_state, self._http.their_state
        if self._ended or states != (h11.DONE, h11.DONE) or self._transport.get_write_buffer_size():
            return False
        if self._http.trailing_data[0]:
            return False
        self._http.start_next_cycle()
        self._busy, self._rested_at = False, time.monotonic()
        return True

    def abort(self) -> None:
        """Not `close`, which waits for a peer that reads no more; nothing that is wanted is left to be written."""
        self._transport.abort()

    async def _drained(self) -> None:
        while self._paused and not (self._ended or self._heard):
            await self._wait()

    async def _head(self) -> h11.Response:
        while True:
            event = await self._event()
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):  # it has closed the connection
                raise httpx.RemoteProtocolError("Server disconnected without sending a response.")

    async def _event(self) -> object:
        """
        Raises:
            httpx.TransportError: It was cut, or is no HTTP.
        """
        while True:
            try:
                event = self._http.next_event()
            except h11.RemoteProtocolError as error:
                if self._ended and not self._heard:
                    return h11.ConnectionClosed()
                raise httpx.RemoteProtocolError(str(error)) from error
            if event is not h11.NEED_DATA:
                return event
            if self._ended:
                raise httpx.ReadError(str(self._fault)) from self._fault
            await self._wait()


def _readable(sock: Any) -> bool:
    number = sock.fileno()
    if number < 0:
        return True
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(number, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([number], [], [], 0)[0])
