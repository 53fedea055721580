"""
The common part of `Client` and `AsyncClient`, without the log calls: the constructor, the state, and what both classes
need to find a run's lane, to flush and to close.
"""

# Rules of this file: nothing is logged here, and nothing waits. An error in the constructor is raised without the
# frames that hold the URI, the token and the headers.

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from os import PathLike
from typing import Any, ClassVar, Final

from runqueue._entities import OperationFailure, Statistics
from runqueue._run_id import PendingRunId, RunId
from runqueue.api._closing import Closing
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
    """The base of `Client` and `AsyncClient`. Their class docstrings describe the arguments."""

    _may_wait: ClassVar[bool] = True
    """Whether a log call may wait for room in the queue."""

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
        engine = _make_engine(
            self._may_wait,
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
        del tracking_uri, token, headers  # a tool that reports errors may show the locals of this frame
        if isinstance(engine, Exception):
            raise engine
        self._engine = engine
        self._lanes = engine.accumulator.lanes
        self._closed = False
        self._closing = Closing()
        self._finalizer = weakref.finalize(self, engine.finalize, weakref.ref(self))
        self._finalizer.atexit = not engine.config.streams  # `_exit` flushes a client that streams

    @property
    def tracking_uri(self) -> str:
        """The URI of the tracking server or store, with `***` in place of the secrets that it may hold."""
        return redact_uri(self._engine.uri)

    @property
    def failures(self) -> tuple[OperationFailure, ...]:
        """
        Everything that has failed for good since the client was made.

        The first 10,000 entries are kept in full. Of the others, only the counts by run, operation and cause are kept.
        """
        return self._engine.failures()

    def statistics(self) -> Statistics:
        """Counts of entries and requests since the client was made. May be called at any time, from any thread."""
        return self._engine.statistics()

    def __repr__(self) -> str:
        counts = self._engine.accumulator.counts()
        state = "closed" if self._closed else "open"
        if self._engine.config.streams:
            state += " streaming"
        shown = " ".join(f"{name}={counts[name]}" for name in ("pending", "in_flight", "stored", "failed", "dropped"))
        return f"<{type(self).__name__} {self.tracking_uri} {state} {shown}>"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickles the settings alone: without entries, token, headers, and the user info of the URI."""
        return (_restored, (type(self), self._engine.config.portable_settings(self._engine.uri)))

    # -- lanes -------------------------------------------------------------------------------------------------------

    def _lane(self, run_id: RunId) -> Lane:
        """
        Return the lane of a run; opens one for a run that is new to the client.

        Raises:
            ClosedError: The client was closed.
            CallTypeError: `run_id` is neither text nor a PendingRunId.
            ConfigError: The text cannot be a run id.
        """
        if self._closed:
            raise ClosedError("the client is closed")
        if isinstance(run_id, PendingRunId):
            lane = self._lanes.get(run_id)
            if lane is not None:
                return lane
            if (
                run_id.run_id is None
            ):  # another client creates the run, in this process or another: look for it in the store
                new = NewRun(*run_id._experiment, 0, None, None, {}, created_elsewhere=True)
                return self._open(run_id, run_exists=False, first=record_of(RUN, ("run",), (), new))
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
        return self._open(run_id, run_exists=True)

    def _open(self, run: RunId, *, run_exists: bool, parent: Lane | None = None, first: Record | None = None) -> Lane:
        if self._closed:
            raise ClosedError("the client is closed")
        return self._engine.accumulator.open(run, run_exists=run_exists, parent=parent, first=first)

    def _begin_flush(self, run_id: RunId | None, timeout: float | None, begun: Future[None] | None) -> RunOperations:
        """
        Begin a flush.

        Args:
            run_id: Only this run. None: all.
            timeout: Seconds after which the flush ends.
            begun: Is completed when the flush has begun, for a caller that does not wait for its end. None: it waits.
        """
        if self._closed:
            raise ClosedError("the client is closed")
        lane = None if run_id is None else self._lane(run_id)
        only_warns = self._engine.config.only_warns
        warn = only_warns or begun is not None
        future = self._engine.flush(lane, seconds(timeout, "timeout"), warn=warn, begun=begun)
        return RunOperations(future, self, only_warns=only_warns)

    def _begin_final_flush(self, timeout: float | None) -> RunOperations:
        only_warns = self._engine.config.only_warns
        future = self._engine.flush(None, timeout, warn=only_warns, final=True)
        return RunOperations(future, self, only_warns=only_warns)

    def _refuse_calls(self) -> bool:
        """
        Let every call raise ClosedError from now on.

        Returns:
            Whether this is the first call, which has to close the client, in a block of `_closing`.
        """
        if self._engine.is_own_thread():
            raise RuntimeError("runqueue's own thread cannot wait for itself, and so not close the client")
        if not self._closing.begin():
            return False
        self._closed = True
        self._lanes = {}  # so that `log_metrics`, which looks here first, calls `_lane`, which raises
        return True


def _make_engine(may_wait: bool, **settings: Any) -> Engine | Exception:
    """Make the engine. An error is returned, without the frames that hold the URI, the token and the headers."""
    try:
        settings["tracking_uri"] = path_as_uri(settings["tracking_uri"])
        config = Config(**settings)
        uri = resolve_tracking_uri(config.tracking_uri)
        check_uri(uri)
        return Engine(config, uri, may_wait=may_wait)
    except Exception as error:  # the constructor raises it
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)


def _restored(client_class: type[BaseClient], settings: dict[str, Any]) -> BaseClient:
    return client_class(**settings)
