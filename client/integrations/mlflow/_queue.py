"""
The client behind one queued store: what is on its way of each run, and what of it has failed.

Rules of this file: no lock on the way of a log call. A run is *clean* when a flush that began after its last record has
ended; both are kept as tokens, of which each is given out once, so that a token that another thread overwrites costs a
flush at worst. A failure is kept until it was told, once, with counts: at the end of its run, or of everything.
"""

from __future__ import annotations

import importlib
import itertools
import time
from contextlib import suppress
from typing import Any, Final

from mlflow.exceptions import MlflowException

from runqueue import Client, ClosedError, ConfigError, FlushError, OperationFailure, RunqueueError
from runqueue.integrations.mlflow import _entities
from runqueue.runtime import _fork, _notices
from runqueue.settings import _environment

_operations: Any = importlib.import_module("mlflow.utils.async_logging.run_operations")

DEFAULT_INTERVAL: Final = 2.0
"""Seconds between two looks at what is queued; a full batch goes at once, and whoever reads or ends a run flushes it."""


class Settings:
    """
    What the environment says of every queued store.

    Raises:
        ConfigError: A variable holds a bad value.
    """

    def __init__(self) -> None:
        self.strict = bool(_environment.switch("RUNQUEUE_STRICT"))
        interval = _environment.number("RUNQUEUE_FLUSH_INTERVAL", above=0)
        self.interval = DEFAULT_INTERVAL if interval is None else interval


class Queue:
    """
    Args:
        uri: The plain tracking URI.

    Raises:
        ConfigError: There is no store for it, or a variable holds a bad value.
    """

    def __init__(self, uri: str) -> None:
        settings = Settings()
        self.strict = settings.strict
        # Not lenient: a flush names what has failed, and does not log it, so that it is told once, by run, with counts.
        self.client = Client(uri, flush_interval=settings.interval, on_failure="raise")
        self._tokens = itertools.count(1)
        self._expires: float | None = None  # when nobody waits for anything any more, as the interpreter ends
        self._begin()
        _fork.register(self)

    def _begin(self) -> None:
        self._last: dict[str, int] = {}  # by run: the token of its last record
        self._clean: dict[str, int] = {}  # by run: that of the last record that was flushed
        self._failed: dict[str, list[OperationFailure]] = {}
        self._params: dict[str, dict[str, str]] = {}
        self._fresh: set[str] = set()  # runs that were created here, and of which nothing was logged yet

    def _after_fork(self) -> None:
        """In a child: what its parent has logged is its parent's to send, and to tell of."""
        self._begin()

    def __repr__(self) -> str:
        return f"<Queue of {self.client!r}>"

    # -- writing -----------------------------------------------------------------------------------------------------

    def created(self, run_id: str) -> None:
        """A run that this process has begun: SIGTERM ends it as KILLED."""
        self._fresh.add(run_id)
        self._mark(run_id)

    def batch(self, run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        """
        Queue what fits.

        Raises:
            RunqueueError: Not all of it was taken.
        """
        client = self.client
        try:
            if tags:
                client.set_tags(run_id, {tag.key: tag.value for tag in tags})
            if params:
                client.log_params(run_id, {param.key: param.value for param in params})
                self._params.setdefault(run_id, {}).update((param.key, param.value) for param in params)
            for group in _entities.points(metrics):
                client.log_metrics(
                    run_id, group.values, group.step, group.dataset, group.model_id, timestamp=group.timestamp
                )
        finally:
            self._noted(run_id)

    def inputs(self, run_id: str, datasets: Any) -> None:
        """The same of dataset inputs."""
        self.client.log_inputs(run_id, datasets)
        self._noted(run_id)

    def conflicts(self, run_id: str, params: Any) -> bool:
        """Whether a param was logged with another value by this process: MLflow refuses that at the call."""
        known = self._params.get(run_id)
        return known is not None and any(known.get(param.key, param.value) != param.value for param in params)

    def _noted(self, run_id: str) -> None:
        if run_id in self._fresh:  # a lane that nothing was logged to may have been released
            self._mark(run_id)
            self._fresh.discard(run_id)
        self._last[run_id] = next(self._tokens)  # after the record: see the head of this file

    def _mark(self, run_id: str) -> None:
        with suppress(RunqueueError):  # an id that no store of ours takes: nothing of it will be queued
            self.client._lane(run_id).made = True

    # -- flushing ----------------------------------------------------------------------------------------------------

    def flush(self, run_id: str | None = None, timeout: float | None = None) -> bool:
        """
        Send what is queued of a run, or of all of them; nothing is done where nothing is.

        Args:
            run_id: None: of all.
            timeout: Seconds.

        Returns:
            Whether nothing of it is left in the queue: it is stored, or has failed for good.
        """
        last = self._last.copy() if run_id is None else {run_id: self._last.get(run_id, 0)}
        dirty = {run: token for run, token in last.items() if token != self._clean.get(run, 0)}
        if not dirty:
            return True
        if self._expires is not None:
            most = max(0.0, self._expires - time.monotonic())
            timeout = most if timeout is None else min(most, timeout)
        try:
            self.client.flush(run_id=run_id, timeout=timeout)
        except FlushError as error:
            left = self._keep(error)
        except (
            ClosedError,
            ConfigError,
        ):  # by `disable()` in another thread, which flushes and tells; or it is no run id
            return True
        else:
            left = set[str]()
        self._clean.update((run, token) for run, token in dirty.items() if run not in left)
        return not left

    def _keep(self, error: FlushError) -> set[str]:
        """Of what a flush could not store: keep what is final, and say whose is still queued."""
        for failure in error.failures:
            if failure.final:
                self._failed.setdefault(str(failure.run_id), []).append(failure)
        return {str(failure.run_id) for failure in error.failures if not failure.final}

    def operations(self, run_id: str) -> Any:
        """What MLflow's asynchronous calls return: its own `RunOperations`, to be waited for."""
        return _operations.RunOperations([Stored(self, run_id)])

    def failed(self, run_id: str) -> list[OperationFailure]:
        """The failures of a run that were not told yet; the list that later ones are added to."""
        return self._failed.setdefault(run_id, [])

    # -- the end -----------------------------------------------------------------------------------------------------

    def queue_status(self, run_id: str, status: str, end_time: int | None) -> None:
        """For a run with data that cannot be sent yet: its final status comes after it."""
        self.client.set_terminated(run_id, status, end_time)
        self._last[run_id] = next(self._tokens)

    def ended(self, run_id: str) -> None:
        """Its final status is stored: keep nothing of it, but for what is to be told."""
        for kept in (self._last, self._clean, self._params):
            kept.pop(run_id, None)
        self._fresh.discard(run_id)
        lane = self.client._lanes.get(run_id)
        if lane is not None:
            self.client._engine.accumulator.over(lane)

    def tell(self, run_id: str, *, left: bool = False) -> None:
        """
        Tell what of the run was not stored, once.

        Args:
            run_id: Of the run.
            left: Some of it is still queued, which is told too.

        Raises:
            MlflowException: The same as an exception, with RUNQUEUE_STRICT=1.
        """
        texts = [summary(run_id, self._failed.pop(run_id, []))]
        if left:
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

    def tell_all(self) -> None:
        """Tell of every run, by warnings alone: nobody is there to catch an exception."""
        for run_id in list(self._failed):
            text = summary(run_id, self._failed.pop(run_id, []))
            if text is not None:
                _notices.warning("%s", text)

    def expire(self) -> None:
        """The interpreter ends: whoever waits from now on, does so for `exit_timeout` at most."""
        self._expires = time.monotonic() + self.client._engine.exit_timeout
        self.tell_all()

    def close(self) -> None:
        """Flush, and end the client; what is not stored is told by warnings."""
        try:
            self.client.close()
        except FlushError as error:
            for failure in error.failures:
                self._failed.setdefault(str(failure.run_id), []).append(failure)
        self.tell_all()


class Stored:
    """What a call has queued of a run, as one of the futures that MLflow's `RunOperations` waits for."""

    def __init__(self, queue: Queue, run_id: str) -> None:
        self._queue = queue
        self._run_id = run_id
        self._failed = queue.failed(run_id)
        self._before = len(self._failed)

    def result(self, timeout: float | None = None) -> None:
        """
        Wait until it is stored.

        Raises:
            MlflowException: Something of the run was not stored since the call.
            TimeoutError: It is still under way.
        """
        stored = self._queue.flush(self._run_id, timeout)
        text = summary(self._run_id, self._failed[self._before :])
        if text is not None:
            raise MlflowException(text)
        if not stored and timeout is not None:
            raise TimeoutError(f"what was logged of run {self._run_id} is still queued after {timeout:g} s")
        if not stored:
            raise MlflowException(f"what was logged of run {self._run_id} is still queued: the store takes no data")


def summary(run_id: str, failures: list[OperationFailure]) -> str | None:
    """How much of a run was not stored, and why; None: all was."""
    if not failures:
        return None
    causes: dict[str, list[OperationFailure]] = {}
    for failure in failures:
        causes.setdefault(str(failure.error), []).append(failure)
    count = sum(failure.count for failure in failures)
    lines = [f"{count:,} entries of run {run_id} were not stored:"]
    lines += [f"  {', '.join(each.summary() for each in alike)}: {cause}" for cause, alike in causes.items()]
    return "\n".join(lines)
