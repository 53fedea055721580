"""The stream: the ticks of a client that streams. Everything queued is sent once an interval, full batches sooner."""

#     nothing queued   asleep until a log call wakes the engine
#     entries queued   a tick at the end of each interval; in between, a lane that has filled a batch wakes the engine
#     a steady flow    the engine looks by itself when the next batches should be full, a few at a time. No log call
#                      wakes it, which would cost the caller a system call and a wait for the interpreter's lock
#     no room          a tick at once if no request is under way; entries that can never be sent are dropped
#
# Rules of this file: it decides when, and `Sender.tick` does the rest. Notices are emitted only here, in the engine's
# thread. A log call must not run the user's logging handlers: they may log to runqueue again.

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Final

import anyio

from runqueue.queueing._errors import Scope, StoreError
from runqueue.queueing._report import MAX_CAUSES, MAX_FULL_FAILURES, Failure
from runqueue.queueing.batches._batch import RUN, STATUS
from runqueue.queueing.delivery._sender import Sender
from runqueue.queueing.lanes._accumulator import Accumulator
from runqueue.queueing.lanes._intake import Intake
from runqueue.queueing.lanes._lane import Lane

SHORTEST_SLEEP: Final = 0.005
"""The shortest sleep, in seconds, between two looks that no log call has asked for."""
LATENESS: Final = 1.05
"""The factor by which a look comes later than the predicted time of a full batch."""
FULL_BATCH_LINGER: Final = 0.25
"""
Seconds that a full batch of a steady flow waits for further ones, at most. They share one wake-up: beside a thread that
computes, each wake-up finds cold caches and takes the interpreter's lock away, which costs more than the sending.
"""
MOST_BATCHES: Final = 4
"""Batches that are sent by one look, at most."""
FULL_QUEUE_INTERVAL: Final = 1.0
"""Seconds between two ticks while the queue is full, however long the interval is."""
DROP_NOTICE_INTERVAL: Final = 60.0
"""Seconds between two notices on dropped entries: beside a dead server, entries are dropped at each step."""


class Stream:
    """
    Ticks for all lanes of a client.

    Args:
        accumulator: Holds the lanes. It must have an intake.
        sender: The sender of the same accumulator.
        interval: Seconds between two ticks.
        notify: Called with the first failure of each cause, and with the numbers of dropped entries by run.
        releases_failures: Whether reported failures may be released when there are too many to keep them for a flush.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        sender: Sender,
        interval: float,
        notify: Callable[[list[Failure], dict[Any, int]], None],
        *,
        releases_failures: bool,
    ) -> None:
        assert accumulator.intake is not None
        self._accumulator = accumulator
        self._intake: Intake = accumulator.intake
        self._sender = sender
        self._interval = interval
        self._notify_user = notify
        self._releases_failures = releases_failures
        self._released_at = 0  # the count of failures when failures were released last
        self._reported_refusals: set[str] = set()  # reported causes for which runs were not created
        self._full: list[Lane] = []  # lanes with a full batch that cannot be sent now
        self._woken = False
        self._sleep: anyio.CancelScope | None = None
        self._due = 0.0
        self._full_at = math.inf  # the predicted time of a full batch
        self._seen = self._seen_at = 0.0  # entries accepted by the last look, for runs that can be sent
        self._rate = 0.0  # new entries a second
        self._no_drop_notice_until = -math.inf  # until then, no notice on dropped entries

    def wake(self) -> None:
        """Wake the stream. Must be called in the engine's thread."""
        self._woken = True
        if self._sleep is not None:
            self._sleep.cancel()

    async def drain(self) -> None:
        """Wait until there is room for the entries that were refused last, or for another entry."""
        signalled_at = -math.inf
        while not self._intake.has_room:
            now = anyio.current_time()
            if now >= signalled_at + FULL_QUEUE_INTERVAL:  # Perhaps no log call has found the queue full yet.
                signalled_at, self._intake.found_full = now, True
                self.wake()
            with anyio.move_on_after(signalled_at + FULL_QUEUE_INTERVAL - now):
                await self._sender.progress()
        self._intake.largest_refused = 1

    async def run(self) -> None:
        """Run until cancelled."""
        try:
            await self._run()
        finally:  # If the engine starts another stream, the next log call must wake it.
            self._intake.take_full_lanes()
            self._intake.mark_asleep()

    async def _run(self) -> None:
        resting = False
        self._schedule_tick()
        while True:
            if self._is_idle():
                # A log call may have compared its inbox with the mark before the mark was lowered. Its record has
                # arrived by the end of another interval; the mark stays low until then.
                asleep, resting = resting, True
                self._intake.mark_asleep()
                if not asleep:
                    self._sender.tidy()
                self._notify()
                await self._sleep_until_due(math.inf if asleep else self._interval)
                if not self._woken:
                    continue
                self._schedule_tick()
            else:
                await self._sleep_until_due(max(0.0, min(self._due, self._full_at) - anyio.current_time()))
            resting = False
            self._woken = False
            self._look()

    async def _sleep_until_due(self, seconds: float) -> None:
        # Not an event with a deadline: in a steady flow no call sets it, and the end of a sleep costs much less.
        with anyio.CancelScope() as self._sleep:
            await anyio.sleep(0 if self._woken else min(seconds, self._seconds_to_notice()))
        self._sleep = None

    def _schedule_tick(self) -> None:
        self._due = anyio.current_time() + self._interval

    def _look(self) -> None:
        self._sender.give_way()
        full = self._intake.take_full_lanes()
        if self._full_at < math.inf:
            full += [
                lane
                for lane in self._accumulator.live()
                if lane.inbox_entries >= self._intake.batch_size and not lane.signalled
            ]
        found_full, self._intake.found_full = self._intake.found_full, False
        if due := anyio.current_time() >= self._due:
            self._intake.signalled_full_at = -1
        if due or (found_full and not self._sender.busy):
            self._sender.tick()
            self._schedule_tick()
            self._sender.tidy()  # Not at every look: it is more thorough than the rest.
            full += self._full
            self._full = []
        elif full:
            self._sender.tick(full)
        for lane in self._intake.rearm(full):
            if self._sender.outage.given_up or lane.awaits_flush:
                self._full.append(lane)
            else:  # The lane was filled again in the meantime.
                self._intake.full_lanes.append(lane)
                self._woken = True
        self._intake.update_bound()
        self._predict_full_batch()
        if found_full or self._intake.pending >= self._intake.max_pending:
            self._drop_unsendable()
            self._due = min(self._due, anyio.current_time() + FULL_QUEUE_INTERVAL)
        self._notify()

    def _predict_full_batch(self) -> None:
        """Predict from the rate of new entries when the fullest lane will have filled its batches."""
        now, full = anyio.current_time(), self._intake.batch_size
        waiting = [lane.inbox_entries for lane in self._accumulator.live() if not lane.awaits_flush]
        seen = self._accumulator.ledger.drawn + sum(waiting)
        elapsed, came = now - self._seen_at, seen - self._seen
        self._seen_at, self._seen = now, seen
        # A producer that pauses (for a validation, for the interpreter's lock) continues at its old rate afterwards.
        self._rate = max(came / elapsed if elapsed >= SHORTEST_SLEEP / 2 else 0.0, self._rate / 2)
        self._full_at = math.inf
        wanted = self._batches_per_look() * full
        if self._rate > 0 and wanted and not self._sender.outage.given_up:
            # A little late rather than early: an early look has to be repeated, a late one finds the batch full.
            expected = now + max(SHORTEST_SLEEP, LATENESS * (wanted - max(waiting, default=0)) / self._rate)
            if expected < self._due:
                self._full_at = expected
        self._intake.wake_size = full if self._full_at == math.inf else wanted + full  # a burst still wakes the engine

    def _batches_per_look(self) -> int:
        """
        Full batches that the next look waits for. 0: there is so little room that each full batch wakes the engine.
        """
        within = 1 + FULL_BATCH_LINGER * self._rate / self._intake.batch_size
        room = self._intake.max_pending / (4 * self._intake.batch_size)
        return int(min(within, room, MOST_BATCHES))

    def _is_idle(self) -> bool:
        return not any(lane.inbox or not lane.is_settled for lane in self._accumulator.live_with_uploads())

    def _drop_unsendable(self) -> None:
        """Make room: drop the entries of runs that the store refused to create, as they can never be sent."""
        for lane in self._accumulator.busy():
            if lane.awaits_flush and (count := lane.keep_only(RUN, STATUS)):
                self._intake.count_dropped(lane, count)
        self._sender.note_settled()

    def _seconds_to_notice(self) -> float:
        """Seconds until the next notice on dropped entries is due."""
        if not self._intake.has_unreported_drops:
            return math.inf
        return max(FULL_QUEUE_INTERVAL, self._no_drop_notice_until - anyio.current_time())

    def _notify(self) -> None:
        log = self._accumulator.ledger.log
        if self._releases_failures and log.count - self._released_at > MAX_FULL_FAILURES:
            self._released_at = log.count
            for lane in self._accumulator.live_with_uploads():
                lane.take_unreported(lane.last_closed)
        failures, now = [*self._refused(), *log.take_new_causes()], anyio.current_time()
        dropped = self._intake.take_dropped() if now >= self._no_drop_notice_until else {}
        if dropped:
            self._no_drop_notice_until = now + DROP_NOTICE_INTERVAL
        if failures or dropped:
            self._notify_user(failures, dropped)

    def _refused(self) -> Iterator[Failure]:
        """
        For each cause, the first run that the store refused to create. It stays queued, so the failure log lacks it.
        """
        for lane in self._accumulator.busy():
            blocked_by, text = lane.blocked_by, str(lane.blocked_by)
            waits = not lane.run_exists and isinstance(blocked_by, StoreError) and blocked_by.scope is Scope.LANE
            if waits:  # The run is created by another process. The error's text names the run.
                text = type(blocked_by).__name__
            if (
                blocked_by is None
                or not (lane.creation_refused or waits)
                or text in self._reported_refusals
                or len(self._reported_refusals) >= MAX_CAUSES
            ):
                continue
            self._reported_refusals.add(text)
            yield from (each for each in lane.outstanding(lane.last_closed, blocked_by) if each.kind == RUN)
