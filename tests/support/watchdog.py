"""
Ends the servers of a test run that was cut off.

A test run that is killed (`timeout`, SIGTERM, SIGKILL, an out-of-memory kill) tears no fixture down. So each process of
a test run starts one watchdog, a child that reads a pipe: when that process is gone, however it ended, the pipe is at
its end, and the watchdog ends the servers that were still registered.
"""

# Rules of this file: only process groups that the test run has made itself are ever signalled. The watchdog stands in a
# session of its own and ignores the signals that end a test run. POSIX only, as the servers are.

from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

GRACE = 5.0
"""Seconds that a server has to end by itself before it is killed."""

_lock = threading.Lock()
_watchdogs: dict[int, subprocess.Popen[str]] = {}
"""By the id of the process that has started it: the child of a fork starts its own."""


def guard(leader: int, number: signal.Signals = signal.SIGTERM, folder: Path | None = None) -> None:
    """
    End a process group as soon as this process is gone.

    Args:
        leader: The group's id, which is the process id of its leader.
        number: The signal that asks it to end; after `GRACE`, SIGKILL follows.
        folder: A folder to remove after it has ended.
    """
    _tell(f"guard {leader} {int(number)} {folder or ''}")


def release(leader: int) -> None:
    """Forget a process group, because it has ended."""
    _tell(f"release {leader}")


def _tell(line: str) -> None:
    with _lock:
        watchdog = _watchdogs.get(os.getpid())
        if watchdog is None:
            watchdog = _watchdogs[os.getpid()] = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # what interrupts a terminal's processes must not reach it
            )
            atexit.register(_end, watchdog, os.getpid())
        assert watchdog.stdin is not None
        watchdog.stdin.write(f"{line}\n")
        watchdog.stdin.flush()


def _end(watchdog: subprocess.Popen[str], owner: int) -> None:
    if os.getpid() == owner:
        watchdog.communicate()


def _close_in_child() -> None:
    """A child that held the pipe open would keep its parent's watchdog from seeing the parent's end."""
    for watchdog in _watchdogs.values():
        assert watchdog.stdin is not None
        watchdog.stdin.close()


os.register_at_fork(after_in_child=_close_in_child)


def _watch(lines: IO[str]) -> None:
    """The watchdog's whole life: keep the list until the pipe ends, then end what is on the list."""
    groups: dict[int, tuple[int, str]] = {}
    for line in lines:
        verb, group, *rest = line.rstrip("\n").split(" ", 3)
        if verb == "guard":
            groups[int(group)] = int(rest[0]), rest[1]
        else:
            groups.pop(int(group), None)
    for leader, (number, _) in groups.items():
        _signal(leader, number)
    deadline = time.monotonic() + GRACE
    while any(_signal(leader, 0) for leader in groups) and time.monotonic() < deadline:
        time.sleep(0.05)  # between two looks
    for leader, (_, folder) in groups.items():
        _signal(leader, signal.SIGKILL)
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _signal(leader: int, number: int) -> bool:
    """Send a signal to a group; whether there was one."""
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM where only zombies are left
        return False
    return True


if __name__ == "__main__":
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    _watch(sys.stdin)
