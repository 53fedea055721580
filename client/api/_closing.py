"""
The close of a client: the first call does the work, and all others wait until it has ended.
"""

# Rules of this file: no locks, because a signal handler or a garbage collection may call `close` in the middle of a
# `close` of the same thread. Such a call waits for nothing, as what it would wait for goes on only after it.

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from runqueue.runtime import _fork
from runqueue.runtime._waiting import wait_for

if TYPE_CHECKING:
    from typing_extensions import Self


class Closing:
    """
    Whether a client was closed, by which thread, and whether that has ended.

    The first call does its work in a block of this context manager: the end of the block lets the others return.
    """

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, object]] = {}  # the first call, with its thread
        self._ended: Future[None] = Future()
        _fork.register(self)

    def _after_fork(self) -> None:
        """In a child: the thread of the parent that closes the client does not run here."""
        self._ended = Future()
        if self._first:
            self._ended.set_result(None)

    def __repr__(self) -> str:
        state = "ended" if self._ended.done() else "under way" if self._first else "not begun"
        return f"<Closing {state}>"

    def begin(self) -> bool:
        """Whether this call is the first."""
        call = (threading.get_ident(), object())
        return self._first.setdefault("call", call) is call  # atomic: of several threads, one is the first

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(InvalidStateError):  # a fork in between has ended it
            self._ended.set_result(None)

    def wait(self, timeout: float | None) -> None:
        """
        Wait in this thread for the first call. Returns at once if it is interrupted by this one.

        Args:
            timeout: Seconds to wait at most. None: until it has ended.
        """
        if self._first["call"][0] != threading.get_ident():
            with suppress(FutureTimeoutError, CancelledError):
                self._ended.result(timeout)

    async def wait_in_loop(self, timeout: float | None) -> None:
        """Wait as `wait` does, in a coroutine: the first call may be another task of the same thread."""
        import anyio

        with anyio.move_on_after(timeout):
            await wait_for(self._ended, cancel=False)
