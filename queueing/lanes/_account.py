"""The account of one lane: how many of its entries are settled, and which failures no flush has reported yet."""

# Rules of this file: every count changes here, in the lane's figures and in the ledger of all lanes at once. Failures that
# are not reported yet are kept in full while all lanes together have few of them, and counted beyond that.

from __future__ import annotations

import math
from collections.abc import Hashable

from runqueue.queueing._report import MAX_FULL_FAILURES, CountedFailures, Failure, Ledger
from runqueue.queueing.batches._part import Part


class Account:
    """
    Counts the entries of one lane.

    Args:
        run: The name of the lane's run in reports.
        ledger: Counts the entries of all lanes.
    """

    def __init__(self, run: Hashable, ledger: Ledger) -> None:
        self.run = run
        self.ledger = ledger
        self.drawn = 0  # entries that have left the inbox
        self.settled = 0  # entries that were stored, have failed, or were dropped
        self.unreported = 0
        """Failed entries that no flush has reported yet."""
        self._failures: list[Failure] = []
        self._counted: list[CountedFailures] = []
        self._flush_ends: list[int] = []  # the last window of each flush that has not reported yet, in order

    @property
    def pending(self) -> int:
        """Drawn entries that are not settled, in flight included."""
        return self.drawn - self.settled

    @property
    def is_clear(self) -> bool:
        """Whether everything is settled and every failure reported, those of final statuses included."""
        return not (self._failures or self._counted) and self.drawn == self.settled

    def add(self, count: int) -> None:
        """Count entries that were drawn from the inbox."""
        self.drawn += count
        self.ledger.drawn += count

    def mark_in_flight(self, count: int) -> None:
        self.ledger.in_flight += count

    def clear_in_flight(self, count: int) -> None:
        self.ledger.in_flight -= count

    def store(self, count: int) -> None:
        self.ledger.stored += count
        self.settled += count

    def fail(self, part: Part, error: Exception, serial: int) -> None:
        """Count the entries of a part of the window *serial* as failed for good, and keep the failure."""
        error.__traceback__ = None  # its frames hold the request, and failures are kept
        for record, start, stop in part.stretches():
            failure = Failure(self.run, record, start, stop, error, final=True, serial=serial)
            self._keep(failure)
            self.ledger.log.add(failure)
        self.ledger.failed += part.weight
        self.settled += part.weight

    def _keep(self, failure: Failure) -> None:
        self.unreported += failure.weight
        count, room = failure.weight, MAX_FULL_FAILURES - self.ledger.unreported
        if room > 0:
            self.ledger.unreported += min(count, room)
            if count <= room:
                self._failures.append(failure)
                return
            kept, failure = failure.split(room)
            self._failures.append(kept)
        serial = failure.serial
        counted = next((each for each in self._counted if serial <= each.bound), None)
        if counted is None:
            counted = CountedFailures(next((bound for bound in self._flush_ends if serial <= bound), math.inf))
            self._counted.append(counted)
        counted.add(failure)

    def close_report(self, serial: int) -> None:
        """Note that a flush will report the failures of the windows up to *serial*, and none of later windows."""
        if serial not in self._flush_ends:
            self._flush_ends.append(serial)
        for counted in self._counted:
            counted.bound = min(counted.bound, serial) if counted.last <= serial else counted.bound

    def drop(self, count: int) -> None:
        """Count queued entries as dropped."""
        self.ledger.dropped += count
        self.settled += count

    def abandon(self) -> int:
        """Count the pending entries as settled, in the lane alone, and return their number."""
        pending = self.pending
        self.settled = self.drawn
        return pending

    def take_unreported(self, serial: int) -> list[Failure]:
        """The failures up to the window `serial` that no flush has reported yet; from now on they count as reported."""
        mine = [failure for failure in self._failures if failure.serial <= serial]
        if mine:
            self._failures = [failure for failure in self._failures if failure.serial > serial]
            self.ledger.unreported -= sum(failure.weight for failure in mine)
        self._flush_ends = [bound for bound in self._flush_ends if bound > serial]
        for counted in [each for each in self._counted if each.last <= serial]:
            self._counted.remove(counted)
            mine += counted.failures(self.run)
        self.unreported -= sum(failure.weight for failure in mine)
        return mine
