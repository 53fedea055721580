"""
Replaces the queueing client of MLflow's autologging by `QueueingClient`, and restores it.
"""

# MLflow's integrations look the client's name up in their own module each time they make a client. So the class is
# replaced in every module of mlflow that holds it. The module that defines the class comes first: modules that are
# imported later take the class from there. Rejected: a subclass, because a later MLflow may call the base's private
# methods; patching the methods of MLflow's class, because its thread pool would stay; an import hook, because it does
# not see modules that are imported already.
#
# Rules of this file: modules are looked up in `sys.modules` and not imported, except for the one that defines the
# class. Something else in the class's place (a test's mock) is left alone. The state is global because mlflow, which is
# changed here, exists once in a process.

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runqueue.integrations.mlflow._queueing_client import QueueingClient
from runqueue.runtime import _fork

if TYPE_CHECKING:
    from typing_extensions import Self


class _Installations:
    """The installations that are active, and the class that they have replaced."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: set[Installation] = set()
        self.original: Any = None

    def add(self, installation: Installation) -> None:
        from mlflow.utils.autologging_utils import client

        with self.lock:
            if not self.active:
                self.original = client.MlflowAutologgingQueueingClient
            self.active.add(installation)
            # Again for each installation: a mock that hid the original in some module may be gone by now.
            _replace_in_mlflow(self.original, QueueingClient)

    def remove(self, installation: Installation) -> None:
        with self.lock:
            if self.active == {installation}:
                self.remove_all()
            self.active.discard(installation)

    def remove_all(self) -> None:
        with self.lock:
            if self.active:
                self.active.clear()
                _replace_in_mlflow(QueueingClient, self.original)

    def _after_fork(self) -> None:
        self.lock = threading.RLock()  # a thread of the parent may have held the old one


_installations = _Installations()
_fork.register(_installations)


class Installation:
    """The context manager that `install` returns. Leaving the block takes back this installation, and no other one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _installations.remove(self)

    def __repr__(self) -> str:
        return f"<Installation {'in place' if self in _installations.active else 'taken back'}>"


def install() -> Installation:
    """
    Let `mlflow.sklearn`, `xgboost`, `lightgbm`, `paddle` and `pytorch.autolog()` log through `QueueingClient`.

    Returns:
        A context manager: `with install(): ...`. Blocks may overlap, also in different threads: MLflow's client is
        restored when the last of them ends. Without a block the installation stays until `uninstall()`.

    Guarantees:
        `install()` may be called before or after `autolog()`, and before or after mlflow's modules are imported. A
        fit that is under way ends with the client that it began with.
    """
    installation = Installation()
    _installations.add(installation)
    return installation


def uninstall() -> None:
    """Restore MLflow's own client in all modules, also in those that were imported since. This ends all blocks."""
    _installations.remove_all()


def _replace_in_mlflow(old: Any, new: Any) -> None:
    """Replace a value in all modules of mlflow, whatever the name that it has there."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mlflow":
            names = getattr(module, "__dict__", {})
            for key in [key for key, value in list(names.items()) if value is old]:
                names[key] = new
