"""
runqueue under MLflow's own API (extra `mlflow`).

Rule of this file: importing it loads neither mlflow nor `runqueue._public`; a name loads what it needs.
"""

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from runqueue._run_id import PendingRunId as PendingRunId
    from runqueue.integrations.mlflow._install import install as install
    from runqueue.integrations.mlflow._install import uninstall as uninstall
    from runqueue.integrations.mlflow._queueing_client import QueueingClient as QueueingClient
    from runqueue.integrations.mlflow._run_operations import RunOperations as RunOperations
    from runqueue.integrations.mlflow._switch import disable as disable
    from runqueue.integrations.mlflow._switch import enable as enable
else:
    _HOMES = {
        "PendingRunId": lambda: _importlib.import_module("runqueue"),
        "QueueingClient": lambda: _importlib.import_module("runqueue.integrations.mlflow._queueing_client"),
        "RunOperations": lambda: _importlib.import_module("runqueue.integrations.mlflow._run_operations"),
        "disable": lambda: _importlib.import_module("runqueue.integrations.mlflow._switch"),
        "enable": lambda: _importlib.import_module("runqueue.integrations.mlflow._switch"),
        "install": lambda: _importlib.import_module("runqueue.integrations.mlflow._install"),
        "uninstall": lambda: _importlib.import_module("runqueue.integrations.mlflow._install"),
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_HOMES[name](), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES})
