"""
MLflow's tracking store with a queue before its writes.

    log_metric, log_param, set_tag, log_batch, log_inputs, and what of them is asynchronous    queued
    what takes a `run_id`: reads, `delete_run`, `delete_tag`, `log_outputs`, ...               first that run is flushed
    searches of runs, reads of logged models, `delete_experiment`                              first all is flushed
    `update_run_info`                                        the same; it tells what was not stored if the run ends by it
    all else: `create_run`, experiments, traces, ...                                           straight through

Rules of this file: an object in front of MLflow's own store, and of its class for whoever asks by `isinstance`. What
stands here is what differs; anything else is the plain store's own attribute, of whatever version of MLflow, so that
it works on the plain store within. What does not fit into the queue goes MLflow's own way, behind the run's data: the
answer is MLflow's own then, at the call.
"""

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

_OF_ALL: Final = frozenset(
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
"""What shows, or ends, data of runs that it does not name; a logged model shows metrics."""
_OF_TRACES: Final = frozenset(("link_traces_to_run", "unlink_traces_from_run"))
"""They name a run, and have nothing to do with its data."""


class QueuedStore:
    """
    Args:
        plain: MLflow's own store.
        queue: For its writes. After `_detach`, all goes to the plain store.
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
        kind: Any = type(self._plain)
        concern = _concern(kind, name)
        if concern is None or self._queue is None:
            return found

        @functools.wraps(found)
        def flushed(*args: Any, **kwargs: Any) -> Any:
            self._flush(concern(args, kwargs))
            return found(*args, **kwargs)

        return flushed

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
        """From now on, all goes to the plain store."""
        queue = self._queue
        vars(self)["_queue"] = None
        return queue

    def _replace(self, plain: Any) -> None:
        """Another object of MLflow's for the same URI: its registry keeps a hundred of them, and no more."""
        vars(self)["_plain"] = plain

    def _flush(self, run_ids: Sequence[str] | None) -> None:
        if self._queue is not None:
            for run_id in [None] if run_ids is None else run_ids:
                self._queue.flush(run_id)

    # -- runs ----------------------------------------------------------------------------------------------------------

    def create_run(self, *args: Any, **kwargs: Any) -> Any:
        """MLflow's own, with a real id."""
        run = self._plain.create_run(*args, **kwargs)
        if self._queue is not None:
            self._queue.created(run.info.run_id)
        return run

    def update_run_info(self, run_id: str, run_status: int, end_time: int | None, run_name: str | None) -> Any:
        """
        MLflow's own, behind the run's data.

        Raises:
            MlflowException: What MLflow's own raises; with RUNQUEUE_STRICT=1, if the run ends by it, also for data that
                was not stored.
        """
        queue = self._queue
        if queue is None:
            return self._plain.update_run_info(run_id, run_status, end_time, run_name)
        over = RunStatus.is_terminated(run_status)  # None, which keeps it, is no such status
        stored = queue.flush(run_id)
        if over and not stored and run_name is None:
            queue.queue_status(run_id, RunStatus.to_string(run_status), end_time)
            queue.tell(run_id, left=True)
            return None
        info = self._plain.update_run_info(run_id, run_status, end_time, run_name)
        if over:
            queue.ended(run_id)
            queue.tell(run_id)
        return info

    # -- what is queued ------------------------------------------------------------------------------------------------

    def log_metric(self, run_id: str, metric: Any) -> None:
        """Queued."""
        if not self._queued(run_id, metrics=(metric,)):
            self._plain.log_metric(run_id, metric)

    def log_param(self, run_id: str, param: Any) -> None:
        """Queued."""
        if not self._queued(run_id, params=(param,)):
            self._plain.log_param(run_id, param)

    def set_tag(self, run_id: str, tag: Any) -> None:
        """Queued."""
        if not self._queued(run_id, tags=(tag,)):
            self._plain.set_tag(run_id, tag)

    def log_batch(self, run_id: str, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any]) -> None:
        """Queued."""
        if not self._queued(run_id, metrics, params, tags):
            self._plain.log_batch(run_id=run_id, metrics=metrics, params=params, tags=tags)

    def log_metric_async(self, run_id: str, metric: Any) -> Any:
        """Queued."""
        return self.log_batch_async(run_id, metrics=[metric], params=[], tags=[])

    def log_param_async(self, run_id: str, param: Any) -> Any:
        """Queued."""
        return self.log_batch_async(run_id, metrics=[], params=[param], tags=[])

    def set_tag_async(self, run_id: str, tag: Any) -> Any:
        """Queued."""
        return self.log_batch_async(run_id, metrics=[], params=[], tags=[tag])

    def log_batch_async(self, run_id: str, metrics: Sequence[Any], params: Sequence[Any], tags: Sequence[Any]) -> Any:
        """Queued."""
        queue = self._queue
        operations = None if queue is None else queue.operations(run_id)
        if operations is not None and self._queued(run_id, metrics, params, tags):
            return operations
        return self._plain.log_batch_async(run_id=run_id, metrics=metrics, params=params, tags=tags)

    def log_inputs(self, run_id: str, datasets: Any = None, models: Any = None) -> None:
        """Datasets are queued, models go straight through."""
        queue = self._queue
        if queue is not None and datasets and not models and _entities.datasets_fit(datasets):
            try:
                queue.inputs(run_id, datasets)
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

    def _queued(
        self, run_id: str, metrics: Sequence[Any] = (), params: Sequence[Any] = (), tags: Sequence[Any] = ()
    ) -> bool:
        """Whether all of it was queued; if not, the run's data has been sent, so that MLflow's own call comes after."""
        queue = self._queue
        if queue is None:
            return False
        fits = _entities.metrics_fit(metrics) and _entities.params_fit(params) and _entities.tags_fit(tags)
        if fits and not queue.conflicts(run_id, params):
            try:
                queue.batch(run_id, metrics, params, tags)
            except RunqueueError:  # closed meanwhile, full for a minute, or no run id: MLflow knows what to say
                pass
            else:
                return True
        queue.flush(run_id)
        return False


Concern = Callable[[tuple[Any, ...], dict[str, Any]], "Sequence[str] | None"]
"""From the arguments of a call, the runs whose data has to be stored first; None: all."""


@functools.lru_cache(maxsize=1_000)
def _concern(plain: Any, name: str) -> Concern | None:
    """Of a method of MLflow's store, by its signature: so it holds for methods that other versions have."""
    function = inspect.getattr_static(plain, name, None)
    if name in _OF_ALL:
        return lambda _args, _kwargs: None
    if not inspect.isfunction(function) or name in _OF_TRACES:
        return None
    names = list(inspect.signature(function).parameters)[1:]
    for wanted, several in (("run_id", False), ("run_ids", True)):
        if wanted in names:
            return functools.partial(_named, wanted, names.index(wanted), several)
    return None


def _named(name: str, place: int, several: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[str] | None:
    value = kwargs.get(name, args[place] if len(args) > place else None)
    if value is None:
        return ()
    return list(value) if several else [value]
