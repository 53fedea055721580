"""
The calls of MLflow's REST API, made to one of MLflow's own stores: functions of a store and the request's data.
"""

# Rules of this file:
# - Everything runs in worker threads, and imports MLflow inside of functions.
# - Each function returns what MLflow's server would answer. What the store raises passes: `_mlflow` converts it.

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias

import orjson

from runqueue.stores._protocol import (
    CREATE_EXPERIMENT,
    CREATE_RUN,
    DELETE_RUN,
    GET_EXPERIMENT,
    GET_RUN,
    LOG_BATCH,
    LOG_INPUTS,
    SEARCH_RUNS,
    UPDATE_RUN,
    Endpoint,
)


def load_mlflow() -> None:
    """Import all of MLflow that opening a store and its calls need. The first time takes seconds."""
    importlib.import_module("mlflow.entities")
    importlib.import_module("mlflow.exceptions")
    importlib.import_module("mlflow.protos.databricks_pb2")
    importlib.import_module("mlflow.store.db.utils")
    importlib.import_module("mlflow.store.tracking.sqlalchemy_store")
    importlib.import_module("mlflow.tracking._tracking_service.utils")
    importlib.import_module("mlflow.utils.proto_json_utils")


_Identity: TypeAlias = tuple[str, str, int, int]


class FileStoreLogger:
    """
    Logs batches to MLflow's file store, so that a retry writes no metric point twice.

    That store appends points one by one. Params and tags are logged first, as repeating them is harmless. After a failure
    the points of the batch are doubtful: each is looked up in its file before it is written again.
    """

    def __init__(self) -> None:
        self._doubtful: dict[str, set[_Identity]] = {}  # by run id

    def log_batch(self, store: Any, data: dict[str, Any]) -> dict[str, Any]:
        """Log the batch, except for points that an earlier attempt has written."""
        run_id = data["run_id"]
        metrics, params, tags = _entities(data)
        if params:
            store.log_batch(run_id, metrics=[], params=params, tags=[])
        if tags:
            store.log_batch(run_id, metrics=[], params=[], tags=tags)
        doubtful = self._doubtful.pop(run_id, set())
        asked = {_identity(point) for point in metrics}
        written: set[_Identity] = set()
        for key in {point[0] for point in asked & doubtful}:
            with suppress(Exception):  # the key has no file: nothing of it was written
                written.update(doubtful.intersection(map(_identity, store.get_metric_history(run_id, key))))
        missing = [point for point in metrics if _identity(point) not in written]
        try:
            if missing or not (metrics or params or tags):
                store.log_batch(run_id, metrics=missing, params=[], tags=[])
        except Exception as error:
            may_have_written = getattr(error, "get_http_status_code", lambda: 500)() >= 500
            self._doubtful[run_id] = doubtful | asked if may_have_written else doubtful
            raise
        if doubtful - asked:
            self._doubtful[run_id] = doubtful - asked
        return {}


def _json(message: Any) -> dict[str, Any]:
    utils: Any = importlib.import_module("mlflow.utils.proto_json_utils")
    data: dict[str, Any] = orjson.loads(utils.message_to_json(message))
    return data


def _tags(data: list[dict[str, str]]) -> list[Any]:
    from mlflow.entities import RunTag

    return [RunTag(tag["key"], tag["value"]) for tag in data]


def _create_run(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    run = store.create_run(
        experiment_id=data["experiment_id"],
        user_id=data.get("user_id", "unknown"),
        start_time=data["start_time"],
        tags=_tags(data["tags"]),
        run_name=data.get("run_name"),
    )
    return {"run": _json(run.to_proto())}


def _update_run(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    from mlflow.entities import RunStatus

    info = store.update_run_info(
        data["run_id"], RunStatus.from_string(data["status"]), end_time=data["end_time"], run_name=None
    )
    return {"run_info": _json(info.to_proto())}


def _delete_run(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    store.delete_run(data["run_id"])
    return {}


def _get_run(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    return {"run": _json(store.get_run(data["run_id"]).to_proto())}


def _search_runs(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    from mlflow.entities import ViewType

    runs = store.search_runs(
        data["experiment_ids"], data["filter"], ViewType.ACTIVE_ONLY, max_results=data["max_results"]
    )
    return {"runs": [_json(run.to_proto()) for run in runs]}


def _identity(point: Any) -> _Identity:
    return point.key, repr(point.value), point.timestamp, point.step  # repr: NaN does not equal itself


def _entities(data: dict[str, Any]) -> tuple[list[Any], list[Any], list[Any]]:
    from mlflow.entities import Metric, Param

    # "NaN" and "Infinity" are text on the wire
    metrics = [Metric(**point | {"value": float(point["value"])}) for point in data.get("metrics", ())]
    params = [Param(param["key"], param["value"]) for param in data.get("params", ())]
    return metrics, params, _tags(data.get("tags", []))


def log_batch(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    metrics, params, tags = _entities(data)
    store.log_batch(data["run_id"], metrics=metrics, params=params, tags=tags)
    return {}


def _log_inputs(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    datasets = [
        DatasetInput(Dataset(**each["dataset"]), [InputTag(tag["key"], tag["value"]) for tag in each["tags"]])
        for each in data["datasets"]
    ]
    store.log_inputs(data["run_id"], datasets=datasets)
    return {}


def _get_experiment(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST

    name = data["experiment_name"]
    experiment = store.get_experiment_by_name(name)
    if experiment is None:  # the server raises this, the store returns None
        raise MlflowException(f"Could not find experiment with name {name!r}", RESOURCE_DOES_NOT_EXIST)
    return {"experiment": _json(experiment.to_proto())}


def _create_experiment(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    return {"experiment_id": str(store.create_experiment(data["name"], artifact_location=None, tags=[]))}


CALLS: Final[dict[Endpoint, Callable[[Any, dict[str, Any]], dict[str, Any]]]] = {
    CREATE_RUN: _create_run,
    UPDATE_RUN: _update_run,
    DELETE_RUN: _delete_run,
    GET_RUN: _get_run,
    SEARCH_RUNS: _search_runs,
    LOG_BATCH: log_batch,
    LOG_INPUTS: _log_inputs,
    GET_EXPERIMENT: _get_experiment,
    CREATE_EXPERIMENT: _create_experiment,
}
