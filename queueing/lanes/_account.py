"""
The books of one lane: how many of its entries are settled, and which have failed.

Rule of this file: every count changes here, in the lane's own figures and in the ledger of all lanes at once. What has
failed is kept until a report names it: in full as long as all lanes together have few, counted beyond that.
"""

from __future__ import annotations

import math
from collections.abc import Hashable

from runqueue.queueing._report import KEPT_IN_FULL, Failure, Ledger, Tally
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
        self.entries = 0  # dealt
        self.settled = 0  # stored or failed
        self.unnamed = 0
        """Failed entries that no report has named yet."""
        self._failures: list[Failure] = []
        self._tallies: list[Tally] = []
        self._bounds: list[int] = []  # the last windows of flushes that have reported nothing yet, in order

    @property
    def pending(self) -> int:
        """Entries that were dealt and are not settled, in flight included."""
        return self.entries - self.settled

    @property
    def clean(self) -> bool:
        """Whether everything is settled, and every failure named; a final status is no entry, and fails all the same."""
        return not (self._failures or self._tallies) and self.entries == self.settled

    def deal(self, count: int) -> None:
        self.entries += count
        self.ledger.dealt += count

    def fly(self, count: int) -> None:
        self.ledger.in_flight += count

    def land(self, count: int) -> None:
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
        self.unnamed += failure.weight
        count, room = failure.weight, KEPT_IN_FULL - self.ledger.unclaimed
        if room > 0:
            self.ledger.unclaimed += min(count, room)
            if count <= room:
                self._failures.append(failure)
                return
            kept, failure = failure.split(room)
            self._failures.append(kept)
        serial = failure.serial
        tally = next((each for each in self._tallies if serial <= each.bound), None)
        if tally is None:
            tally = Tally(next((bound for bound in self._bounds if serial <= bound), math.inf))
            self._tallies.append(tally)
        tally.add(failure)

    def close(self, serial: int) -> None:
        """A flush will report what has failed of the windows up to this one, and not of later ones."""
        if serial not in self._bounds:
            self._bounds.append(serial)
        for tally in self._tallies:
            tally.bound = min(tally.bound, serial) if tally.last <= serial else tally.bound

    def drop(self, count: int) -> None:
        """Give up entries that are queued."""
        self.ledger.dropped += count
        self.settled += count

    def abandon(self) -> int:
        """Write off what is pending; how much that is."""
        pending = self.pending
        self.settled = self.entries
        return pending

    def claim(self, serial: int) -> list[Failure]:
        """The failures of the windows up to `serial` that no report has named yet."""
        mine = [failure for failure in self._failures if failure.serial <= serial]
        if mine:
            self._failures = [failure for failure in self._failures if failure.serial > serial]
            self.ledger.unclaimed -= sum(failure.weight for failure in mine)
        self._bounds = [bound for bound in self._bounds if bound > serial]
        for tally in [each for each in self._tallies if each.last <= serial]:
            self._tallies.remove(tally)
            mine += tally.failures(self.run)
        self.unnamed -= sum(failure.weight for failure in mine)
        return mine
