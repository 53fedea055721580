"""
MLflow's tracking store with a queue in front of its writes.

    log_metric, log_param, set_tag, log_batch,
    log_inputs, and their asynchronous forms      are queued
    methods with a `run_id`: reads, `delete_run`,
    `delete_tag`, `log_outputs`, ...              flush that run first
    searches of runs, reads of logged models,
    `delete_experiment`                           flush all runs first
    `update_run_info`                             flushes that run first, and reports its failures if it ends the run
    `create_run`, experiments, traces, ...        are unchanged
"""

# Rules of this file: the queued store is an object in front of MLflow's own store, and `isinstance` sees the class of
# that store. Only the methods that differ are written here. Every other attribute is read from the plain store,
# whatever MLflow's version, so a method of the plain store calls the plain store. Where a write cannot be queued, the
# run's data is sent first; then the plain store gets the call, and its answer is the caller's.

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Final

from mlflow.entities import RunStatus

from runqueue import RunqueueError
from runqueue.integrations.mlflow import _entities
from runqueue.integrations.mlflow._queue import Queue
from runqueue.settings._redaction import redact_uri

_READ_ALL_RUNS: Final = frozenset(
    (
        "_search_runs",
        "delete_experiment",
        "delete_logged_model",
        "finalize_logged_model",
        "get_logged_model",
        "search_logged_models",
        "search_runs",
    )
)
"""Methods that show or delete data of runs that their arguments do not name. A logged model shows metrics of runs."""
_CONCERN_TRACES: Final = frozenset(("link_traces_to_run", "unlink_traces_from_run"))
"""Methods that take a run id, but do not touch the data of the run."""


class QueuedStore:
    """
    MLflow's store for one tracking URI, with queued writes. After `_detach` it is the plain store alone.

    Args:
        plain: MLflow's own store.
        queue: The queue for its writes.
        uri: The plain tracking URI.
    """

    _plain: Any
    _queue: Queue | None
    _uri: str

    def __init__(self, plain: Any, queue: Queue, uri: str) -> None:
        vars(self).update(_plain=plain, _queue=queue, _uri=uri)

    # -- in front of the plain store -----------------------------------------------------------------------------------

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._plain.__class__

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._plain, name)
        store_class: Any = type(self._plain)
        runs_of_call = _runs_to_flush(store_class, name)
        if runs_of_call is None or self._queue is None:
            return found

        @functools.wraps(found)
        def flush_and_call(*args: Any, **kwargs: Any) -> Any:
            self._flush(runs_of_call(args, kwargs))
            return found(*args, **kwargs)

        return flush_and_call

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._plain, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._plain, name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(self._plain), *QueuedStore.__dict__})

    def __repr__(self) -> str:
        state = "no queue" if self._queue is None else repr(self._queue)
        return f"<QueuedStore {redact_uri(self._uri)} {state} before {type(self._plain).__name__}>"

    def __reduce__(self) -> Any:
        raise TypeError("a tracking store is not pickled; mlflow.MlflowClient is, and finds its store anew")

    def _detach(self) -> Queue | None:
        """Send all further calls to the plain store, and return the queue for the caller to close."""
        queue = self._queue
        vars(self)["_queue"] = None
        return queue

    def _replace(self, plain: Any) -> None:
        """
        Take another plain store for the same URI: MLflow's registry caches a hundred stores, and then makes new ones.
        """
        vars(self)["_plain"] = plain

    def _flush(self, run_ids: Sequence[str] | None) -> None:
        if self._queue is not None:
            for run_id in [None] if run_ids is None else run_ids:
                self._queue.flush(run_id)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def create_run(self, *args: Any, **kwargs: Any) -> Any:
        """Create the run at once, so that it has a real id."""
        run = self._plain.create_run(*args, **kwargs)
        if self._queue is not None:
            self._queue.add_own_run(run.info.run_id)
        return run

    def update_run_info(self, run_id: str, run_status: int, end_time: int | None, run_name: str | None) -> Any:
        """
        Flush the run, then update it. Where the run ends but its data cannot be sent, queue the status behind the data.
        A run that is set RUNNING is ended by SIGTERM, as one that was created is.

        Raises:
            MlflowException: The plain store refuses the update; or, with RUNQUEUE_STRICT=1, the run ends and
                some of its
                data was not stored.
        """
        queue = self._queue
        if queue is None:
            return self._plain.update_run_info(run_id, run_status, end_time, run_name)
        ends = RunStatus.is_terminated(run_status)  # False for None, which keeps the run's status
        stored = queue.flush(run_id)
        if ends and not stored and run_name is None:
            queue.queue_status(run_id, RunStatus.to_string(run_status), end_time)
            queue.report(run_id, still_queued=True)
            return None
        info = self._plain.update_run_info(run_id, run_status, end_time, run_name)
        if ends:
            queue.forget_run(run_id)
            queue.report(run_id)
        elif run_status == RunStatus.RUNNING:  # `mlflow.start_run` resumes a run by this call
            queue.add_own_run(run_id)
        return info

    # -- queued writes -------------------------------------------------------------------------------------------------

    def log_metric(self, run_id: str, metric: Any) -> None:
        """Queue a metric."""
        if not self._try_to_queue(run_id, metrics=(metric,)):
            self._plain.log_metric(run_id, metric)

    def log_param(self, run_id: str, param: Any) -> None:
        """Queue a param."""
        if not self._try_to_queue(run_id, params=(param,)):
            self._plain.log_param(run_id, param)

    def set_tag(self, run_id: str, tag: Any) -> None:
        """Queue a tag."""
        if not self._try_to_queue(run_id, tags=(tag,)):
            self._plain.set_tag(run_id, tag)

    def log_batch(self, run_id: str, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any]) -> None:
        """Queue metrics, params and tags."""
        if not self._try_to_queue(run_id, metrics, params, tags):
            self._plain.log_batch(run_id=run_id, metrics=metrics, params=params, tags=tags)

    def log_metric_async(self, run_id: str, metric: Any) -> Any:
        """Queue a metric; return MLflow's `RunOperations`."""
        return self.log_batch_async(run_id, metrics=[metric], params=[], tags=[])

    def log_param_async(self, run_id: str, param: Any) -> Any:
        """Queue a param; return MLflow's `RunOperations`."""
        return self.log_batch_async(run_id, metrics=[], params=[param], tags=[])

    def set_tag_async(self, run_id: str, tag: Any) -> Any:
        """Queue a tag; return MLflow's `RunOperations`."""
        return self.log_batch_async(run_id, metrics=[], params=[], tags=[tag])

    def log_batch_async(self, run_id: str, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any]) -> Any:
        """Queue metrics, params and tags; return MLflow's `RunOperations`."""
        queue = self._queue
        operations = None if queue is None else queue.operations(run_id)
        if operations is not None and self._try_to_queue(run_id, metrics, params, tags):
            return operations
        return self._plain.log_batch_async(run_id=run_id, metrics=metrics, params=params, tags=tags)

    def log_inputs(self, run_id: str, datasets: Any = None, models: Any = None) -> None:
        """Queue datasets. A call with models goes to the plain store."""
        queue = self._queue
        if queue is not None and datasets and not models and _entities.can_queue_datasets(datasets):
            try:
                queue.log_inputs(run_id, datasets)
            except RunqueueError:
                pass
            else:
                return
        self._flush((run_id,))
        self._plain.log_inputs(run_id, datasets, models)

    def flush_async_logging(self) -> None:
        """Send all that is queued."""
        self._flush(None)
        self._plain.flush_async_logging()

    def _try_to_queue(
        self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()
    ) -> bool:
        """
        Return whether all was queued. If not, flush the run: the caller then calls the plain store, behind its data.
        """
        queue = self._queue
        if queue is None:
            return False
        if (
            _entities.can_queue_metrics(metrics)
            and _entities.can_queue_params(params)
            and _entities.can_queue_tags(tags)
            and not queue.has_conflicting_param(run_id, params)
        ):
            try:
                queue.log_batch(run_id, metrics, params, tags)
            except RunqueueError:  # closed meanwhile, full for a minute, or not a run id: the plain store answers
                pass
            else:
                return True
        queue.flush(run_id)
        return False


RunsOfCall = Callable[[tuple[Any, ...], dict[str, Any]], "Sequence[str] | None"]
"""A function from a call's arguments to the runs that have to be flushed before the call. None: all runs."""


@functools.lru_cache(maxsize=1_000)
def _runs_to_flush(store_class: Any, name: str) -> RunsOfCall | None:
    """
    Find out which runs a method of MLflow's store concerns. None: no run.

    The method's signature decides, so that methods of other versions of MLflow are covered too.
    """
    function = inspect.getattr_static(store_class, name, None)
    if name in _READ_ALL_RUNS:
        return lambda _args, _kwargs: None
    if not inspect.isfunction(function) or name in _CONCERN_TRACES:
        return None
    parameters = list(inspect.signature(function).parameters)[1:]
    for parameter, is_list in (("run_id", False), ("run_ids", True)):
        if parameter in parameters:
            return functools.partial(_run_ids_of_call, parameter, parameters.index(parameter), is_list)
    return None


def _run_ids_of_call(
    parameter: str, position: int, is_list: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Sequence[str]:
    value = kwargs.get(parameter, args[position] if len(args) > position else None)
    if value is None:
        return ()
    return list(value) if is_list else [value]
