"""
From records to the bytes of MLflow's REST API, and nothing else: no I/O, no clock.

A server that cannot parse an entry drops the rest of the batch and answers 200, so every field is checked and typed
here. What a record holds, by kind (see `runqueue.queueing`); what is not shown of its six items is None:

    (RUN, ("run",), keys of its tags, NewRun)
    (PARAM, {key: value})
    (TAG, {key: value}, rides)
    (METRIC, {key: value}, timestamp_ns, step, model_id, (dataset_name, dataset_digest) | None)
    (DATASET, (Dataset | InvalidValue, ...))
    (STATUS, (), status, end_time_ms)
    (ARTIFACT, {path in the run's artifacts: what is uploaded, see `_source`})

A value that could not be converted at the call is an [InvalidValue][] in its place; its entry fails alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

import attrs

from runqueue._entities import Entry, EntryKind
from runqueue._run_id import RunId
from runqueue.queueing import Limits, Record
from runqueue.queueing.batches._batch import ARTIFACT, DATASET, METRIC, PARAM, RUN, STATUS, TAG
from runqueue.wire._points import MILLISECOND

MLFLOW_LIMITS: Final = Limits(metrics=1_000, params=100, tags=100, entities=1_000, datasets=1_000, bytes=1_000_000)
"""Source: MLflow's REST API, "Log Batch"; datasets from `mlflow.utils.validation.MAX_DATASETS_PER_BATCH`."""

MAX_KEY: Final = 250
"""Characters; source: `mlflow.utils.validation.MAX_ENTITY_KEY_LENGTH`. Longer keys and values are cut."""
MAX_PARAM_VALUE: Final = 6_000
"""Characters; source: `mlflow.utils.validation.MAX_PARAM_VAL_LENGTH`."""
MAX_TAG_VALUE: Final = 8_000
"""Characters; source: `mlflow.utils.validation.MAX_TAG_VAL_LENGTH`."""

SYSTEM_TAGS: Final = 2
"""Tags of ours in a create-run: what the run is recognised by, and its parent."""
MAX_CREATE_TAGS: Final = 1_000 - SYSTEM_TAGS
"""Tags that a create-run carries besides."""
MAX_CREATE_TAG_BYTES: Final = 250_000
"""The same in bytes of ASCII-escaped JSON: the answer echoes them, and answers are read up to 1 MB."""

ENVELOPE_BYTES: Final = 320
"""Bytes a log-batch has at most besides its fragments: its brackets and names, and a run id of up to 256 characters."""

TOKEN_TAG: Final = "runqueue.create_id"
"""What a run is recognised by."""
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
    """What `create_run` was asked for."""

    experiment_id: str | None
    experiment_name: str | None
    start_time: int
    run_name: str | None
    parent: RunId | None
    tags: dict[str, str]
    """Those of its own that are safe to travel inside the request."""
    sought: bool = False
    """Another process creates it: it is not created, but looked for."""


@attrs.frozen
class InvalidValue:
    """A value that cannot be sent, in the place it was given at, and why."""

    value: object
    reason: str


def is_safe_in_create(key: str) -> bool:
    """
    Whether a tag may travel inside create-run.

    Servers check keys in log-batch but not in create-run, where a bad one would be stored and then be out of reach of
    every other call; `mlflow.runName` contradicts `run_name`. Those go by log-batch, where the server judges them.
    """
    return (
        _SAFE_TAG.fullmatch(key) is not None
        and len(key) <= MAX_KEY
        and key != "mlflow.runName"
        and not any(part in (".", "..") for part in key.split("/"))
    )


def describe(record: Record, start: int, stop: int) -> Iterator[Entry]:
    """The entries of a stretch of a record, for a report."""
    kind = record[0]
    name = _ENTRY_KINDS[kind]
    if kind == RUN:
        yield Entry(name, record[3].run_name)
    elif kind == STATUS:
        yield Entry(name, "status", record[2])
    elif kind == DATASET:
        for given in record[1][start:stop]:
            yield Entry(name, None, given.value) if isinstance(given, InvalidValue) else Entry(name, given.name, given)
    elif kind == ARTIFACT:  # without what is uploaded: it may be large, and a report is kept
        for path in islice(record[1], start, stop):
            yield Entry(name, path)
    else:
        stamp, step = (_given(milliseconds(record[2])), _given(record[3])) if kind == METRIC else (None, None)
        for key, value in islice(record[1].items(), start, stop):
            yield Entry(name, key, _given(value), step, stamp)


def _given(value: Any) -> Any:
    return value.value if isinstance(value, InvalidValue) else value


def milliseconds(stamp: int | InvalidValue) -> int | InvalidValue:
    """A record's timestamp, which is in nanoseconds."""
    return stamp if isinstance(stamp, InvalidValue) else stamp // MILLISECOND
