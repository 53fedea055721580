"""
The client for coroutines, on asyncio and trio. Its log calls are plain calls, as they never wait; `flush`, `close` and
`drain` are awaited.
"""

# Rules of this file: nothing of ours runs in the caller's loop. The engine has a loop of its own, and a caller here
# waits for a future of it.

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from runqueue._run_id import RunId
from runqueue.api._client import is_clean_exit
from runqueue.api._run import RunCalls
from runqueue.api._run_operations import RunOperations
from runqueue.engine._engine import JOIN_SECONDS
from runqueue.errors import ClosedError
from runqueue.runtime import _notices
from runqueue.runtime._waiting import wait_for
from runqueue.settings._config import seconds

if TYPE_CHECKING:
    from typing_extensions import Self


class AsyncClient(RunCalls):
    """
    `Client` for coroutines, on asyncio and trio: the same arguments, methods and guarantees.

        async with runqueue.AsyncClient(flush_interval=2.0) as client:
            run = client.create_run(experiment_name="nightly")
            client.log_metrics(run, {"loss": 0.7}, step=1)
            await client.flush()

    Log calls are plain calls, as they never wait. `flush`, `close` and `drain` are awaited; what they have not sent
    when they are cancelled stays queued. A client may be made outside of any loop, and used in several loops, one after
    the other.

    Args:
        tracking_uri: Where runs are stored: a URI, or a path of a folder. None: the URI that `mlflow` itself would use.
        max_workers: Requests in flight at once, at most; one run has at most one. Default: 8.
        limits: Limits of a batch, see `Limits`. None, or a field that is None: the store's own limit.
        request_timeout: Seconds for one attempt of a request, from its start to the last byte of the answer. None: the
            environment variable MLFLOW_HTTP_REQUEST_TIMEOUT, else 60.
        retry_timeout: Seconds for which a flush goes on retrying, counted from the first failure after the last
            success. None: 300.
        token: A bearer token, or a callable that returns one. The engine's thread calls it before the first request and
            after a 401. None: credentials as `mlflow` finds them.
        headers: HTTP headers of every request. They replace the client's own, except Content-Type and Accept-Encoding.
            None: no others.
        transport: What sends HTTP requests: "aiohttp", which "auto" means; "httpx", in pure Python, which takes three
            times the CPU time; or an `httpx.AsyncBaseTransport`. A transport that is passed gets all requests to the
            tracking server, and no setting of proxies, certificates or connections applies to it. The client closes it
            at its end. Unless it holds no connections, as `httpx.MockTransport`, no other client and no forked process
            can use it at the same time. It is not pickled with the client. Default: "auto".
        flush_interval: Seconds between two times at which a client that streams sends what is queued. Full batches are
            sent sooner. None: the client does not stream, and sends nothing before `flush()`, `close()` or the end of
            the block.
        max_pending: Entries that may be queued or in flight at once. None: 1,000,000 (about 80 MB) for a client that
            streams, else no bound.
        on_full: What a log call does when `max_pending` is reached: "block" waits for room, "raise" raises
            QueueFullError, "drop" drops the call's entries and logs how many. Instead of waiting, an `AsyncClient`
            and a client that does not stream raise. Default: "block".
        block_timeout: Seconds for which log calls wait in total each time the queue becomes full. After that they raise
            QueueFullError, or drop their entries with `on_failure="warn"`. Default: 60.
        on_failure: What `flush()`, `close()` and the end of a block do with entries that were not stored: "raise"
            raises FlushError, "warn" logs one warning. None: "warn" for a client that streams, else "raise".
        exit_timeout: Seconds for which a client that streams goes on sending after an exception has ended its block,
            and at the end of the interpreter. Default: 20.
        handle_signals: Whether a client that streams handles SIGTERM and SIGHUP, where they have their default actions:
            it sends what is queued, sets its unfinished runs to KILLED, and lets the signal end the process. Default:
            True.
        progress: Whether a flush of more than 2 seconds shows its progress: as a bar on a terminal and in a notebook,
            else as lines in the log. Default: True.
        proxies: Whether requests go through the proxies in HTTP_PROXY, HTTPS_PROXY and ALL_PROXY. Default: True.

    Raises:
        ConfigError: An argument or an environment variable has a bad value, or the tracking URI needs a package that is
            not installed.
        CallTypeError: An argument is of the wrong type.

    Guarantees:
        As those of `Client`.
    """

    _may_wait = False

    async def drain(self) -> None:
        """
        Wait until the queue has room: for the entries that were refused last, or else for one entry (see
        `max_pending`).

        Raises:
            ClosedError: The client was closed before there was room.
            QueueFullError: The queue is full, and the client does not stream: only `flush` makes room.
        """
        try:
            await wait_for(self._engine.drain())
        except CancelledError:  # the engine has ended; this task was not cancelled
            raise ClosedError("the client was closed before there was room") from None

    async def flush(
        self, synchronous: bool = True, *, run_id: RunId | None = None, timeout: float | None = None
    ) -> RunOperations:
        """
        Send everything that is queued now. Entries that are logged meanwhile do not prolong the flush.

        Args:
            synchronous: Whether to wait for the end of the flush and raise what failed. False: return once the flush
                has begun; the result can be awaited later.
            run_id: Send only this run, and create its parents. None: all runs.
            timeout: Seconds after which the flush ends; what it has not stored is reported, and stays queued. None: the
                flush ends when everything was tried, and `retry_timeout` bounds how long it retries.

        Returns:
            A handle of the flush, to await it or to cancel it.

        Raises:
            FlushError: Some entries were not stored; `failures` names each. Only with `synchronous`, and not with
                `on_failure="warn"`.
            ClosedError: The client was closed.
            ConfigError: `run_id` or `timeout` has a bad value.
        """
        begun: Future[None] | None = None if synchronous else Future()
        operations = self._begin_flush(run_id, timeout, begun)
        if begun is None:
            await operations
        else:
            await wait_for(begun, cancel=False)
        return operations

    async def close(self, timeout: float | None = None) -> None:
        """
        Flush, then end the client's thread and connections. All other calls raise ClosedError from now on.

        A second call, in any task or thread, waits for the end of the first, and raises nothing.

        Args:
            timeout: Seconds after which the flush ends, or this call returns if it is not the first. None: as for
                `flush`.

        Raises:
            FlushError: Some entries were not stored, and will not be. Not with `on_failure="warn"`.
        """
        timeout = seconds(timeout, "timeout")
        if not self._refuse_calls():
            await self._closing.wait_in_loop(timeout)
            return
        operations: RunOperations | None = None
        with self._closing:
            try:
                operations = self._begin_final_flush(timeout)
                await operations
            finally:
                lost = await self._stop(failed=True)
                ended = operations is not None and operations.report is not None
                self._engine.late.warn_of_lost(lost, flush_ended=ended)

    async def _stop(self, *, failed: bool) -> int:
        """End the engine without blocking the loop, even while this task is being cancelled."""
        import anyio

        with anyio.move_on_after(JOIN_SECONDS, shield=True):
            await wait_for(self._engine.request_stop(), cancel=False)
        return self._engine.stop(failed=failed)

    async def _shielded(self, future: Future[int]) -> int:
        """Wait for a future of bounded duration, even while this task is being cancelled."""
        import anyio

        with anyio.CancelScope(shield=True), suppress(CancelledError):
            return await wait_for(future, cancel=False)
        return 0

    async def _discard(self) -> None:
        """Close without a flush: send only the final status of runs whose block has raised, and warn of the rest."""
        if not self._refuse_calls():
            await self._closing.wait_in_loop(self._engine.config.exit_timeout)
            return
        lost = 0
        with self._closing:
            try:
                sending = self._engine.send_final_statuses()
                if sending is not None:
                    lost = await self._shielded(sending)
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
        elif not is_clean_exit(exc) and not self._engine.config.streams:
            await self._discard()
        else:
            import anyio

            is_clean = is_clean_exit(exc)
            try:
                with anyio.CancelScope(shield=not is_clean):  # sends even if this task is being cancelled
                    await self.close(None if is_clean else self._engine.config.exit_timeout)
            except Exception as error:  # must not hide the exception that has ended the block
                _notices.error("%s", error)
