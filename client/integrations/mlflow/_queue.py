"""
The client behind one queued store. It knows which runs have unsent data, and keeps the failures that the user has not
seen yet.
"""

# Rules of this file: a log call takes no lock. A run has unsent data until a flush has ended that began after its last
# record. To tell, each log call stores a new token for its run, and each flush stores the token that it has found; a
# token is given out once. Where two threads overwrite each other's token, one flush too many is sent. A failure is kept
# until it is reported: once, with counts, at the end of its run or when the queue closes.

from __future__ import annotations

import importlib
import itertools
import time
from contextlib import suppress
from typing import Any, Final

import mlflow
from mlflow.exceptions import MlflowException

from runqueue import Client, ClosedError, ConfigError, FlushError, OperationFailure, RunqueueError
from runqueue.integrations.mlflow import _entities
from runqueue.runtime import _fork, _notices
from runqueue.settings import _environment

_operations: Any = importlib.import_module("mlflow.utils.async_logging.run_operations")

DEFAULT_INTERVAL: Final = 2.0
"""Seconds between two background flushes. A full batch is sent at once; reading or ending a run flushes the run."""


class Settings:
    """
    The settings that all queued stores take from the environment.

    Raises:
        ConfigError: A variable holds a bad value.
    """

    def __init__(self) -> None:
        self.strict = bool(_environment.switch("RUNQUEUE_STRICT"))
        interval = _environment.number("RUNQUEUE_FLUSH_INTERVAL", above=0)
        self.interval = DEFAULT_INTERVAL if interval is None else interval


class Queue:
    """
    The queue for one tracking URI.

    Args:
        uri: The plain tracking URI.

    Raises:
        ConfigError: There is no store for it, or a variable holds a bad value.
    """

    def __init__(self, uri: str) -> None:
        settings = Settings()
        self.strict = settings.strict
        # "raise": a flush then raises its failures and logs no warning, so that each run is reported once, with counts.
        self.client = Client(uri, flush_interval=settings.interval, on_failure="raise")
        self._tokens = itertools.count(1)
        self._exit_deadline: float | None = None  # set when the interpreter ends; no flush waits longer
        self._reset()
        _fork.register(self)

    def _reset(self) -> None:
        self._last_tokens: dict[str, int] = {}  # by run: the token of its last record
        self._flushed_tokens: dict[str, int] = {}  # by run: the token of its last record that a flush has covered
        self._failures: dict[str, list[OperationFailure]] = {}  # by run
        self._logged_params: dict[str, dict[str, str]] = {}  # by run

    def _after_fork(self) -> None:
        """In a child: the parent sends what it has logged, and reports the failures of it."""
        self._reset()

    def __repr__(self) -> str:
        return f"<Queue of {self.client!r}>"

    # -- writing -----------------------------------------------------------------------------------------------------

    def add_own_run(self, run_id: str) -> None:
        """Note that this process has created or resumed the run: SIGTERM and SIGHUP then end it as KILLED."""
        with suppress(RunqueueError):  # the client refuses this id, so nothing will be queued for the run
            self.client._lane(run_id).ended = False  # a run that is resumed may have ended in this process
            self.client._enter_run(run_id)

    def log_batch(self, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        """
        Queue entities that `_entities` has found fit for the queue.

        Raises:
            RunqueueError: Some of them were not queued.
        """
        client = self.client
        try:
            if tags:
                client.set_tags(run_id, {tag.key: tag.value for tag in tags})
            if params:
                client.log_params(run_id, {param.key: param.value for param in params})
                self._logged_params.setdefault(run_id, {}).update((param.key, param.value) for param in params)
            for call in _entities.metric_calls(metrics):
                client.log_metrics(
                    run_id, call.values, call.step, call.dataset, call.model_id, timestamp=call.timestamp
                )
        finally:
            self._mark_unsent(run_id)

    def log_inputs(self, run_id: str, datasets: Any) -> None:
        """
        Queue dataset inputs.

        Raises:
            RunqueueError: They were not queued.
        """
        self.client.log_inputs(run_id, datasets)
        self._mark_unsent(run_id)

    def has_conflicting_param(self, run_id: str, params: Any) -> bool:
        """Return whether this process has logged one of the params with another value, which MLflow refuses."""
        known = self._logged_params.get(run_id)
        return known is not None and any(known.get(param.key, param.value) != param.value for param in params)

    def _mark_unsent(self, run_id: str) -> None:
        """Must follow the queueing of the record: a flush in between would take the record for sent."""
        if run_id not in self._last_tokens:
            active = mlflow.active_run()
            if active is not None and active.info.run_id == run_id:  # it may have been open before the store was queued
                self.add_own_run(run_id)
        self._last_tokens[run_id] = next(self._tokens)

    # -- flushing ----------------------------------------------------------------------------------------------------

    def flush(self, run_id: str | None = None, timeout: float | None = None) -> bool:
        """
        Send what is queued for a run, or for all runs. Where nothing is queued, return at once.

        Args:
            run_id: The run. None: all runs.
            timeout: Seconds to wait at most. None: as long as a flush of the client waits.

        Returns:
            Whether nothing is left in the queue: all is stored, or has failed for good.
        """
        last = self._last_tokens.copy() if run_id is None else {run_id: self._last_tokens.get(run_id, 0)}
        unsent = {run: token for run, token in last.items() if token != self._flushed_tokens.get(run, 0)}
        if not unsent:
            return True
        if self._exit_deadline is not None:
            remaining = max(0.0, self._exit_deadline - time.monotonic())
            timeout = remaining if timeout is None else min(remaining, timeout)
        try:
            self.client.flush(run_id=run_id, timeout=timeout)
        except FlushError as error:
            still_queued = self._keep_final_failures(error)
        except ClosedError:  # `disable()` in another thread, which flushes the client and reports its failures
            return True
        except ConfigError:  # not a run id, so nothing was queued for it
            return True
        else:
            still_queued = set[str]()
        self._flushed_tokens.update((run, token) for run, token in unsent.items() if run not in still_queued)
        return not still_queued

    def _keep_final_failures(self, error: FlushError) -> set[str]:
        """Keep the failures that are final for the report, and return the runs that still have queued data."""
        for failure in error.failures:
            if failure.final:
                self.failures_of(str(failure.run_id)).append(failure)
        return {str(failure.run_id) for failure in error.failures if not failure.final}

    def operations(self, run_id: str) -> Any:
        """Return MLflow's `RunOperations` for a call that is about to queue; waiting for it flushes the run."""
        return _operations.RunOperations([RunFuture(self, run_id)])

    def failures_of(self, run_id: str) -> list[OperationFailure]:
        """Return the run's failures that were not reported yet: the very list that later failures are added to."""
        return self._failures.setdefault(run_id, [])

    # -- the end -----------------------------------------------------------------------------------------------------

    def queue_status(self, run_id: str, status: str, end_time: int | None) -> None:
        """Queue the final status behind the run's data, which the store does not take at the moment."""
        self.client.set_terminated(run_id, status, end_time)
        self._last_tokens[run_id] = next(self._tokens)

    def forget_run(self, run_id: str) -> None:
        """Let go of all state of a run whose final status is stored, except for failures that are to be reported."""
        for by_run in (self._last_tokens, self._flushed_tokens, self._logged_params):
            by_run.pop(run_id, None)
        self.client._engine.own_runs.discard(run_id)
        lane = self.client._lanes.get(run_id)
        if lane is not None:
            self.client._engine.accumulator.run_ended(lane)

    def report(self, run_id: str, *, still_queued: bool = False) -> None:
        """
        Report the run's entries that were not stored, each once.

        Args:
            run_id: The run.
            still_queued: Whether data and final status of the run are still queued, which is reported too.

        Raises:
            MlflowException: The report, with RUNQUEUE_STRICT=1. Otherwise the report is a warning.
        """
        texts = [summary(run_id, self._failures.pop(run_id, []))]
        if still_queued:
            counts = self.client.statistics()
            texts.append(
                f"the store takes no data: run {run_id} and its final status are still queued ({counts.pending:,} entries"
                " in all), and are sent when it does, or at the end of the process"
            )
        text = "\n".join(each for each in texts if each is not None)
        if not text:
            return
        if self.strict:
            raise MlflowException(text)
        _notices.warning("%s", text)

    def report_all(self) -> None:
        """Report the failures of all runs as warnings, also with RUNQUEUE_STRICT=1: no caller could catch an error."""
        for run_id in list(self._failures):
            text = summary(run_id, self._failures.pop(run_id, []))
            if text is not None:
                _notices.warning("%s", text)

    def begin_exit(self) -> None:
        """Report all failures, since the interpreter ends; flushes wait for `exit_timeout` in all from now on."""
        self._exit_deadline = time.monotonic() + self.client._engine.exit_timeout
        self.report_all()

    def close(self) -> None:
        """Flush and close the client; warn of what could not be stored."""
        try:
            self.client.close()
        except FlushError as error:
            for failure in error.failures:
                self.failures_of(str(failure.run_id)).append(failure)
        self.report_all()


class RunFuture:
    """
    One of the futures that MLflow's `RunOperations` waits for: the data of a run up to a call.

    Args:
        queue: The queue that the call uses.
        run_id: The run.
    """

    def __init__(self, queue: Queue, run_id: str) -> None:
        self._queue = queue
        self._run_id = run_id
        self._failures = queue.failures_of(run_id)
        self._count_before = len(self._failures)

    def result(self, timeout: float | None = None) -> None:
        """
        Flush the run.

        Args:
            timeout: Seconds to wait at most. None: as long as a flush of the client waits.

        Raises:
            MlflowException: An entry of the run has failed since the call, or the store takes no data.
            TimeoutError: Data of the run is still queued after `timeout`.
        """
        stored = self._queue.flush(self._run_id, timeout)
        text = summary(self._run_id, self._failures[self._count_before :])
        if text is not None:
            raise MlflowException(text)
        if not stored and timeout is not None:
            raise TimeoutError(f"what was logged of run {self._run_id} is still queued after {timeout:g} s")
        if not stored:
            raise MlflowException(f"what was logged of run {self._run_id} is still queued: the store takes no data")


def summary(run_id: str, failures: list[OperationFailure]) -> str | None:
    """Return the text on a run's failures: counts by cause. None if there is no failure."""
    if not failures:
        return None
    causes: dict[str, list[OperationFailure]] = {}
    for failure in failures:
        causes.setdefault(str(failure.error), []).append(failure)
    count = sum(failure.count for failure in failures)
    lines = [f"{count:,} entries of run {run_id} were not stored:"]
    lines += [f"  {', '.join(each.summary() for each in alike)}: {cause}" for cause, alike in causes.items()]
    return "\n".join(lines)
