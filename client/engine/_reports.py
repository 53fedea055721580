"""From the engine's failures, which know records and lanes, to what users read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from runqueue._entities import Entries, Entry, FlushReport, OperationFailure
from runqueue._run_id import PendingRunId
from runqueue.queueing import Failure, Report
from runqueue.queueing._report import FailureLog
from runqueue.wire._records import OPERATIONS, describe


def public_report(report: Report) -> FlushReport:
    """The outcome of a flush, for its caller."""
    return FlushReport(total=report.total, failures=grouped(report.failures))


def public_failures(log: FailureLog) -> tuple[OperationFailure, ...]:
    """All final failures: in full as far as the log keeps them, then counted."""
    counted = tuple(
        OperationFailure(_run_id(run), OPERATIONS[kind], (), error, True, count)
        for run, kind, error, count in log.rest()
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
    return describe(failure.record, failure.start + start, failure.start + stop)


def _run_id(run: Any) -> Any:
    return run.run_id or run if isinstance(run, PendingRunId) else run
