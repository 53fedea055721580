"""
runqueue under MLflow's own API (extra `mlflow`).

`enable()` queues what MLflow's own API logs. `install()` replaces only the queueing client of MLflow's autologging.
"""

# Rules of this file: importing it must load neither mlflow nor `runqueue._public`. Each public name is imported from
# its module at first use.

from __future__ import annotations

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from runqueue._run_id import PendingRunId as PendingRunId
    from runqueue.integrations.mlflow._enable import disable as disable
    from runqueue.integrations.mlflow._enable import enable as enable
    from runqueue.integrations.mlflow._install import install as install
    from runqueue.integrations.mlflow._install import uninstall as uninstall
    from runqueue.integrations.mlflow._queueing_client import QueueingClient as QueueingClient
    from runqueue.integrations.mlflow._run_operations import RunOperations as RunOperations
else:
    _MODULES = {
        "PendingRunId": lambda: _importlib.import_module("runqueue"),
        "QueueingClient": lambda: _importlib.import_module("runqueue.integrations.mlflow._queueing_client"),
        "RunOperations": lambda: _importlib.import_module("runqueue.integrations.mlflow._run_operations"),
        "disable": lambda: _importlib.import_module("runqueue.integrations.mlflow._enable"),
        "enable": lambda: _importlib.import_module("runqueue.integrations.mlflow._enable"),
        "install": lambda: _importlib.import_module("runqueue.integrations.mlflow._install"),
        "uninstall": lambda: _importlib.import_module("runqueue.integrations.mlflow._install"),
    }

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(_MODULES[name](), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
