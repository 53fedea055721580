"""
A lock between the processes of one machine.
"""

# Rule of this file: the lock is best effort. If it cannot be had, or not in time, the work is done without it.

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Final

TIMEOUT: Final = 60.0
"""Seconds to wait for another process."""
POLL_INTERVAL: Final = 0.05


@contextmanager
def locked(name: str) -> Generator[None, None, None]:
    """
    Hold a lock while the block runs. It blocks the calling thread until the lock is free, for TIMEOUT at most.

    Args:
        name: The lock's name, any text. Processes that use the same name exclude each other.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    with ExitStack() as stack:  # closing the file releases the lock
        with suppress(OSError):  # there is no temporary folder, or the file is another user's
            file = stack.enter_context(Path(tempfile.gettempdir(), f"runqueue-{digest}.lock").open("a"))
            deadline = time.monotonic() + TIMEOUT
            while not _acquired(file) and time.monotonic() < deadline:
                time.sleep(POLL_INTERVAL)
        yield


def _acquired(file: IO[str]) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return _acquired_on_windows(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _acquired_on_windows(file: IO[str]) -> bool:
    import importlib

    msvcrt = importlib.import_module("msvcrt")
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True
