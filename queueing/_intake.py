"""
The way of a record into its lane where a client streams or bounds what is pending: two marks, and what crossing them does.

    bell    a lane has as much as fills a batch, or something has arrived after a lull: the engine is told, once
    bound   all that is not settled would become more than `max_pending`: the caller waits, is refused, or loses the record

Rules of this file: the usual call reads and adds two numbers and appends; no lock, no object. The engine's thread alone
moves the marks. `taken` is added to by any thread without a lock: CPython switches threads between calls and at
backward jumps, never between the reading and the writing of one such statement.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

import attrs

from runqueue.queueing._batch import RUN, Record, weight
from runqueue.queueing._errors import QueueFullError
from runqueue.queueing._report import Ledger

if TYPE_CHECKING:
    from runqueue.queueing._lane import Lane

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
    dropped: dict[object, int] = attrs.field(factory=dict)
    """Entries that were not taken, by run, until somebody has said so."""
    _rung: bool = False
    _resting: bool = False
    _spent: bool = False
    _since: float | None = None
    _room: threading.Condition = attrs.field(factory=lambda: threading.Condition(threading.RLock()))

    def guard(self, lane: Lane) -> None:
        """Stand before this lane's inbox."""
        append = lane.inbox.append

        def take(record: Record) -> None:
            count = len(record[1])
            if self.taken + count > self.mark and not self.admit(lane, record):
                return
            self.taken += count
            lane.fresh += count
            append(record)
            if lane.fresh >= self.full and not lane.rung:
                lane.rung = True
                self.bells.append(lane)
                self._call()

        def push(record: Record) -> None:
            self.taken += len(record[1])
            lane.fresh += len(record[1])
            append(record)

        lane.append, lane.push = take, push

    # -- the caller's thread, off the usual path -----------------------------------------------------------------------

    def admit(self, lane: Lane, record: Record) -> bool:
        """
        Whether the record may be appended, now or after a wait.

        Raises:
            QueueFullError: It may not, and `on_full` says to raise.
        """
        count = weight(record)
        if self._fits(count):
            self._call()
            return True
        if not count or self.exempt():
            return True  # a final status counts nothing; the engine's own thread would wait for itself
        self._call()
        if self.on_full == "drop" and record[0] == RUN:
            return True  # without it, nothing of its run could ever be stored
        if self.on_full == "block" and self.drains() and self._wait(count):
            return True
        if self.on_full == "drop" or (self.on_full == "block" and self.lenient and self.drains()):
            self._drop(lane, count)
            return False
        raise QueueFullError(self._words(count))

    def _fits(self, count: int) -> bool:
        # A record larger than the bound would never fit; it may pass when nothing else is there.
        return self.pending + count <= self.max_pending or self.pending <= 0

    @property
    def pending(self) -> int:
        """Entries that were accepted and are not settled; exact when no call is under way."""
        return self.taken - self.ledger.released

    def _wait(self, count: int) -> bool:
        """Whether there was room in time."""
        begin = time.monotonic()
        with self._room:
            while not self._fits(count):
                if self._since is None:
                    self._since = time.monotonic()
                left = min(self._since, begin) + self.block_timeout - time.monotonic()
                if self._spent or left <= 0 or not self.drains():
                    self._spent = True  # one budget for each time it is full: the next calls do not wait either
                    return False
                self._room.wait(min(left, _LOOK))
            return True

    def _drop(self, lane: Lane, count: int) -> None:
        with self._room:
            self.ledger.refused += count
            self.note(lane, count)

    def note(self, lane: Lane, count: int) -> None:
        """So many entries of this lane were dropped; somebody has to say so."""
        with self._room:
            self.dropped[lane.run] = self.dropped.get(lane.run, 0) + count

    def _words(self, count: int) -> str:
        text = f"{self.pending:,} of at most {self.max_pending:,} entries are pending; {count:,} more do not fit"
        if self.on_full == "block":
            why = f"there was no room within {self.block_timeout:g} s" if self.drains() else "nothing drains the queue"
            text += f" ({why})"
        return text

    def _call(self) -> None:
        if not self._rung:
            self._rung = True
            self.ring()

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def answer(self) -> list[Lane]:
        """The bell was heard: the lanes it was rung for. From now on it can be rung again."""
        self._rung = self._resting = False
        lanes, self.bells = self.bells, []
        for lane in lanes:
            lane.rung = False
        return lanes

    def settle(self) -> None:
        """Entries may have been settled: move the bound, and wake who waits for room."""
        if not self._resting:
            self.mark = self.ledger.released + self.max_pending
        if self._since is not None and self.pending < self.max_pending:
            with self._room:
                self._since, self._spent = None, False
                self._room.notify_all()

    def rest(self) -> None:
        """Nothing is left to do: the next call is to ring."""
        self._resting = True
        self.mark = -1

    def release(self) -> None:
        """The engine has ended: nobody is to wait any longer."""
        with self._room:
            self._room.notify_all()

    def told(self) -> dict[object, int]:
        """What was dropped since the last time, by run."""
        with self._room:
            dropped, self.dropped = self.dropped, {}
        return dropped

    def __repr__(self) -> str:
        return f"<Intake pending={self.pending} of {self.max_pending}>"
