"""
Puts the bodies of requests together: encoded fragments inside the JSON objects of MLflow's REST API.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from runqueue.queueing import Batch, Record
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, TAG
from runqueue.wire._encoder import key_value
from runqueue.wire._records import NewRun


def log_batch_body(run_id: str, batch: Batch) -> bytes:
    """Return the body of `POST runs/log-batch`."""
    return _body(run_id, [(b"metrics", METRIC), (b"params", PARAM), (b"tags", TAG)], batch)


def log_inputs_body(run_id: str, batch: Batch) -> bytes:
    """Return the body of `POST runs/log-inputs`."""
    return _body(run_id, [(b"datasets", DATASET)], batch)


def _body(run_id: str, names: Iterable[tuple[bytes, int]], batch: Batch) -> bytes:
    parts = [b'{"run_id":', orjson.dumps(run_id)]
    for name, kind in names:
        if kind in batch.groups:
            parts += (b',"', name, b'":[', batch.joined(kind), b"]")
    return b"".join([*parts, b"}"])  # a single copy: the body may have a megabyte


def status_body(run_id: str, record: Record) -> bytes:
    """Return the body of `POST runs/update`, which sets the final status and the end time at once."""
    return orjson.dumps({"run_id": run_id, "status": record[2], "end_time": record[3]})


def create_run_body(new: NewRun, experiment_id: str, system_tags: dict[str, str], tags: Iterable[bytes]) -> bytes:
    """
    Return the body of `POST runs/create`.

    Args:
        new: The arguments of `create_run`.
        experiment_id: The experiment's id.
        system_tags: The tags that runqueue adds.
        tags: Encoded fragments of the user's tags.
    """
    head: dict[str, Any] = {"experiment_id": experiment_id, "start_time": new.start_time}
    if new.run_name is not None:
        head["run_name"] = new.run_name
    if "mlflow.user" in new.tags:  # deprecated by MLflow, but older pages of its UI still read it
        head["user_id"] = new.tags["mlflow.user"]
    pieces = [key_value(key, value) for key, value in system_tags.items()] + [piece for piece in tags if piece]
    return orjson.dumps(head)[:-1] + b',"tags":[' + b",".join(pieces) + b"]}"
