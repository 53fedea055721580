"""
Failures and reports: which entries were not stored, and why.

A [Report][] is the outcome of one flush; a [FailureLog][] holds the final failures of a client's whole life.
"""

# Rule of this file: its memory is bounded. The first failures are kept in full, all others are counted by cause.

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any, Final

import attrs

from runqueue.queueing.batches._batch import STATUS, Record, record_of

MAX_FULL_FAILURES: Final = 10_000
"""
Failed entries of one client that its [FailureLog][] keeps one by one. The lanes keep as many again for the next flush
to report. A run that fails for days must not fill the memory.
"""
MAX_CAUSES: Final = 1_000
"""Causes that are counted apart, and warned of once each. Failures of further causes are counted and reported only."""
_CAUSE_CHARACTERS: Final = 40
"""Characters of an error's text that tell its cause: what follows them mostly names the entry."""


class Failure:
    """
    A range of one record's entries that was not stored.

    Args:
        run: The run, as the caller names it.
        record: The record.
        start: The first entry.
        stop: The entry after the last one.
        error: Why they were not stored.
        final: Whether they have failed for good. False: they are still queued.
        serial: The window of the lane that held the record.
    """

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
        self.serial: int = serial

    def split(self, count: int) -> tuple[Failure, Failure]:
        """Cut the failure in two: its first *count* entries, and the others."""
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
        """The number of entries. A final status counts as none."""
        return 0 if self.record[0] == STATUS else self.stop - self.start

    def __repr__(self) -> str:
        state = "final" if self.final else "pending"
        return f"<Failure run={self.run} kind={self.kind} {self.start}:{self.stop} {state}: {self.error}>"


class CountedFailure(Failure):
    """Entries that failed for one cause and are known by their number only."""

    __slots__ = ("count",)

    def __init__(self, run: Hashable, kind: int, error: Exception, count: int, *, serial: int) -> None:
        super().__init__(run, record_of(kind, ()), 0, 0, error, final=True, serial=serial)
        self.count = count

    @property
    def weight(self) -> int:
        return self.count


class Causes:
    """
    Counts failed entries by a key and the text of their error.

    Where texts name the entry, there are as many texts as entries: beyond `MAX_CAUSES`, failures are counted by what
    their texts have in common.
    """

    def __init__(self) -> None:
        self._counts: Counter[tuple[Any, ...]] = Counter()
        self._errors: dict[tuple[Any, ...], Exception] = {}

    def add(self, failure: Failure, *key: Any, common: str) -> None:
        """
        Count the entries of a failure.

        Args:
            failure: The failure.
            key: Counted apart from other keys.
            common: Replaces the text of the error once there are `MAX_CAUSES` causes.
        """
        cause = (*key, str(failure.error))
        if cause not in self._counts and len(self._counts) >= MAX_CAUSES:
            cause = (*key, common)
        self._errors.setdefault(
            cause, failure.error
        )  # before the count: another thread may be iterating over the counts
        self._counts[cause] += failure.weight

    def __len__(self) -> int:
        return len(self._counts)

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], Exception, int]]:
        """Key and text, the first error, and the number of entries of each cause. Any thread may iterate."""
        for cause, count in list(self._counts.items()):
            yield cause, self._errors[cause], count


class FailureLog:
    """All final failures of a client: the first `MAX_FULL_FAILURES` entries in full, the others counted."""

    def __init__(self) -> None:
        self.full: list[Failure] = []
        self.counted: Causes = Causes()
        self.count: int = 0
        """Failed entries and final statuses."""
        self._kept = 0
        self._causes: set[tuple[int, str]] = set()
        self._new_causes: list[Failure] = []

    def take_new_causes(self) -> list[Failure]:
        """Return the first failure of each cause that is new since the last call."""
        failures, self._new_causes = self._new_causes, []
        return failures

    def add(self, failure: Failure) -> None:
        self.count += max(1, failure.weight)
        cause = (failure.kind, getattr(failure.error, "code", None) or str(failure.error)[:_CAUSE_CHARACTERS])
        if cause not in self._causes and len(self._causes) < MAX_CAUSES:
            self._causes.add(cause)
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
        self.counted.add(failure, failure.run, failure.kind, common=cause[1] if cause in self._causes else "")

    def beyond_bound(self) -> Iterator[tuple[Any, int, Exception, int]]:
        """The failures that are only counted: run, kind, error, number of entries."""
        for (run, kind, _), error, count in self.counted:
            yield run, kind, error, count


@attrs.frozen(kw_only=True)
class Report:
    """The outcome of one flush."""

    total: int
    """Entries that were queued when the flush began."""
    failures: tuple[Failure, ...] = ()
    """Those of them that were not stored: failed for good (`final`), or still queued."""

    @property
    def not_stored(self) -> int:
        return sum(failure.weight for failure in self.failures)
