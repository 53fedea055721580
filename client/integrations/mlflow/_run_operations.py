"""
The flushes of `QueueingClient`: as futures, as MLflow's `RunOperations`, and as what the end of the process waits for.
"""

# Rules of this file: a failure is reported in MLflow's words, by an `MlflowException` whose cause is runqueue's error.

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import suppress
from itertools import islice
from typing import Any

from runqueue import Client, FlushError, RunqueueError
from runqueue import RunOperations as Flush
from runqueue.errors import SHOWN
from runqueue.runtime import _exit


class RunOperations:
    """
    Flushes, ended or not, as MLflow's autologging waits for them.

    Args:
        operation_futures: Futures, or other objects with a method `result()`: those of flushes, or foreign ones.
    """

    def __init__(self, operation_futures: Iterable[Any]) -> None:
        self._operation_futures = list(operation_futures)  # MLflow reads it by this name to combine several

    def await_completion(self) -> None:
        """
        Wait until all flushes have ended.

        Raises:
            MlflowException: A flush could not store everything. Its cause is the error of the first such flush.
        """
        errors: list[Exception] = []
        for future in self._operation_futures:
            try:
                future.result()
            except Exception as error:  # a foreign future may raise anything
                errors.append(error)
        if errors:
            raise mlflow_error(errors) from errors[0]

    def __repr__(self) -> str:
        return f"<RunOperations {self._operation_futures}>"


class FlushFuture:
    """A flush with the methods of a future."""

    def __init__(self, flush: Flush) -> None:
        self._flush = flush

    def result(self, timeout: float | None = None) -> None:
        self._flush.await_completion(timeout)

    def done(self) -> bool:
        return self._flush.done

    def __repr__(self) -> str:
        return repr(self._flush)


class BackgroundFlush:
    """
    A flush that the caller may not wait for. Until it has ended, it is an `_exit.ExitTarget`, so that the end of the
    process waits for it, and it holds the client, which would otherwise be garbage-collected with the flush unfinished.

    Args:
        flush: The flush.
        client: The client that it flushes.
        running: The flushes of the same `QueueingClient` that have not ended; this one adds and removes itself.
    """

    def __init__(self, flush: Flush, client: Client, running: set[BackgroundFlush]) -> None:
        self._flush: Flush | None = flush
        self._client: Client | None = client
        self._engine = client._engine
        self._running = running

    def register(self) -> None:
        """Let the end of the process wait for the flush."""
        flush = self._flush
        assert flush is not None
        self._running.add(self)
        _exit.flush_at_exit(self, signals=False)
        _exit.flush_at_worker_exit()
        flush._future.add_done_callback(self._unregister)

    def wait(self, timeout: float | None) -> None:
        """
        Wait until the flush has ended. Its failures are raised to the holder of its `RunOperations`, and not here.
        """
        flush = self._flush
        if flush is not None:
            with suppress(RunqueueError, TimeoutError):
                flush.await_completion(timeout)

    def _unregister(self, _: Future[Any] | None = None) -> None:
        self._flush = self._client = None  # ends a reference cycle: the flush's future holds this callback
        self._running.discard(self)
        _exit.unregister(self)

    @property
    def exit_timeout(self) -> float:
        return self._engine.exit_timeout

    def begin_final_flush(self, timeout: float) -> Future[Any] | None:
        """Return the flush that has begun already: entries that were logged after it are not sent."""
        flush = self._flush
        return None if flush is None else flush._future

    def is_own_thread(self) -> bool:
        return self._engine.is_own_thread()

    def flush_logs(self) -> None:
        self._engine.flush_logs()

    def give_up_waiting(self) -> int:
        """Count what is lost. The caller warns of it, so the client's own warning, at its collection, is turned off."""
        client = self._client
        if client is not None:
            client._finalizer.detach()
        self._unregister()
        return self._engine.give_up_waiting()

    def watch_log_calls(self, callback: object) -> None:
        """Do nothing: the client itself counts what is logged after the end."""

    def report_late_entries(self) -> None:
        """Do nothing: see `watch_log_calls`."""

    def report_late_drops(self) -> None:
        """Do nothing: see `watch_log_calls`."""

    def queue_killed_status(self) -> None:
        """Do nothing: this target is registered without signals."""


def mlflow_error(errors: list[Exception]) -> Exception:
    """Return the exception that MLflow's client raises for the failures of flushes."""
    from mlflow.exceptions import MlflowException

    failures = [MlflowException(_text_by_run(error)) if isinstance(error, FlushError) else error for error in errors]
    return MlflowException(
        f"The following failures occurred while performing one or more logging operations: {failures}"
    )


def _text_by_run(error: FlushError) -> str:
    runs: dict[Any, list[str]] = {}
    for failure in error.failures:
        runs.setdefault(failure.run_id, []).append(f"{failure.summary()}: {failure.error}")
    texts = [
        f"Failed to perform one or more operations on the run with ID {run_id}."
        f" Failed operations: [{', '.join(islice(failures, SHOWN))}{', ...' if len(failures) > SHOWN else ''}]"
        for run_id, failures in islice(runs.items(), SHOWN)
    ]
    if len(runs) > SHOWN:
        texts.append(f"... and {len(runs) - SHOWN:,} more runs; `failures` of the cause holds all")
    return ". ".join(texts)
