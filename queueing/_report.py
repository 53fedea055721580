"""
What became of the entries: counts while they are under way, failures to the entry, the report of one flush.

Rule of this file: it only keeps ledger. `drawn = pending + in_flight + stored + failed + dropped` holds at any moment,
because pending is never kept but derived.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any, Final

import attrs

from runqueue.queueing.batches._batch import STATUS, Record, record_of

MAX_FULL_FAILURES: Final = 10_000
"""
Failed entries of one client that are kept one by one: by its [FailureLog][], and as many again for the next flush to
report. A run that fails for days must not fill the memory.
"""
MAX_CAUSES: Final = 1_000
"""Causes that are told apart for a warning each; beyond them, failures are counted and reported, and not warned of."""
_CAUSE_CHARACTERS: Final = 40
"""Characters of a text by which causes are told apart: what follows mostly names the entry."""


class Failure:
    """A stretch of one record that was not stored, and why."""

    __slots__ = ("error", "final", "record", "run", "serial", "start", "stop")

    def __init__(
        self, run: Hashable, record: Record, start: int, stop: int, error: Exception, *, final: bool, serial: int = 0
    ) -> None:
        self.run: Hashable = run
        self.record: Record = record
        self.start: int = start
        self.stop: int = stop
        self.error: Exception = error
        self.final: bool = final
        self.serial: int = serial  # the window of its lane that held it

    def split(self, count: int) -> tuple[Failure, Failure]:
        """The first `count` entries, and the others."""
        middle = self.start + count
        first = Failure(self.run, self.record, self.start, middle, self.error, final=self.final, serial=self.serial)
        return first, Failure(
            self.run, self.record, middle, self.stop, self.error, final=self.final, serial=self.serial
        )

    @property
    def kind(self) -> int:
        return int(self.record[0])

    @property
    def weight(self) -> int:
        return 0 if self.record[0] == STATUS else self.stop - self.start

    def __repr__(self) -> str:
        state = "final" if self.final else "pending"
        return f"<Failure run={self.run} kind={self.kind} {self.start}:{self.stop} {state}: {self.error}>"


class CountedFailure(Failure):
    """Any number of entries that were not stored for one cause, and are not kept themselves."""

    __slots__ = ("count",)

    def __init__(self, run: Hashable, kind: int, error: Exception, count: int, *, serial: int) -> None:
        super().__init__(run, record_of(kind, ()), 0, 0, error, final=True, serial=serial)
        self.count = count

    @property
    def weight(self) -> int:
        return self.count


class Causes:
    """
    Entries counted by a key and the text of their error. Texts that name the entry are as many as the entries: beyond
    `MAX_CAUSES`, what they have in common has to do.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[Any, ...]] = Counter()
        self._errors: dict[tuple[Any, ...], Exception] = {}

    def add(self, failure: Failure, *key: Any, common: str) -> None:
        cause = (*key, str(failure.error))
        if cause not in self._counts and len(self._counts) >= MAX_CAUSES:
            cause = (*key, common)
        self._errors.setdefault(cause, failure.error)  # first: another thread may go through the counts
        self._counts[cause] += failure.weight

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], Exception, int]]:
        """Key and text, the first error, and how many; from any thread."""
        for cause, count in list(self._counts.items()):
            yield cause, self._errors[cause], count


class CountedFailures:
    """
    Final failures of one lane that are counted, by operation and cause.

    Args:
        bound: The window that a flush has closed which will report them. Infinite: none has yet.
    """

    def __init__(self, bound: float) -> None:
        self.bound = bound
        self.last = 0  # the last window that any of them came from
        self._causes = Causes()

    def add(self, failure: Failure) -> None:
        self.last = max(self.last, failure.serial)
        self._causes.add(failure, failure.kind, common="")

    def failures(self, run: Hashable) -> Iterator[Failure]:
        for (kind, _), error, count in self._causes:
            yield CountedFailure(run, kind, error, count, serial=self.last)


class FailureLog:
    """All final failures: the first [MAX_FULL_FAILURES][] entries in full, the others counted."""

    def __init__(self) -> None:
        self.full: list[Failure] = []
        self.counted: Causes = Causes()
        self.count: int = 0
        """Entries, and final statuses."""
        self._kept = 0
        self._causes: set[tuple[int, str]] = set()
        self._new_causes: list[Failure] = []

    def take_new_causes(self) -> list[Failure]:
        """The first failure of each cause, since the last time."""
        news, self._new_causes = self._new_causes, []
        return news

    def add(self, failure: Failure) -> None:
        self.count += max(1, failure.weight)
        known = (failure.kind, getattr(failure.error, "code", None) or str(failure.error)[:_CAUSE_CHARACTERS])
        if known not in self._causes and len(self._causes) < MAX_CAUSES:
            self._causes.add(known)
            self._new_causes.append(failure)
        room = MAX_FULL_FAILURES - self._kept
        if room > 0:
            count = failure.stop - failure.start
            self._kept += count
            if count <= room:
                self.full.append(failure)
                return
            kept, failure = failure.split(room)
            self.full.append(kept)
        self.counted.add(failure, failure.run, failure.kind, common=known[1] if known in self._causes else "")

    def rest(self) -> Iterator[tuple[Any, int, Exception, int]]:
        """Of those beyond the bound: run, kind, error, number of entries."""
        for (run, kind, _), error, count in self.counted:
            yield run, kind, error, count


class Ledger:
    """
    The counts of one sender, in entries.

    Only the engine's thread writes, but for `refused`; `turn` is odd while records change from a lane's inbox into its
    windows, so that a reader in another thread knows when to count anew.
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
        self.drawn: int = 0
        self.in_flight: int = 0
        self.stored: int = 0
        self.failed: int = 0
        self.dropped: int = 0
        self.refused: int = 0  # dropped at the bound, before they were taken
        self.requeued: int = 0  # drawn by the engine itself, and taken by no log call
        self.retried: int = 0  # attempts, not entries
        self.log: FailureLog = FailureLog()
        self.unreported: int = 0  # failed entries that are kept in full until a flush reports them
        self.seqlock: int = 0  # odd while records change from an inbox into a window

    @property
    def settled(self) -> int:
        """Of the entries that log calls have handed over: how many are settled, or given up."""
        return self.stored + self.failed + self.dropped - self.requeued

    def __repr__(self) -> str:
        return f"<Ledger drawn={self.drawn} in_flight={self.in_flight} stored={self.stored} failed={self.failed}>"


@attrs.frozen(kw_only=True)
class Report:
    """The outcome of one flush."""

    total: int
    """Entries that the flush began with."""
    failures: tuple[Failure, ...] = ()
    """What of them was not stored: failed for good (`final`), or still queued."""

    @property
    def not_stored(self) -> int:
        return sum(failure.weight for failure in self.failures)
