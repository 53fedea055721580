"""
httpcore's network on asyncio's own streams, for connections without TLS.

httpcore speaks to asyncio by anyio, which guards each read and write with a scope, a time-out and a turn of the loop. Here
one deadline guards the whole attempt (see `_http_store`), so nothing of that is wanted. TLS is left to httpcore: asyncio's
streams can be upgraded from Python 3.11 on only.

Rules of this file: whatever goes wrong is an error of httpcore's; what it says of time-outs is not looked at.
"""

from __future__ import annotations

import asyncio
import select
from typing import Any, Final

import httpcore

_NEXT_ADDRESS: Final = 0.25
"""Seconds after which a host's next address is tried too; source: RFC 8305, section 8."""


async def connect(host: str, port: int) -> httpcore.AsyncNetworkStream:
    """
    In the running asyncio loop.

    Raises:
        httpcore.ConnectError: There is no such host, or nobody listens.
    """
    try:
        reader, writer = await asyncio.open_connection(host, port, happy_eyeballs_delay=_NEXT_ADDRESS)
    except (OSError, UnicodeError) as error:  # idna's, of a host that is no name
        raise httpcore.ConnectError(str(error)) from error
    return _Stream(reader, writer)


class _Stream(httpcore.AsyncNetworkStream):
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        try:
            return await self._reader.read(max_bytes)
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if not buffer:
            return
        try:
            self._writer.write(buffer)
            await self._writer.drain()
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        # Not `close`, which waits for a peer that reads no more; nothing that is wanted is left to be written.
        self._writer.transport.abort()
        await asyncio.sleep(0)  # in which the socket is closed

    def get_extra_info(self, info: str) -> Any:
        if info == "is_readable":  # of an idle connection: its end has come, or what nobody has asked for
            return self._reader.at_eof() or _readable(self._writer.get_extra_info("socket"))
        return self._writer.get_extra_info(info)


def _readable(sock: Any) -> bool:
    """What the system has, as the loop may not have looked yet."""
    number = sock.fileno()
    if number < 0:
        return True
    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(number, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([number], [], [], 0)[0])
