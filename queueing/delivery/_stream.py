"""
The ticks of a client that streams: everything that waits is sent once an interval, and full batches sooner.

    nothing queued  ->  asleep, until the first record rings
    something is    ->  a tick at the end of each interval; in between, a lane that has filled a batch rings for itself
    a steady flow   ->  the engine looks by itself when the next batches should be full, a few at a time: nobody rings,
                        which would cost the caller a system call, and a wait for the interpreter's lock
    no room         ->  a tick at once if nothing is being sent; what nobody will ever send is given up

Rules of this file: it decides when, `Sender.tick` does the rest. Whatever is worth a word is handed to `tell` here, in
the engine's thread, never by a log call.
"""

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
"""Seconds between two looks that nobody has rung for."""
LATE: Final = 1.05
"""By how much a look comes after the time at which a batch should be full."""
COMPANY: Final = 0.25
"""Seconds that a full batch of a steady flow waits for others at most. They share one awakening: beside a thread that
computes, it finds cold caches and takes the interpreter's lock away, and both cost more than the work itself."""
TOGETHER: Final = 4
"""Batches that go together at most; fewer than are calm, see `_intake`."""
PRESSED: Final = 1.0
"""Seconds between two ticks while there is no room, however long the interval: somebody loses data, or waits."""
QUIET: Final = 60.0
"""Seconds between two words on entries that were dropped at the bound: beside a dead server, each step drops some."""


class Stream:
    """
    Args:
        accumulator: With an intake.
        sender: Of the same accumulator.
        interval: Seconds.
        tell: Is given the first failure of each cause, and entries that were dropped, by run.
        claims: Whether failures may be let go once they are told, when there are too many of them to keep for a flush.
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
        self._claimed = 0  # of the log's count, when failures were let go last
        self._refusals: set[str] = set()  # causes for which runs were not created, that were told
        self._full: list[Lane] = []  # that hold a full batch, which cannot be sent now; they do not ring
        self._called = False
        self._sleep: anyio.CancelScope | None = None
        self._due = 0.0
        self._next = math.inf  # when a batch should be full
        self._seen = self._seen_at = 0.0  # entries that had come in for runs that are sent, at the last look
        self._pace = 0.0  # of what comes in, in entries a second
        self._mute_until = -math.inf  # about what is dropped

    def hear(self) -> None:
        """The bell. In the engine's thread."""
        self._called = True
        if self._sleep is not None:
            self._sleep.cancel()

    async def drain(self) -> None:
        """Wait until there is room: for what was refused last, or for another entry."""
        complained = -math.inf
        while not self._intake.roomy:
            now = anyio.current_time()
            if now >= complained + PRESSED:  # no call may have found it full yet, nor will one meanwhile
                complained, self._intake.crowded = now, True
                self.hear()
            with anyio.move_on_after(complained + PRESSED - now):
                await self._sender.progress()
        self._intake.wanted = 1

    async def run(self) -> None:
        """Until cancelled."""
        try:
            await self._run()
        finally:  # should another one follow, the next call is to ring for it
            self._intake.answer()
            self._intake.rest()

    async def _run(self) -> None:
        resting = False
        self._postpone()
        while True:
            if self._is_idle():
                # A record may be on its way still that has seen the mark before it was lowered; it has arrived by the
                # end of another interval. The mark stays down meanwhile.
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
        # Not an event with a deadline: in a steady flow nobody calls, and the end of a sleep costs much less.
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
            self._sender.tidy()  # not by every turn: it looks closer than the others
            full += self._full
            self._full = []
        elif full:
            self._sender.tick(full)
        for lane in self._intake.rearm(full):
            if self._sender.outage.spent or lane.doomed:
                self._full.append(lane)
            else:  # it was filled anew meanwhile
                self._intake.bells.append(lane)
                self._called = True
        self._intake.settle()
        self._expect()
        if crowded or self._intake.pending >= self._intake.max_pending:
            self._shed()
            self._due = min(self._due, anyio.current_time() + PRESSED)
        self._say()

    def _expect(self) -> None:
        """By the pace of what came in since the last look: when will the fullest lane have filled its batches?"""
        now, full = anyio.current_time(), self._intake.full
        waiting = [lane.fresh for lane in self._accumulator.live() if not lane.doomed]
        seen = self._accumulator.ledger.dealt + sum(waiting)
        elapsed, came = now - self._seen_at, seen - self._seen
        self._seen_at, self._seen = now, seen
        # A producer that has stopped for a moment (a validation, the interpreter's lock) goes on as before.
        self._pace = max(came / elapsed if elapsed >= SOONEST / 2 else 0.0, self._pace / 2)
        self._next = math.inf
        wanted = self._together() * full
        if self._pace > 0 and wanted and not self._sender.outage.spent:
            # Rather a little late than early: an early look is one more, and a late one finds a batch as full.
            expected = now + max(SOONEST, LATE * (wanted - max(waiting, default=0)) / self._pace)
            if expected < self._due:
                self._next = expected
        self._intake.loud = full if self._next == math.inf else wanted + full  # a burst rings all the same

    def _together(self) -> int:
        """Full batches that the next look waits for; 0: there is so little room that each has to ring."""
        within = 1 + COMPANY * self._pace / self._intake.full
        room = self._intake.max_pending / (4 * self._intake.full)
        return int(min(within, room, TOGETHER))

    def _is_idle(self) -> bool:
        return not any(lane.inbox or not lane.idle for lane in self._accumulator.families())

    def _shed(self) -> None:
        """Make room: nothing of a run that was refused will ever be sent without somebody's doing."""
        for lane in self._accumulator.busy():
            if lane.doomed and (count := lane.keep_only(RUN, STATUS)):
                self._intake.note(lane, count)
        self._sender.moved()

    def _hush(self) -> float:
        """Seconds until somebody is to be told of what was dropped."""
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
        """The first run for each cause that the store will not create; it stays queued, so no log of failures has it."""
        for lane in self._accumulator.busy():
            stuck, text = lane.stuck, str(lane.stuck)
            waits = not lane.opened and isinstance(stuck, StoreError) and stuck.scope is Scope.LANE
            if waits:  # for another process; its text names the run
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
