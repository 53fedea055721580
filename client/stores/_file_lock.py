"""
A lock between the processes of one machine, for what must not be done by two of them at once.

Rule of this file: it is a help, not a promise: where no such lock can be had, or not in time, the work is done without.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

PATIENCE: Final = 60.0
"""Seconds to wait for another process."""
PAUSE: Final = 0.05


@contextmanager
def locked(name: str) -> Generator[None, None, None]:
    """
    Hold the lock of this name, in the thread that calls.

    Args:
        name: Any text, the same in every process.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    with ExitStack() as stack:  # closing the file gives the lock back
        with suppress(OSError):  # no temporary folder of ours, or another user's file
            file = stack.enter_context(Path(tempfile.gettempdir(), f"runqueue-{digest}.lock").open("a"))
            deadline = time.monotonic() + PATIENCE
            while not _taken(file) and time.monotonic() < deadline:
                time.sleep(PAUSE)
        yield


def _taken(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return _taken_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _taken_on_windows(file: IO[str]) -> bool:
    import importlib

    msvcrt = importlib.import_module("msvcrt")
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
