"""
A replacement for the client of MLflow's autologging: the same constructor, methods and errors, on `runqueue.Client`.
"""

# Autologging makes a client for each fit, flushes it, and drops the last reference to it without closing it. So the
# engine starts at the first flush and ends when the client is collected. A flush that the caller does not wait for
# holds the client until the flush has ended, and the end of the process waits for it, for `exit_timeout` at most.
#
# Rules of this file: names, order and defaults of all arguments are MLflow's. mlflow is imported only to raise its
# error.

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runqueue import Client, PendingRunId, RunqueueError
from runqueue.errors import ConfigError
from runqueue.integrations.mlflow._run_operations import BackgroundFlush, FlushFuture, RunOperations, mlflow_error
from runqueue.runtime import _notices
from runqueue.settings._tracking_uri import path_as_uri, resolve_tracking_uri
from runqueue.wire._limits import MAX_KEY

if TYPE_CHECKING:
    from mlflow.data.dataset import Dataset
    from mlflow.entities import DatasetInput
    from typing_extensions import Self


class QueueingClient:
    """
    Queues what an autologging integration logs, and sends it at `flush()`.

    Unlike `mlflow.utils.autologging_utils.client.MlflowAutologgingQueueingClient`, it is thread-safe, stores the valid
    entries beside one that the server rejects, lets a `PendingRunId` be used after a flush, and sends `run_name`. Runs
    that it creates carry the tag `runqueue.create_id`.

    Args:
        tracking_uri: None: mlflow's tracking URI. A prefix `runqueue+` (`runqueue+http://host`) is dropped.

    Raises:
        MlflowException: There is no store for the URI, or the store needs something that is not installed.
    """

    def __init__(self, tracking_uri: str | PathLike[str] | None = None) -> None:
        self._uri = resolve_tracking_uri(path_as_uri(tracking_uri))
        del tracking_uri  # it may hold a password, and tracebacks may show the locals of this frame
        self._client = self._make_client()
        self._running_flushes: set[BackgroundFlush] = set()

    def _make_client(self) -> Client:
        try:
            return Client(self._uri, progress=False)  # a progress bar would disturb the fit's own output
        except RunqueueError as error:
            failure = _mlflow_error_of_call(error)
        raise failure  # outside of `except`, where the error's frames, which hold the URI, would be chained

    def __repr__(self) -> str:
        if "_client" not in vars(self):  # the constructor has raised, and a traceback shows this object
            return "<QueueingClient>"
        return repr(self._client).replace("<Client", "<QueueingClient", 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the configuration alone: what is queued is sent by the original, once."""
        return (type(self), (self._client._engine.config.portable_settings(self._uri)["tracking_uri"],))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """
        Flush, unless the block has raised an exception: then nothing queued is sent, and the exception is kept.

        Raises:
            MlflowException: The flush could not store everything.
        """
        client, self._client = self._client, self._make_client()  # as MLflow's client, this one can be used again
        deadline = None if exc is None else monotonic() + client._engine.exit_timeout
        for flush in tuple(self._running_flushes):  # also after an exception: these have begun
            flush.wait(None if deadline is None else max(0.0, deadline - monotonic()))
        try:
            client.__exit__(exc_type, exc, traceback)
        except RunqueueError as error:
            raise mlflow_error([error]) from error

    def create_run(
        self,
        experiment_id: str,
        start_time: int | None = None,
        tags: dict[str, Any] | None = None,
        run_name: str | None = None,
    ) -> PendingRunId:
        """
        Queue the creation of a run; see `runqueue.Client.create_run`.

        Raises:
            MlflowException: A value is invalid.
        """
        try:
            return self._client.create_run(experiment_id, start_time, _cut_keys(tags), run_name)
        except RunqueueError as error:
            raise _mlflow_error_of_call(error) from error

    def set_terminated(
        self, run_id: str | PendingRunId, status: str | None = None, end_time: int | None = None
    ) -> None:
        """
        Queue the end of a run; see `runqueue.Client.set_terminated`.

        Raises:
            MlflowException: A value is invalid.
        """
        try:
            self._client.set_terminated(run_id, status, end_time)
        except RunqueueError as error:
            raise _mlflow_error_of_call(error) from error

    def log_params(self, run_id: str | PendingRunId, params: dict[str, Any]) -> None:
        """
        Queue params; see `runqueue.Client.log_params`.

        Raises:
            MlflowException: A value is invalid.
        """
        try:
            self._client.log_params(run_id, _cut_keys(params))
        except RunqueueError as error:
            raise _mlflow_error_of_call(error) from error

    def log_inputs(self, run_id: str | PendingRunId, datasets: list[DatasetInput] | None) -> None:
        """
        Queue datasets that the run reads; see `runqueue.Client.log_inputs`.

        Raises:
            MlflowException: A value is invalid.
        """
        try:
            self._client.log_inputs(run_id, datasets)
        except RunqueueError as error:
            raise _mlflow_error_of_call(error) from error

    def log_metrics(
        self,
        run_id: str | PendingRunId,
        metrics: dict[str, float],
        step: int | None = None,
        dataset: Dataset | None = None,
        model_id: str | None = None,
    ) -> None:
        """
        Queue metric points of one step and time; see `runqueue.Client.log_metrics`.

        Raises:
            MlflowException: A value is invalid.
        """
        try:
            self._client.log_metrics(run_id, _cut_keys(metrics), step, dataset, model_id)
        except RunqueueError as error:
            raise _mlflow_error_of_call(error) from error

    def set_tags(self, run_id: str | PendingRunId, tags: dict[str, Any]) -> None:
        """
        Queue tags; see `runqueue.Client.set_tags`.

        Raises:
            MlflowException: A value is invalid.
        """
        try:
            self._client.set_tags(run_id, _cut_keys(tags))
        except RunqueueError as error:
            raise _mlflow_error_of_call(error) from error

    def flush(self, synchronous: bool = True) -> RunOperations:
        """
        Send what is queued now.

        Args:
            synchronous: Wait until everything is stored, and raise failures. False: return at once; failures are
                logged as well, since the caller may not wait for them.

        Returns:
            The flush. With `synchronous` it has ended.

        Raises:
            MlflowException: Something was not stored. Its cause is the `runqueue.FlushError`, which names each entry.
        """
        client = self._client
        try:
            flush = client.flush(synchronous)
        except RunqueueError as error:
            raise mlflow_error([error]) from error
        if not flush.done:
            BackgroundFlush(flush, client, self._running_flushes).register()
        return RunOperations([FlushFuture(flush)])


def _cut_keys(entries: Any) -> Any:
    """
    Cut long keys as MLflow's client does: where two keys of a call are the same after it, the last value is kept.

    `runqueue.Client` reports such keys as failures. A fit that MLflow's client lets pass would then fail.
    """
    if not isinstance(entries, Mapping) or not any(isinstance(key, str) and len(key) > MAX_KEY for key in entries):
        return entries
    short = {
        key[: MAX_KEY - 3] + "..." if isinstance(key, str) and len(key) > MAX_KEY else key: value
        for key, value in entries.items()
    }
    text = (
        "keys of more than %d characters were cut; %d of %d entries have the same key as a later one, and are left out"
    )
    _notices.warning(text, MAX_KEY, len(entries) - len(short), len(entries))
    return short


def _mlflow_error_of_call(error: RunqueueError) -> Exception:
    """Return MLflow's exception for an error of a log call or of the constructor."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

    is_invalid = isinstance(error, ConfigError)
    return MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE if is_invalid else INTERNAL_ERROR)
