"""What `flush` returns: a flush that may still be under way."""

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
    A flush, under way or over. In async code it can be awaited: `await operations` does what `await_completion` does.
    """

    def __init__(self, future: Future[FlushReport], client: object = None, *, lenient: bool = False) -> None:
        self._future = future
        self._lenient = lenient  # the engine logs what was not stored, and nothing is raised for it
        self._client = client  # kept: the end of a client that nobody holds ends its flushes
        _fork.register(self)

    def _after_fork(self) -> None:
        """In a child: nobody will end there what its parent's thread has begun."""
        self._future._condition = threading.Condition()  # another thread may have held it
        if not self._future.done():
            self._future = Future()
            self._future.set_exception(ClosedError("the flush is that of the process which this one was forked from"))

    @property
    def done(self) -> bool:
        """Whether the flush has ended."""
        return self._future.done()

    @property
    def report(self) -> FlushReport | None:
        """What the flush has stored and what not; None as long as it is under way, or if it could not begin."""
        over = self._future.done() and not self._future.cancelled() and self._future.exception() is None
        return self._future.result() if over else None

    def await_completion(self, timeout: float | None = None) -> None:
        """
        Wait until the flush has ended.

        Args:
            timeout: Seconds to wait; the flush goes on all the same. None: as long as it takes.

        Raises:
            FlushError: What the flush could not store; not with `on_failure="warn"`, which logs it.
            TimeoutError: It is still under way.
            ClosedError: The client was closed meanwhile, without flushing.
        """
        try:
            report = self._future.result(timeout)
        except FutureTimeoutError:
            raise TimeoutError(f"the flush is still under way after {timeout} s") from None
        except CancelledError:
            raise ClosedError("the client was closed before the flush ended") from None
        self._raise_failures(report)

    def cancel(self) -> None:
        """Stop sending for this flush; what is not stored stays queued for the next one."""
        self._future.cancel()

    def __await__(self) -> Generator[Any, Any, None]:
        return self._completion().__await__()

    async def _completion(self) -> None:
        try:
            report = await wait_for(self._future)
        except CancelledError:  # the flush was, not the wait for it
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
        if report.failures and not self._lenient:
            raise FlushError(report.failures, report.total)
