"""
What a fork of the process does to us.

In the child there is no thread but the one that forked; whatever another thread held stays locked for good. So nobody
forks while a thread of ours imports (a module's lock would be taken along) or starts its loop, and whatever has threads
or locks of its own begins anew in the child.

Rules of this file: the only state is what the hooks need; they never wait for long, and never raise.
"""

from __future__ import annotations

import itertools

# logging takes its lock before a fork, and hooks run in the reverse order of their registration. This import makes sure that
# logging's hook is registered first: our hook then waits for a running import, which may need that lock, before it is taken.
import logging  # noqa: F401
import os
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Final, Protocol

PATIENCE: Final = 30.0
"""Seconds that a fork waits for the end of an import; importing mlflow takes some."""


class Forked(Protocol):
    """Something that has to begin anew in a child."""

    def _after_fork(self) -> None: ...


_importing = threading.RLock()
_held: list[bool] = []  # by the thread that forks, of which there is one at a time
_all: weakref.WeakValueDictionary[int, Forked] = weakref.WeakValueDictionary()
_serials = itertools.count()


def register(thing: Forked) -> None:
    """Call its `_after_fork` in every child, as long as it lives; in the order of registration."""
    _all[next(_serials)] = thing


@contextmanager
def importing() -> Generator[None, None, None]:
    """Around imports in a thread of ours, and whatever else takes locks that a child would never get."""
    with _importing:
        yield


def _before() -> None:
    _held.append(_importing.acquire(timeout=PATIENCE))


def _in_parent() -> None:
    if _held.pop():
        _importing.release()


def _in_child() -> None:
    global _importing
    _importing = threading.RLock()
    _held.clear()
    for thing in list(_all.values()):
        with suppress(Exception):  # the others begin anew all the same
            thing._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_in_parent, after_in_child=_in_child)
