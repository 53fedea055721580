"""The stream: the ticks of a client that streams. Everything queued is sent once an interval, full batches sooner."""

#     nothing queued   asleep until a log call wakes the engine
#     entries queued   a tick at the end of each interval; in between, a lane that has filled a batch wakes the engine
#     a steady flow    the engine looks by itself when the next batches should be full, a few at a time. No log call wakes it,
#                      which would cost the caller a system call and a wait for the interpreter's lock
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
from runqueue.queueing._report import KEPT_IN_FULL, MOST_CAUSES, Failure
from runqueue.queueing.batches._batch import RUN, STATUS
from runqueue.queueing.delivery._sender import Sender
from runqueue.queueing.lanes._accumulator import Accumulator
from runqueue.queueing.lanes._intake import Intake
from runqueue.queueing.lanes._lane import Lane

SOONEST: Final = 0.005
"""The shortest sleep, in seconds, between two looks that no log call has asked for."""
LATE: Final = 1.05
"""The factor by which a look comes later than the predicted time of a full batch."""
COMPANY: Final = 0.25
"""
Seconds that a full batch of a steady flow waits for further ones, at most. They share one wake-up: beside a thread that
computes, each wake-up finds cold caches and takes the interpreter's lock away, which costs more than the sending.
"""
TOGETHER: Final = 4
"""Batches that are sent by one look, at most."""
PRESSED: Final = 1.0
"""Seconds between two ticks while the queue is full, however long the interval is."""
QUIET: Final = 60.0
"""Seconds between two notices on dropped entries: beside a dead server, entries are dropped at each step."""


class Stream:
    """
    Ticks for all lanes of a client.

    Args:
        accumulator: Holds the lanes. It must have an intake.
        sender: The sender of the same accumulator.
        interval: Seconds between two ticks.
        tell: Called with the first failure of each cause, and with the numbers of dropped entries by run.
        claims: Whether reported failures may be released when there are too many of them to keep them for a flush.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        sender: Sender,
        interval: float,
        tell: Callable[[list[Failure], dict[Any, int]], None],
        *,
        claims: bool,
    ) -> None:
        assert accumulator.intake is not None
        self._accumulator = accumulator
        self._intake: Intake = accumulator.intake
        self._sender = sender
        self._interval = interval
        self._tell = tell
        self._claims = claims
        self._claimed = 0  # the count of failures when failures were released last
        self._refusals: set[str] = set()  # reported causes for which runs were not created
        self._full: list[Lane] = []  # lanes with a full batch that cannot be sent now
        self._called = False
        self._sleep: anyio.CancelScope | None = None
        self._due = 0.0
        self._next = math.inf  # the predicted time of a full batch
        self._seen = self._seen_at = 0.0  # entries accepted by the last look, for runs that can be sent
        self._pace = 0.0  # new entries a second
        self._mute_until = -math.inf  # until then, no notice on dropped entries

    def hear(self) -> None:
        """Wake the stream. Must be called in the engine's thread."""
        self._called = True
        if self._sleep is not None:
            self._sleep.cancel()

    async def drain(self) -> None:
        """Wait until there is room for the entries that were refused last, or for another entry."""
        complained = -math.inf
        while not self._intake.roomy:
            now = anyio.current_time()
            if now >= complained + PRESSED:  # Perhaps no log call has found the queue full yet.
                complained, self._intake.crowded = now, True
                self.hear()
            with anyio.move_on_after(complained + PRESSED - now):
                await self._sender.progress()
        self._intake.wanted = 1

    async def run(self) -> None:
        """Run until cancelled."""
        try:
            await self._run()
        finally:  # If the engine starts another stream, the next log call must wake it.
            self._intake.answer()
            self._intake.rest()

    async def _run(self) -> None:
        resting = False
        self._postpone()
        while True:
            if self._is_idle():
                # A log call may have compared its inbox with the mark before the mark was lowered. Its record has
                # arrived by the end of another interval; the mark stays low until then.
                asleep, resting = resting, True
                self._intake.rest()
                if not asleep:
                    self._sender.tidy()
                self._say()
                await self._listen(math.inf if asleep else self._interval)
                if not self._called:
                    continue
                self._postpone()
            else:
                await self._listen(max(0.0, min(self._due, self._next) - anyio.current_time()))
            resting = False
            self._called = False
            self._turn()

    async def _listen(self, seconds: float) -> None:
        # Not an event with a deadline: in a steady flow no call sets it, and the end of a sleep costs much less.
        with anyio.CancelScope() as self._sleep:
            await anyio.sleep(0 if self._called else min(seconds, self._hush()))
        self._sleep = None

    def _postpone(self) -> None:
        self._due = anyio.current_time() + self._interval

    def _turn(self) -> None:
        self._sender.give_way()
        full = self._intake.answer()
        if self._next < math.inf:
            full += [lane for lane in self._accumulator.live() if lane.fresh >= self._intake.full and not lane.rung]
        crowded, self._intake.crowded = self._intake.crowded, False
        if due := anyio.current_time() >= self._due:
            self._intake.complained = -1
        if due or (crowded and not self._sender.busy):
            self._sender.tick()
            self._postpone()
            self._sender.tidy()  # Not at every look: it is more thorough than the rest.
            full += self._full
            self._full = []
        elif full:
            self._sender.tick(full)
        for lane in self._intake.rearm(full):
            if self._sender.outage.spent or lane.doomed:
                self._full.append(lane)
            else:  # The lane was filled again in the meantime.
                self._intake.bells.append(lane)
                self._called = True
        self._intake.settle()
        self._expect()
        if crowded or self._intake.pending >= self._intake.max_pending:
            self._shed()
            self._due = min(self._due, anyio.current_time() + PRESSED)
        self._say()

    def _expect(self) -> None:
        """Predict from the rate of new entries when the fullest lane will have filled its batches."""
        now, full = anyio.current_time(), self._intake.full
        waiting = [lane.fresh for lane in self._accumulator.live() if not lane.doomed]
        seen = self._accumulator.ledger.dealt + sum(waiting)
        elapsed, came = now - self._seen_at, seen - self._seen
        self._seen_at, self._seen = now, seen
        # A producer that pauses (for a validation, for the interpreter's lock) continues at its old rate afterwards.
        self._pace = max(came / elapsed if elapsed >= SOONEST / 2 else 0.0, self._pace / 2)
        self._next = math.inf
        wanted = self._together() * full
        if self._pace > 0 and wanted and not self._sender.outage.spent:
            # A little late rather than early: an early look has to be repeated, a late one finds the batch full.
            expected = now + max(SOONEST, LATE * (wanted - max(waiting, default=0)) / self._pace)
            if expected < self._due:
                self._next = expected
        self._intake.loud = full if self._next == math.inf else wanted + full  # a burst still wakes the engine

    def _together(self) -> int:
        """
        The number of full batches that the next look waits for. 0: there is so little room that each batch wakes the engine.
        """
        within = 1 + COMPANY * self._pace / self._intake.full
        room = self._intake.max_pending / (4 * self._intake.full)
        return int(min(within, room, TOGETHER))

    def _is_idle(self) -> bool:
        return not any(lane.inbox or not lane.idle for lane in self._accumulator.families())

    def _shed(self) -> None:
        """Make room: drop the entries of runs that the store refused to create, as they can never be sent."""
        for lane in self._accumulator.busy():
            if lane.doomed and (count := lane.keep_only(RUN, STATUS)):
                self._intake.note(lane, count)
        self._sender.moved()

    def _hush(self) -> float:
        """Seconds until the next notice on dropped entries is due."""
        if not self._intake.has_news:
            return math.inf
        return max(PRESSED, self._mute_until - anyio.current_time())

    def _say(self) -> None:
        log = self._accumulator.ledger.log
        if self._claims and log.count - self._claimed > KEPT_IN_FULL:
            self._claimed = log.count
            for lane in self._accumulator.families():
                lane.claim(lane.dealt)
        news, now = [*self._refused(), *log.news()], anyio.current_time()
        dropped = self._intake.told() if now >= self._mute_until else {}
        if dropped:
            self._mute_until = now + QUIET
        if news or dropped:
            self._tell(news, dropped)

    def _refused(self) -> Iterator[Failure]:
        """
        For each cause, the first run that the store refused to create. Such a run stays queued, so the log of failures lacks it.
        """
        for lane in self._accumulator.busy():
            stuck, text = lane.stuck, str(lane.stuck)
            waits = not lane.opened and isinstance(stuck, StoreError) and stuck.scope is Scope.LANE
            if waits:  # The run is created by another process. The error's text names the run.
                text = type(stuck).__name__
            if (
                stuck is None
                or not (lane.refused or waits)
                or text in self._refusals
                or len(self._refusals) >= MOST_CAUSES
            ):
                continue
            self._refusals.add(text)
            yield from (each for each in lane.outstanding(lane.dealt, stuck) if each.kind == RUN)
