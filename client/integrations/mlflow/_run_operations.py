"""
The flushes of `QueueingClient`: in the form of futures, composed of several, and seen to their end where nobody waits.

Rules of this file: what fails is told in MLflow's words, by MLflow's error, whose cause is ours.
"""

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
    Flushes under way or over.

    Args:
        operation_futures: What has `result()`: those of flushes (`RunOperations._operation_futures`), and any others.
    """

    def __init__(self, operation_futures: Iterable[Any]) -> None:
        self._operation_futures = list(operation_futures)  # the name that MLflow combines several by

    def await_completion(self) -> None:
        """
        Wait until all have ended.

        Raises:
            MlflowException: What any of them could not store; its cause is the first one's error.
        """
        errors: list[Exception] = []
        for future in self._operation_futures:
            try:
                future.result()
            except Exception as error:  # of a foreign future: anything
                errors.append(error)
        if errors:
            raise failed(errors) from errors[0]

    def __repr__(self) -> str:
        return f"<RunOperations {self._operation_futures}>"


class Outcome:
    """A flush in the form of a future."""

    def __init__(self, flush: Flush) -> None:
        self._flush = flush

    def result(self, timeout: float | None = None) -> None:
        self._flush.await_completion(timeout)

    def done(self) -> bool:
        return self._flush.done

    def __repr__(self) -> str:
        return repr(self._flush)


class UnderWay:
    """
    A flush that nobody may hold. Until it is over it stands among what the end of the process waits for (an
    `_exit.ExitTarget`), and that keeps its client.
    """

    def __init__(self, flush: Flush, client: Client, flushes: set[UnderWay]) -> None:
        self._flush: Flush | None = flush
        self._client: Client | None = client
        self._engine = client._engine
        self._flushes = flushes

    def watch(self) -> None:
        flush = self._flush
        assert flush is not None
        self._flushes.add(self)
        _exit.flush_at_exit(self, signals=False)
        _exit.flush_at_worker_exit()
        flush._future.add_done_callback(self._over)

    def wait(self, timeout: float | None) -> None:
        """Until it has ended: whoever holds it is told what it could not store."""
        flush = self._flush
        if flush is not None:
            with suppress(RunqueueError, TimeoutError):
                flush.await_completion(timeout)

    def _over(self, _: Future[Any] | None = None) -> None:
        self._flush = self._client = None  # the flush's future holds us
        self._flushes.discard(self)
        _exit.unregister(self)

    @property
    def exit_timeout(self) -> float:
        return self._engine.exit_timeout

    def begin_final_flush(self, timeout: float) -> Future[Any] | None:
        """It has begun: what was logged after it was not meant to be sent by it."""
        flush = self._flush
        return None if flush is None else flush._future

    def is_own_thread(self) -> bool:
        return self._engine.is_own_thread()

    def flush_logs(self) -> None:
        self._engine.flush_logs()

    def give_up_waiting(self) -> int:
        """The time is over: it is said now how much is lost, and not again by the client that goes."""
        client = self._client
        if client is not None:
            client._finalizer.detach()
        self._over()
        return self._engine.give_up_waiting()

    def watch_log_calls(self, callback: object) -> None:
        """What is logged after the end is the client's own to count."""

    def report_late_entries(self) -> None:
        """As above."""

    def report_late_drops(self) -> None:
        """As above."""

    def queue_killed_status(self) -> None:
        """It watches for no signals."""


def failed(errors: list[Exception]) -> Exception:
    """What flushes could not store, in MLflow's words."""
    from mlflow.exceptions import MlflowException

    told = [MlflowException(_by_run(error)) if isinstance(error, FlushError) else error for error in errors]
    return MlflowException(f"The following failures occurred while performing one or more logging operations: {told}")


def _by_run(error: FlushError) -> str:
    runs: dict[Any, list[str]] = {}
    for failure in error.failures:
        runs.setdefault(failure.run_id, []).append(f"{failure.summary()}: {failure.error}")
    told = [
        f"Failed to perform one or more operations on the run with ID {run_id}."
        f" Failed operations: [{', '.join(islice(failures, SHOWN))}{', ...' if len(failures) > SHOWN else ''}]"
        for run_id, failures in islice(runs.items(), SHOWN)
    ]
    if len(runs) > SHOWN:
        told.append(f"... and {len(runs) - SHOWN:,} more runs; `failures` of the cause holds all")
    return ". ".join(told)
