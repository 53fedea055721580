"""
The log calls of both clients: each puts one record into the lane of its run and returns.
"""

# Rules of this file: nothing here waits, takes a lock (but to open a run's lane), or makes an object for each entry. A
# log call costs its caller the copy of a dict, a look at the types of its values, a tuple, and an append.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import time_ns
from typing import Any, Final

from runqueue._run_id import PendingRunId, RunId
from runqueue.api import _conversion as convert
from runqueue.api._base_client import BaseClient
from runqueue.errors import CallTypeError, ClosedError, ConfigError, QueueFullError, RunqueueError
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, RUN, STATUS, TAG, record_of
from runqueue.runtime import _notices
from runqueue.wire._records import MILLISECOND, PARENT_TAG, TOKEN_TAG, InvalidValue, NewRun

_PLAIN: Final = frozenset((float, int, bool))


class LogCalls(BaseClient):
    """Adds the log calls to a client. Any number of threads may call them at once."""

    # -- runs --------------------------------------------------------------------------------------------------------

    def create_run(
        self,
        experiment_id: str | None = None,
        start_time: int | None = None,
        tags: Mapping[str, Any] | None = None,
        run_name: str | None = None,
        *,
        experiment_name: str | None = None,
        parent_run_id: RunId | None = None,
    ) -> PendingRunId:
        """
        Queue the creation of a run. Nothing is sent before the call returns.

        Args:
            experiment_id: The id of the run's experiment. None: `experiment_name` is given.
            start_time: Milliseconds since the epoch. None: now.
            tags: The run's first tags, by key; the `str()` of each value is stored. None: no tags.
            run_name: The run's name. None: the server makes one up.
            experiment_name: The name of the run's experiment, which is created if it does not exist. None:
                `experiment_id` is given.
            parent_run_id: The run in which this one is nested. None: no run.

        Returns:
            The placeholder to pass as `run_id` to all other calls.

        Raises:
            ConfigError: Neither or both of `experiment_id` and `experiment_name` are given, or a value is bad.
            CallTypeError: A value is of the wrong type.
            QueueFullError: The queue is full; see `max_pending`.
            ClosedError: The client was closed.

        Guarantees:
            Exactly one run is created, even if an answer of the server is lost. If the run cannot be created,
            everything that is queued for it stays queued.
        """
        if isinstance(experiment_id, int) and not isinstance(experiment_id, bool):
            experiment_id = str(experiment_id)
        experiment_id = convert.text_or_none(experiment_id, "experiment_id")
        experiment_name = convert.text_or_none(experiment_name, "experiment_name")
        if (experiment_id is None) == (experiment_name is None):
            raise ConfigError("create_run takes exactly one of experiment_id= and experiment_name=")
        if "" in (experiment_id, experiment_name):
            raise ConfigError("experiment_id and experiment_name must not be empty")
        run_name = convert.text_or_none(run_name, "run_name")
        given = {} if tags is None else convert.mapping(tags, "tags")
        if run_name is not None and given.get("mlflow.runName", run_name) != run_name:
            raise ConfigError(f"run_name={run_name!r} contradicts the tag mlflow.runName={given['mlflow.runName']!r}")
        given.pop(TOKEN_TAG, None)  # the tags may be copied from another run, whose token would stand for both runs
        if parent_run_id is not None and given.pop(PARENT_TAG, parent_run_id) not in _names_of(parent_run_id):
            raise ConfigError(f"parent_run_id={parent_run_id!r} contradicts the tag {PARENT_TAG}")
        bounds = self._engine.bounds
        in_create, in_batch = convert.split_first_tags(given, bounds.create_tags, bounds.create_tag_bytes)
        started = time_ns() // 1_000_000 if start_time is None else convert.millis(start_time, "start_time")
        parent = None if parent_run_id is None else self._lane(parent_run_id)
        new = NewRun(experiment_id, experiment_name, started, run_name, parent_run_id, in_create)

        pending = PendingRunId((experiment_id, experiment_name))
        lane = self._open(pending, run_exists=False, parent=parent)
        try:
            lane.append(record_of(RUN, ("run",), tuple(in_create), new))
        except (QueueFullError, ClosedError):
            self._engine.accumulator.forget(lane)
            raise
        lane.owned = True
        if in_batch:
            lane.push(record_of(TAG, in_batch, False))
        return pending

    def set_terminated(self, run_id: RunId, status: str | None = None, end_time: int | None = None) -> None:
        """
        Queue the final status of a run.

        Args:
            run_id: The run: its id or its placeholder.
            status: "FINISHED", "FAILED", "KILLED", "RUNNING" or "SCHEDULED". None: "FINISHED".
            end_time: Milliseconds since the epoch. None: now.

        Raises:
            ConfigError: MLflow does not know the status, or the time is out of range.
            CallTypeError: A value is of the wrong type.
            ClosedError: The client was closed.

        Guarantees:
            The status is sent after everything else that a flush sends for the run, even if some of that was rejected.
        """
        name = convert.status(status)
        ended = time_ns() // 1_000_000 if end_time is None else convert.millis(end_time, "end_time")
        lane, ends = self._lane(run_id), name not in ("RUNNING", "SCHEDULED")
        lane.ended = ends
        if ends and self._engine.own_runs:
            self._engine.own_runs.discard(run_id)
        lane.append(record_of(STATUS, (), name, ended))
        if lane.released:  # the engine has released the lane meanwhile, and the record went to the run's next lane
            self._lane(run_id).ended = ends

    def _enter_run(self, run_id: str) -> None:
        """Note that no other process ends the run when this one gets a signal: the client then sets it KILLED."""
        self._engine.own_runs.add(run_id)

    def _end_run(self, run_id: RunId, status: str, *, raised: bool) -> None:
        """Queue the final status at the end of a run's block. Raises nothing: an exception may be ending the block."""
        try:
            self.set_terminated(run_id, status)
        except RunqueueError as error:  # e.g. the client was closed inside of the block
            _notices.warning("the final status %s of run %s was not queued: %s", status, run_id, error)
        else:
            if raised:
                self._lane(run_id).block_raised = True

    # -- metrics -----------------------------------------------------------------------------------------------------

    def log_metrics(
        self,
        run_id: RunId,
        metrics: Mapping[str, Any],
        step: int | None = None,
        dataset: Any = None,
        model_id: str | None = None,
        *,
        timestamp: int | None = None,
    ) -> None:
        """
        Queue metric points of one step and one time.

        Args:
            run_id: The run: its id or its placeholder.
            metrics: Values by key. A value may be anything that `float()` takes, except text: numpy and torch scalars,
                Decimal, NaN, the infinities. The mapping may be changed after the call.
            step: A whole number. None: 0.
            dataset: The dataset that the metrics were computed on: any object with a `name` and a `digest`. None: no
                dataset.
            model_id: The id of the logged model that the metrics belong to. None: no model.
            timestamp: Milliseconds since the epoch. None: now.

        Raises:
            CallTypeError: `metrics` is no mapping, `dataset` has no name or digest, or `run_id` is of the wrong type.
            ConfigError: `run_id` cannot be the id of a run.
            QueueFullError: The queue is full; see `max_pending`.
            ClosedError: The client was closed.

        A value, a key or a step that cannot be stored fails alone, later; see `flush`.
        """
        try:
            lane = self._lanes[run_id]
        except (KeyError, TypeError):
            lane = self._lane(run_id)
        try:
            entries = {**metrics}
        except TypeError:
            entries = convert.mapping(metrics, "metrics")
        values = entries.values()
        for first in values:  # noqa: B007  faster than next(iter(values))
            break
        else:
            return
        # Plain numbers need no conversion. If the first value is a float, the type of the sum shows that all values are
        # plain, in a third of the time that a look at each type takes. A few other types add up to a float as well,
        # such as fractions; they are immutable too.
        try:
            plain = (
                sum(values, 0.0).__class__ is float
                if first.__class__ is float
                else _PLAIN.issuperset(map(type, values))
            )
        except Exception:  # the values' own arithmetic may raise anything
            plain = False
        if not plain:
            entries = convert.numbers(entries)
        if step.__class__ is not int:
            step = _step(step)
        stamp = time_ns() if timestamp is None else _nanoseconds(timestamp)
        if dataset is not None:
            dataset = convert.dataset_reference(dataset)
        lane.append((METRIC, entries, stamp, step, model_id, dataset))

    def log_metric(
        self, run_id: RunId, key: str, value: Any, step: int | None = None, timestamp: int | None = None
    ) -> None:
        """
        Queue one metric point.

        Args:
            run_id: The run: its id or its placeholder.
            key: The metric's name.
            value: As for `log_metrics`.
            step: A whole number. None: 0.
            timestamp: Milliseconds since the epoch. None: now.

        Raises:
            CallTypeError, ConfigError, QueueFullError, ClosedError: As for `log_metrics`.
        """
        try:
            lane = self._lanes[run_id]
        except (KeyError, TypeError):
            lane = self._lane(run_id)
        entries = _single(key, value)
        if value.__class__ not in _PLAIN:
            entries = convert.numbers(entries)
        if step.__class__ is not int:
            step = _step(step)
        stamp = time_ns() if timestamp is None else _nanoseconds(timestamp)
        lane.append((METRIC, entries, stamp, step, None, None))

    # -- params, tags, datasets --------------------------------------------------------------------------------------

    def log_params(self, run_id: RunId, params: Mapping[str, Any]) -> None:
        """
        Queue params. MLflow never changes a param: an equal value may be logged again, another value fails.

        Args:
            run_id: The run: its id or its placeholder.
            params: Values by key; the `str()` of each value is stored.

        Raises:
            CallTypeError: `params` is no mapping, or `run_id` is of the wrong type.
            ConfigError: `run_id` cannot be the id of a run.
            QueueFullError: The queue is full; see `max_pending`.
            ClosedError: The client was closed.
        """
        entries = convert.texts(convert.mapping(params, "params"))
        lane = self._lane(run_id)
        if entries:
            lane.append(record_of(PARAM, entries))

    def log_param(self, run_id: RunId, key: str, value: Any) -> None:
        """
        Queue one param; see `log_params`.

        Args:
            run_id: The run: its id or its placeholder.
            key: The param's name.
            value: Its `str()` is stored.

        Raises:
            CallTypeError, ConfigError, QueueFullError, ClosedError: As for `log_params`.
        """
        self.log_params(run_id, _single(key, value))

    def set_tags(self, run_id: RunId, tags: Mapping[str, Any]) -> None:
        """
        Queue tags. A tag that is set again takes the new value.

        Args:
            run_id: The run: its id or its placeholder. Tags that are queued before the run exists are sent with the
                request that creates it, within that request's limits.
            tags: Values by key; the `str()` of each value is stored.

        Raises:
            CallTypeError: `tags` is no mapping, or `run_id` is of the wrong type.
            ConfigError: `run_id` cannot be the id of a run.
            QueueFullError: The queue is full; see `max_pending`.
            ClosedError: The client was closed.
        """
        entries = convert.texts(convert.mapping(tags, "tags"))
        lane = self._lane(run_id)
        if not entries:
            return
        in_create, in_batch = convert.split_tags(entries)
        dropped = lane.append(record_of(TAG, in_create, True)) if in_create else False
        if in_batch and not dropped:
            (lane.push if in_create else lane.append)(record_of(TAG, in_batch, False))

    def set_tag(self, run_id: RunId, key: str, value: Any) -> None:
        """
        Queue one tag; see `set_tags`.

        Args:
            run_id: The run: its id or its placeholder.
            key: The tag's name.
            value: Its `str()` is stored.

        Raises:
            CallTypeError, ConfigError, QueueFullError, ClosedError: As for `set_tags`.
        """
        self.set_tags(run_id, _single(key, value))

    def log_inputs(
        self,
        run_id: RunId,
        datasets: Iterable[Any] | None,
        *,
        contexts: Iterable[str | None] | None = None,
        tags_list: Iterable[Mapping[str, Any] | None] | None = None,
    ) -> None:
        """
        Queue the datasets that a run reads.

        Args:
            run_id: The run: its id or its placeholder.
            datasets: Datasets of `mlflow.data`, `DatasetInput` of mlflow, or `runqueue.Dataset`. None and [] do
                nothing.
            contexts: For each dataset the purpose it is read for, e.g. "training", or None. None: no purposes.
            tags_list: For each dataset more tags of this input, or None; the `str()` of each value is stored. None: no
                more tags.

        Raises:
            CallTypeError: `datasets`, `contexts` or `tags_list` is no list, or holds values of the wrong type.
            ConfigError: The lists are not of one length, or give two values for one tag of a dataset.
            QueueFullError: The queue is full; see `max_pending`.
            ClosedError: The client was closed.
        """
        entries = convert.datasets(() if datasets is None else datasets, contexts, tags_list)
        lane = self._lane(run_id)
        if entries:
            lane.append(record_of(DATASET, entries))

    def log_input(
        self, run_id: RunId, dataset: Any, context: str | None = None, tags: Mapping[str, Any] | None = None
    ) -> None:
        """
        Queue one dataset that a run reads; see `log_inputs`.

            client.log_input(run, mlflow.data.from_pandas(frame), context="training")

        Args:
            run_id: The run: its id or its placeholder.
            dataset: A dataset of `mlflow.data`, a `DatasetInput` of mlflow, or a `runqueue.Dataset`.
            context: The purpose it is read for, e.g. "training". None: no purpose.
            tags: More tags of this input; the `str()` of each value is stored. None: no more tags.

        Raises:
            CallTypeError, ConfigError, QueueFullError, ClosedError: As for `log_inputs`.
        """
        self.log_inputs(run_id, [dataset], contexts=[context], tags_list=[tags])


def _names_of(run_id: RunId) -> tuple[object, ...]:
    return (run_id, run_id.run_id) if isinstance(run_id, PendingRunId) else (run_id,)


def _single(key: Any, value: Any) -> dict[Any, Any]:
    try:
        return {key: value}
    except TypeError:
        raise CallTypeError(f"a key is text, not {type(key).__name__}") from None


def _step(step: Any) -> Any:
    return 0 if step is None else convert.whole(step, "step")


def _nanoseconds(timestamp: Any) -> int | InvalidValue:
    """
    A time in nanoseconds, which is what records hold: to divide `time_ns()` in each call would cost as much as to read
    the clock.
    """
    whole = timestamp if timestamp.__class__ is int else convert.whole(timestamp, "timestamp")
    return whole if isinstance(whole, InvalidValue) else whole * MILLISECOND
