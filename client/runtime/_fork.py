"""
Lets objects begin anew in a forked child, and keeps a fork from happening in the middle of an import.

`register` an object with a method `_after_fork`; put imports in a thread of runqueue's into `with importing()`.
"""

# A child has one thread, the one that forked. A lock that another thread of the parent held stays locked in it for
# ever. Hence no fork while a thread of runqueue's imports a module or starts its loop, and every object with a thread,
# a lock or a connection begins anew in the child.
#
# Rules of this file: the hooks never wait for long and never raise; the state of this module is what they need.

from __future__ import annotations

import importlib
import itertools
import os
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Final, Protocol

# logging takes its lock before a fork. Hooks run in the reverse order of their registration, so logging must register
# its hook before this module does: then this module's hook waits for a running import before logging's lock is taken,
# which the import may need.
importlib.import_module("logging")

IMPORT_SECONDS: Final = 30.0
"""How long a fork waits for the end of an import. Importing mlflow takes several seconds."""


class Forked(Protocol):
    """An object that begins anew in a forked child."""

    def _after_fork(self) -> None: ...


_importing = threading.RLock()
_acquired: list[bool] = []  # whether the hook before the fork got the lock; only one thread forks at a time
_registered: weakref.WeakValueDictionary[int, Forked] = weakref.WeakValueDictionary()
_serials = itertools.count()


def register(forked: Forked) -> None:
    """Call the object's `_after_fork` in every child, as long as it lives, in the order of registration."""
    _registered[next(_serials)] = forked


@contextmanager
def importing() -> Generator[None, None, None]:
    """Hold off forks: around imports in a thread of runqueue's, and around what takes other locks of the process."""
    with _importing:
        yield


def _before_fork() -> None:
    _acquired.append(_importing.acquire(timeout=IMPORT_SECONDS))


def _after_fork_in_parent() -> None:
    if _acquired.pop():
        _importing.release()


def _after_fork_in_child() -> None:
    global _importing
    _importing = threading.RLock()
    _acquired.clear()
    for each in list(_registered.values()):
        with suppress(Exception):  # the others must begin anew all the same
            each._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
