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

CALM_BATCHES: Final = 8
"""Batches that may be queued while the engine still counts as keeping up."""
OnFull: TypeAlias = Literal["block", "raise", "drop"]
_RECHECK_SECONDS: float = 0.5
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
    batch_size: float = math.inf
    """Entries of one lane that are worth a bell. Infinite: nothing streams, no bell is rung."""
    wake_size: float = attrs.field(default=attrs.Factory(lambda self: self.batch_size, takes_self=True))
    """Entries of one lane at which a call rings: `full`, or more while the engine looks by itself in time."""
    wake: Callable[[], None] = lambda: None
    """Tell the engine that there is something to do. Any thread; must not block."""
    drains: Callable[[], bool] = lambda: False
    """Whether anything sends what is queued without being asked to: else there is nothing to wait for."""
    is_engine_thread: Callable[[], bool] = lambda: False
    """Whether the caller is the engine itself, which must never wait for itself."""
    drops_after_timeout: bool = False
    """Where the budget of waiting is spent: drop instead of raising."""
    admitted: int = 0
    mark: float = -1
    """`taken` up to which a call has nothing to think about; below 0 at first, so that the first call rings."""
    full_lanes: list[Lane] = attrs.field(factory=list)
    """Lanes that have as much as fills a batch."""
    live: list[Lane] = attrs.field(factory=list)
    """Lanes that may have something to send or to report; one may stand there twice. Always the same list."""
    found_full: bool = False
    """Whether a call found no room; until the engine has seen to it."""
    signalled_full_at: float = -1
    """`ledger.settled` when a call signalled_full_at of that last. Until it has moved, or the engine has looked by itself and
    puts this back, there is nothing new to complain of: beside a dead server, each step of a training would ring."""
    largest_refused: int = 1
    """Entries of the largest record that was refused since somebody has waited for room."""
    dropped: dict[object, int] = attrs.field(factory=dict)
    """Entries that were not taken, by run, until somebody has said so."""
    unreported_drops: int = 0
    """How many these are."""
    _dropped_by_engine: dict[object, int] = attrs.field(factory=dict)
    """The same by the engine, which has its own books: it never waits for a lock of a log call."""
    _woken: bool = False
    _asleep: bool = False
    _budget_spent: bool = False
    _full_since: float | None = None
    _settled_when_full: int = 0  # `ledger.settled` then
    _room: threading.Condition = attrs.field(factory=lambda: threading.Condition(threading.RLock()))

    def install(self, lane: Lane) -> None:
        """Stand before this lane's inbox."""
        append, enlist = lane.inbox.appender(), self.live.append

        def take(record: Record) -> bool:
            count = len(record[1])
            if self.admitted + count <= self.mark:
                self.admitted += count
            elif not self.admit(lane, record):
                return True
            lane.inbox_entries = inbox_entries = lane.inbox_entries + count
            try:
                append(record)
            finally:  # after an interrupt too: nobody would see the record
                if not lane.listed:  # after the record: whoever unlists a lane looks at its inbox then
                    lane.listed = True
                    enlist(lane)
            if inbox_entries >= self.wake_size and not lane.signalled:
                lane.signalled = True
                self.full_lanes.append(lane)
                self._wake_once()
            elif self.mark < 0:  # not for being beyond the bound: the engine is awake
                self._wake_once()
            return False

        def push(record: Record) -> None:
            count = len(record[1])  # before: a call between the reading and the writing lets another thread in
            self.admitted += count
            lane.inbox_entries += count
            try:
                append(record)
            finally:
                if not lane.listed:
                    lane.listed = True
                    enlist(lane)
            if self.mark < 0:
                self._wake_once()

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
        if self._reserve(count):
            return True
        if (
            count and not self.is_engine_thread()
        ):  # a final status counts nothing; the engine's own thread would wait for itself
            if self.signalled_full_at != (settled := self.ledger.settled):
                try:
                    self.signalled_full_at = (
                        settled  # first: the engine may put it back before we are told that it rang
                    )
                    self._signal_full()
                except BaseException:  # KeyboardInterrupt
                    self.signalled_full_at = -1
                    raise
            drops = self.on_full == "drop"
            if self.on_full == "block" and self.drains():
                if self._wait(count):
                    return True
                drops = self.drops_after_timeout
            self.largest_refused = max(self.largest_refused, count)
            if not drops:
                raise QueueFullError(self._full_message(count))
            if record[0] != RUN:  # without it, nothing of its run could ever be stored
                self._drop(lane, count)
                return False
        self.admitted += count
        return True

    def _reserve(self, count: int) -> bool:
        """Count the entries in if there is room. One larger than the bound may pass when nothing else is there."""
        settled = self.ledger.settled
        # No call from here on, so that no other thread gets in between the look and the addition.
        if self.admitted + count <= settled + self.max_pending or self.admitted <= settled:
            self.admitted += count
            return True
        return False

    @property
    def has_room(self) -> bool:
        """Whether what was refused would be let in now: by the rule of `_enter`, which must call nothing."""
        settled = self.ledger.settled
        return self.admitted + self.largest_refused <= settled + self.max_pending or self.admitted <= settled

    @property
    def is_calm(self) -> bool:
        """Whether the engine keeps up, and the bound is far away."""
        return self.pending <= min(CALM_BATCHES * self.batch_size, self.max_pending / 2)

    @property
    def pending(self) -> int:
        """Entries that were accepted and are not settled; exact when no call is under way."""
        return self.admitted - self.ledger.settled

    def _wait(self, count: int) -> bool:
        """Whether there was room in time."""
        begin = time.monotonic()
        with self._room:
            while True:
                if not self.drains():  # first: its end makes room, and nobody would send what came in by that
                    raise ClosedError("the client was closed while this call waited for room")
                settled = self.ledger.settled
                if self._reserve(count):
                    return True
                if self._full_since is None:
                    self._full_since, self._settled_when_full = time.monotonic(), settled
                left = min(self._full_since, begin) + self.block_timeout - time.monotonic()
                if self._budget_spent or left <= 0:
                    self._budget_spent = True  # one budget for each time it is full: the next calls do not wait either
                    return False
                self._signal_full()
                self._room.wait(min(left, _RECHECK_SECONDS))

    def _signal_full(self) -> None:
        """Tell the engine that somebody finds no room."""
        self.found_full = True
        self._wake_once()

    def _drop(self, lane: Lane, count: int) -> None:
        with self._room:
            self.ledger.refused += count
            self.unreported_drops += count
            self.dropped[lane.run] = self.dropped.get(lane.run, 0) + count

    def count_dropped(self, lane: Lane, count: int) -> None:
        """So many entries of this lane were dropped; somebody has to say so."""
        self._dropped_by_engine[lane.run] = self._dropped_by_engine.get(lane.run, 0) + count

    def _full_message(self, count: int) -> str:
        text = f"{self.pending:,} of at most {self.max_pending:,} entries are pending; {count:,} more do not fit"
        if self.on_full == "block":
            why = f"there was no room within {self.block_timeout:g} s" if self.drains() else "nothing drains the queue"
            text += f" ({why})"
        return text

    def _wake_once(self) -> None:
        if not self._woken:
            self._woken = True
            try:
                self.wake()
            except BaseException:  # KeyboardInterrupt: else nobody would ever ring again
                self._woken = False
                self.signalled_full_at = -1
                raise

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def take_full_lanes(self) -> list[Lane]:
        """The bell was heard: the lanes it was rung for. From now on others can ring again; these after `rearm`."""
        self._woken = self._asleep = False
        lanes, self.full_lanes = self.full_lanes, []
        return lanes

    def rearm(self, lanes: list[Lane]) -> list[Lane]:
        """Let lanes ring again; those that hold a full batch still are given back, and do not ring."""
        full: list[Lane] = []
        for lane in lanes:
            lane.signalled = False  # before the look: whoever adds a record after it finds that it may ring
            if lane.inbox_entries >= self.batch_size:
                lane.signalled = True
                full.append(lane)
        return full

    def update_bound(self) -> None:
        """Entries may have been settled: move the bound, and wake who waits for room."""
        if not self._asleep:
            self.mark = self.ledger.settled + self.max_pending
        # Not by less than `max_pending` alone, which does not mean that a record fits: the budget would begin anew.
        renewed = (
            self._full_since is not None
            and self.pending < self.max_pending
            and self.ledger.settled > self._settled_when_full
        )
        if renewed and self._room.acquire(blocking=False):  # see `told`; who waits looks by itself too
            self._full_since, self._budget_spent = None, False
            self._room.notify_all()
            self._room.release()

    def mark_asleep(self) -> None:
        """Nothing is left to do: the next call is to ring."""
        self._asleep = True
        self.mark = self.signalled_full_at = -1

    def release(self) -> None:
        """The engine has ended: nobody is to wait any longer."""
        with self._room:
            self._room.notify_all()

    @property
    def has_unreported_drops(self) -> bool:
        """Whether there is something for `told`."""
        return bool(self.unreported_drops or self._dropped_by_engine)

    def take_dropped(self) -> dict[object, int]:
        """What was dropped since the last time, by run."""
        dropped, self._dropped_by_engine = self._dropped_by_engine, {}
        # Never waits: a signal handler may wait for us in the thread that holds it. What it keeps is said next time.
        if self._room.acquire(blocking=False):
            taken, self.dropped, self.unreported_drops = self.dropped, {}, 0
            self._room.release()
            for run, count in taken.items():
                dropped[run] = dropped.get(run, 0) + count
        return dropped

    def __repr__(self) -> str:
        return f"<Intake pending={self.pending} of {self.max_pending}>"
