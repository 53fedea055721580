"""
The body of a request: bytes, or a stretch of a file that is sent piece by piece.

    Streamed            the stretch, read anew for each attempt
    with_heartbeats     runs work that takes long and reports nothing meanwhile
"""

# Rules of this file: at most one piece is in memory; pieces are read in worker threads. An error of the file is kept in
# `file_error`, because a transport would replace it by an error of its own.

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias

import anyio

from runqueue.http._upload import CHUNK, Meter, Readable
from runqueue.queueing import StoreError
from runqueue.runtime._waiting import in_thread

FORWARDING_RATE: Final = 5_000_000
"""Bytes a second: the least at which a server is expected to pass an upload on to its own store, before it answers."""
_HEARTBEAT: Final = 5.0
"""Seconds between two heartbeats."""


class Streamed:
    """
    A stretch of a file, or of bytes in memory. Each iteration begins anew, because a request may be repeated.

    Args:
        file: Stays open as long as this is in use; or the bytes.
        start: The first byte.
        count: Bytes.
        on_sent: Called with the size of each piece before it is sent, and with the negative sum of all of them when the
            sending begins anew.
    """

    def __init__(self, file: Readable | bytes, start: int, count: int, on_sent: Callable[[int], None]) -> None:
        self._file = file
        self._start = start
        self._count = count
        self._on_sent = on_sent
        self._sent = 0
        self.on_progress: Callable[[float], None] = lambda seconds: None
        """Called with each piece: by how many seconds the deadline has to move beyond the usual; set by the sender."""
        self.file_error: StoreError | None = None
        """The error of the file that has ended the request. None: the file is in order."""

    def __len__(self) -> int:
        return self._count

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.reset()
        while self._sent < self._count:
            count = min(CHUNK, self._count - self._sent)
            try:
                piece = await self._read(self._start + self._sent, count)
            except StoreError as error:
                self.file_error = error
                raise
            self._sent += count
            self._on_sent(count)
            self.on_progress(self._count / FORWARDING_RATE if self._sent == self._count else 0.0)
            yield piece

    async def _read(self, start: int, count: int) -> bytes:
        if isinstance(self._file, bytes):
            return self._file[start : start + count]
        return await in_thread(self._file.read, start, count)

    @property
    def in_memory(self) -> bytes:
        """The whole body if it is in memory, else nothing."""
        return self._file if isinstance(self._file, bytes) else b""

    def reset(self) -> None:
        """Take back what was reported as sent."""
        if self._sent:
            self._on_sent(-self._sent)
        self._sent = 0


Body: TypeAlias = bytes | Streamed


async def with_heartbeats(work: Callable[[], Awaitable[None]], meter: Meter, seconds: float) -> None:
    """
    Run work that may take long and reports no progress.

    Args:
        work: Called once.
        meter: Gets a heartbeat every few seconds until the work is done.
        seconds: The heartbeats end after this time, and the work counts as stuck.
    """
    failure: Exception | None = None

    async def beat() -> None:
        with anyio.move_on_after(seconds):
            while True:
                await anyio.sleep(_HEARTBEAT)
                meter.add(0)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(beat)
        try:
            await work()
        except Exception as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
