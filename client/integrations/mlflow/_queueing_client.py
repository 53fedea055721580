"""
A substitute for the client that MLflow's autologging queues by: the same constructor, methods and errors, over
`runqueue.Client`.

Autologging makes one for each fit, flushes it, and drops it without a word. So nothing is started before the first
flush; the engine ends with the last reference to the client; and a flush that nobody waits for is seen to its end:
it keeps the client until then, and the end of the process waits for it, within `exit_timeout`.

Rules of this file: names, order and defaults of all arguments are MLflow's; mlflow is imported only to raise its error.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runqueue import Client, PendingRunId, RunqueueError
from runqueue.errors import ConfigError
from runqueue.integrations.mlflow._run_operations import Outcome, RunOperations, UnderWay, failed
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

    Unlike `mlflow.utils.autologging_utils.client.MlflowAutologgingQueueingClient` it is thread-safe, an entry that the
    server rejects costs only itself, a `PendingRunId` can be used after a flush, and `run_name` is sent. Runs that it
    creates carry the tag `runqueue.create_id`.

    Args:
        tracking_uri: None: that of mlflow. `runqueue+http://host` and the like mean `http://host`.

    Raises:
        MlflowException: Nothing is known for the URI, or it needs something that is not installed.
    """

    def __init__(self, tracking_uri: str | PathLike[str] | None = None) -> None:
        self._uri = resolve_tracking_uri(path_as_uri(tracking_uri))
        del tracking_uri  # what catches errors may show the locals of this frame
        self._client = self._made()
        self._flushes: set[UnderWay] = set()

    def _made(self) -> Client:
        try:
            return Client(self._uri, progress=False)  # its bar would stand in the middle of a fit
        except RunqueueError as error:
            failure = _refused(error)
        raise failure  # out here: without the frames of the error, which hold the URI

    def __repr__(self) -> str:
        if "_client" not in vars(self):  # of one that could not be made, in a frame of its error
            return "<QueueingClient>"
        return repr(self._client).replace("<Client", "<QueueingClient", 1)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled client has nothing queued: that stays here, and is sent from here, once."""
        return (type(self), (self._client._engine.config.portable_settings(self._uri)["tracking_uri"],))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """
        Flush, unless an exception is on its way: then nothing queued is sent, and it is never hidden.

        Raises:
            MlflowException: What the flush could not store.
        """
        client, self._client = self._client, self._made()  # MLflow's can be used again, too
        deadline = None if exc is None else monotonic() + client._engine.exit_timeout
        for flush in tuple(self._flushes):  # those that were begun are not given up, the exception notwithstanding
            flush.wait(None if deadline is None else max(0.0, deadline - monotonic()))
        try:
            client.__exit__(exc_type, exc, traceback)
        except RunqueueError as error:
            raise failed([error]) from error

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
            MlflowException: A value is bad.
        """
        try:
            return self._client.create_run(experiment_id, start_time, _cut(tags), run_name)
        except RunqueueError as error:
            raise _refused(error) from error

    def set_terminated(
        self, run_id: str | PendingRunId, status: str | None = None, end_time: int | None = None
    ) -> None:
        """
        Queue the end of a run; see `runqueue.Client.set_terminated`.

        Raises:
            MlflowException: A value is bad.
        """
        try:
            self._client.set_terminated(run_id, status, end_time)
        except RunqueueError as error:
            raise _refused(error) from error

    def log_params(self, run_id: str | PendingRunId, params: dict[str, Any]) -> None:
        """
        Queue params; see `runqueue.Client.log_params`.

        Raises:
            MlflowException: A value is bad.
        """
        try:
            self._client.log_params(run_id, _cut(params))
        except RunqueueError as error:
            raise _refused(error) from error

    def log_inputs(self, run_id: str | PendingRunId, datasets: list[DatasetInput] | None) -> None:
        """
        Queue datasets that the run reads; see `runqueue.Client.log_inputs`.

        Raises:
            MlflowException: A value is bad.
        """
        try:
            self._client.log_inputs(run_id, datasets)
        except RunqueueError as error:
            raise _refused(error) from error

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
            MlflowException: A value is bad.
        """
        try:
            self._client.log_metrics(run_id, _cut(metrics), step, dataset, model_id)
        except RunqueueError as error:
            raise _refused(error) from error

    def set_tags(self, run_id: str | PendingRunId, tags: dict[str, Any]) -> None:
        """
        Queue tags; see `runqueue.Client.set_tags`.

        Raises:
            MlflowException: A value is bad.
        """
        try:
            self._client.set_tags(run_id, _cut(tags))
        except RunqueueError as error:
            raise _refused(error) from error

    def flush(self, synchronous: bool = True) -> RunOperations:
        """
        Send what is queued now.

        Args:
            synchronous: Wait until it is stored, and raise what failed. False: return at once; what fails is logged
                too, as nobody may wait for it.

        Returns:
            The flush; it is over if `synchronous`.

        Raises:
            MlflowException: What was tried and not stored; its cause is the `runqueue.FlushError`, with each entry.
        """
        client = self._client
        try:
            flush = client.flush(synchronous)
        except RunqueueError as error:
            raise failed([error]) from error
        if not flush.done:
            UnderWay(flush, client, self._flushes).watch()
        return RunOperations([Outcome(flush)])


def _cut(entries: Any) -> Any:
    """
    With long keys cut as MLflow's client cuts them: of those that are the same then, the last of a call stays.
    `runqueue.Client` reports each of them, which would fail a fit that has always gone well.
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


def _refused(error: RunqueueError) -> Exception:
    """What a call or the constructor got wrong, in MLflow's form."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE

    bad = isinstance(error, ConfigError)
    return MlflowException(str(error), error_code=INVALID_PARAMETER_VALUE if bad else INTERNAL_ERROR)
