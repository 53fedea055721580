"""
What is said to the user: the log lines of ours, and of those whose code runs in our threads.

A handler is the user's code: it may raise, log metrics, flush, or wait for a lock that a thread holds which waits for
us. So nothing is handed to a handler in a thread of ours: a filter takes the record there, and a short-lived thread,
of which there is one at most for each client, hands it on. In the user's threads a handler is called at once.

Rules of this file: to say something never raises, and never waits in a thread of ours.
"""

from __future__ import annotations

import contextvars
import logging
import sys
import threading
import traceback
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final

HANDLER_SECONDS: Final = 1.0
"""Seconds that whoever waits for us waits for the handlers too, so that what was said comes before what it was about."""

LOGGER_NAMES: Final = (
    "runqueue",
    "httpx",
    "asyncio",
    *(f"httpcore.{each}" for each in ("connection", "http11", "http2", "proxy", "socks")),
    *(f"aiohttp.{each}" for each in ("client", "internal")),
)
"""Loggers that are written to in our threads."""

logger = logging.getLogger("runqueue")

current_relay: contextvars.ContextVar[LogRelay | None] = contextvars.ContextVar("runqueue_log_relay", default=None)
"""Of the thread of ours on behalf of which code runs; a context variable, as those go with a task to worker threads."""
_handing_on: contextvars.ContextVar[bool] = contextvars.ContextVar("runqueue_handing_on", default=False)


def warning(text: str, *args: object) -> None:
    """Log a warning."""
    _log(logging.WARNING, text, args)


def error(text: str, *args: object) -> None:
    """Log an error."""
    _log(logging.ERROR, text, args)


def _log(level: int, text: str, args: tuple[object, ...]) -> None:
    try:
        logger.log(level, text, *args, stacklevel=3)
    except Exception:  # of a handler, which is the user's
        _complain()


class LogRelay:
    """Hands records to their handlers, in the order in which they were made."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a garbage collection may come back in here
        self._records: deque[tuple[contextvars.Context, logging.LogRecord]] = deque()
        self._thread: threading.Thread | None = None
        self._heard: Future[None] | None = None

    def put(self, record: logging.LogRecord) -> None:
        """Any thread; returns at once."""
        with self._lock:
            self._records.append((contextvars.copy_context(), record))
            if self._thread is None:
                self._heard = Future()
                self._thread = threading.Thread(target=self._run, name="runqueue log", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter ends: `flush` will do it
                    self._thread = self._heard = None

    def in_progress(self) -> Future[None] | None:
        """Done when all was handed on; None: it is."""
        return self._heard

    def flush(self) -> None:
        """Hand on what is left; waits for `HANDLER_SECONDS` at most. Not in a thread of ours."""
        thread = self._thread
        if thread is None:
            self._hand_on()
        elif thread is not threading.current_thread():
            thread.join(HANDLER_SECONDS)

    def _run(self) -> None:
        while True:
            self._hand_on()
            with self._lock:
                if not self._records:
                    heard, self._thread, self._heard = self._heard, None, None
                    break
        if heard is not None:
            heard.set_result(None)

    def _hand_on(self) -> None:
        while True:
            try:
                context, record = self._records.popleft()
            except IndexError:
                return
            context.run(_hand_on, record)


class _Diverted(logging.Filter):
    """Takes the records that are made in our threads."""

    def filter(self, record: logging.LogRecord) -> bool:
        relay = current_relay.get()
        if relay is None or _handing_on.get():
            return True
        relay.put(record)
        return False


_diverted: Final = _Diverted()


def install_filters() -> None:
    """Let no handler be called in our threads. First of the filters, so that those of the user see a record once."""
    for name in LOGGER_NAMES:
        filters: list[Any] = logging.getLogger(name).filters
        if _diverted not in filters:
            filters.insert(0, _diverted)


def _hand_on(record: logging.LogRecord) -> None:
    _handing_on.set(True)
    try:
        logging.getLogger(record.name).handle(record)
    except Exception:
        _complain()


def _complain() -> None:
    """As `logging` does where a handler fails."""
    if logging.raiseExceptions and sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write("--- Logging error ---\n" + traceback.format_exc())
