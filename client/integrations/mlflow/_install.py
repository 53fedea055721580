"""
Puts `QueueingClient` under MLflow's autologging, and takes it away again.

MLflow's integrations look the client's name up in their own module each time they make one. So the class is replaced
in every module of mlflow's that holds it, and first of all where it is defined: there, modules that are imported later
find ours. Rejected: a subclass, whose private methods a next MLflow may call; a patch of the original's methods, which
leaves its thread pool; an import hook, which sees no module that is there already.

Rules of this file: modules are looked at, never imported, but for the one that defines the class; what is in a module's
place by somebody else's hand is left alone. The only state is who wants it installed: it is mlflow that is changed,
and there is one in a process.
"""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runqueue.integrations.mlflow._queueing_client import QueueingClient
from runqueue.runtime import _fork

if TYPE_CHECKING:
    from typing_extensions import Self


class _Place:
    """Who has asked for it and not taken it back, and what was there before."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.holders: set[Installation] = set()
        self.original: Any = None

    def fill(self, holder: Installation) -> None:
        from mlflow.utils.autologging_utils import client

        with self.lock:
            if not self.holders:
                self.original = client.MlflowAutologgingQueueingClient
            self.holders.add(holder)
            _replace(self.original, QueueingClient)  # each time: a mock may have been in its place, and be gone

    def leave(self, holder: Installation) -> None:
        with self.lock:
            if self.holders == {holder}:
                self.clear()
            self.holders.discard(holder)

    def clear(self) -> None:
        with self.lock:
            if self.holders:
                self.holders.clear()
                _replace(QueueingClient, self.original)

    def _after_fork(self) -> None:
        self.lock = threading.RLock()  # another thread may have held it


_place = _Place()
_fork.register(_place)


class Installation:
    """What `install` returns: at the end of its block this installation is taken back, and no other."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _place.leave(self)

    def __repr__(self) -> str:
        return f"<Installation {'in place' if self in _place.holders else 'taken back'}>"


def install() -> Installation:
    """
    Let `mlflow.sklearn`, `xgboost`, `lightgbm`, `paddle` and `pytorch.autolog()` log through `QueueingClient`.

    Returns:
        A context manager, for a block: `with install(): ...`. Of several that overlap, in whatever threads, the last
        to end restores. Without a block it stays until `uninstall()`.

    Guarantees:
        It does not matter whether it comes before or after `autolog()`, or before or after mlflow's modules were
        imported. A fit under way ends with the client that it began with.
    """
    installation = Installation()
    _place.fill(installation)
    return installation


def uninstall() -> None:
    """Put MLflow's own client back wherever ours is, modules that were imported since included; it ends all blocks."""
    _place.clear()


def _replace(old: Any, new: Any) -> None:
    """In the modules of mlflow that hold it by any name; the one that defines it is among them."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "mlflow":
            names = getattr(module, "__dict__", {})
            for key in [key for key, value in list(names.items()) if value is old]:
                names[key] = new
