"""
What a request carries: bytes, or what is sent piece by piece, as a file is.

Rules of this file: no more than one piece is in memory; it is read in worker threads; what goes wrong with the file is kept
here, as a library that sends would make an error of its own of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, TypeAlias

import anyio

from runqueue.http._upload import CHUNK, Meter, Readable
from runqueue.queueing import StoreError
from runqueue.runtime._waiting import in_thread

PASSED_ON: Final = 5_000_000
"""Bytes a second that a server passes on at least to its own store, before it answers."""
_BEAT: Final = 5.0
"""Seconds between two signs of life."""


class Streamed:
    """
    A stretch of a file, or many bytes. Each iteration begins anew: a request may be repeated.

    Args:
        file: Open as long as this is in use; or the bytes.
        start: The first byte.
        count: Bytes.
        moved: Told of each piece, how many bytes it has, before it is sent; and of all of them, below zero, when it is
            begun anew.
    """

    def __init__(self, file: Readable | bytes, start: int, count: int, moved: Callable[[int], None]) -> None:
        self._file = file
        self._start = start
        self._count = count
        self._moved = moved
        self._sent = 0
        self.beat: Callable[[float], None] = lambda seconds: None
        """Told that it goes on, and by how many seconds more than usual; set by whoever watches the time."""
        self.fault: StoreError | None = None
        """What is wrong with the file, if it was that which has ended the request."""

    def __len__(self) -> int:
        return self._count

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.take_back()
        while self._sent < self._count:
            count = min(CHUNK, self._count - self._sent)
            try:
                piece = await self._read(self._start + self._sent, count)
            except StoreError as error:
                self.fault = error
                raise
            self._sent += count
            self._moved(count)
            self.beat(self._count / PASSED_ON if self._sent == self._count else 0.0)
            yield piece

    async def _read(self, start: int, count: int) -> bytes:
        if isinstance(self._file, bytes):
            return self._file[start : start + count]
        return await in_thread(self._file.read, start, count)

    @property
    def held(self) -> bytes:
        """All of it, if it is in memory."""
        return self._file if isinstance(self._file, bytes) else b""

    def take_back(self) -> None:
        """What was sent counts no longer."""
        if self._sent:
            self._moved(-self._sent)
        self._sent = 0


Body: TypeAlias = bytes | Streamed


async def kept_alive(work: Callable[[], Awaitable[None]], meter: Meter, seconds: float) -> None:
    """
    Do what may last long and shows nothing of it meanwhile.

    Args:
        work: To be done.
        meter: Given signs of life until it is done.
        seconds: But no longer than this: then it counts as stuck.
    """
    failure: Exception | None = None

    async def beat() -> None:
        with anyio.move_on_after(seconds):
            while True:
                await anyio.sleep(_BEAT)
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
