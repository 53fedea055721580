"""
The accumulator: the lanes of one client, by run.

    open  ->  live: the engine looks at it  ->  released: its run has ended, and everything of it is reported

Lanes of ended runs are released, so that a service with a run for each request does not keep them all.
"""

# Rules of this file:
# - Any thread may look up or open a lane; only the engine's thread releases one.
# - Looking up takes no lock. The engine never waits for the lock: its owner may be a log call that a signal handler has
#   interrupted, and the handler may wait for the engine.
#
# How a lane is released. A log call may have looked the lane up and append to it minutes later, if a signal handler
# came between. So `append` and `push` of the lane are first replaced by functions that go to the lane which the run has
# then. From here on nobody gets hold of the inbox's items anew, and their reference count tells whether a call still
# holds them. If one does, or if the inbox is not empty, the replacement is undone, and the engine tries again later.
#
# Rejected: the inbox passes on what it holds when its last user lets go of it (`__del__`). Until then a flush in
# another thread would not find these records, and they would come behind later records of the same thread.

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from sys import getrefcount
from types import SimpleNamespace
from typing import Any, Final

from runqueue.queueing.batches._batch import Record
from runqueue.queueing.lanes._account import Ledger
from runqueue.queueing.lanes._inbox import Inbox
from runqueue.queueing.lanes._intake import Intake
from runqueue.queueing.lanes._lane import Lane
from runqueue.queueing.lanes._screening import Encode

_RECOUNTS: Final = 100
"""How often `counts` begins anew because records moved from an inbox into a window meanwhile."""


class Accumulator:
    """
    Holds everything that a client has queued.

    Args:
        encode: See [runqueue.queueing.Encode][].
        make_intake: Makes the intake that records have to pass. None: there is none.
    """

    def __init__(self, encode: Encode, make_intake: Callable[[Ledger], Intake] | None = None) -> None:
        self.lanes: dict[Hashable, Lane] = {}
        self._encode = encode
        self._make_intake = make_intake
        self.reset()

    def reset(self) -> None:
        """Forget everything that is queued and counted; for a forked child."""
        self._callback: Callable[[], None] | None = None
        self.lanes.clear()
        self._all: dict[Lane, None] = {}
        self._releasing: list[Lane] = []  # the lane that is being released; who removes it here decides
        self._lock = threading.RLock()  # re-entrant: a signal handler or a garbage collection may log
        self.ledger: Ledger = Ledger()
        self.intake: Intake | None = None if self._make_intake is None else self._make_intake(self.ledger)
        # Lanes for `tidy`. With an intake, every lane that has something to do is among them.
        self._live: list[Lane] = [] if self.intake is None else self.intake.live

    def open(self, run: Hashable, *, run_exists: bool, parent: Lane | None = None, first: Record | None = None) -> Lane:
        """
        The lane of a run, made if there is none.

        Args:
            run: The lane's name.
            run_exists: Whether the store has the run already.
            parent: The lane whose run has to exist first.
            first: The first record of a new lane; it passes even if there is no room.
        """
        with self._lock:
            self._cancel_release()
            lane = self.lanes.get(run)
            if lane is None:
                lane = Lane(run, self._encode, self.ledger, run_exists=run_exists, parent=parent)
                if self.intake is not None:
                    self.intake.install(lane)
                if first is not None:
                    lane.push(first)
                made, lane = lane, self.lanes.setdefault(run, lane)  # `resolve` takes no lock
                if lane is made:
                    self._all[lane] = None
                    if run_exists and not lane.listed:  # released by `tidy` if nothing is logged
                        lane.listed = True
                        self._live.append(lane)
                    if self._callback is not None:
                        _watch(lane, self._callback)
            return lane

    def watch(self, callback: Callable[[], None]) -> None:
        """Call *callback* after each record from now on, in the thread that has logged it."""
        self._callback = callback
        for lane in self.all():
            _watch(lane, callback)

    def alias(self, run: Hashable, lane: Lane) -> None:
        """Give the lane a second name, unless a lane has that name already."""
        with self._lock:
            self._cancel_release()
            if not lane.released and self.lanes.setdefault(run, lane) is lane and run not in lane.names:
                lane.names.append(run)

    def resolve(self, lane: Lane, name: Hashable) -> None:
        """Give the lane of a run that was created the run's real id as a name. In the engine's thread."""
        lane.name = name
        if self.lanes.setdefault(name, lane) is lane and name not in lane.names:  # `setdefault` is atomic: no lock
            lane.names.append(name)

    def run_ended(self, lane: Lane) -> None:
        """Mark a lane whose run was ended by other means than a record, so that `tidy` releases it."""
        lane.ended = True
        with self._lock:
            if not lane.listed:
                lane.listed = True
                self._live.append(lane)

    def forget(self, lane: Lane) -> None:
        """Remove a lane whose first record was refused, before any other caller has seen it."""
        lane.released = True
        self._unname(lane)
        self._all.pop(lane, None)
        lane.append = lane.push = lane.inbox.appender()  # the functions of the intake hold the lane

    def all(self) -> list[Lane]:
        """All lanes in the order of their opening, without those that were released."""
        return list(self._all)

    def live(self) -> list[Lane]:
        """The lanes that may have something to send or to report, few of many thousands; a lane may be there twice."""
        return self.all() if self.intake is None else self._live.copy()

    def busy(self) -> list[Lane]:
        """The lanes that have something to send or to report."""
        return [lane for lane in self.live() if not lane.is_done]

    def live_with_uploads(self) -> list[Lane]:
        """The live lanes, and their upload lanes."""
        return [member for lane in self.live() for member in lane.with_uploads]

    def inboxes_empty(self) -> bool:
        """Whether no inbox holds a record, not even a final status, which has no entries."""
        return not any(lane.inbox for lane in self.live())

    def inbox_entries(self) -> int:
        """The number of entries in all inboxes."""
        return sum(sum(lane.inbox.weights()) for lane in set(self.live()))

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def mark_live(self, lanes: Iterable[Lane]) -> None:
        """Let `tidy` look at these lanes. With an intake it does so anyway."""
        if self.intake is None:
            self._live.extend(lane for lane in lanes if lane.owner is None)

    def tidy(self, needed: Callable[[Lane], bool]) -> None:
        """
        Release the lanes that are of no more use, and unlist those that have nothing to do.

        Args:
            needed: Whether a flush or a pump still works with a lane.
        """
        count = len(self._live)  # log calls may append more lanes meanwhile
        kept = [
            lane for lane in dict.fromkeys(self._live[:count]) if not lane.released and self._stays_live(lane, needed)
        ]
        self._live[:count] = kept  # atomic

    def _stays_live(self, lane: Lane, needed: Callable[[Lane], bool]) -> bool:
        """Whether the engine has to look at the lane again."""
        if lane.is_releasable:
            return needed(lane) or not self.release(lane)
        if self.intake is not None and not lane.is_done:
            return True
        lane.listed = False  # must come before the look: a record that is added after it lists the lane
        lane.listed = self.intake is not None and bool(lane.inbox)
        return lane.listed

    def release(self, lane: Lane) -> bool:
        """Remove a lane if it is of no more use and no log call can append to it; return whether it was removed."""
        if not lane.is_releasable or not self._lock.acquire(blocking=False):
            return False
        try:
            # `open` may be entered from here on, in this thread (a garbage collection may log). It then removes the
            # lane from `_releasing`, and the lane stays.
            self._releasing[:] = [lane]
            lane.append, lane.push = partial(self._forward, lane.name), partial(self._forward_push, lane.name)
            # The order matters: once no call holds the items, nothing more comes into the inbox.
            if _holders(lane) == _UNUSED and lane.is_releasable:
                self._unname(lane)
                try:
                    self._releasing.pop()  # one atomic step; if it fails, `open` has given the lane its names back
                except IndexError:
                    self._restore(lane)  # `_unname` may have removed those names again
                    return False
                lane.released = True
                lane.blocked_by = None  # its traceback holds the lane
                lane.upload_lanes.clear()
                self._all.pop(lane, None)
                return True
            self._cancel_release()
            return False
        finally:
            self._lock.release()

    def _cancel_release(self) -> None:
        for lane in self._releasing.copy():  # removed last: a nested call must find it here
            self._restore(lane)
        self._releasing.clear()

    def _restore(self, lane: Lane) -> None:
        """Undo the beginning of a release."""
        for name in lane.names:
            self.lanes.setdefault(name, lane)
        if self.intake is None:
            lane.append = lane.push = lane.inbox.appender()
        else:  # at once: a record that passed the bare `append` would not be counted
            self.intake.install(lane)
        if self._callback is not None:
            _watch(lane, self._callback)

    def _unname(self, lane: Lane) -> None:
        for name in lane.names:
            if self.lanes.get(name) is lane:
                self.lanes.pop(name, None)

    def _forward(self, name: Hashable, record: Record) -> bool | None:
        """The `append` of a lane that is released, or being released."""
        return self.open(name, run_exists=True).append(record)

    def _forward_push(self, name: Hashable, record: Record) -> None:
        self.open(name, run_exists=True).push(record)

    # -- counts --------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Entries accepted, pending, in flight, stored, failed and dropped; exact when no call is under way."""
        # No lock: a signal handler may call this in the thread that holds the lock, and wait for the engine.
        seqlock, counts = self.ledger.seqlock, self._count()
        for _ in range(_RECOUNTS):
            if seqlock == self.ledger.seqlock and not seqlock % 2:
                break
            time.sleep(0)
            seqlock, counts = self.ledger.seqlock, self._count()
        return counts

    def _count(self) -> dict[str, int]:
        ledger = self.ledger
        accepted = ledger.drawn + self.inbox_entries() + ledger.refused
        settled = {"stored": ledger.stored, "failed": ledger.failed, "dropped": ledger.dropped + ledger.refused}
        in_flight = ledger.in_flight
        pending = accepted - in_flight - sum(settled.values())
        return {"accepted": accepted, "pending": pending, "in_flight": in_flight, **settled}

    def abandon(self, *, failed: bool) -> int:
        """
        Forget everything that is queued, and count it.

        Args:
            failed: Whether it counts as failed (the client's end could not send it) or as dropped (it would not).

        Returns:
            The number of entries.
        """
        count = sum(lane.abandon() for lane in self.all())
        if failed:
            self.ledger.failed += count
        else:
            self.ledger.dropped += count
        if self.intake is not None:
            self.intake.wake_waiters()
        return count

    def __repr__(self) -> str:
        return f"<Accumulator lanes={len(self.all())} pending={self.counts()['pending']}>"


def _holders(lane: Any) -> int:
    """References to the inbox's items: the inbox's, those of this call, and one for each log call that may append."""
    return getrefcount(lane.inbox.items)


_UNUSED: Final = _holders(SimpleNamespace(inbox=Inbox()))
"""The number of references to the items of an inbox that no log call holds."""


def _watch(lane: Lane, callback: Callable[[], None]) -> None:
    append, push = lane.append, lane.push

    def take(record: Record) -> bool | None:
        dropped = append(record)
        callback()
        return dropped

    def put(record: Record) -> None:
        push(record)
        callback()

    lane.append, lane.push = take, put
