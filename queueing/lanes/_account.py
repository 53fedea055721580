"""
Counts of entries: a [Ledger][] for all lanes of a client, and an [Account][] for each lane.

An account also keeps the failures of its lane until a flush reports them.
"""

# Rules of this file: every count changes in the account and in the ledger at the same time. Pending entries are not
# counted but derived: `drawn = pending + in_flight + stored + failed + dropped` holds at any moment. Failures are kept
# in full as long as all lanes together hold few of them, and counted beyond that.

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator

from runqueue.queueing._report import MAX_FULL_FAILURES, Causes, CountedFailure, Failure, FailureLog
from runqueue.queueing.batches._part import Part


class Ledger:
    """
    The counts of a client, in entries. Only the engine's thread changes them, except for `refused`.

    `seqlock` is odd while records move from an inbox into a window. A reader in another thread counts again if it was
    odd, or has changed meanwhile.
    """

    __slots__ = (
        "drawn",
        "dropped",
        "failed",
        "in_flight",
        "log",
        "refused",
        "requeued",
        "retried",
        "seqlock",
        "stored",
        "unreported",
    )

    def __init__(self) -> None:
        self.drawn: int = 0  # drawn from an inbox into a window
        self.in_flight: int = 0
        self.stored: int = 0
        self.failed: int = 0
        self.dropped: int = 0  # drawn, and given up
        self.refused: int = 0  # dropped by log calls, for want of room
        self.requeued: int = 0  # of those drawn: queued by the engine itself, not by a log call
        self.retried: int = 0  # repeated requests
        self.log: FailureLog = FailureLog()
        self.unreported: int = 0  # failed entries that accounts keep in full
        self.seqlock: int = 0

    @property
    def settled(self) -> int:
        """Settled entries of log calls: stored, failed or dropped."""
        return self.stored + self.failed + self.dropped - self.requeued

    def __repr__(self) -> str:
        return f"<Ledger drawn={self.drawn} in_flight={self.in_flight} stored={self.stored} failed={self.failed}>"


class Account:
    """
    The counts and failures of one lane.

    Args:
        run: The run's name in reports.
        ledger: Counts the entries of all lanes.
    """

    def __init__(self, run: Hashable, ledger: Ledger) -> None:
        self.run = run
        self.ledger = ledger
        self.drawn = 0
        self.settled = 0
        self.unreported = 0
        """Failed entries that no flush has reported yet."""
        self._failures: list[Failure] = []
        self._counted: list[_CountedFailures] = []
        self._report_ends: list[int] = []  # for each flush that has not reported yet, its last window

    @property
    def pending(self) -> int:
        """Entries that were drawn and are not settled, including those in flight."""
        return self.drawn - self.settled

    @property
    def is_clear(self) -> bool:
        """Whether all entries are settled and all failures reported, including those of final statuses."""
        return not (self._failures or self._counted) and self.drawn == self.settled

    def add(self, count: int) -> None:
        """Count entries that were drawn."""
        self.drawn += count
        self.ledger.drawn += count

    def mark_in_flight(self, count: int) -> None:
        self.ledger.in_flight += count

    def clear_in_flight(self, count: int) -> None:
        self.ledger.in_flight -= count

    def store(self, count: int) -> None:
        """Settle entries as stored."""
        self.ledger.stored += count
        self.settled += count

    def drop(self, count: int) -> None:
        """Settle queued entries as dropped."""
        self.ledger.dropped += count
        self.settled += count

    def fail(self, part: Part, error: Exception, serial: int) -> None:
        """
        Settle entries as failed, and keep the failure for a report.

        Args:
            part: The entries.
            error: Why they failed.
            serial: The window that held them.
        """
        error.__traceback__ = None  # its frames refer to the request, and reports are kept
        for record, start, stop in part.stretches():
            failure = Failure(self.run, record, start, stop, error, final=True, serial=serial)
            self._keep(failure)
            self.ledger.log.add(failure)
        self.ledger.failed += part.weight
        self.settled += part.weight

    def abandon(self) -> int:
        """Settle all pending entries without counting them in the ledger, and return their number."""
        pending = self.pending
        self.settled = self.drawn
        return pending

    # -- reports -----------------------------------------------------------------------------------------------------

    def close_report(self, serial: int) -> None:
        """Note that a flush will report the failures of the windows up to *serial*, and of no later ones."""
        if serial not in self._report_ends:
            self._report_ends.append(serial)
        for counted in self._counted:
            if counted.last <= serial:
                counted.report_end = min(counted.report_end, serial)

    def take_unreported(self, serial: int) -> list[Failure]:
        """Return the unreported failures of the windows up to *serial*. They count as reported from now on."""
        taken = [failure for failure in self._failures if failure.serial <= serial]
        if taken:
            self._failures = [failure for failure in self._failures if failure.serial > serial]
            self.ledger.unreported -= sum(failure.weight for failure in taken)
        self._report_ends = [end for end in self._report_ends if end > serial]
        for counted in [each for each in self._counted if each.last <= serial]:
            self._counted.remove(counted)
            taken += counted.failures(self.run)
        self.unreported -= sum(failure.weight for failure in taken)
        return taken

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
        counted = next((each for each in self._counted if serial <= each.report_end), None)
        if counted is None:
            counted = _CountedFailures(next((end for end in self._report_ends if serial <= end), math.inf))
            self._counted.append(counted)
        counted.add(failure)


class _CountedFailures:
    """
    Failures of one lane that are counted by operation and cause, for one report.

    Args:
        report_end: The last window of the flush that will report them. Infinite: no such flush has begun.
    """

    def __init__(self, report_end: float) -> None:
        self.report_end = report_end
        self.last = 0  # the last window that holds one of them
        self._causes = Causes()

    def add(self, failure: Failure) -> None:
        self.last = max(self.last, failure.serial)
        self._causes.add(failure, failure.kind, common="")

    def failures(self, run: Hashable) -> Iterator[Failure]:
        for (kind, _), error, count in self._causes:
            yield CountedFailure(run, kind, error, count, serial=self.last)
