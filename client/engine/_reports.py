"""
What users read of an outcome: reports of flushes, failures by cause, and the warnings of a client that streams.

The engine's failures know records and lanes; the functions here turn them into `runqueue.FlushReport`,
`runqueue.OperationFailure`, and log lines.
"""

# Rule of this file: few log lines, whatever happens. Each cause is warned of once, and each run once; of many runs only
# the first are named.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Final

from runqueue._entities import Entries, Entry, FlushReport, OperationFailure
from runqueue._run_id import PendingRunId
from runqueue.queueing import Failure, Report
from runqueue.queueing._report import FailureLog
from runqueue.runtime import _notices
from runqueue.wire._records import OPERATIONS, entries_of

NAMED_RUNS: Final = 10
"""Runs that one warning of dropped entries names; the others are counted."""


def public_report(report: Report) -> FlushReport:
    """The outcome of a flush, for its caller."""
    return FlushReport(total=report.total, failures=grouped(report.failures))


def public_failures(log: FailureLog) -> tuple[OperationFailure, ...]:
    """All final failures of a client: with their entries as far as the log keeps them, then counts only."""
    counted = tuple(
        OperationFailure(_run_id(run), OPERATIONS[kind], (), error, True, count)
        for run, kind, error, count in log.beyond_bound()
    )
    return grouped(list(log.full)) + counted


def grouped(failures: Iterable[Failure]) -> tuple[OperationFailure, ...]:
    """One failure for each run, operation and cause, in the order of their first entries."""
    groups: dict[tuple[Any, int, str, bool], list[Failure]] = {}
    texts: dict[int, str] = {}  # thousands of entries share one error
    for failure in failures:
        text = texts.setdefault(id(failure.error), str(failure.error))
        groups.setdefault((failure.run, failure.kind, text, failure.final), []).append(failure)
    return tuple(_public(group) for group in groups.values())


def warn_of_failures(failures: Iterable[Failure]) -> None:
    """Log one warning for each run, operation and cause, which names the first entry; flushes report all entries."""
    for failure in grouped(failures):
        fate = "failed; `failures` holds all" if failure.final else "is still queued"
        try:
            summary = failure.summary()
        except Exception as error:  # the repr of a key is foreign code
            summary = f"{failure.operation} (it cannot be shown: {type(error).__name__})"
        text = "%s of run %s %s, as others may for the same cause: %s"
        _notices.warning(text, summary, failure.run_id, fate, failure.error)


def warn_of_dropped(dropped: Mapping[Any, int], max_pending: float) -> None:
    """
    Log how many entries were dropped.

    Args:
        dropped: Entries by run, since the last warning.
        max_pending: The bound they met.
    """
    for run, count in islice(dropped.items(), NAMED_RUNS):
        _notices.warning("%d entries of run %s were dropped: max_pending=%d", count, run, max_pending)
    if others := list(islice(dropped.values(), NAMED_RUNS, None)):
        text = "%d entries of %d other runs were dropped: max_pending=%d"
        _notices.warning(text, sum(others), len(others), max_pending)


def _public(group: list[Failure]) -> OperationFailure:
    first = group[0]
    parts = [(failure.stop - failure.start, partial(_described, failure)) for failure in group]
    return OperationFailure(
        run_id=_run_id(first.run),
        operation=OPERATIONS[first.kind],
        entries=Entries(parts),
        error=first.error,
        final=first.final,
        count=sum(failure.weight for failure in group),
    )


def _described(failure: Failure, start: int, stop: int) -> Iterator[Entry]:
    return entries_of(failure.record, failure.start + start, failure.start + stop)


def _run_id(run: Any) -> Any:
    return run.run_id or run if isinstance(run, PendingRunId) else run
