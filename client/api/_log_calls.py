"""
The log calls, the same in both faces: each puts one record into a lane, and returns. The rest of a face is in `_base_client`.

Rules of this file: nothing here waits, takes a lock (but to open a run's lane), or makes an object for each entry.
What a call costs its caller is a copy of a dict, a look at its values' types, a tuple, and an append.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from time import time_ns
from typing import Any, Final

from runqueue._run_id import PendingRunId, RunId
from runqueue.api import _conversion as convert
from runqueue.api._artifact_calls import ArtifactCalls
from runqueue.api._base_client import BaseClient
from runqueue.api._run import RunCalls
from runqueue.errors import CallTypeError, ClosedError, ConfigError, QueueFullError, RunqueueError
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, RUN, STATUS, TAG, record_of
from runqueue.runtime import _notices
from runqueue.wire._records import MILLISECOND, PARENT_TAG, TOKEN_TAG, InvalidValue, NewRun

_PLAIN: Final = frozenset((float, int, bool))


class LogCalls(BaseClient, RunCalls, ArtifactCalls):
    """What can be called, of `Client` and `AsyncClient`. Thread-safe: any thread may log, in any number."""

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
        Queue the creation of a run.

        Args:
            experiment_id: Of the experiment the run belongs to.
            start_time: Milliseconds since the epoch. None: now.
            tags: Of the run, from its start. They travel inside the request as far as its limits allow.
            run_name: None: the server makes one up.
            experiment_name: Instead of `experiment_id`: looked up, and created when it does not exist.
            parent_run_id: The run is nested in this one; it is created after it.

        Returns:
            What to pass as `run_id` from now on.

        Raises:
            ConfigError: Neither or both of `experiment_id` and `experiment_name` are given, or a value is bad.
            ClosedError: The client was closed.

        Guarantees:
            Exactly one run is created, also when answers are lost. If it cannot be created, what is queued for it
            stays queued.
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
        given.pop(TOKEN_TAG, None)  # of a run whose tags were taken over: it would be taken for that run
        if parent_run_id is not None and given.pop(PARENT_TAG, parent_run_id) not in _names_of(parent_run_id):
            raise ConfigError(f"parent_run_id={parent_run_id!r} contradicts the tag {PARENT_TAG}")
        bounds = self._engine.bounds
        inside, others = convert.own_tags(given, bounds.riders, bounds.rider_bytes)
        started = time_ns() // 1_000_000 if start_time is None else convert.millis(start_time, "start_time")
        parent = None if parent_run_id is None else self._lane(parent_run_id)
        new = NewRun(experiment_id, experiment_name, started, run_name, parent_run_id, inside)

        pending = PendingRunId((experiment_id, experiment_name))
        lane = self._open(pending, opened=False, parent=parent)
        try:
            lane.append(record_of(RUN, ("run",), tuple(inside), new))
        except (QueueFullError, ClosedError):
            self._engine.accumulator.forget(lane)
            raise
        lane.made = True
        if others:
            lane.push(record_of(TAG, others, False))
        return pending

    def set_terminated(self, run_id: RunId, status: str | None = None, end_time: int | None = None) -> None:
        """
        Queue the end of a run.

        Args:
            run_id: Real or pending.
            status: "FINISHED" (also None), "FAILED", "KILLED", "RUNNING" or "SCHEDULED".
            end_time: Milliseconds since the epoch. None: now.

        Raises:
            ConfigError: MLflow knows no such status.
            ClosedError: The client was closed.

        Guarantees:
            Sent after all else that a flush holds for the run, in one request, also when some of that was rejected.
        """
        name = convert.status(status)
        ended = time_ns() // 1_000_000 if end_time is None else convert.millis(end_time, "end_time")
        lane, over = self._lane(run_id), name not in ("RUNNING", "SCHEDULED")
        lane.ended = over
        if over and self._engine.entry_point_runs:
            self._engine.entry_point_runs.discard(run_id)
        lane.append(record_of(STATUS, (), name, ended))
        if lane.released:  # between these lines: the record went to the run's next lane
            self._lane(run_id).ended = over

    def _enter_run(self, run_id: str) -> None:
        """This process was started for the run: SIGTERM ends it, as nobody else would."""
        self._engine.entry_point_runs.add(run_id)

    def _end_run(self, run_id: RunId, status: str, *, raised: bool) -> None:
        """The end of a run's block; never an exception, as one may be on its way already."""
        try:
            self.set_terminated(run_id, status)
        except RunqueueError as error:  # the client was closed inside of the block, say
            _notices.warning("the final status %s of run %s was not queued: %s", status, run_id, error)
        else:
            if raised:
                self._lane(run_id).raised = True

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
        Queue metric points of one step and time.

        Args:
            run_id: Real or pending.
            metrics: By key, any value that `float()` takes, text excepted: numpy and torch scalars, Decimal, NaN and
                the infinities. Changing the mapping afterwards changes nothing.
            step: A whole number. None: 0.
            dataset: What they were measured on: anything with a `name` and a `digest`.
            model_id: Of the logged model they belong to.
            timestamp: Milliseconds since the epoch. None: now.

        Raises:
            CallTypeError: `metrics` is no mapping.
            ClosedError: The client was closed.
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
        for first in values:  # noqa: B007  the quickest way to the first of them
            break
        else:
            return
        # Where the first is a float, their sum tells in a third of the time whether all of them are numbers that do not
        # change; a few others that add up to a float, such as fractions, do not change either.
        try:
            plain = (
                sum(values, 0.0).__class__ is float
                if first.__class__ is float
                else _PLAIN.issuperset(map(type, values))
            )
        except Exception:  # foreign arithmetic may raise anything
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
        """Queue one metric point; see `log_metrics`."""
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
        Queue params. A param is write-once: logging an equal value again is fine, another value is refused.

        Args:
            run_id: Real or pending.
            params: By key; of each value the `str()` is stored.

        Raises:
            CallTypeError: `params` is no mapping.
            ClosedError: The client was closed.
        """
        entries = convert.texts(convert.mapping(params, "params"))
        lane = self._lane(run_id)
        if entries:
            lane.append(record_of(PARAM, entries))

    def log_param(self, run_id: RunId, key: str, value: Any) -> None:
        """Queue one param; see `log_params`."""
        self.log_params(run_id, _single(key, value))

    def set_tags(self, run_id: RunId, tags: Mapping[str, Any]) -> None:
        """
        Queue tags; of a key, the last value stays.

        Args:
            run_id: Real or pending. What is queued before the run exists travels inside the request that creates it,
                as far as its limits allow.
            tags: By key; of each value the `str()` is stored.

        Raises:
            CallTypeError: `tags` is no mapping.
            ClosedError: The client was closed.
        """
        entries = convert.texts(convert.mapping(tags, "tags"))
        lane = self._lane(run_id)
        if not entries:
            return
        riding, others = convert.riding(entries)
        dropped = lane.append(record_of(TAG, riding, True)) if riding else False
        if others and not dropped:
            (lane.push if riding else lane.append)(record_of(TAG, others, False))

    def set_tag(self, run_id: RunId, key: str, value: Any) -> None:
        """Queue one tag; see `set_tags`."""
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
        Queue datasets that the run reads.

        Args:
            run_id: Real or pending.
            datasets: mlflow's `DatasetInput`, `mlflow.data` datasets, or `runqueue.Dataset`. None and [] do nothing.
            contexts: What each is read for, e.g. "training"; as `mlflow.log_inputs` takes them. None: nothing is said.
            tags_list: Tags of each, besides those that come with it; of each value the `str()` is stored.

        Raises:
            CallTypeError: `datasets`, `contexts` or `tags_list` is no list, or holds what it does not take.
            ConfigError: They are not of one length, or two values are given for a tag of a dataset.
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
        Queue one dataset that the run reads; see `log_inputs`.

            client.log_input(run, mlflow.data.from_pandas(frame), context="training")
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
    """As the clock counts: to divide its time at each call would cost the caller as much as to read it."""
    whole = timestamp if timestamp.__class__ is int else convert.whole(timestamp, "timestamp")
    return whole if isinstance(whole, InvalidValue) else whole * MILLISECOND
