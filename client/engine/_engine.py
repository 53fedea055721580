"""
What is behind a client: the lanes that its log calls fill, and a thread with an event loop in which they are sent.

The two clients call `Engine` from their callers' threads; what it needs of the loop, it submits to its thread.
"""

# Rules of this file: the callers' threads and loops reach the engine's thread by `LoopThread` alone. anyio, httpx and
# mlflow are imported in the engine's thread, with `_assembly`, and not before.

from __future__ import annotations

import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import time_ns
from typing import TYPE_CHECKING, Any, Final

from runqueue._entities import FlushReport, OperationFailure, Statistics
from runqueue.engine._delivery import bounds_of
from runqueue.engine._late_entries import LateEntries
from runqueue.engine._reports import public_failures, public_report
from runqueue.errors import FlushError
from runqueue.http._upload import Meter
from runqueue.queueing import Accumulator, Lane, Ledger, Report, StoreError
from runqueue.queueing.batches._batch import METRIC, STATUS, record_of
from runqueue.queueing.lanes._intake import Intake
from runqueue.runtime import _exit, _fork, _notices
from runqueue.runtime._loop_thread import LoopThread
from runqueue.settings._config import Config
from runqueue.settings._redaction import redact_uri
from runqueue.stores._protocol import Traffic
from runqueue.wire._encoder import Encoder
from runqueue.wire._limits import MLFLOW_LIMITS

if TYPE_CHECKING:
    from runqueue.engine._assembly import Assembly

JOIN_SECONDS: Final = 5.0
"""How long the end of a client waits for the thread, which by then only closes its connections."""
MAX_RESTART_DELAY: Final = 30.0
"""Seconds between two attempts to start an engine whose store cannot be made, at most."""

logger = logging.getLogger("runqueue")


class Engine:
    """
    Queues and sends what one client logs. Its thread starts with the first call that needs it.

    Args:
        config: The client's settings.
        uri: The tracking URI, resolved and checked.
        may_wait: Whether a log call may wait for room in its caller's thread.

    Raises:
        ConfigError: An environment variable that the client will need later has a bad value.
    """

    def __init__(self, config: Config, uri: str, *, may_wait: bool = True) -> None:
        self.config = config
        self.uri = uri
        self.encoder = Encoder()
        config.seconds_per_request()  # both are called for their ConfigError: the constructor raises it, not a flush
        config.retry_settings()
        self.bounds = bounds_of(config, MLFLOW_LIMITS)
        self._stopped = False
        self._may_wait = may_wait
        self._thread = LoopThread(self._run_assembly)
        has_intake = config.streams or config.pending_bound < math.inf
        self.accumulator = Accumulator(self.encoder.encode, self._make_intake if has_intake else None)
        self._reset()
        if config.streams:
            _exit.flush_at_exit(self, signals=config.handle_signals)
        _fork.register(self)
        self._assembly: Assembly

    def __repr__(self) -> str:
        return f"<Engine {redact_uri(self.uri)} {self._thread.state}>"

    def _reset(self) -> None:
        self.traffic = Traffic()
        self.meter = Meter()
        self.own_runs: set[str] = set()
        """Ids of existing runs that this process was started for, has made or resumed otherwise, and has not ended."""
        self._final_flush_begun = False
        self._last_statuses: Future[None] | None = None  # is done when the final statuses of `finalize` are sent
        self._gave_up_waiting = False
        self._restart_delay = 0.0
        self._thread = LoopThread(self._run_assembly)
        self.accumulator.reset()  # not replaced: the log calls hold on to its lanes
        self.late = LateEntries(self.uri, self.accumulator, self.config.pending_bound)

    # -- calls from any thread ---------------------------------------------------------------------------------------

    def flush(
        self,
        lane: Lane | None,
        timeout: float | None,
        *,
        warn: bool,
        begun: Future[None] | None = None,
        final: bool = False,
    ) -> Future[FlushReport]:
        """
        Begin a flush.

        Args:
            lane: Only this run.
            timeout: Seconds after which the flush ends, and the rest stays queued.
            warn: Whether to log what was not stored, for a caller that may not wait for the report.
            begun: Is completed when the flush has begun: what is logged after that belongs to the next flush.
            final: Whether it is the client's last flush: what it cannot send has failed for good.
        """
        if not self._thread.started and self.accumulator.inboxes_empty():
            future: Future[FlushReport] = Future()
            future.set_result(FlushReport(total=0, failures=()))
        else:
            future = self._thread.submit(self._flush, begun, lane, timeout, warn, final)
        if begun is not None:
            future.add_done_callback(lambda _: _complete(begun))  # a flush may fail or be cancelled before it begins
        return future

    def send_final_statuses(self) -> Future[int] | None:
        """
        Send the final status of the runs whose block has ended by an exception, and nothing else, within
        `exit_timeout`.

        Returns:
            Entries that were given up. None: there is no such run.
        """
        lanes = self._lanes_of_raised_blocks()
        return self._thread.submit(self._send_final_statuses, lanes) if lanes else None

    def _lanes_of_raised_blocks(self) -> list[Lane]:
        return [lane for lane in self.accumulator.all() if lane.block_raised and lane.run_exists and not lane.is_done]

    def drain(self) -> Future[None]:
        """Wait for room for another entry."""
        if self.accumulator.intake is None:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._thread.submit(self._drain)

    def statistics(self) -> Statistics:
        """Counts, exact when no call is under way."""
        return Statistics(
            **self.accumulator.counts(),
            cut=self.encoder.cut,
            retried=self.accumulator.ledger.retried,
            requests=self.traffic.requests,
            bytes_sent=self.traffic.bytes_sent,
        )

    def failures(self) -> tuple[OperationFailure, ...]:
        """All final failures."""
        return public_failures(self.accumulator.ledger.log)

    def unsent(self) -> int:
        """Entries that are queued or in flight."""
        return self.late.unsent()

    # -- the end of the client ---------------------------------------------------------------------------------------

    def request_stop(self) -> Future[None]:
        """Ask the thread to end, without waiting for it; requests under way are cut off."""
        return self._thread.stop()

    def stop(self, *, failed: bool) -> int:
        """
        End the thread, and wait for it; requests under way are cut off.

        Args:
            failed: What is still queued counts as failed (a flush has reported it), else as dropped.

        Returns:
            Entries that were still queued.
        """
        self._stopped = True
        _exit.unregister(self)
        self._thread.stop()
        self._thread.join(JOIN_SECONDS)
        lost = self.accumulator.abandon(failed=failed)
        self.late.warn_of_drops()
        return lost

    def finalize(self, client: Callable[[], object]) -> None:
        """
        End the engine of a client that was garbage-collected, or that does not stream and is still open at exit.

        A client that streams sends what is queued. Any other warns of it, and sends final statuses as
        `send_final_statuses` does.

        Args:
            client: A weak reference to the client. It is alive at exit, where this waits for the end of the requests.
        """
        if self.config.streams and not self._stopped and self._thread.started:
            self._thread.call_soon(self._start_final_flush)
            return
        _exit.unregister(self)
        lost = self.unsent()
        if lost:
            # A log call that was running while the client was closed may have found its lane before that.
            how = "got data while it was closed" if self._stopped else "was never closed"
            _notices.warning("a client of %s %s: %d entries were not sent", redact_uri(self.uri), how, lost)
        self.late.warn_of_drops()
        if not self._stopped:
            self.late.reported = lost
            _exit.report_late_entries_of(self)
        lanes = [] if self._stopped else self._lanes_of_raised_blocks()
        if not lanes:
            self._thread.stop()  # not joined: this may be a garbage collection
            return
        self._last_statuses = Future()
        self._thread.call_soon(partial(self._start_final_statuses, lanes), lambda _: self._thread.stop())
        _exit.flush_at_exit(self, signals=False)  # the process may end before the requests do
        if client() is not None:
            _exit.flush_now(self)

    # -- the end of the process; see `_exit.ExitTarget` --------------------------------------------------------------

    @property
    def exit_timeout(self) -> float:
        return self.config.exit_timeout

    def is_own_thread(self) -> bool:
        return self._thread.is_own_thread()

    def begin_final_flush(self, timeout: float) -> Future[Any] | None:
        if self._last_statuses is not None:
            return self._last_statuses
        idle = self.accumulator.inboxes_empty()
        if self._stopped or (idle and not self._thread.started):
            return None
        if self._final_flush_begun and (idle or self._gave_up_waiting) and self.unsent() <= self.late.reported:
            return None
        self._final_flush_begun = True
        return self._thread.submit(self._flush, None, None, timeout, True, True)

    def give_up_waiting(self) -> int:
        self._gave_up_waiting = True
        self.late.reported = self.unsent()
        return self.late.reported

    def queue_killed_status(self) -> None:
        lanes = [lane for lane in self.accumulator.all() if lane.owned]
        lanes += [self.accumulator.open(run, run_exists=True) for run in self.own_runs]
        for lane in lanes:
            if not lane.ended:
                lane.ended = True
                lane.push(record_of(STATUS, (), "KILLED", time_ns() // 1_000_000))

    def watch_log_calls(self, callback: Callable[[], None]) -> None:
        self.accumulator.watch(callback)

    def report_late_entries(self) -> None:
        self.late.warn()

    def report_late_drops(self) -> None:
        self.late.warn_of_late_drops()

    def flush_logs(self) -> None:
        self._thread.flush_logs()

    # -- fork --------------------------------------------------------------------------------------------------------

    def _after_fork(self) -> None:
        """In a child: begin with no thread, no connection and an empty queue. The parent sends what it has queued."""
        self.encoder = Encoder()  # another thread of the parent may have been changing its caches
        self.accumulator._encode = self.encoder.encode
        self._reset()
        if self.config.streams and not self._stopped:
            _exit.flush_at_exit(self, signals=False)  # a worker that is terminated is to end at once

    # -- the intake: calls from log calls ----------------------------------------------------------------------------

    def _make_intake(self, ledger: Ledger) -> Intake:
        config = self.config
        return Intake(
            ledger,
            max_pending=config.pending_bound,
            on_full=config.on_full if self._may_wait or config.on_full != "block" else "raise",
            block_timeout=config.block_timeout,
            batch_size=self.bounds.room(METRIC) if config.streams else math.inf,
            wake=self._wake if config.streams else lambda: None,
            drains=lambda: config.streams and not self._stopped,
            is_engine_thread=self._thread.is_own_thread,
            drops_after_timeout=config.only_warns,
            mark=-1 if config.streams else config.pending_bound,
        )

    def _wake(self) -> None:
        """Let the stream look at the queue; starts the thread if there is none."""
        _exit.flush_at_worker_exit()  # here, in the worker's own thread: later, the worker may have begun to end
        self._thread.call_soon(self._wake_stream, self._retry_start)

    def _retry_start(self, error: BaseException) -> None:
        """Treat a store that cannot be made as an outage: warn of it once, and try again later."""
        if self._restart_delay == 0:
            text = "%s cannot be used yet (%d entries are queued): %s"
            logger.warning(text, redact_uri(self.uri), self.unsent(), error)
        self._restart_delay = min(MAX_RESTART_DELAY, 2 * self._restart_delay + 1)
        timer = threading.Timer(self._restart_delay, self._wake)
        timer.daemon = True
        timer.start()

    # -- in the engine's thread --------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _run_assembly(self) -> AsyncGenerator[None, None]:
        with _fork.importing():
            from runqueue.engine._assembly import assembled
        making = assembled(
            self.config,
            lambda: self.uri,
            self.accumulator,
            traffic=self.traffic,
            meter=self.meter,
            on_outage=self._warn_of_outage,
        )
        async with making as self._assembly:
            self._restart_delay = 0.0
            yield

    async def _flush(
        self, begun: Future[None] | None, lane: Lane | None, timeout: float | None, warn: bool, final: bool
    ) -> FlushReport:
        on_begun = lambda: None if begun is None else _complete(begun)
        report = await self._assembly.flush(lane, timeout, final=final, on_begun=on_begun)
        if final:
            self._make_final(report)
        public = public_report(report)
        if warn and public.failures:
            text, cause = str(FlushError(public.failures, report.total)), self._assembly.outage_error
            logger.warning("%s%s", text, "" if cause is None or str(cause) in text else f"\n  The server: {cause}")
        self.late.warn_of_drops()
        return public

    def _make_final(self, report: Report) -> None:
        """What the final flush leaves queued has failed for good."""
        left = [failure for failure in report.failures if not failure.final]
        for failure in left:
            failure.final = True
            self.accumulator.ledger.log.add(failure)
        self.late.reported = sum(failure.weight for failure in left)

    def _start_final_flush(self) -> None:
        async def flush_and_stop() -> None:
            try:
                await self._flush(None, None, None, True, True)
            finally:
                self._stopped = True
                _exit.unregister(self)
                self._thread.stop()

        self._assembly.start(flush_and_stop)

    def _start_final_statuses(self, lanes: list[Lane]) -> None:
        ended = self._last_statuses

        async def send_and_stop() -> None:
            try:
                await self._send_final_statuses(lanes)
            finally:
                self._stopped = True
                _exit.unregister(self)
                if ended is not None:
                    ended.set_result(None)
                self._thread.stop()

        self._assembly.start(send_and_stop)

    async def _send_final_statuses(self, lanes: list[Lane]) -> int:
        return await self._assembly.send_final_statuses(lanes)

    async def _drain(self) -> None:
        await self._assembly.drain()

    def _wake_stream(self) -> None:
        self._assembly.wake()

    def _warn_of_outage(self, error: StoreError) -> None:
        """Warn while the training still runs, so that its user can mend the server; once an outage."""
        if not self._final_flush_begun:  # the final flush logs one message with all counts
            text = "%s does not take data (%d entries are queued): %s"
            logger.warning(text, redact_uri(self.uri), self.unsent(), error)


def _complete(begun: Future[None]) -> None:
    with suppress(InvalidStateError):  # the flush has begun, and now it has ended
        begun.set_result(None)
