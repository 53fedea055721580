"""
The placeholder for a run that does not exist yet.

Rule of this file: one token, one object a process. Unpickling or copying a PendingRunId gives the living object of that
token back, so that equality is identity: a hash and a comparison in C, which the enqueue path needs, and a copy that
learns the real id together with the original.
"""

from __future__ import annotations

import threading
import uuid
import weakref
from typing import TypeAlias

from runqueue.runtime._fork import register

_living: weakref.WeakValueDictionary[str, PendingRunId] = weakref.WeakValueDictionary()
_lock = threading.RLock()  # a garbage collection may come back in here

Experiment: TypeAlias = tuple[str | None, str | None]
"""Id and name, one of which is given."""


class _Lock:
    """Begins anew in a forked child: another thread of the parent may have held it."""

    def _after_fork(self) -> None:
        global _lock
        _lock = threading.RLock()


_renewed = _Lock()
register(_renewed)


class PendingRunId:
    """
    Names a run from the moment it is queued. Made by `create_run`; hashable, comparable, picklable.

    It stays valid after every flush: for logging, as `parent_run_id=`, and in another client, also of another process:
    as long as the run does not exist, that one looks for it, by a tag that the run is created with.
    """

    __slots__ = ("__weakref__", "_experiment", "_run_id", "_token")

    def __init__(self, experiment: Experiment = (None, None)) -> None:
        self._token = uuid.uuid4().hex
        self._run_id: str | None = None
        self._experiment = experiment
        with _lock:
            _living[self._token] = self

    @property
    def run_id(self) -> str | None:
        """The real id once the run exists, None before."""
        return self._run_id

    def _resolve(self, run_id: str) -> None:
        self._run_id = run_id

    def __repr__(self) -> str:
        return f"<PendingRunId {self._token[:8]} {self._run_id or 'pending'}>"

    def __reduce__(self) -> tuple[object, ...]:
        return (_restore, (self._token, self._run_id, self._experiment))


RunId: TypeAlias = str | PendingRunId


def _restore(token: str, run_id: str | None, experiment: Experiment = (None, None)) -> PendingRunId:
    with _lock:
        pending = _living.get(token)
        if pending is None:
            pending = PendingRunId.__new__(PendingRunId)
            pending._token = token
            pending._run_id = None
            pending._experiment = experiment
            _living[token] = pending
    if run_id is not None:
        pending._resolve(run_id)
    return pending
