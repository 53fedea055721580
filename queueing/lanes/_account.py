"""
The books of one lane: how many of its entries are settled, and which have failed.

Rule of this file: every count changes here, in the lane's own figures and in the ledger of all lanes at once. What has
failed is kept until a report names it: in full as long as all lanes together have few, counted beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from runqueue.queueing._report import MAX_FULL_FAILURES, CountedFailures, Failure, Ledger
from runqueue.queueing.batches._part import Part


class Account:
    """
    Args:
        run: What the lane is called in reports.
        ledger: Of all lanes.
    """

    def __init__(self, run: Hashable, ledger: Ledger) -> None:
        self.run = run
        self.ledger = ledger
        self.drawn = 0  # dealt
        self.settled = 0  # stored or failed
        self.unreported = 0
        """Failed entries that no report has named yet."""
        self._failures: list[Failure] = []
        self._counted: list[CountedFailures] = []
        self._flush_ends: list[int] = []  # the last windows of flushes that have reported nothing yet, in order

    @property
    def pending(self) -> int:
        """Entries that were dealt and are not settled, in flight included."""
        return self.drawn - self.settled

    @property
    def is_clear(self) -> bool:
        """Whether everything is settled, and every failure named; a final status is no entry, and fails all the same."""
        return not (self._failures or self._counted) and self.drawn == self.settled

    def add(self, count: int) -> None:
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
        """These entries, of the window `serial`, have failed for good."""
        error.__traceback__ = None  # its frames hold the request, and reports are kept
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
        tally = next((each for each in self._counted if serial <= each.bound), None)
        if tally is None:
            tally = CountedFailures(next((bound for bound in self._flush_ends if serial <= bound), math.inf))
            self._counted.append(tally)
        tally.add(failure)

    def close_report(self, serial: int) -> None:
        """A flush will report what has failed of the windows up to this one, and not of later ones."""
        if serial not in self._flush_ends:
            self._flush_ends.append(serial)
        for tally in self._counted:
            tally.bound = min(tally.bound, serial) if tally.last <= serial else tally.bound

    def drop(self, count: int) -> None:
        """Give up entries that are queued."""
        self.ledger.dropped += count
        self.settled += count

    def abandon(self) -> int:
        """Write off what is pending; how much that is."""
        pending = self.pending
        self.settled = self.drawn
        return pending

    def take_unreported(self, serial: int) -> list[Failure]:
        """The failures of the windows up to `serial` that no report has named yet."""
        mine = [failure for failure in self._failures if failure.serial <= serial]
        if mine:
            self._failures = [failure for failure in self._failures if failure.serial > serial]
            self.ledger.unreported -= sum(failure.weight for failure in mine)
        self._flush_ends = [bound for bound in self._flush_ends if bound > serial]
        for tally in [each for each in self._counted if each.last <= serial]:
            self._counted.remove(tally)
            mine += tally.failures(self.run)
        self.unreported -= sum(failure.weight for failure in mine)
        return mine
