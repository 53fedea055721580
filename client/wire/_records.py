"""
What the records of MLflow's calls hold, and how a report describes them.

`runqueue.queueing` knows a record as a tuple of six items that begins with its kind. These are the items by kind; those
not shown are None:

    (RUN, ("run",), keys of its tags, NewRun)
    (PARAM, {key: value})
    (TAG, {key: value}, whether the tags may travel inside create-run)
    (METRIC, {key: value}, timestamp_ns, step, model_id, (dataset_name, dataset_digest) | None)
    (DATASET, (Dataset | InvalidValue, ...))
    (STATUS, (), status, end_time_ms)
    (ARTIFACT, {path among the run's artifacts: source, see `runqueue.artifacts._source`})

A value that could not be converted at the call is replaced by an `InvalidValue`, and only its entry fails.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import attrs

from runqueue._entities import Entry, EntryKind
from runqueue._run_id import RunId
from runqueue.queueing import Record
from runqueue.queueing.batches._batch import ARTIFACT, DATASET, METRIC, PARAM, RUN, STATUS, TAG
from runqueue.wire._limits import MAX_KEY

MILLISECOND: Final = 1_000_000
"""In nanoseconds, the unit of a metric record's timestamp."""

TOKEN_TAG: Final = "runqueue.create_id"
"""The tag by which a run is found again when the answer to its create-run was lost."""
PARENT_TAG: Final = "mlflow.parentRunId"

OPERATIONS: Final = {
    RUN: "create_run",
    PARAM: "log_params",
    TAG: "set_tags",
    METRIC: "log_metrics",
    DATASET: "log_inputs",
    STATUS: "set_terminated",
    ARTIFACT: "log_artifact",
}
_ENTRY_KINDS: Final[dict[int, EntryKind]] = {
    RUN: "run",
    PARAM: "param",
    TAG: "tag",
    METRIC: "metric",
    DATASET: "dataset",
    STATUS: "run",
    ARTIFACT: "artifact",
}

_SAFE_TAG: Final = re.compile(r"[A-Za-z0-9_.\-: ]+(/[A-Za-z0-9_.\-: ]+)*")


@attrs.frozen
class NewRun:
    """The arguments of a `create_run`."""

    experiment_id: str | None
    experiment_name: str | None
    start_time: int
    run_name: str | None
    parent: RunId | None
    tags: dict[str, str]
    """The tags that travel inside the request."""
    created_elsewhere: bool = False
    """Whether another process creates the run. It is searched for then, and not created."""


@attrs.frozen
class InvalidValue:
    """Takes the place of a value that cannot be sent, with the reason."""

    value: object
    reason: str


def is_safe_in_create(key: str) -> bool:
    """
    Tell if a tag may travel inside create-run; the others are sent by log-batch.

    Servers check keys in log-batch, but not in create-run: a bad key would be stored, and no other call could reach it.
    `mlflow.runName` is sent by log-batch because it may contradict `run_name`.
    """
    return (
        _SAFE_TAG.fullmatch(key) is not None
        and len(key) <= MAX_KEY
        and key != "mlflow.runName"
        and not any(part in (".", "..") for part in key.split("/"))
    )


def entries_of(record: Record, start: int, stop: int) -> Iterator[Entry]:
    """
    Yield the entries of a record for a report.

    Args:
        record: The record.
        start: The index of the first entry.
        stop: The index after the last one.
    """
    kind = record[0]
    name = _ENTRY_KINDS[kind]
    if kind == RUN:
        yield Entry(name, record[3].run_name)
    elif kind == STATUS:
        yield Entry(name, "status", record[2])
    elif kind == DATASET:
        for given in record[1][start:stop]:
            yield Entry(name, None, given.value) if isinstance(given, InvalidValue) else Entry(name, given.name, given)
    elif kind == ARTIFACT:  # without the content: it may be large, and reports are kept
        for path in islice(record[1], start, stop):
            yield Entry(name, path)
    else:
        stamp, step = (_original(milliseconds(record[2])), _original(record[3])) if kind == METRIC else (None, None)
        for key, value in islice(record[1].items(), start, stop):
            yield Entry(name, key, _original(value), step, stamp)


def _original(value: Any) -> Any:
    return value.value if isinstance(value, InvalidValue) else value


def milliseconds(stamp: int | InvalidValue) -> int | InvalidValue:
    """Convert a record's timestamp from nanoseconds."""
    return stamp if isinstance(stamp, InvalidValue) else stamp // MILLISECOND
