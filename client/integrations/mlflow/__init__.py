"""
runqueue under MLflow's own API (extra `mlflow`).

Rule of this file: importing it loads neither mlflow nor `runqueue._public`; a name loads what it needs.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from runqueue._run import PendingRunId as PendingRunId
    from runqueue.integrations.mlflow._install import install as install
    from runqueue.integrations.mlflow._install import uninstall as uninstall
    from runqueue.integrations.mlflow._queueing_client import QueueingClient as QueueingClient
    from runqueue.integrations.mlflow._run_operations import RunOperations as RunOperations
else:
    _HOME = {
        "PendingRunId": "runqueue",
        "QueueingClient": "runqueue.integrations.mlflow._queueing_client",
        "RunOperations": "runqueue.integrations.mlflow._run_operations",
        "install": "runqueue.integrations.mlflow._install",
        "uninstall": "runqueue.integrations.mlflow._install",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_import_module(_HOME[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOME})
