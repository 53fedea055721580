"""
An asynchronous, batching logging client for MLflow tracking servers.

    import runqueue

    with runqueue.Client(flush_interval=2.0) as client:
        with client.start_run(experiment_name="nightly") as run:
            run.log_params({"lr": 3e-4})
            for step in range(1_000):
                run.log_metrics({"loss": 0.7}, step=step)

Log calls return at once; a thread of the client sends what they have queued, in few, large, ordered requests. What
could not be stored is reported to the entry: by a `FlushError`, in `client.failures`, or in a logged warning.

    Client, AsyncClient         make one of them; `help(runqueue.Client)` describes every setting
    Run, RunOperations          what `start_run` and `flush` return
    PendingRunId                what `create_run` returns: the placeholder of a run that is still queued
    Dataset, Limits             arguments: a dataset that a run reads; limits of a batch
    FlushReport, Statistics,    results: what a flush has stored; counts; entries that were not stored, and why
    OperationFailure, Entry
    errors                      every error, as a tree
"""

# Rules of this file: `import runqueue` loads nothing; the first use of a public name loads all of them, from `_public`.
# So a library may import runqueue at no cost, as MLflow does with each of its plugins. The exception is a hook of
# atexit: hooks run in the reverse order of their registration, so that this one runs after those of the user, which may
# log.

from __future__ import annotations as _annotations

import atexit as _atexit
import sys as _sys
import typing as _typing

__all__ = [
    "AsyncClient",
    "AuthError",
    "CallTypeError",
    "Client",
    "ClosedError",
    "ConfigError",
    "Dataset",
    "Entry",
    "EntryKind",
    "FlushError",
    "FlushReport",
    "Limits",
    "NotFoundError",
    "OnFailure",
    "OnFull",
    "OperationFailure",
    "PendingRunId",
    "QueueFullError",
    "RejectedError",
    "Run",
    "RunId",
    "RunOperations",
    "RunqueueError",
    "Scope",
    "Statistics",
    "StoreError",
    "Token",
    "Transport",
    "UnavailableError",
    "UnexpectedAnswerError",
    "errors",
]


@_atexit.register
def _flush_after_user_hooks() -> None:
    exit_ = _sys.modules.get("runqueue.runtime._exit")
    if exit_ is not None:
        exit_.flush_after_user_hooks()


if _typing.TYPE_CHECKING:  # mypy knows the constant by this name only; with `__getattr__` it would accept every name
    from runqueue._public import *  # pyright: ignore[reportWildcardImportFromLibrary]

    __version__: str
else:

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version  # loads a tenth of what the first use of a client loads

            globals()[name] = version("runqueue")
        elif name in __all__:
            from runqueue import _public

            globals().update((each, getattr(_public, each)) for each in __all__)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        dunders = (name for name in globals() if name.startswith("__"))
        return sorted({*__all__, *dunders, "__version__"})
