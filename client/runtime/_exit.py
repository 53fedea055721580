"""
Sends what streaming clients have queued when the process ends: at the interpreter's end, at SIGTERM and at SIGHUP.

    end of the script, sys.exit, an exception   every registered target is flushed, within its `exit_timeout`
    end of a worker of multiprocessing          likewise
    SIGTERM, first                              likewise, after unfinished runs were set KILLED; then the default action
    SIGTERM, after one of these signals         the default action at once
    SIGHUP, as from a terminal that is closed   as the first SIGTERM; after one of these signals it is ignored
    SIGINT                                      Python's own KeyboardInterrupt, and its end by SIGINT; no handler
"""

# An atexit hook comes after the program's other threads have ended, so that what they have logged is sent too, and
# before daemon threads such as the engine's are stopped. Workers of multiprocessing that were forked end without
# atexit's hooks; multiprocessing has a hook of its own for them.
#
# atexit's hooks run in the reverse order of their registration. So the user's hooks that were registered before the
# first client run after ours, and may log. What they log is sent within what is left of `exit_timeout`: first by a
# second hook, which `import runqueue` registers, and after that by each log call itself, which waits for its own flush.
# When no time is left, or the client does not stream, a warning counts what was not sent.
#
# Python ends a script by SIGINT if a KeyboardInterrupt has left it. It notes that in a flag, and clears the flag when a
# thread executes text, as attrs and named tuples do at their import. An engine loads its libraries from the first
# record on, but may still be at it when the script is interrupted. So the flag is set again after the flush at exit.
#
# A terminal that is closed may send SIGHUP twice: by the shell, and by the kernel when the shell ends. So a second
# SIGHUP does not end the flush of the first.
#
# Rules of this file: the state is what the hooks need. The signal handler is installed from the main thread only, in
# place of the default action and of no other handler, and is removed with the last client that wants it. So SIGHUP is
# left alone under nohup, which lets the program ignore it.

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

SIGNALS: Final = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""The signals that count as an end of the process. Windows has no SIGHUP."""
MARGIN: Final = 2.0
"""Seconds beyond `exit_timeout` for which a flush that does not end is waited for."""


class ExitTarget(Protocol):
    """What is flushed when the process ends: an engine, or a single flush."""

    @property
    def exit_timeout(self) -> float:
        """Seconds for the flush."""
        ...

    def begin_final_flush(self, timeout: float) -> Future[Any] | None:
        """
        Begin the last flush.

        Args:
            timeout: Seconds after which it ends.

        Returns:
            Its future. None: nothing is queued, or nothing since the last such flush.
        """
        ...

    def is_own_thread(self) -> bool:
        """Whether the caller is the engine's thread, or works for it."""
        ...

    def watch_log_calls(self, callback: Callable[[], None]) -> None:
        """Call a function after each log call from now on."""
        ...

    def report_late_entries(self) -> None:
        """Warn of entries that were logged too late to be sent, if there are more than at the last warning."""
        ...

    def report_late_drops(self) -> None:
        """Warn of entries that were dropped since the last such warning, each time for a larger count."""
        ...

    def flush_logs(self) -> None:
        """Wait until the handlers of the engine's log records were called; not for long."""
        ...

    def queue_killed_status(self) -> None:
        """Queue KILLED as the final status of the unfinished runs that the client has created, or was started for."""
        ...

    def give_up_waiting(self) -> int:
        """Note that no flush is waited for any more. Returns the entries that are queued or in flight."""
        ...


class _Hooks:
    """The registered targets, and which hooks are installed."""

    def __init__(self) -> None:
        self.streaming: set[ExitTarget] = set()
        self.at_signal: set[ExitTarget] = set()  # those of them that `SIGNALS` flush too
        self.ended: weakref.WeakSet[ExitTarget] = weakref.WeakSet()  # that do not stream, and whose thread has ended
        self.exit_began: float | None = None  # when the interpreter began to end; -inf: nothing is waited for any more
        self.atexit_registered = False
        self.handled: set[int] = set()  # the signals that have our handler
        self.worker: int | None = None  # the process whose hook of multiprocessing is registered

    def _after_fork(self) -> None:
        """In a child: it does not send what its parent has queued, and a signal ends it at once."""
        self.streaming.clear()
        self.at_signal.clear()
        self.ended.clear()
        self.exit_began = None
        self.remove_handlers()

    def remove_handlers(self) -> None:
        if self.handled and threading.current_thread() is threading.main_thread():
            for number in self.handled:
                if signal.getsignal(number) is _on_signal:
                    signal.signal(number, signal.SIG_DFL)
            self.handled.clear()


_hooks = _Hooks()
_fork.register(_hooks)


def flush_at_exit(target: ExitTarget, *, signals: bool) -> None:
    """
    Register a target.

    Args:
        target: Flushed when the process ends.
        signals: Whether `SIGNALS` count as an end.
    """
    _hooks.streaming.add(target)
    if not _hooks.atexit_registered:
        _hooks.atexit_registered = True
        atexit.register(_at_exit)
    if signals:
        _hooks.at_signal.add(target)
        in_main = threading.current_thread() is threading.main_thread()
        for number in SIGNALS if in_main else ():
            if signal.getsignal(number) is signal.SIG_DFL:
                with suppress(ValueError):  # not the main interpreter
                    signal.signal(number, _on_signal)
                    _hooks.handled.add(number)


def flush_at_worker_exit() -> None:
    """In a worker of multiprocessing: flush at its end too. To be called while the worker does its work."""
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _hooks.worker == os.getpid():
        return
    _hooks.worker = os.getpid()
    from multiprocessing.util import Finalize  # a worker has imported it already

    Finalize(None, _at_exit, exitpriority=0)


def flush_now(target: ExitTarget) -> None:
    """Flush a target as at exit, and wait for it. To be called when the process ends."""
    _flush_all((target,), time.monotonic())


def unregister(target: ExitTarget) -> None:
    """Forget a target that has ended."""
    _hooks.streaming.discard(target)
    _hooks.at_signal.discard(target)
    if not _hooks.at_signal:
        _hooks.remove_handlers()


def flush_after_user_hooks() -> None:
    """Send what the user's hooks have logged after `_at_exit`. Later log calls send what they log by themselves."""
    _at_exit()
    for target in list(_hooks.streaming):
        target.watch_log_calls(partial(_send_late_entries, target))
        _outcome(target.report_late_drops)  # the engine would warn of these once a minute, but the process ends
    for target in list(_hooks.ended):
        _outcome(target.report_late_entries)


def report_late_entries_of(target: ExitTarget) -> None:
    """Warn of what is logged from now on to a target that does not stream and whose thread has ended."""
    _hooks.ended.add(target)
    target.watch_log_calls(target.report_late_entries)


def _at_exit() -> None:
    if _hooks.exit_began is None:
        _hooks.exit_began = time.monotonic()
    _flush_all(_hooks.streaming, _hooks.exit_began)
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not hasattr(sys, "ps1"):
        _let_python_end_by_sigint()


def _let_python_end_by_sigint() -> None:
    """Set Python's flag of a KeyboardInterrupt that has left the script. Text that raises one sets it."""
    with suppress(KeyboardInterrupt):
        exec("raise KeyboardInterrupt")  # noqa: S102  nothing else sets the flag


def _flush_all(targets: Iterable[ExitTarget], began: float) -> None:
    if not _flush(targets, began):
        _hooks.exit_began = -math.inf  # the user has interrupted the wait, and wants no other


def _send_late_entries(target: ExitTarget) -> None:
    if target.is_own_thread():  # it would wait for itself
        return
    began = time.monotonic() if _hooks.exit_began is None else _hooks.exit_began
    if time.monotonic() < began + target.exit_timeout:
        _flush_all((target,), began)
        target.report_late_drops()  # only of drops: another thread may be sending what is still queued
    else:
        target.report_late_entries()


def _on_signal(number: int, frame: FrameType | None) -> None:
    for each in _hooks.handled:
        if signal.getsignal(each) is _on_signal:
            signal.signal(each, signal.SIG_DFL if each == signal.SIGTERM else signal.SIG_IGN)
    _hooks.handled.clear()
    for target in list(_hooks.at_signal):
        target.queue_killed_status()
    try:
        _flush(_hooks.at_signal, time.monotonic())
    finally:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _flush(targets: Iterable[ExitTarget], began: float) -> bool:
    """
    Flush targets side by side, and wait until all have ended or their time is over.

    Args:
        targets: What to flush.
        began: When their time began, by `time.monotonic`.

    Returns:
        False: the user has interrupted the wait.
    """
    flushed = list(targets)
    spent = time.monotonic() - began
    flushes = [_outcome(partial(each.begin_final_flush, max(0.0, each.exit_timeout - spent))) for each in flushed]
    interrupted = False
    for target, flush in zip(flushed, flushes, strict=True):
        failure = flush if isinstance(flush, BaseException) else None
        if isinstance(flush, Future):
            left = 0.0 if interrupted else began + target.exit_timeout + MARGIN - time.monotonic()
            outcome = _outcome(lambda flush=flush, left=left: flush.result(max(0.0, left)))  # type: ignore[misc]
            failure = outcome if isinstance(outcome, BaseException) else None
        if failure is not None:
            interrupted = interrupted or isinstance(failure, KeyboardInterrupt)
            late = isinstance(failure, futures.TimeoutError)
            cause = "the time was over" if late else str(failure) or type(failure).__name__
            _notices.warning("%d entries were not sent: %s", target.give_up_waiting(), cause)
        _outcome(target.flush_logs)
    return not interrupted


def _outcome(function: Callable[[], Any]) -> Any:
    """What a function returns or raises: no error of ours changes how the process ends."""
    try:
        return function()
    except (Exception, KeyboardInterrupt) as error:
        return error
