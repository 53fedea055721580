"""
Log records of runqueue, and of the libraries whose code runs in its threads.

`warning` and `error` log to the logger "runqueue". In a thread of runqueue's, the records of `LOGGER_NAMES` are passed
to a `LogRelay`, whose thread calls the handlers.
"""

# A handler is the user's code: it may raise, log metrics, flush, or wait for a lock whose owner waits for the engine.
# So no handler is called in a thread of runqueue's: a filter takes the record there, and a thread that lives only while
# there are records, one at most for each client, calls the handlers. In the user's threads handlers are called at once.
#
# Rules of this file: logging never raises, and never waits in a thread of runqueue's.

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
"""How long a caller that waits for the engine also waits for handlers, so that a log line precedes what it is about."""

LOGGER_NAMES: Final = (
    "runqueue",
    "httpx",
    "asyncio",
    *(f"httpcore.{each}" for each in ("connection", "http11", "http2", "proxy", "socks")),
    *(f"aiohttp.{each}" for each in ("client", "internal")),
)
"""Loggers that code in the threads of runqueue writes to."""

logger = logging.getLogger("runqueue")

current_relay: contextvars.ContextVar[LogRelay | None] = contextvars.ContextVar("runqueue_log_relay", default=None)
"""
The relay of the engine for which this code runs. None: it runs in a thread of the user's. It is a context variable, as
those follow a task into worker threads.
"""
_in_relay: contextvars.ContextVar[bool] = contextvars.ContextVar("runqueue_in_log_relay", default=False)


def warning(text: str, *args: object) -> None:
    """Log a warning."""
    _log(logging.WARNING, text, args)


def error(text: str, *args: object) -> None:
    """Log an error."""
    _log(logging.ERROR, text, args)


def _log(level: int, text: str, args: tuple[object, ...]) -> None:
    try:
        logger.log(level, text, *args, stacklevel=3)
    except Exception:  # a handler is the user's code
        _print_traceback()


class LogRelay:
    """Calls the handlers of records in a thread of its own, in the order in which the records were made."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # re-entrant: a garbage collection in here may log
        self._records: deque[tuple[contextvars.Context, logging.LogRecord]] = deque()
        self._thread: threading.Thread | None = None
        self._done: Future[None] | None = None

    def put(self, record: logging.LogRecord) -> None:
        """Take a record. May be called in any thread, and returns at once."""
        with self._lock:
            self._records.append((contextvars.copy_context(), record))
            if self._thread is None:
                self._done = Future()
                self._thread = threading.Thread(target=self._run, name="runqueue log", daemon=True)
                try:
                    self._thread.start()
                except RuntimeError:  # the interpreter ends, and starts no thread: `flush` will call the handlers
                    self._thread = self._done = None

    def in_progress(self) -> Future[None] | None:
        """A future that is done when the handlers of all records were called. None: there are no records."""
        return self._done

    def flush(self) -> None:
        """Call the remaining handlers, or wait for the thread that does, for `HANDLER_SECONDS` at most."""
        thread = self._thread
        if thread is None:
            self._handle_all()
        elif thread is not threading.current_thread():
            thread.join(HANDLER_SECONDS)

    def _run(self) -> None:
        while True:
            self._handle_all()
            with self._lock:
                if not self._records:
                    done, self._thread, self._done = self._done, None, None
                    break
        if done is not None:
            done.set_result(None)

    def _handle_all(self) -> None:
        while True:
            try:
                context, record = self._records.popleft()
            except IndexError:
                return
            context.run(_handle, record)


class _RelayFilter(logging.Filter):
    """Passes records that are made in a thread of runqueue's to its relay."""

    def filter(self, record: logging.LogRecord) -> bool:
        relay = current_relay.get()
        if relay is None or _in_relay.get():
            return True
        relay.put(record)
        return False


_filter: Final = _RelayFilter()


def install_filters() -> None:
    """
    Keep handlers from being called in the threads of runqueue.

    The filter is the first of its logger, so that a filter of the user's sees each record once, in the relay's thread.
    """
    for name in LOGGER_NAMES:
        filters: list[Any] = logging.getLogger(name).filters
        if _filter not in filters:
            filters.insert(0, _filter)


def _handle(record: logging.LogRecord) -> None:
    _in_relay.set(True)
    try:
        logging.getLogger(record.name).handle(record)
    except Exception:
        _print_traceback()


def _print_traceback() -> None:
    """Print the current exception, as `logging` does when a handler fails."""
    if logging.raiseExceptions and sys.stderr is not None:
        with suppress(OSError, ValueError):
            sys.stderr.write("--- Logging error ---\n" + traceback.format_exc())
