"""
The lanes of one client, by run.

Rules of this file: any thread may look a lane up or open one; a lane, once there, stays. Looking up takes no lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Final

from runqueue.queueing._batch import Record, weight
from runqueue.queueing._gate import Encode
from runqueue.queueing._intake import Intake
from runqueue.queueing._lane import Lane
from runqueue.queueing._report import Ledger

_LOOKS: Final = 100
"""As often a count is begun anew because records were just changing places; then it is as good as it is."""


class Accumulator:
    """
    Holds what is queued.

    Args:
        encode: See [runqueue.queueing.Encode][].
        bounded: Makes what records have to pass on their way in, if anything.
    """

    def __init__(self, encode: Encode, bounded: Callable[[Ledger], Intake] | None = None) -> None:
        self.lanes: dict[Hashable, Lane] = {}
        self._encode = encode
        self._bounded = bounded
        self.reset()

    def reset(self) -> None:
        """Begin anew, with nothing queued and nothing counted, as in a child process."""
        self.lanes.clear()
        self._each: list[Lane] = []
        self._lock = threading.RLock()  # a signal handler or a garbage collection may come back in here
        self.ledger = Ledger()
        self.intake = None if self._bounded is None else self._bounded(self.ledger)

    def open(self, run: Hashable, *, opened: bool, parent: Lane | None = None, first: Record | None = None) -> Lane:
        """
        The lane of this run, made if there is none.

        Args:
            run: The lane's name.
            opened: Whether the run exists.
            parent: The lane whose run has to exist first.
            first: A record that a new lane begins with, whatever the bound.
        """
        with self._lock:
            lane = self.lanes.get(run)
            if lane is None:
                lane = Lane(run, self._encode, self.ledger, opened=opened, parent=parent)
                if self.intake is not None:
                    self.intake.guard(lane)
                if first is not None:
                    lane.push(first)
                made, lane = lane, self.lanes.setdefault(run, lane)  # `alias` takes no lock
                if lane is made:
                    self._each.append(lane)
            return lane

    def alias(self, run: Hashable, lane: Lane) -> None:
        """Let the lane be found by a second name too, unless that name has a lane already."""
        self.lanes.setdefault(run, lane)  # atomic. No lock: see `counts`

    def all(self) -> list[Lane]:
        """Every lane once, in the order of their opening."""
        return self._each.copy()

    def busy(self) -> list[Lane]:
        """Those with something to send or to report; of many thousands, few."""
        return [lane for lane in self._each.copy() if lane.inbox or lane.owed or not lane.idle]

    def idle(self) -> bool:
        """Whether no inbox holds anything; a final status counts no entry, but waits all the same."""
        return not any(lane.inbox for lane in self.all())

    def waiting(self) -> int:
        """Entries in the inboxes, not dealt yet."""
        return sum(sum(map(weight, lane.inbox.copy())) for lane in self.all())

    def counts(self) -> dict[str, int]:
        """Entries accepted, pending, in flight, stored, failed and dropped; exact when no call is under way."""
        # No lock: a signal handler may come in here, in the thread that would hold it, and wait for the engine.
        turn, counts = self.ledger.turn, self._count()
        for _ in range(_LOOKS):
            if turn == self.ledger.turn and not turn % 2:
                break
            time.sleep(0)
            turn, counts = self.ledger.turn, self._count()
        return counts

    def _count(self) -> dict[str, int]:
        books = self.ledger
        accepted = books.dealt + self.waiting() + books.refused
        settled = {"stored": books.stored, "failed": books.failed, "dropped": books.dropped + books.refused}
        in_flight = books.in_flight
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
