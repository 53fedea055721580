"""
The face for coroutines, on asyncio and trio. The log calls are plain calls, as they never wait; what waits is awaited.

Nothing of ours runs in the caller's loop: the engine has one of its own, and a wait here is bridged to it.
"""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from runqueue._run_id import RunId
from runqueue.api._client import clean_exit
from runqueue.api._log_calls import LogCalls
from runqueue.api._run_operations import RunOperations
from runqueue.engine._engine import JOIN_SECONDS
from runqueue.errors import ClosedError
from runqueue.runtime import _notices
from runqueue.runtime._waiting import wait_for
from runqueue.settings._config import seconds

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncClient(LogCalls):
    """
    `runqueue.Client` for asyncio and trio: the same arguments, methods and guarantees.

        async with runqueue.AsyncClient() as client:
            run = client.create_run(experiment_id="0")
            client.log_metrics(run, {"loss": 0.7}, step=1)
            await client.flush()

    It may be made outside of any loop, and used in several, one after the other. Cancelling a wait leaves what is not
    stored yet in the queue.
    """

    _waits = False

    async def drain(self) -> None:
        """
        Wait until there is room for what was refused last, or for one more entry (see `max_pending`): log calls here
        never wait, but raise or drop.

        Raises:
            ClosedError: The client was closed before there was room.
            QueueFullError: The queue is full, and nothing drains it but `flush`: the client does not stream.
        """
        try:
            await wait_for(self._engine.drain())
        except CancelledError:  # the engine has ended, not the wait for it
            raise ClosedError("the client was closed before there was room") from None

    async def flush(
        self, synchronous: bool = True, *, run_id: RunId | None = None, timeout: float | None = None
    ) -> RunOperations:
        """See `Client.flush`. With `synchronous=False` the result can be awaited later."""
        begun: Future[None] | None = None if synchronous else Future()
        operations = self._begin_flush(run_id, timeout, begun)
        if begun is None:
            await operations
        else:
            await wait_for(begun, cancel=False)
        return operations

    async def close(self, timeout: float | None = None) -> None:
        """See `Client.close`."""
        timeout = seconds(timeout, "timeout")
        if not self._shut():
            return
        operations: RunOperations | None = None
        try:
            operations = self._begin_end(timeout)
            await operations
        finally:
            self._engine.report_lost_entries(
                await self._stop(failed=True), None if operations is None else operations.report
            )

    async def _stop(self, *, failed: bool) -> int:
        """End the engine without blocking the loop, also when this task is being cancelled."""
        import anyio

        with anyio.move_on_after(JOIN_SECONDS, shield=True):
            await wait_for(self._engine.request_stop(), cancel=False)
        return self._engine.stop(failed=failed)

    async def _shielded(self, future: Future[int]) -> int:
        """Wait for what the engine bounds itself, also when this task is being cancelled."""
        import anyio

        with anyio.CancelScope(shield=True), suppress(CancelledError):
            return await wait_for(future, cancel=False)
        return 0

    async def _discard(self) -> None:
        if not self._shut():
            return
        lost = 0
        try:
            last = self._engine.send_final_statuses()
            if last is not None:
                lost = await self._shielded(last)
        finally:
            lost += await self._stop(failed=False)
            if lost:
                _notices.warning("the block ended by an exception: %d queued entries were not sent", lost)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            await self.close()
        elif not clean_exit(exc) and not self._engine.config.streams:
            await self._discard()
        else:
            import anyio

            clean = clean_exit(exc)
            try:
                with anyio.CancelScope(shield=not clean):  # best effort, though this task may be being cancelled
                    await self.close(None if clean else self._engine.config.exit_timeout)
            except Exception as error:  # the script ends as it wanted to
                _notices.error("%s", error)
