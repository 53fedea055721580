"""
The placeholder of a run that does not exist yet.
"""

# Rule of this file: a process has one object for each token. Unpickling or copying a PendingRunId returns the object
# that lives already. So equality is identity, whose hash and comparison are in C, as the log calls need it, and a copy
# learns the real id together with the original.

from __future__ import annotations

import threading
import uuid
import weakref
from typing import TypeAlias

from runqueue.runtime._fork import register

_living: weakref.WeakValueDictionary[str, PendingRunId] = weakref.WeakValueDictionary()
_lock = threading.RLock()  # re-entrant: a garbage collection in here may run code that comes here again

Experiment: TypeAlias = tuple[str | None, str | None]
"""The id and the name of an experiment, one of which is given."""


class _LockReset:
    """Replaces the lock in a forked child, as another thread of the parent may have held it."""

    def _after_fork(self) -> None:
        global _lock
        _lock = threading.RLock()


_lock_reset = _LockReset()
register(_lock_reset)


class PendingRunId:
    """
    The placeholder of a run that is still queued; returned by `create_run`, and taken by all calls for `run_id`.

    It stays valid when the run exists. It is hashable, comparable and picklable, and another client can use it too,
    also in another process: until the run exists, that client searches for it, by a tag that the run is created with.
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
        """The run's real id. None: the run does not exist yet."""
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
