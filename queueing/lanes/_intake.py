"""
The way of a record into its lane where a client streams or bounds what is pending: two marks, and what crossing them does.

    bell    a lane has as much as fills a batch, or something has arrived after a lull: the engine is told, once
    bound   all that is not settled would become more than `max_pending`: the caller waits, is refused, or loses the record

And it lists the lanes that are worth a look: a record that enters a lane which is not listed lists it; the engine
unlists those that have nothing to do (see `Accumulator.tidy`), so that its work does not grow with the runs it has seen.

Rules of this file: the usual call reads and adds two numbers and appends; no lock, no object. The engine's thread alone
moves the marks. `taken` is added to by any thread without a lock: CPython switches threads between calls and at
backward jumps, never between the reading and the writing of one such statement, nor between a comparison and the
statement after it. A bell is rung after its record is in the inbox, never before.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from runqueue.queueing._errors import ClosedError, QueueFullError
from runqueue.queueing._report import Ledger
from runqueue.queueing.batches._batch import RUN, Record, weight

if TYPE_CHECKING:
    from runqueue.queueing.lanes._lane import Lane

CALM: Final = 8
"""Batches that may be queued while the engine still counts as keeping up."""
OnFull: TypeAlias = Literal["block", "raise", "drop"]
_LOOK: float = 0.5
"""Seconds between two looks of a caller that waits: its engine may have ended meanwhile, and would wake nobody."""


@attrs.define(eq=False)
class Intake:
    """
    Counts what comes in, and holds the bound.

    The engine's owner sets `ring`, `drains` and `exempt` before the first record.
    """

    ledger: Ledger
    max_pending: float = math.inf
    """Entries that are accepted and not settled, in flight included."""
    on_full: OnFull = "block"
    block_timeout: float = 60.0
    """Seconds of waiting, in all, each time the queue becomes full."""
    full: float = math.inf
    """Entries of one lane that are worth a bell. Infinite: nothing streams, no bell is rung."""
    loud: float = attrs.field(default=attrs.Factory(lambda self: self.full, takes_self=True))
    """Entries of one lane at which a call rings: `full`, or more while the engine looks by itself in time."""
    ring: Callable[[], None] = lambda: None
    """Tell the engine that there is something to do. Any thread; must not block."""
    drains: Callable[[], bool] = lambda: False
    """Whether anything sends what is queued without being asked to: else there is nothing to wait for."""
    exempt: Callable[[], bool] = lambda: False
    """Whether the caller is the engine itself, which must never wait for itself."""
    lenient: bool = False
    """Where the budget of waiting is spent: drop instead of raising."""
    taken: int = 0
    mark: float = -1
    """`taken` up to which a call has nothing to think about; below 0 at first, so that the first call rings."""
    bells: list[Lane] = attrs.field(factory=list)
    """Lanes that have as much as fills a batch."""
    live: list[Lane] = attrs.field(factory=list)
    """Lanes that may have something to send or to report; one may stand there twice. Always the same list."""
    crowded: bool = False
    """Whether a call found no room; until the engine has seen to it."""
    complained: float = -1
    """`ledger.released` when a call complained of that last. Until it has moved, or the engine has looked by itself and
    puts this back, there is nothing new to complain of: beside a dead server, each step of a training would ring."""
    wanted: int = 1
    """Entries of the largest record that was refused since somebody has waited for room."""
    dropped: dict[object, int] = attrs.field(factory=dict)
    """Entries that were not taken, by run, until somebody has said so."""
    untold: int = 0
    """How many these are."""
    _given_up: dict[object, int] = attrs.field(factory=dict)
    """The same by the engine, which has its own books: it never waits for a lock of a log call."""
    _rung: bool = False
    _resting: bool = False
    _spent: bool = False
    _since: float | None = None
    _full_at: int = 0  # `ledger.released` then
    _room: threading.Condition = attrs.field(factory=lambda: threading.Condition(threading.RLock()))

    def guard(self, lane: Lane) -> None:
        """Stand before this lane's inbox."""
        append, enlist = lane.inbox.way_in(), self.live.append

        def take(record: Record) -> bool:
            count = len(record[1])
            if self.taken + count <= self.mark:
                self.taken += count
            elif not self.admit(lane, record):
                return True
            lane.fresh = fresh = lane.fresh + count
            try:
                append(record)
            finally:  # after an interrupt too: nobody would see the record
                if not lane.listed:  # after the record: whoever unlists a lane looks at its inbox then
                    lane.listed = True
                    enlist(lane)
            if fresh >= self.loud and not lane.rung:
                lane.rung = True
                self.bells.append(lane)
                self._call()
            elif self.mark < 0:  # not for being beyond the bound: the engine is awake
                self._call()
            return False

        def push(record: Record) -> None:
            count = len(record[1])  # before: a call between the reading and the writing lets another thread in
            self.taken += count
            lane.fresh += count
            try:
                append(record)
            finally:
                if not lane.listed:
                    lane.listed = True
                    enlist(lane)
            if self.mark < 0:
                self._call()

        lane.append, lane.push = take, push

    # -- the caller's thread, off the usual path -----------------------------------------------------------------------

    def admit(self, lane: Lane, record: Record) -> bool:
        """
        Whether the record may be appended, now or after a wait; it is counted in then.

        Raises:
            QueueFullError: It may not, and `on_full` says to raise.
            ClosedError: The client was closed while the call waited.
        """
        count = weight(record)
        if self._enter(count):
            return True
        if count and not self.exempt():  # a final status counts nothing; the engine's own thread would wait for itself
            if self.complained != (released := self.ledger.released):
                try:
                    self.complained = released  # first: the engine may put it back before we are told that it rang
                    self._complain()
                except BaseException:  # KeyboardInterrupt
                    self.complained = -1
                    raise
            drops = self.on_full == "drop"
            if self.on_full == "block" and self.drains():
                if self._wait(count):
                    return True
                drops = self.lenient
            self.wanted = max(self.wanted, count)
            if not drops:
                raise QueueFullError(self._words(count))
            if record[0] != RUN:  # without it, nothing of its run could ever be stored
                self._drop(lane, count)
                return False
        self.taken += count
        return True

    def _enter(self, count: int) -> bool:
        """Count the entries in if there is room. One larger than the bound may pass when nothing else is there."""
        released = self.ledger.released
        # No call from here on, so that no other thread gets in between the look and the addition.
        if self.taken + count <= released + self.max_pending or self.taken <= released:
            self.taken += count
            return True
        return False

    @property
    def roomy(self) -> bool:
        """Whether what was refused would be let in now: by the rule of `_enter`, which must call nothing."""
        released = self.ledger.released
        return self.taken + self.wanted <= released + self.max_pending or self.taken <= released

    @property
    def calm(self) -> bool:
        """Whether the engine keeps up, and the bound is far away."""
        return self.pending <= min(CALM * self.full, self.max_pending / 2)

    @property
    def pending(self) -> int:
        """Entries that were accepted and are not settled; exact when no call is under way."""
        return self.taken - self.ledger.released

    def _wait(self, count: int) -> bool:
        """Whether there was room in time."""
        begin = time.monotonic()
        with self._room:
            while True:
                if not self.drains():  # first: its end makes room, and nobody would send what came in by that
                    raise ClosedError("the client was closed while this call waited for room")
                released = self.ledger.released
                if self._enter(count):
                    return True
                if self._since is None:
                    self._since, self._full_at = time.monotonic(), released
                left = min(self._since, begin) + self.block_timeout - time.monotonic()
                if self._spent or left <= 0:
                    self._spent = True  # one budget for each time it is full: the next calls do not wait either
                    return False
                self._complain()
                self._room.wait(min(left, _LOOK))

    def _complain(self) -> None:
        """Tell the engine that somebody finds no room."""
        self.crowded = True
        self._call()

    def _drop(self, lane: Lane, count: int) -> None:
        with self._room:
            self.ledger.refused += count
            self.untold += count
            self.dropped[lane.run] = self.dropped.get(lane.run, 0) + count

    def note(self, lane: Lane, count: int) -> None:
        """So many entries of this lane were dropped; somebody has to say so."""
        self._given_up[lane.run] = self._given_up.get(lane.run, 0) + count

    def _words(self, count: int) -> str:
        text = f"{self.pending:,} of at most {self.max_pending:,} entries are pending; {count:,} more do not fit"
        if self.on_full == "block":
            why = f"there was no room within {self.block_timeout:g} s" if self.drains() else "nothing drains the queue"
            text += f" ({why})"
        return text

    def _call(self) -> None:
        if not self._rung:
            self._rung = True
            try:
                self.ring()
            except BaseException:  # KeyboardInterrupt: else nobody would ever ring again
                self._rung = False
                self.complained = -1
                raise

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def answer(self) -> list[Lane]:
        """The bell was heard: the lanes it was rung for. From now on others can ring again; these after `rearm`."""
        self._rung = self._resting = False
        lanes, self.bells = self.bells, []
        return lanes

    def rearm(self, lanes: list[Lane]) -> list[Lane]:
        """Let lanes ring again; those that hold a full batch still are given back, and do not ring."""
        full: list[Lane] = []
        for lane in lanes:
            lane.rung = False  # before the look: whoever adds a record after it finds that it may ring
            if lane.fresh >= self.full:
                lane.rung = True
                full.append(lane)
        return full

    def settle(self) -> None:
        """Entries may have been settled: move the bound, and wake who waits for room."""
        if not self._resting:
            self.mark = self.ledger.released + self.max_pending
        # Not by less than `max_pending` alone, which does not mean that a record fits: the budget would begin anew.
        renewed = self._since is not None and self.pending < self.max_pending and self.ledger.released > self._full_at
        if renewed and self._room.acquire(blocking=False):  # see `told`; who waits looks by itself too
            self._since, self._spent = None, False
            self._room.notify_all()
            self._room.release()

    def rest(self) -> None:
        """Nothing is left to do: the next call is to ring."""
        self._resting = True
        self.mark = self.complained = -1

    def release(self) -> None:
        """The engine has ended: nobody is to wait any longer."""
        with self._room:
            self._room.notify_all()

    @property
    def has_news(self) -> bool:
        """Whether there is something for `told`."""
        return bool(self.untold or self._given_up)

    def told(self) -> dict[object, int]:
        """What was dropped since the last time, by run."""
        dropped, self._given_up = self._given_up, {}
        # Never waits: a signal handler may wait for us in the thread that holds it. What it keeps is said next time.
        if self._room.acquire(blocking=False):
            taken, self.dropped, self.untold = self.dropped, {}, 0
            self._room.release()
            for run, count in taken.items():
                dropped[run] = dropped.get(run, 0) + count
        return dropped

    def __repr__(self) -> str:
        return f"<Intake pending={self.pending} of {self.max_pending}>"
