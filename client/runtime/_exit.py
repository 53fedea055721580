"""
How a process ends while clients stream: at the end of the interpreter, and by SIGTERM.

    end of the script, sys.exit, an exception   every streaming client is flushed, within its `exit_timeout`
    end of a worker of multiprocessing          likewise
    SIGTERM, first                              likewise, its unfinished runs set KILLED; then the default action
    SIGTERM, second                             the default action at once
    SIGINT                                      Python's own KeyboardInterrupt; nothing is installed

The hook is atexit's: it comes after the threads of the program have ended, so what they logged counts too, and
before daemon threads such as the engine's are cut off. The workers of multiprocessing that were forked end without it;
multiprocessing has a hook of its own for them.

atexit's hooks run in the reverse order of their registration, so those of the user's that were there before the first
client come after ours, and may log. What they log is sent within what is left of `exit_timeout`: at once by a second
hook, registered by `import runqueue`; after that by each log call itself, which waits for it. When no time is left, or
the client does not stream, it is said with counts.

Rules of this file: the only state is what the hooks need; the handler is installed from the main thread only, in the
place of the default action and nobody else's, and goes with the last client that wants it.
"""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from types import FrameType
from typing import Any, Final, Protocol

from runqueue.runtime import _fork, _notices

MARGIN: Final = 2.0
"""Seconds beyond its bound after which an engine that says nothing is not waited for any longer."""


class ExitTarget(Protocol):
    """An engine that streams."""

    @property
    def exit_timeout(self) -> float: ...

    def begin_final_flush(self, timeout: float) -> Future[Any] | None:
        """Begin the last flush, for so many seconds; None if there is nothing to send, or nothing new since the last."""
        ...

    def is_own_thread(self) -> bool:
        """Whether the caller is the engine's own thread."""
        ...

    def watch_log_calls(self, callback: Callable[[], None]) -> None:
        """Call this after each log call from now on."""
        ...

    def report_late_entries(self) -> None:
        """Say how much has come too late to be sent, if there is news."""
        ...

    def report_late_drops(self) -> None:
        """Say what was dropped since that was said last, by ever larger counts."""
        ...

    def flush_logs(self) -> None:
        """See to it that what was logged of it is out."""
        ...

    def queue_killed_status(self) -> None:
        """Queue KILLED as the final status of what this client has made, or was started for, and not ended."""
        ...

    def give_up_waiting(self) -> int:
        """Entries that are queued or in flight, and that nobody will wait for any more."""
        ...


class _Hooks:
    """What is to be ended, and by what."""

    def __init__(self) -> None:
        self.streaming: set[ExitTarget] = set()
        self.killed: set[ExitTarget] = set()  # those of them that SIGTERM ends too
        self.over: weakref.WeakSet[ExitTarget] = weakref.WeakSet()  # that do not stream, and cannot send any more
        self.begun: float | None = None  # when the interpreter began to end
        self.registered = False
        self.installed = False
        self.worker: int | None = None  # the process in which multiprocessing was asked to call us

    def _after_fork(self) -> None:
        """A child has nothing of its parent's to send, and dies when it is told to."""
        self.streaming.clear()
        self.killed.clear()
        self.over.clear()
        self.begun = None
        self.uninstall()

    def uninstall(self) -> None:
        if self.installed and threading.current_thread() is threading.main_thread():
            self.installed = False
            if signal.getsignal(signal.SIGTERM) is _on_term:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)


_hooks = _Hooks()
_fork.register(_hooks)


def flush_at_exit(engine: ExitTarget, *, signals: bool) -> None:
    """Flush this engine when the process ends."""
    _hooks.streaming.add(engine)
    if not _hooks.registered:
        _hooks.registered = True
        atexit.register(_at_exit)
    if signals:
        _hooks.killed.add(engine)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            with suppress(ValueError):  # not the main interpreter
                signal.signal(signal.SIGTERM, _on_term)
                _hooks.installed = True


def flush_at_worker_exit() -> None:
    """Hook into the end of a worker of multiprocessing, if this process is one; from inside of its work."""
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _hooks.worker == os.getpid():
        return
    _hooks.worker = os.getpid()
    from multiprocessing.util import Finalize  # which a worker has imported

    Finalize(None, _at_exit, exitpriority=0)


def unregister(engine: ExitTarget) -> None:
    """It has ended."""
    _hooks.streaming.discard(engine)
    _hooks.killed.discard(engine)
    if not _hooks.killed:
        _hooks.uninstall()


def _at_exit() -> None:
    if _hooks.begun is None:
        _hooks.begun = time.monotonic()
    _end_all(_hooks.streaming, _hooks.begun)


def _end_all(engines: Iterable[ExitTarget], begun: float) -> None:
    if not _end(engines, begun):
        _hooks.begun = -math.inf  # nobody wants to wait for anything any more


def flush_after_user_hooks() -> None:
    """For what hooks have logged after `_at_exit`; later ones see to it by themselves."""
    _at_exit()
    for engine in list(_hooks.streaming):
        engine.watch_log_calls(partial(_send_late, engine))
        _outcome(engine.report_late_drops)  # of other hooks; the engine says them once a minute, and has none left
    for engine in list(_hooks.over):
        _outcome(engine.report_late_entries)


def report_late_entries_of(engine: ExitTarget) -> None:
    """This engine, which does not stream, cannot send any more: what it is given from now on is only counted."""
    _hooks.over.add(engine)
    engine.watch_log_calls(engine.report_late_entries)


def _send_late(engine: ExitTarget) -> None:
    if engine.is_own_thread():  # it would wait for itself
        return
    begun = time.monotonic() if _hooks.begun is None else _hooks.begun
    if time.monotonic() < begun + engine.exit_timeout:
        _end_all((engine,), begun)
        engine.report_late_drops()  # of the rest, some may just be on its way, by another thread
    else:
        engine.report_late_entries()


def _on_term(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _hooks.installed = False
    for engine in list(_hooks.killed):
        engine.queue_killed_status()
    try:
        _end(_hooks.killed, time.monotonic())
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _end(engines: Iterable[ExitTarget], begun: float) -> bool:
    """Flush them side by side, until all have, or their time is over, or somebody interrupts: then False."""
    ending = list(engines)
    spent = time.monotonic() - begun
    flushes = [_outcome(partial(engine.begin_final_flush, max(0.0, engine.exit_timeout - spent))) for engine in ending]
    interrupted = False
    for engine, flush in zip(ending, flushes, strict=True):
        failure = flush if isinstance(flush, BaseException) else None
        if isinstance(flush, Future):
            left = 0.0 if interrupted else begun + engine.exit_timeout + MARGIN - time.monotonic()
            outcome = _outcome(lambda flush=flush, left=left: flush.result(max(0.0, left)))  # type: ignore[misc]
            failure = outcome if isinstance(outcome, BaseException) else None
        if failure is not None:
            interrupted = interrupted or isinstance(failure, KeyboardInterrupt)
            late = isinstance(failure, futures.TimeoutError)
            cause = "the time was over" if late else str(failure) or type(failure).__name__
            _notices.warning("%d entries were not sent: %s", engine.give_up_waiting(), cause)
        _outcome(engine.flush_logs)
    return not interrupted


def _outcome(function: Callable[[], Any]) -> Any:
    """What it returns, or what it raises: the process ends as it wanted to, whatever we meet."""
    try:
        return function()
    except (Exception, KeyboardInterrupt) as error:
        return error
