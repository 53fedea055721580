"""
The thread behind a client: one event loop of its own, with the sender and the store in it.

Rules of this file: the thread is started when it is first needed and is a daemon; the user's threads and loops reach
it by `submit` alone. httpx, anyio and mlflow are imported in it, not before.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from runqueue._config import Config, without_secrets
from runqueue._entities import FlushReport, OperationFailure, Statistics
from runqueue._reports import public_failures, public_report
from runqueue._store import Traffic
from runqueue._stores import make_store
from runqueue._wire import ENVELOPE, MLFLOW_LIMITS, RIDER_BYTES, RIDERS, Encoder
from runqueue.queueing import Accumulator, Bounds, ClosedError, Failure, Lane, Limits, Report, StoreError

if TYPE_CHECKING:
    import asyncio

    import anyio
    from anyio.from_thread import BlockingPortal

    from runqueue._creation import Creation
    from runqueue.queueing._sender import Sender

T = TypeVar("T")

JOIN_SECONDS = 5.0
"""How long `stop` waits for the thread, which has nothing left to do by then but to close sockets."""

logger = logging.getLogger("runqueue")


class Engine:
    """
    Args:
        config: The client's.
        uri: The tracking URI, resolved and checked.
    """

    def __init__(self, config: Config, uri: str) -> None:
        self.config = config
        self.uri = uri
        self.traffic = Traffic()
        self.encoder = Encoder()
        self.accumulator = Accumulator(self.encoder.encode)
        config.seconds_per_request()  # a bad variable is an error of the constructor, not of the first flush
        _bounds(config, MLFLOW_LIMITS)
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._ended: Future[None] = Future()
        self._portal: BlockingPortal
        self._loop: asyncio.AbstractEventLoop
        self._stop: anyio.Event
        self._sender: Sender
        self._creation: Creation

    def __repr__(self) -> str:
        state = "running" if self._thread is not None else "not started"
        return f"<Engine {without_secrets(self.uri)} {state}>"

    @property
    def started(self) -> bool:
        return self._thread is not None

    # -- calls from any thread ---------------------------------------------------------------------------------------

    def submit(self, function: Callable[..., Awaitable[T]], *args: Any) -> Future[T]:
        """Run a coroutine function in the engine's loop. Cancelling the future cancels it."""
        if threading.current_thread() is self._thread:
            raise RuntimeError("runqueue's own thread cannot wait for itself")
        self._start()
        try:
            return self._portal.start_task_soon(function, *args)
        except RuntimeError:  # the portal's word for having been stopped
            raise ClosedError("the client was closed meanwhile") from None

    def flush(self, lane: Lane | None, timeout: float | None, *, warn: bool) -> Future[FlushReport]:
        """
        Args:
            lane: Only this run.
            timeout: Seconds.
            warn: Log what was not stored: for a flush nobody may wait for.
        """
        if not self.started and self.accumulator.idle():
            nothing: Future[FlushReport] = Future()
            nothing.set_result(FlushReport(total=0, failures=()))
            return nothing
        return self.submit(self._flush, lane, timeout, warn, False)

    def close(self, timeout: float | None) -> Future[FlushReport]:
        """A last flush: what it cannot send is final."""
        if not self.started and self.accumulator.idle():
            return self.flush(None, timeout, warn=False)
        return self.submit(self._flush, None, timeout, False, True)

    def stop(self, *, failed: bool) -> int:
        """
        End the thread; requests under way are cut off.

        Args:
            failed: What is still queued counts as failed (and was reported), else as dropped.

        Returns:
            Entries that were still queued.
        """
        self.stop_soon()
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)
        return self.accumulator.abandon(failed=failed)

    def stop_soon(self) -> Future[None]:
        """Ask the thread to end; the future is done when it has nothing left to do but to return."""
        with self._starting:
            if self._thread is None:
                if not self._ended.done():
                    self._ended.set_result(None)
            elif not self._stopping:
                # Not by the portal, which waits for the loop: this may be a garbage collection in the loop's own thread.
                with suppress(RuntimeError):  # the loop is closed already
                    self._loop.call_soon_threadsafe(self._stop.set)
            self._stopping = True
        return self._ended

    def finalize(self) -> None:
        """For a client that is forgotten, or still there at exit: say what it leaves behind."""
        lost = self.accumulator.counts()["pending"]
        if lost:
            logger.warning("a client of %s was never closed: %d entries were not sent", without_secrets(self.uri), lost)
        self.stop_soon()  # not joined: this may be a garbage collection

    def statistics(self) -> Statistics:
        """Exact when no call is under way."""
        return Statistics(
            **self.accumulator.counts(),
            cut=self.encoder.cut,
            retried=self.accumulator.ledger.retried,
            requests=self.traffic.requests,
            bytes_sent=self.traffic.bytes_sent,
        )

    def failures(self) -> tuple[OperationFailure, ...]:
        return public_failures(self.accumulator.ledger.log)

    # -- in the thread -----------------------------------------------------------------------------------------------

    async def _flush(self, lane: Lane | None, timeout: float | None, warn: bool, final: bool) -> FlushReport:
        import anyio

        begun = anyio.current_time()
        report = await self._sender.flush(lane, timeout)
        if self._sender.outage.since is None:
            left = None if timeout is None else max(0.0, begun + timeout - anyio.current_time())
            with anyio.move_on_after(left):
                await self._creation.last_look()
        if final:
            self._make_final(report)
        public = public_report(report)
        if warn and public.failures:
            logger.warning(
                "%d of %d entries were not stored; the first cause: %s",
                report.not_stored,
                report.total,
                public.failures[0].error,
            )
        return public

    def _make_final(self, report: Report) -> None:
        """What the end of a client leaves queued has failed for good."""
        left: list[Failure] = [failure for failure in report.failures if not failure.final]
        for failure in left:
            failure.final = True
            self.accumulator.ledger.log.add(failure)

    def _warn_of_outage(self, error: StoreError) -> None:
        """Early, as whoever waits for a training wants to mend the server before its end; once, as nobody reads more."""
        queued = self.accumulator.counts()["pending"] + self.accumulator.counts()["in_flight"]
        logger.warning("%s does not take data (%d entries are queued): %s", without_secrets(self.uri), queued, error)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._starting:
            if self._thread is not None:
                return
            ready: Future[None] = Future()
            thread = threading.Thread(target=self._run, args=(ready,), name="runqueue", daemon=True)
            thread.start()
            ready.result()
            self._thread = thread

    def _run(self, ready: Future[None]) -> None:
        import anyio

        try:
            anyio.run(self._main, ready, backend="asyncio")
        except BaseException as error:
            if ready.done():
                raise
            ready.set_exception(error)
        finally:
            self._ended.set_result(None)

    async def _main(self, ready: Future[None]) -> None:
        import asyncio

        import anyio
        from anyio.from_thread import BlockingPortal

        from runqueue._creation import Creation
        from runqueue._delivery import Delivery
        from runqueue.queueing._retry import RetryPolicy
        from runqueue.queueing._sender import Sender

        store = make_store(self.config, self.uri, self.traffic)
        try:
            self._creation = Creation(store, self.config.seconds_per_request())
            self._sender = Sender(
                self.accumulator,
                Delivery(store, self._creation, self.accumulator),
                bounds=_bounds(self.config, store.limits),
                max_workers=self.config.max_workers,
                retry=RetryPolicy(timeout=self.config.seconds_of_retrying()),
                on_outage=self._warn_of_outage,
            )
            self._loop, self._stop = asyncio.get_running_loop(), anyio.Event()
            async with BlockingPortal() as self._portal, self._sender:
                ready.set_result(None)
                await self._stop.wait()
                await self._portal.stop(cancel_remaining=True)
        finally:
            await store.aclose()


def _bounds(config: Config, own: Limits) -> Bounds:
    limits = own if config.limits is None else config.limits.over(own)
    return Bounds.of(limits, envelope=ENVELOPE, riders=RIDERS, rider_bytes=RIDER_BYTES)
