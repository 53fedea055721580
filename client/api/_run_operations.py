"""The handle of a flush, which `flush` returns: it tells whether the flush has ended, waits for it, or cancels it."""

from __future__ import annotations

import threading
from collections.abc import Generator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

from runqueue._entities import FlushReport
from runqueue.errors import ClosedError, FlushError
from runqueue.runtime import _fork
from runqueue.runtime._waiting import wait_for


class RunOperations:
    """
    A flush that may still be under way; returned by `flush`.

    In coroutines it can be awaited: `await operations` does what `await_completion` does.
    """

    def __init__(self, future: Future[FlushReport], client: object = None, *, only_warns: bool = False) -> None:
        self._future = future
        self._only_warns = only_warns  # the engine logs what was not stored, and the handle raises nothing
        self._client = client  # keeps the client alive: a client that is garbage-collected ends its flushes
        _fork.register(self)

    def _after_fork(self) -> None:
        """In a child: the flush has failed, as the thread that would end it runs in the parent only."""
        self._future._condition = threading.Condition()  # another thread of the parent may have held its lock
        if not self._future.done():
            self._future = Future()
            self._future.set_exception(ClosedError("the flush is that of the process which this one was forked from"))

    @property
    def done(self) -> bool:
        """Whether the flush has ended."""
        return self._future.done()

    @property
    def report(self) -> FlushReport | None:
        """What the flush has stored and what not. None: it is still under way, was cancelled, or could not begin."""
        succeeded = self._future.done() and not self._future.cancelled() and self._future.exception() is None
        return self._future.result() if succeeded else None

    def await_completion(self, timeout: float | None = None) -> None:
        """
        Wait until the flush has ended.

        Args:
            timeout: Seconds to wait; the flush itself goes on afterwards. None: until it ends.

        Raises:
            FlushError: Some entries were not stored. With `on_failure="warn"` they are logged, and nothing is raised.
            TimeoutError: The flush is still under way.
            ClosedError: The flush was cancelled, or the client was closed before the flush ended.
        """
        try:
            report = self._future.result(timeout)
        except FutureTimeoutError:
            raise TimeoutError(f"the flush is still under way after {timeout} s") from None
        except CancelledError:
            raise ClosedError("the client was closed before the flush ended") from None
        self._raise_failures(report)

    def cancel(self) -> None:
        """End the flush now. What it has not stored stays queued, and the next flush sends it."""
        self._future.cancel()

    def __await__(self) -> Generator[Any, Any, None]:
        return self._completion().__await__()

    async def _completion(self) -> None:
        try:
            report = await wait_for(self._future)
        except CancelledError:  # the flush was cancelled, not this task
            raise ClosedError("the client was closed before the flush ended") from None
        self._raise_failures(report)

    def __repr__(self) -> str:
        report = self.report
        if self._future.cancelled():
            return "<RunOperations cancelled>"
        if report is None:
            return "<RunOperations under way>"
        return f"<RunOperations done, {report.stored} of {report.total} stored>"

    def _raise_failures(self, report: FlushReport) -> None:
        if report.failures and not self._only_warns:
            raise FlushError(report.failures, report.total)
