"""
Every error that runqueue raises.

    RunqueueError
    ├── ConfigError(ValueError)         a constructor or a call was given a bad value; raised at once
    │   └── CallTypeError(TypeError)    ... or a value of the wrong type
    ├── StoreError                      a request did not store what it carried
    │   ├── RejectedError               the store, or a check before it, rejects an entry
    │   ├── NotFoundError               the run, the experiment or the end point does not exist
    │   ├── AuthError                   the credentials were refused (401), or give no permission (403)
    │   ├── UnavailableError            no answer, or one that says "later" (retriable)
    │   └── UnexpectedAnswerError       an answer that MLflow does not give: a login page, a redirect, a cut body
    ├── FlushError                      what one flush could not store, to the entry
    ├── QueueFullError                  the queue of a client is full, and a log call found no room
    └── ClosedError                     the client was closed

A log call never raises a StoreError. Those are causes: of the failures of a FlushError, of those in `client.failures`,
and of logged warnings.
"""

# Rule of this file: an error carries the policy for it. The engine reads the attributes of a StoreError, such as
# `retriable`, `retry_after` and `scope`, and never its class or its text.

from __future__ import annotations

from itertools import islice
from typing import Any, Final

from runqueue._entities import OperationFailure
from runqueue.queueing import ClosedError, ConfigError, QueueFullError, RejectedError, RunqueueError, Scope, StoreError

__all__ = [
    "AuthError",
    "CallTypeError",
    "ClosedError",
    "ConfigError",
    "FlushError",
    "NotFoundError",
    "QueueFullError",
    "RejectedError",
    "RunqueueError",
    "Scope",
    "StoreError",
    "UnavailableError",
    "UnexpectedAnswerError",
]


SHOWN: Final = 100
"""How many runs, and causes for each run, the text of a FlushError names."""


class CallTypeError(ConfigError, TypeError):
    """
    Raised at once by a constructor or a call that was given a value of the wrong type; the text names the argument.
    """


class NotFoundError(StoreError):
    """Raised by a store for a run, an experiment or an end point that does not exist, and for a deleted run."""

    scope = Scope.LANE


class AuthError(StoreError):
    """
    Raised by a store that refuses the credentials.

    A 401 concerns every run (`scope` STORE: everything stays queued), a 403 one run (`scope` LANE).
    """

    scope = Scope.STORE


class UnavailableError(StoreError):
    """Raised by a store that cannot be reached, does not answer in time, or asks to be tried again later."""

    retriable = True


class UnexpectedAnswerError(StoreError):
    """
    Raised by a store for an answer that is not MLflow's, whatever its status: it does not prove that anything was
    stored.
    """


class FlushError(RunqueueError):
    """
    Raised by `flush`, `close`, `RunOperations.await_completion` and the end of a block if some entries were not stored.

    Args:
        failures: The entries that were not stored, by run, operation and cause.
        total: The number of entries that the flush began with.
    """

    def __init__(self, failures: tuple[OperationFailure, ...], total: int) -> None:
        self.failures = failures
        self.total = total
        super().__init__(failures, total)

    def __str__(self) -> str:
        lost = sum(failure.count for failure in self.failures)
        pending = sum(failure.count for failure in self.failures if not failure.final)
        lines = [f"{lost:,} of {self.total:,} entries were not stored"]
        if not lost:
            lines = [f"the final status was not stored, of {self.total:,} entries all others were"]
        if pending:
            lines[0] += f" ({pending:,} of them are still queued; flush() tries them again)"
        runs: dict[Any, dict[str, list[OperationFailure]]] = {}
        for failure in self.failures:
            runs.setdefault(failure.run_id, {}).setdefault(str(failure.error), []).append(failure)
        for run_id, causes in islice(runs.items(), SHOWN):
            lines.append(f"Failed to perform one or more operations on the run with ID {run_id}:")
            for cause, alike in islice(causes.items(), SHOWN):
                lines.append(f"  {', '.join(failure.summary() for failure in alike)}: {cause}")
            if len(causes) > SHOWN:
                lines.append(f"  ... and {len(causes) - SHOWN:,} more causes; `failures` holds all")
        if len(runs) > SHOWN:
            lines.append(f"... and {len(runs) - SHOWN:,} more runs; `failures` holds all")
        return "\n".join(lines)
