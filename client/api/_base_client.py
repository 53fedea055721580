"""
What both faces are made of: the engine behind a client, the lanes of its runs, its state, its flushes and its end.

Rules of this file: nothing is logged here, and nothing waits. What fails in the constructor is raised without the frames
that hold the URI, the token and the headers.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from os import PathLike
from typing import Any, ClassVar, Final

from runqueue._entities import OperationFailure, Statistics
from runqueue._run_id import PendingRunId, RunId
from runqueue.api._run_operations import RunOperations
from runqueue.engine._engine import Engine
from runqueue.errors import CallTypeError, ClosedError, ConfigError
from runqueue.queueing import Lane, Limits, Record
from runqueue.queueing.batches._batch import RUN, record_of
from runqueue.settings._config import Config, OnFailure, OnFull, Token, Transport, seconds
from runqueue.settings._redaction import redact_uri
from runqueue.settings._tracking_uri import path_as_uri, resolve_tracking_uri
from runqueue.stores._resolve import check_uri
from runqueue.wire._records import NewRun

_RUN_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,255}")
"""Source: `mlflow.utils.validation._RUN_ID_REGEX`."""


class BaseClient:
    """What `Client` and `AsyncClient` have in common, but for the log calls."""

    _waits: ClassVar[bool] = True
    """Whether a log call may wait for room."""

    def __init__(
        self,
        tracking_uri: str | PathLike[str] | None = None,
        *,
        max_workers: int = 8,
        limits: Limits | None = None,
        request_timeout: float | None = None,
        retry_timeout: float | None = None,
        token: Token | None = None,
        headers: Mapping[str, str] | None = None,
        transport: Transport = "auto",
        flush_interval: float | None = None,
        max_pending: int | None = None,
        on_full: OnFull = "block",
        block_timeout: float = 60.0,
        on_failure: OnFailure | None = None,
        exit_timeout: float = 20.0,
        handle_signals: bool = True,
        progress: bool = True,
        proxies: bool = True,
    ) -> None:
        made = _engine_of(
            self._waits,
            tracking_uri=tracking_uri,
            max_workers=max_workers,
            limits=limits,
            request_timeout=request_timeout,
            retry_timeout=retry_timeout,
            token=token,
            headers=headers,
            transport=transport,
            flush_interval=flush_interval,
            max_pending=max_pending,
            on_full=on_full,
            block_timeout=block_timeout,
            on_failure=on_failure,
            exit_timeout=exit_timeout,
            handle_signals=handle_signals,
            progress=progress,
            proxies=proxies,
        )
        del tracking_uri, token, headers  # what catches errors may show the locals of this frame
        if isinstance(made, Exception):
            raise made
        self._engine = made
        self._lanes = self._engine.accumulator.lanes
        self._closed = False
        self._finalizer = weakref.finalize(self, self._engine.finalize)
        self._finalizer.atexit = not made.config.streams  # those are flushed then, see `_exit`

    @property
    def tracking_uri(self) -> str:
        """Where runs are kept, without the secrets that the URI may hold."""
        return redact_uri(self._engine.uri)

    @property
    def failures(self) -> tuple[OperationFailure, ...]:
        """All that has failed for good: the first 10,000 entries in full, the others counted by run and cause."""
        return self._engine.failures()

    def statistics(self) -> Statistics:
        """Counts of entries and requests since the client was made; at any time, from any thread."""
        return self._engine.statistics()

    def __repr__(self) -> str:
        counts = self._engine.accumulator.counts()
        state = "closed" if self._closed else "open"
        if self._engine.config.streams:
            state += " streaming"
        shown = " ".join(f"{name}={counts[name]}" for name in ("pending", "in_flight", "stored", "failed", "dropped"))
        return f"<{type(self).__name__} {self.tracking_uri} {state} {shown}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled client is its configuration: without what is queued, without token, headers and user info."""
        return (_restored, (type(self), self._engine.config.portable_settings(self._engine.uri)))

    # -- lanes -------------------------------------------------------------------------------------------------------

    def _lane(self, run_id: RunId) -> Lane:
        """
        The lane of a run, opened if it is seen for the first time.

        Raises:
            ClosedError: The client was closed.
            CallTypeError: It is neither text nor a PendingRunId.
            ConfigError: It cannot be a run id.
        """
        if self._closed:
            raise ClosedError("the client is closed")
        if isinstance(run_id, PendingRunId):
            lane = self._lanes.get(run_id)
            if lane is not None:
                return lane
            if run_id.run_id is None:  # of another client, in this process or another: it will turn up in the store
                sought = NewRun(*run_id._experiment, 0, None, None, {}, created_elsewhere=True)
                return self._open(run_id, opened=False, first=record_of(RUN, ("run",), (), sought))
            lane = self._lane(run_id.run_id)
            self._engine.accumulator.alias(run_id, lane)
            return lane
        if not isinstance(run_id, str):
            raise CallTypeError(f"run_id takes a run id or a PendingRunId, not {type(run_id).__name__}")
        lane = self._lanes.get(run_id)
        if lane is not None:
            return lane
        if _RUN_ID.fullmatch(run_id) is None:
            raise ConfigError(f"run_id={run_id[:300]!r} is no run id: letters, digits, _ and -, at most 256 of them")
        return self._open(run_id, opened=True)

    def _open(self, run: RunId, *, opened: bool, parent: Lane | None = None, first: Record | None = None) -> Lane:
        if self._closed:
            raise ClosedError("the client is closed")
        return self._engine.accumulator.open(run, opened=opened, parent=parent, first=first)

    def _begin_flush(self, run_id: RunId | None, timeout: float | None, begun: Future[None] | None) -> RunOperations:
        """A flush. Where it is not waited for, *begun* gets done when it has begun."""
        if self._closed:
            raise ClosedError("the client is closed")
        lane = None if run_id is None else self._lane(run_id)
        lenient = self._engine.config.only_warns
        warn = lenient or begun is not None
        flushing = self._engine.flush(lane, seconds(timeout, "timeout"), warn=warn, begun=begun)
        return RunOperations(flushing, self, lenient=lenient)

    def _begin_end(self, timeout: float | None) -> RunOperations:
        """The last flush."""
        lenient = self._engine.config.only_warns
        flushing = self._engine.flush(None, timeout, warn=lenient, final=True)
        return RunOperations(flushing, self, lenient=lenient)

    def _shut(self) -> bool:
        """Refuse all calls from now on; False if they were refused before."""
        if self._engine.is_own_thread():
            raise RuntimeError("runqueue's own thread cannot wait for itself, and so not close the client")
        if self._closed:
            return False
        self._closed = True
        self._lanes = {}  # so that the calls' fast way ends in `_lane` too
        return True


def _engine_of(waits: bool, **settings: Any) -> Engine | Exception:
    """The engine; or the error without its frames, which hold the URI, the token and the headers."""
    try:
        settings["tracking_uri"] = path_as_uri(settings["tracking_uri"])
        config = Config(**settings)
        uri = resolve_tracking_uri(config.tracking_uri)
        check_uri(uri)
        return Engine(config, uri, may_wait=waits)
    except Exception as error:  # raised by the caller
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


def _restored(face: type[BaseClient], settings: dict[str, Any]) -> BaseClient:
    return face(**settings)
