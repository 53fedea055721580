"""
The books of one lane: how many of its entries are settled, and which have failed.

Rule of this file: every count changes here, in the lane's own figures and in the ledger of all lanes at once.
"""

from __future__ import annotations

from collections.abc import Hashable

from runqueue.queueing._part import Part
from runqueue.queueing._report import Failure, Ledger


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
        self._failures: list[Failure] = []

    @property
    def pending(self) -> int:
        """Entries that were dealt and are not settled, in flight included."""
        return self.entries - self.settled

    @property
    def unnamed(self) -> int:
        """Failed entries that no report has named yet."""
        return sum(failure.weight for failure in self._failures)

    @property
    def clean(self) -> bool:
        """Whether everything is settled, and every failure named; a final status is no entry, and fails all the same."""
        return not self._failures and self.entries == self.settled

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
            self._failures.append(failure)
            self.ledger.log.add(failure)
        self.ledger.failed += part.weight
        self.settled += part.weight

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
        return mine
