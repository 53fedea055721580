"""
The lanes of one client, by run.

    opened  ->  looked at, while it has something to do  ->  released, when its run has ended and all of it is told

A lane is **released** so that a service with a run for each request does not keep them all. The danger is a log call that
has looked the lane up and appends later, perhaps minutes later, if a signal handler came between. So a lane is let go only
when nobody can append to it any more: its way in is turned first, to whatever lane the run has then; after that nobody
gets hold of the inbox anew, and the count of references tells whether somebody still has it. If so, or if the inbox got
something meanwhile, the way is turned back, and the engine tries another time. Rejected: to let the inbox hand on what
it holds when the last caller lets go of it (`__del__`): a flush in another thread would not find it until then, and it
would come behind what the same thread has logged after it.

Rules of this file: any thread may look a lane up or open one, the engine's alone releases. Looking up takes no lock; the
engine never waits for the lock, as a log call that holds it may have been interrupted by one that waits for the engine.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from sys import getrefcount
from types import SimpleNamespace
from typing import Any, Final

from runqueue.queueing._report import Ledger
from runqueue.queueing.batches._batch import Record
from runqueue.queueing.lanes._inbox import Inbox
from runqueue.queueing.lanes._intake import Intake
from runqueue.queueing.lanes._lane import Lane
from runqueue.queueing.lanes._screening import Encode

_RECOUNTS: Final = 100
"""As often a count is begun anew because records were just changing places; then it is as good as it is."""


class Accumulator:
    """
    Holds what is queued.

    Args:
        encode: See [runqueue.queueing.Encode][].
        bounded: Makes what records have to pass on their way in, if anything.
    """

    def __init__(self, encode: Encode, make_intake: Callable[[Ledger], Intake] | None = None) -> None:
        self.lanes: dict[Hashable, Lane] = {}
        self._encode = encode
        self._make_intake = make_intake
        self.reset()

    def reset(self) -> None:
        """Begin anew, with nothing queued and nothing counted, as in a child process."""
        self._callback: Callable[[], None] | None = None
        self.lanes.clear()
        self._all: dict[Lane, None] = {}
        self._releasing: list[Lane] = []  # the one that is being released; whoever takes it out decides
        self._lock = threading.RLock()  # a signal handler or a garbage collection may come back in here
        self.ledger: Ledger = Ledger()
        self.intake: Intake | None = None if self._make_intake is None else self._make_intake(self.ledger)
        # To be looked at by `tidy`: where there is an intake, all lanes that have anything to do.
        self._live: list[Lane] = [] if self.intake is None else self.intake.live

    def open(self, run: Hashable, *, run_exists: bool, parent: Lane | None = None, first: Record | None = None) -> Lane:
        """
        The lane of this run, made if there is none.

        Args:
            run: The lane's name.
            opened: Whether the run exists.
            parent: The lane whose run has to exist first.
            first: A record that a new lane begins with, whatever the bound.
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
                    if run_exists and not lane.listed:  # if nothing comes of it, it goes again
                        lane.listed = True
                        self._live.append(lane)
                    if self._callback is not None:
                        _watch(lane, self._callback)
            return lane

    def watch(self, callback: Callable[[], None]) -> None:
        """Call this after each record from now on, in the thread that has logged it."""
        self._callback = callback
        for lane in self.all():
            _watch(lane, callback)

    def alias(self, run: Hashable, lane: Lane) -> None:
        """Let the lane be found by a second name too, unless that name has a lane already."""
        with self._lock:
            self._cancel_release()
            if not lane.released and self.lanes.setdefault(run, lane) is lane and run not in lane.names:
                lane.names.append(run)

    def resolve(self, lane: Lane, name: Hashable) -> None:
        """The run has got its real name. In the engine's thread."""
        lane.name = name
        if self.lanes.setdefault(name, lane) is lane and name not in lane.names:  # atomic. No lock: see above
            lane.names.append(name)

    def run_ended(self, lane: Lane) -> None:
        """Its run has ended, and no record of ours says so: have it looked at by `tidy`."""
        lane.ended = True
        with self._lock:
            if not lane.listed:
                lane.listed = True
                self._live.append(lane)

    def forget(self, lane: Lane) -> None:
        """A lane whose first record was refused, and that nobody else has callback of."""
        lane.released = True
        self._unname(lane)
        self._all.pop(lane, None)
        lane.append = lane.push = lane.inbox.appender()  # what an intake has put there leads back to the lane

    def all(self) -> list[Lane]:
        """Every lane once, in the order of their opening; without those that were released."""
        return list(self._all)

    def live(self) -> list[Lane]:
        """Those that may have something to send or to report, one perhaps twice: of many thousands, few."""
        return self.all() if self.intake is None else self._live.copy()

    def busy(self) -> list[Lane]:
        """Those with something to send or to report."""
        return [lane for lane in self.live() if not lane.is_done]

    def live_with_uploads(self) -> list[Lane]:
        """Those that may have something to send or to report, with their side lanes."""
        return [member for lane in self.live() for member in lane.with_uploads]

    def inboxes_empty(self) -> bool:
        """Whether no inbox holds anything; a final status counts no entry, but waits all the same."""
        return not any(lane.inbox for lane in self.live())

    def inbox_entries(self) -> int:
        """Entries in the inboxes, not dealt yet."""
        return sum(sum(lane.inbox.weights()) for lane in set(self.live()))

    # -- the engine's thread -------------------------------------------------------------------------------------------

    def mark_live(self, lanes: Iterable[Lane]) -> None:
        """Have these looked at by `tidy`; with an intake they are anyway."""
        if self.intake is None:
            self._live.extend(lane for lane in lanes if lane.owner is None)

    def tidy(self, needed: Callable[[Lane], bool]) -> None:
        """
        Release what is over, and unlist what has nothing to do.

        Args:
            needed: Whether somebody still works with a lane.
        """
        count = len(self._live)  # log calls may list more meanwhile, at the end
        kept = [
            lane for lane in dict.fromkeys(self._live[:count]) if not lane.released and self._stays_live(lane, needed)
        ]
        self._live[:count] = kept  # atomic

    def _stays_live(self, lane: Lane, needed: Callable[[Lane], bool]) -> bool:
        """Whether the lane has to be looked at another time."""
        if lane.is_releasable:
            return needed(lane) or not self.release(lane)
        if self.intake is not None and not lane.is_done:
            return True
        lane.listed = False  # before the look: whoever adds a record after it lists the lane
        lane.listed = self.intake is not None and bool(lane.inbox)
        return lane.listed

    def release(self, lane: Lane) -> bool:
        """Forget a lane, unless it is not over, or somebody may be about to append to it."""
        if not lane.is_releasable or not self._lock.acquire(blocking=False):
            return False
        try:
            # Whoever comes into `open` from here on does so in this thread (a garbage collection may log), and takes
            # the lane out of `_closing`: it stays then.
            self._releasing[:] = [lane]
            lane.append, lane.push = partial(self._forward, lane.name), partial(self._forward_push, lane.name)
            if (
                _holders(lane) == _UNUSED and lane.is_releasable
            ):  # in this order: what is in the inbox then, is all there will be
                self._unname(lane)
                try:
                    self._releasing.pop()  # looks and takes in one: before it nobody has made another lane of the run
                except IndexError:
                    self._restore(lane)  # names that it was given back may have been lost again
                    return False
                lane.released = True
                lane.blocked_by = None  # with frames that hold the lane
                lane.upload_lanes.clear()
                self._all.pop(lane, None)
                return True
            self._cancel_release()
            return False
        finally:
            self._lock.release()

    def _cancel_release(self) -> None:
        for lane in self._releasing.copy():  # taken out last: whoever comes in here meanwhile has to find its way in
            self._restore(lane)
        self._releasing.clear()

    def _restore(self, lane: Lane) -> None:
        """Do not release it after all."""
        for name in lane.names:
            self.lanes.setdefault(name, lane)
        if self.intake is None:
            lane.append = lane.push = lane.inbox.appender()
        else:  # never the bare way in between: what takes it is not counted
            self.intake.install(lane)
        if self._callback is not None:
            _watch(lane, self._callback)

    def _unname(self, lane: Lane) -> None:
        for name in lane.names:
            if self.lanes.get(name) is lane:
                self.lanes.pop(name, None)

    def _forward(self, name: Hashable, record: Record) -> bool | None:
        """`append` of a lane that is released, or was about to be."""
        return self.open(name, run_exists=True).append(record)

    def _forward_push(self, name: Hashable, record: Record) -> None:
        self.open(name, run_exists=True).push(record)

    # -- counts --------------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        """Entries accepted, pending, in flight, stored, failed and dropped; exact when no call is under way."""
        # No lock: a signal handler may come in here, in the thread that would hold it, and wait for the engine.
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
        Forget all that is queued, and count it.

        Args:
            failed: Whether it counts as failed (an end that could not send it) or as dropped (an end that would not).

        Returns:
            The number of entries.
        """
        count = sum(lane.abandon() for lane in self.all())
        if failed:
            self.ledger.failed += count
        else:
            self.ledger.dropped += count
        if self.intake is not None:
            self.intake.release()
        return count

    def __repr__(self) -> str:
        return f"<Accumulator lanes={len(self.all())} pending={self.counts()['pending']}>"


def _holders(lane: Any) -> int:
    """References to what is in the inbox: its own, those of this call, and one for each call that has a way into it."""
    return getrefcount(lane.inbox.items)


_UNUSED: Final = _holders(SimpleNamespace(inbox=Inbox()))


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
