"""
The intake: counts the records that log calls hand over, wakes the engine, and holds the bound on what is pending.

An engine has one if its client streams or bounds what is pending. `install` puts it in front of a lane's inbox. A log
call then compares two counts with two marks:

    wake_size   the lane holds a full batch, or the engine sleeps: the call wakes the engine, once
    mark        more than `max_pending` entries would be pending: the call waits, raises, or drops the record

The intake also lists the lanes that the engine has to look at. A record lists its lane, and `Accumulator.tidy` removes
the lanes that have nothing to do; so a look costs no more after many runs than after one.
"""

# Rules of this file:
# - The usual call compares and adds two numbers and appends to a list: no lock, no new object.
# - Only the engine's thread moves the marks.
# - Any thread adds to `admitted`, without a lock. CPython switches threads at calls and at jumps backwards; it does not
#   between the read and the write of one such statement, nor between a comparison and the statement after it.
# - `wake()` follows the append: the engine looks at the inbox as soon as it wakes.

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import attrs

from runqueue.queueing._errors import ClosedError, QueueFullError
from runqueue.queueing.batches._batch import RUN, Record, weight
from runqueue.queueing.lanes._account import Ledger

if TYPE_CHECKING:
    from runqueue.queueing.lanes._lane import Lane

CALM_BATCHES: Final = 8
"""With no more full batches pending than these, the engine keeps up with the log calls."""
OnFull: TypeAlias = Literal["block", "raise", "drop"]
_RECHECK_SECONDS: float = 0.5
"""Seconds after which a waiting call looks by itself: the engine may have ended, and then wakes no caller."""


@attrs.define(eq=False)
class Intake:
    """
    Stands between the log calls and the inboxes of all lanes of a client.

    A call that finds no room waits up to `block_timeout` for it, or raises, or drops its record, as `on_full` says.
    """

    ledger: Ledger
    max_pending: float = math.inf
    """Bound on the entries that are admitted and not settled, in flight included."""
    on_full: OnFull = "block"
    block_timeout: float = 60.0
    """Seconds that calls wait, all together, each time the queue becomes full; then none waits until there was room."""
    batch_size: float = math.inf
    """Entries that fill a batch. Infinite: the client does not stream, and no full batch wakes the engine."""
    wake_size: float = attrs.field(default=attrs.Factory(lambda self: self.batch_size, takes_self=True))
    """Entries in an inbox at which a call wakes the engine: `batch_size`, or more while the engine plans looks."""
    wake: Callable[[], None] = lambda: None
    """Wakes the engine. Called in any thread; must not block."""
    drains: Callable[[], bool] = lambda: False
    """Whether the engine sends without being asked to; if not, a call does not wait for room."""
    is_engine_thread: Callable[[], bool] = lambda: False
    """Whether the current thread is the engine's, which must not wait for itself."""
    drops_after_timeout: bool = False
    """Whether a call whose wait was in vain drops its record, instead of raising."""
    admitted: int = 0
    """Entries that were let into an inbox, ever."""
    mark: float = -1
    """Up to this value of `admitted` a call appends at once. Negative while the engine sleeps: then a call wakes it."""
    full_lanes: list[Lane] = attrs.field(factory=list)
    """Lanes that hold a full batch, since the engine looked last."""
    live: list[Lane] = attrs.field(factory=list)
    """Lanes that may have something to send or to report; one may be in it twice. The list object is never replaced."""
    found_full: bool = False
    """Whether a call found no room since the engine looked last."""
    signalled_full_at: float = -1
    """
    `ledger.settled` when a call last woke the engine because it found no room; -1: none did. The next call does so only
    after entries were settled or the engine has looked: beside a dead server, each training step would wake it.
    """
    largest_refused: int = 1
    """Entries of the largest record that found no room since `drain` last ended."""
    dropped: dict[object, int] = attrs.field(factory=dict)
    """Entries that log calls have dropped, by run, since `take_dropped`. Guarded by `_room`."""
    unreported_drops: int = 0
    """The sum of `dropped`."""
    _dropped_by_engine: dict[object, int] = attrs.field(factory=dict)
    """Entries that the engine has dropped, by run. A dict of its own, because the engine never waits for `_room`."""
    _woken: bool = False  # a call has woken the engine, which has not looked since
    _asleep: bool = False
    _budget_spent: bool = False  # the waits since the queue became full have taken `block_timeout`
    _full_since: float | None = None
    _settled_when_full: int = 0  # `ledger.settled` then
    _room: threading.Condition = attrs.field(factory=lambda: threading.Condition(threading.RLock()))

    def install(self, lane: Lane) -> None:
        """Let all records of this lane pass the intake: replace its `append` and `push`."""
        append, enlist = lane.inbox.appender(), self.live.append

        def take(record: Record) -> bool:
            count = len(record[1])
            if self.admitted + count <= self.mark:
                self.admitted += count
            elif not self.admit(lane, record):
                return True
            lane.inbox_entries = entries = lane.inbox_entries + count
            try:
                append(record)
            finally:  # even if a signal handler raises here: the engine would not find the record
                if not lane.listed:  # must follow the append: `tidy` unlists a lane before it looks at the inbox
                    lane.listed = True
                    enlist(lane)
            if entries >= self.wake_size and not lane.signalled:
                lane.signalled = True
                self.full_lanes.append(lane)
                self._wake_once()
            elif self.mark < 0:  # the engine sleeps
                self._wake_once()
            return False

        def push(record: Record) -> None:
            count = len(record[1])  # a statement of its own: a call inside of `+=` would let another thread in between
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
        Count the record in for which there was no room at first sight, if need be after a wait.

        Returns:
            Whether it may be appended. If not, it was dropped.

        Raises:
            QueueFullError: There is no room, and `on_full` says to raise.
            ClosedError: The client was closed while the call waited.
        """
        count = weight(record)
        if self._reserve(count):
            return True
        if count and not self.is_engine_thread():  # a final status has no entries, and always passes
            if self.signalled_full_at != (settled := self.ledger.settled):
                try:
                    # Must come before `_signal_full`: the engine may reset it as soon as it is awake.
                    self.signalled_full_at = settled
                    self._signal_full()
                except BaseException:  # KeyboardInterrupt: the engine may not have been woken
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
            if record[0] != RUN:  # without its creation, nothing of the run could be stored: it passes
                self._drop(lane, count)
                return False
        self.admitted += count
        return True

    def _reserve(self, count: int) -> bool:
        """Count the entries in if there is room. A record larger than the bound passes when nothing else is pending."""
        settled = self.ledger.settled
        # No call may stand in these lines: another thread could run between the comparison and the addition.
        if self.admitted + count <= settled + self.max_pending or self.admitted <= settled:
            self.admitted += count
            return True
        return False

    @property
    def has_room(self) -> bool:
        """Whether the largest refused record would pass now: the rule of `_reserve`, which may not call this."""
        settled = self.ledger.settled
        return self.admitted + self.largest_refused <= settled + self.max_pending or self.admitted <= settled

    @property
    def is_calm(self) -> bool:
        """Whether few batches are pending, and the bound is far away."""
        return self.pending <= min(CALM_BATCHES * self.batch_size, self.max_pending / 2)

    @property
    def pending(self) -> int:
        """Entries that were admitted and are not settled; exact when no log call is under way."""
        return self.admitted - self.ledger.settled

    def _wait(self, count: int) -> bool:
        """Wait for room, and count the entries in; False: there was none in time."""
        begin = time.monotonic()
        with self._room:
            while True:
                if (
                    not self.drains()
                ):  # must come before `_reserve`: the end of the engine makes room, and sends nothing
                    raise ClosedError("the client was closed while this call waited for room")
                settled = self.ledger.settled
                if self._reserve(count):
                    return True
                if self._full_since is None:
                    self._full_since, self._settled_when_full = time.monotonic(), settled
                left = min(self._full_since, begin) + self.block_timeout - time.monotonic()
                if self._budget_spent or left <= 0:
                    self._budget_spent = True  # the calls that follow do not wait either, until there is room again
                    return False
                self._signal_full()
                self._room.wait(min(left, _RECHECK_SECONDS))

    def _signal_full(self) -> None:
        """Tell the engine that a call finds no room."""
        self.found_full = True
        self._wake_once()

    def _drop(self, lane: Lane, count: int) -> None:
        with self._room:
            self.ledger.refused += count
            self.unreported_drops += count
            self.dropped[lane.run] = self.dropped.get(lane.run, 0) + count

    def count_dropped(self, lane: Lane, count: int) -> None:
        """Note entries that the engine has dropped, for the next notice. In the engine's thread."""
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
            except BaseException:  # KeyboardInterrupt: the next call has to wake the engine
                self._woken = False
                self.signalled_full_at = -1
                raise

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def take_full_lanes(self) -> list[Lane]:
        """The lanes for which calls have woken the engine. Others may wake it from now on, these after `rearm`."""
        self._woken = self._asleep = False
        lanes, self.full_lanes = self.full_lanes, []
        return lanes

    def rearm(self, lanes: list[Lane]) -> list[Lane]:
        """Let these lanes wake the engine again, except for those that hold a full batch now: they are returned."""
        full: list[Lane] = []
        for lane in lanes:
            lane.signalled = False  # must come before the look: a record that is added after it may wake the engine
            if lane.inbox_entries >= self.batch_size:
                lane.signalled = True
                full.append(lane)
        return full

    def update_bound(self) -> None:
        """Move the mark to what is settled by now, and wake the calls that wait for room if there is any."""
        if not self._asleep:
            self.mark = self.ledger.settled + self.max_pending
        # The budget of waiting begins anew only after something was settled. Less than `max_pending` pending entries
        # are not enough: a large record may still not fit.
        renewed = (
            self._full_since is not None
            and self.pending < self.max_pending
            and self.ledger.settled > self._settled_when_full
        )
        if renewed and self._room.acquire(blocking=False):  # see `take_dropped`; calls look again by themselves
            self._full_since, self._budget_spent = None, False
            self._room.notify_all()
            self._room.release()

    def mark_asleep(self) -> None:
        """The engine goes to sleep: the next call has to wake it."""
        self._asleep = True
        self.mark = self.signalled_full_at = -1

    def wake_waiters(self) -> None:
        """Wake all calls that wait for room: the engine has ended."""
        with self._room:
            self._room.notify_all()

    @property
    def has_unreported_drops(self) -> bool:
        """Whether entries were dropped since `take_dropped`."""
        return bool(self.unreported_drops or self._dropped_by_engine)

    def take_dropped(self) -> dict[object, int]:
        """The entries that were dropped since the last call of this, by run."""
        dropped, self._dropped_by_engine = self._dropped_by_engine, {}
        # Try-lock only: the owner may be a thread whose signal handler waits for the engine. What is missed now is
        # taken the next time.
        if self._room.acquire(blocking=False):
            taken, self.dropped, self.unreported_drops = self.dropped, {}, 0
            self._room.release()
            for run, count in taken.items():
                dropped[run] = dropped.get(run, 0) + count
        return dropped

    def __repr__(self) -> str:
        return f"<Intake pending={self.pending} of {self.max_pending}>"
