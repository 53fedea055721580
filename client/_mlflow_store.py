"""
MLflow's own stores (SQLite and other databases, files, plugins), behind the same calls as the REST API.

Rules of this file: every call of MLflow's runs in a worker thread, and is never repeated before it has returned; what
a server would answer is what is returned or raised, by the same table. MLflow is imported in the first of these
threads: it takes seconds.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, Final

import anyio
import anyio.to_thread
import orjson

from runqueue._answer import error_of
from runqueue._config import without_secrets
from runqueue._file_lock import locked
from runqueue._store import (
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
    Traffic,
)
from runqueue._wire import MLFLOW_LIMITS
from runqueue.errors import UnavailableError
from runqueue.queueing import Limits, Scope, StoreError

THREADS: Final = 8
"""Calls at once to a database that takes more than one writer."""


_PASSING: Final = frozenset(("OperationalError", "InterfaceError", "TimeoutError"))
"""Errors of SQLAlchemy that tell of the database's state, and not of what it was asked."""


class MlflowStore:
    """
    Args:
        uri: What `mlflow.set_tracking_uri` would take.
        traffic: Counts the calls.
    """

    def __init__(self, uri: str, traffic: Traffic) -> None:
        self._uri = uri
        self._traffic = traffic
        self._store: Any = None  # MLflow's own; as untyped as its entities
        self._opening = threading.Lock()
        # SQLite takes one writer at a time and makes the others fail in the end; MLflow's file store is not
        # thread-safe. One call at a time is as fast for both, and cannot fail so.
        single = uri.startswith(("sqlite", "file:")) or "://" not in uri
        self._threads = anyio.CapacityLimiter(1 if single else THREADS)
        # The same once more for the threads themselves: a call that nobody waits for any longer holds its turn.
        self._turns = threading.Semaphore(1 if single else THREADS)

    @property
    def limits(self) -> Limits:
        return MLFLOW_LIMITS

    def __repr__(self) -> str:
        return f"<MlflowStore {without_secrets(self._uri)}>"

    async def aclose(self) -> None:
        """Nothing to do: MLflow keeps one store a URI for the life of the process."""

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `Store.call`."""
        self._traffic.count(body)
        data = orjson.loads(body) if body else dict(query or {})
        # Abandoned on cancel: that only ends the waiting. The engine never sends for this lane again before then.
        return await anyio.to_thread.run_sync(
            self._perform, _CALLS[endpoint], data, abandon_on_cancel=True, limiter=self._threads
        )

    def _perform(self, call: Callable[[Any, dict[str, Any]], dict[str, Any]], data: dict[str, Any]) -> dict[str, Any]:
        failure: StoreError
        with self._turns:
            try:
                store = self._opened()
            except Exception as error:
                failure = self._unopened(error)
            else:
                try:
                    return call(store, data)
                except Exception as error:
                    failure = self._describe(error)
        raise failure

    def _opened(self) -> Any:
        with self._opening:
            if self._store is None:
                # Private to MLflow, but the only way that asks its registry and keeps one store a URI.
                utils: Any = importlib.import_module("mlflow.tracking._tracking_service.utils")
                # The first use of a database runs MLflow's migrations, which two processes cannot do at once.
                with locked(self._uri) if self._uri.startswith("sqlite") else nullcontext():
                    self._store = utils._get_store(self._uri)
            return self._store

    def _unopened(self, error: Exception) -> StoreError:
        """
        Nothing can be stored, and nothing that is queued is at fault. Most of it passes: a database that is down, or
        that another process is just migrating.
        """
        text = f"the store cannot be opened: {type(error).__name__}: {self._veiled(error)}"
        status = getattr(error, "get_http_status_code", None)
        refused = status is not None and status() < 500  # an MlflowException: a file store without its switch, say
        unknown = any(each.__name__ == "ArgumentError" for each in type(error).__mro__)  # sqlalchemy's, of a bad URI
        if refused or unknown or isinstance(error, (ImportError, TypeError, ValueError)):
            return StoreError(text, scope=Scope.STORE)
        return UnavailableError(text)

    def _veiled(self, error: Exception) -> str:
        return str(error).replace(self._uri, without_secrets(self._uri))

    def _describe(self, error: Exception) -> StoreError:
        text = self._veiled(error)
        status = getattr(error, "get_http_status_code", None)
        if status is not None:  # an MlflowException
            return error_of(status(), str(getattr(error, "error_code", "")), text)
        if type(error).__module__.startswith("sqlalchemy") and type(error).__name__ in _PASSING:
            return UnavailableError(f"{type(error).__name__}: {text}", ambiguous=True)
        return StoreError(f"{type(error).__name__}: {text}")


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


def _log_batch(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    from mlflow.entities import Metric, Param

    metrics = [
        Metric(
            point["key"],
            float(point["value"]),  # "NaN" and "Infinity" are text on the wire
            point["timestamp"],
            point["step"],
            model_id=point.get("model_id"),
            dataset_name=point.get("dataset_name"),
            dataset_digest=point.get("dataset_digest"),
        )
        for point in data.get("metrics", ())
    ]
    params = [Param(param["key"], param["value"]) for param in data.get("params", ())]
    store.log_batch(data["run_id"], metrics=metrics, params=params, tags=_tags(data.get("tags", [])))
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
    if experiment is None:  # what the server answers where the store has only None
        raise MlflowException(f"Could not find experiment with name {name!r}", RESOURCE_DOES_NOT_EXIST)
    return {"experiment": _json(experiment.to_proto())}


def _create_experiment(store: Any, data: dict[str, Any]) -> dict[str, Any]:
    return {"experiment_id": str(store.create_experiment(data["name"], artifact_location=None, tags=[]))}


_CALLS: Final[dict[Endpoint, Callable[[Any, dict[str, Any]], dict[str, Any]]]] = {
    CREATE_RUN: _create_run,
    UPDATE_RUN: _update_run,
    DELETE_RUN: _delete_run,
    GET_RUN: _get_run,
    SEARCH_RUNS: _search_runs,
    LOG_BATCH: _log_batch,
    LOG_INPUTS: _log_inputs,
    GET_EXPERIMENT: _get_experiment,
    CREATE_EXPERIMENT: _create_experiment,
}
