"""
What is behind a client: the lanes it fills, and, in a thread with a loop of its own, the sender and the store.

Rules of this file: it assembles. The user's threads and loops reach the thread by `LoopThread.submit` alone. httpx,
anyio and mlflow are imported in the thread, not before.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import asynccontextmanager, suppress
from functools import partial
from time import sleep, time_ns
from typing import TYPE_CHECKING, Any

import attrs

from runqueue._entities import FlushReport, OperationFailure, Statistics
from runqueue.engine import _progress
from runqueue.engine._reports import public_failures, public_report, warn_of_dropped, warn_of_failures
from runqueue.errors import FlushError
from runqueue.http._upload import Meter
from runqueue.queueing import Accumulator, Bounds, Failure, Lane, Ledger, Limits, QueueFullError, Report, StoreError
from runqueue.queueing.batches._batch import METRIC, STATUS, record_of
from runqueue.queueing.lanes._intake import Intake
from runqueue.runtime import _exit, _fork, _notices
from runqueue.runtime._loop_thread import LoopThread
from runqueue.settings._config import Config
from runqueue.settings._redaction import redact_uri
from runqueue.stores._protocol import Traffic
from runqueue.stores._resolve import make_store
from runqueue.wire._encoder import Encoder
from runqueue.wire._limits import ENVELOPE_BYTES, MAX_CREATE_TAG_BYTES, MAX_CREATE_TAGS, MLFLOW_LIMITS

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

    from runqueue.engine._creation import Creation
    from runqueue.queueing.delivery._flush import Flush
    from runqueue.queueing.delivery._sender import Sender
    from runqueue.queueing.delivery._stream import Stream

JOIN_SECONDS = 5.0
"""How long an end waits for the thread, which has nothing left to do by then but to close sockets."""

GIVE_WAY = 60e-6
"""Seconds that our thread stops for between two pieces of work: a training's thread that waits for the interpreter needs
half of that to wake up; without a pause ours takes the lock again before."""

logger = logging.getLogger("runqueue")


class Engine:
    """
    Args:
        config: The client's.
        uri: The tracking URI, resolved and checked.
        waits: Whether a log call may wait for room.
    """

    def __init__(self, config: Config, uri: str, *, waits: bool = True) -> None:
        self.config = config
        self.uri = uri
        self.encoder = Encoder()  # see `_after_fork`
        config.seconds_per_request()  # a bad variable is an error of the constructor, not of the first flush
        config.retry_settings()
        self.bounds = _bounds(config, MLFLOW_LIMITS)
        self._stopped = False
        self._waits = waits
        bounded = self._intake if config.streams or config.pending_bound < math.inf else None
        self._thread = LoopThread(self._assembled)
        self.accumulator = Accumulator(self.encoder.encode, bounded)
        self._begin_anew()
        if config.streams:
            _exit.flush_at_exit(self, signals=config.handle_signals)
        _fork.register(self)
        self._sender: Sender
        self._stream: Stream
        self._creation: Creation
        self._tasks: TaskGroup

    def __repr__(self) -> str:
        return f"<Engine {redact_uri(self.uri)} {self._thread.state}>"

    def _begin_anew(self) -> None:
        self._ending = False
        self.traffic = Traffic()
        self.meter = Meter()
        self._final = 0  # entries that the last flush has reported as left
        self._written_off = False  # whether it was the last one, as nothing was heard of it
        self._said_late = 0  # entries that came after the end, when that was said last
        self._dropped_late = 0  # of those that were dropped, likewise
        self._start_pause = 0.0
        self.entered: set[str] = set()  # runs that this process is the entry point of
        self._thread = LoopThread(self._assembled)
        self.accumulator.reset()  # the same object: the log calls hold on to its lanes

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
        Args:
            lane: Only this run.
            timeout: Seconds.
            warn: Log what was not stored: for a flush nobody may wait for.
            begun: Gets done when the flush has begun: what is logged from then on belongs to the next one.
            final: It is the last one: what it cannot send has failed for good.
        """
        if not self._thread.started and self.accumulator.idle():
            future: Future[FlushReport] = Future()
            future.set_result(FlushReport(total=0, failures=()))
        else:
            future = self._thread.submit(self._flush, begun, lane, timeout, warn, final)
        if begun is not None:
            future.add_done_callback(lambda _: _say_begun(begun))  # it may fail, or be cancelled, before it can begin
        return future

    def send_final_statuses(self) -> Future[int] | None:
        """
        Of the runs whose block has ended by an exception, send the final status and nothing else, within `exit_timeout`.

        Returns:
            Entries that were given up for it. None: there is no such run.
        """
        lanes = [lane for lane in self.accumulator.all() if lane.raised and lane.opened]
        return self._thread.submit(self._send_final_statuses, lanes) if lanes else None

    def begin_final_flush(self, timeout: float) -> Future[FlushReport] | None:
        """See `_exit.ExitTarget`."""
        idle = self.accumulator.idle()
        if self._stopped or (idle and not self._thread.started):
            return None
        if self._ending and (idle or self._written_off) and self.unsent() <= self._final:
            return None
        self._ending = True
        return self._thread.submit(self._flush, None, None, timeout, True, True)

    def watch_log_calls(self, callback: Callable[[], None]) -> None:
        """See `_exit.ExitTarget`."""
        self.accumulator.watch(callback)

    def report_late_entries(self) -> None:
        """See `_exit.ExitTarget`. By ever larger counts, as there may be a log call in a loop."""
        self.report_late_drops()
        late = self.unsent() - self._final
        if late > 0 and late >= 2 * self._said_late:
            self._said_late = late
            text = "the interpreter ends: %d entries were logged too late for a client of %s, and were not sent"
            _notices.warning(text, late, redact_uri(self.uri))

    def report_late_drops(self) -> None:
        """See `_exit.ExitTarget`."""
        intake = self.accumulator.intake
        if intake is not None and intake.untold >= max(1, self._dropped_late):
            self._dropped_late += intake.untold
            self._say_dropped()

    def flush_logs(self) -> None:
        """See `_exit.ExitTarget`."""
        self._thread.flush_logs()

    def is_own_thread(self) -> bool:
        """Whether the caller is the engine's thread, or works for it."""
        return self._thread.is_own_thread()

    def queue_killed_status(self) -> None:
        """See `_exit.ExitTarget`."""
        lanes = [lane for lane in self.accumulator.all() if lane.made]
        lanes += [self.accumulator.open(run, opened=True) for run in self.entered]
        for lane in lanes:
            if not lane.ended:
                lane.ended = True
                lane.push(record_of(STATUS, (), "KILLED", time_ns() // 1_000_000))

    def unsent(self) -> int:
        """Entries that are queued or in flight."""
        counts = self.accumulator.counts()
        return counts["pending"] + counts["in_flight"]

    def give_up_waiting(self) -> int:
        """See `_exit.ExitTarget`."""
        self._written_off = True
        self._final = self.unsent()
        return self._final

    @property
    def exit_timeout(self) -> float:
        return self.config.exit_timeout

    def _after_fork(self) -> None:
        """In a child: nothing queued, no thread, no connection. What its parent's thread held is let lie."""
        self.encoder = Encoder()  # its caches may have been about to be changed
        self.accumulator._encode = self.encoder.encode
        self._begin_anew()
        if self.config.streams and not self._stopped:
            _exit.flush_at_exit(self, signals=False)  # who tells a worker to end wants it to end at once

    def stop(self, *, failed: bool) -> int:
        """
        End the thread; requests under way are cut off.

        Args:
            failed: What is still queued counts as failed (and was reported), else as dropped.

        Returns:
            Entries that were still queued.
        """
        self._stopped = True
        _exit.unregister(self)
        self._thread.stop()
        self._thread.join(JOIN_SECONDS)
        lost = self.accumulator.abandon(failed=failed)
        self._say_dropped()
        return lost

    def report_lost_entries(self, lost: int, report: FlushReport | None) -> None:
        """Of what `stop` has found, warn of what the last flush has not reported."""
        if report is None:
            if lost:
                logger.warning("the client was closed before its last flush ended: %d entries were not sent", lost)
        elif lost > self._final:
            logger.warning("%d entries came while the client was closed, and were not sent", lost - self._final)

    def stop_soon(self) -> Future[None]:
        """Ask the thread to end, and do not wait for it."""
        return self._thread.stop()

    def finalize(self) -> None:
        """For a client that is forgotten, or still there at exit: say what it leaves behind."""
        if self.config.streams and not self._stopped and self._thread.started:
            self._thread.nudge(self._end_by_itself)  # its data is sent as it would have been
            return
        _exit.unregister(self)
        lost = self.unsent()
        if lost:
            # After its end, what another thread was just logging can be left: its lane was looked up before.
            how = "got data while it was closed" if self._stopped else "was never closed"
            _notices.warning("a client of %s %s: %d entries were not sent", redact_uri(self.uri), how, lost)
        self._say_dropped()
        if not self._stopped:
            self._final = lost
            _exit.report_late_entries_of(self)
        self._thread.stop()  # not joined: this may be a garbage collection

    def drain(self) -> Future[None]:
        """Done when there is room for another entry."""
        if self.accumulator.intake is None:
            done: Future[None] = Future()
            done.set_result(None)
            return done
        return self._thread.submit(self._drain)

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

    def _intake(self, ledger: Ledger) -> Intake:
        config = self.config
        return Intake(
            ledger,
            max_pending=config.pending_bound,
            on_full=config.on_full if self._waits or config.on_full != "block" else "raise",
            block_timeout=config.block_timeout,
            full=self.bounds.room(METRIC) if config.streams else math.inf,
            ring=self._ring if config.streams else lambda: None,
            drains=lambda: config.streams and not self._stopped,
            exempt=self._thread.is_own_thread,
            lenient=config.only_warns,
            mark=-1 if config.streams else config.pending_bound,
        )

    # -- in the thread -----------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _assembled(self) -> AsyncGenerator[None, None]:
        """What lives in the loop."""
        with _fork.importing():
            import anyio

            from runqueue.artifacts._store import UPLOADS, Artifacts
            from runqueue.engine._creation import Creation
            from runqueue.engine._delivery import Delivery
            from runqueue.queueing.delivery._retry import RetryPolicy
            from runqueue.queueing.delivery._sender import Sender
            from runqueue.queueing.delivery._stream import Stream

            store = make_store(self.config, self.uri, self.traffic)
        self._start_pause = 0.0
        artifacts = None
        try:
            artifacts = Artifacts(store, self.config, self.uri, self.traffic, self.meter)
            self._creation = Creation(store, self.config.seconds_per_request(), artifacts.know)
            delivery = Delivery(store, self._creation, self.accumulator, artifacts)
            self._sender = Sender(
                self.accumulator,
                delivery,
                check=delivery.check,
                bounds=_bounds(self.config, store.limits),
                max_workers=self.config.max_workers,
                uploads=UPLOADS,
                alive=lambda: self.meter.heartbeats,
                retry=RetryPolicy(**attrs.asdict(self.config.retry_settings())),
                on_outage=self._warn_of_outage,
                streams=self.config.streams,
                pause=partial(sleep, GIVE_WAY),
                patience=self.config.stall_timeout(),
            )
            async with self._sender, anyio.create_task_group() as tasks:
                if self.config.flush_interval is not None:
                    self._stream = Stream(
                        self.accumulator,
                        self._sender,
                        self.config.flush_interval,
                        self._tell,
                        claims=self.config.only_warns,
                    )
                    tasks.start_soon(self._stream.run)
                    outage = self._sender.outage
                    tasks.start_soon(self._creation.watch, lambda: outage.since is None)
                self._tasks = tasks
                yield
                tasks.cancel_scope.cancel()
        finally:
            if artifacts is not None:
                await artifacts.aclose()
            await store.aclose()

    async def _flush(
        self, begun: Future[None] | None, lane: Lane | None, timeout: float | None, warn: bool, final: bool
    ) -> FlushReport:
        import anyio

        end = None if timeout is None else anyio.current_time() + timeout
        flush = self._sender.begin(lane, last=final)
        if begun is not None:
            _say_begun(begun)
        await self._completed(flush, timeout)
        if self._creation.doubtful and self._sender.outage.since is None:
            patience = self.config.seconds_per_request()
            if end is not None:
                patience = min(patience, max(0.0, end - anyio.current_time()))
            with anyio.move_on_after(patience):
                await self._creation.last_look()
        report = flush.report()  # last, as it names each failure once
        self._sender.tidy(flush)
        if final:
            self._make_final(report)
        public = public_report(report)
        if warn and public.failures:
            text, cause = str(FlushError(public.failures, report.total)), self._sender.outage.error
            logger.warning("%s%s", text, "" if cause is None or str(cause) in text else f"\n  The server: {cause}")
        self._say_dropped()
        return public

    def _ring(self) -> None:
        _exit.flush_at_worker_exit()  # here, in the thread of the work: later, the worker may have begun to end
        self._thread.nudge(self._hear, self._not_started)

    def _not_started(self, error: BaseException) -> None:
        """The store could not be made: an outage like any other, which is said once and tried again."""
        if self._start_pause == 0:
            text = "%s cannot be used yet (%d entries are queued): %s"
            logger.warning(text, redact_uri(self.uri), self.unsent(), error)
        self._start_pause = min(30.0, 2 * self._start_pause + 1)
        again = threading.Timer(self._start_pause, self._ring)
        again.daemon = True
        again.start()

    def _say_dropped(self) -> None:
        if self.accumulator.intake is not None:
            warn_of_dropped(self.accumulator.intake.told(), self.config.pending_bound)

    async def _completed(self, flush: Flush, timeout: float | None) -> None:
        if not (self.config.progress and flush.open):
            await self._sender.completion(flush, timeout)
            return
        ledger = self.accumulator.ledger
        begun = ledger.stored + ledger.failed
        settled = lambda: min(flush.total, ledger.stored + ledger.failed - begun)
        uploaded = _progress.uploaded(flush, self.meter)
        async with _progress.Shown(self._tasks, flush.total, settled, uploaded):
            await self._sender.completion(flush, timeout)

    def _end_by_itself(self) -> None:
        async def end() -> None:
            try:
                await self._flush(None, None, None, True, True)
            finally:
                self._stopped = True
                _exit.unregister(self)
                self._thread.stop()

        self._tasks.start_soon(end)

    def _hear(self) -> None:
        self._stream.hear()

    async def _drain(self) -> None:
        intake = self.accumulator.intake
        if self.config.streams:
            await self._stream.drain()
        elif intake is not None and not intake.roomy:
            raise QueueFullError("the queue is full, and without flush_interval= nothing drains it but flush()")

    def _tell(self, news: list[Failure], dropped: dict[Any, int]) -> None:
        warn_of_failures(news)
        warn_of_dropped(dropped, self.config.pending_bound)

    async def _send_final_statuses(self, lanes: list[Lane]) -> int:
        import anyio

        given_up = sum(lane.keep_only(STATUS) for lane in lanes)
        flushes = [self._sender.begin(lane) for lane in lanes]
        with anyio.move_on_after(self.config.exit_timeout):
            for flush in flushes:
                await self._sender.completion(flush, None)
        left = [each for flush in flushes for each in flush.report().failures if each.kind == STATUS]
        if left:  # it counts as no entry
            text = "the final status of %d runs was not stored, such as that of %s: %s"
            logger.warning(text, len(left), left[0].run, self._sender.outage.error or left[0].error)
        return given_up

    def _make_final(self, report: Report) -> None:
        """What the end of a client leaves queued has failed for good."""
        left: list[Failure] = [failure for failure in report.failures if not failure.final]
        for failure in left:
            failure.final = True
            self.accumulator.ledger.log.add(failure)
        self._final = sum(failure.weight for failure in left)

    def _warn_of_outage(self, error: StoreError) -> None:
        """Early, as whoever waits for a training wants to mend the server before its end; once, as nobody reads more."""
        if not self._ending:  # then one message says it all, with counts
            text = "%s does not take data (%d entries are queued): %s"
            logger.warning(text, redact_uri(self.uri), self.unsent(), error)


def _say_begun(begun: Future[None]) -> None:
    with suppress(InvalidStateError):  # it is said by whoever comes first: the beginning, or an end without one
        begun.set_result(None)


def _bounds(config: Config, own: Limits) -> Bounds:
    limits = own if config.limits is None else config.limits.over(own)
    return Bounds.of(limits, envelope=ENVELOPE_BYTES, riders=MAX_CREATE_TAGS, rider_bytes=MAX_CREATE_TAG_BYTES)
