"""
Reads the bytes of an artifact when it is uploaded.
"""

# Rules of this file:
# - Everything here blocks, and is called in worker threads. There is no loop and no socket.
# - A file is opened once an attempt. Opening neither follows a symbolic link that was not checked, nor waits: a pipe would
#   block for ever.
# - A file that is gone, is no regular file, changes meanwhile, or has left its folder by a link fails alone.

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from runqueue.artifacts._source import (
    InMemory,
    LocalFile,
    Source,
    is_inside,
    leads_out_text,
    unreadable_text,
)
from runqueue.errors import RejectedError
from runqueue.http._upload import CHUNK
from runqueue.queueing import Scope
from runqueue.wire._records import InvalidValue


def rejected(reason: str) -> RejectedError:
    """Return the error that fails one artifact, and says nothing about the store."""
    return RejectedError(reason, scope=Scope.BATCH)


class OpenFile:
    """
    An open file during its upload. It may be used from several threads.

    Raises:
        RejectedError: The file cannot be opened, is no regular file, or a link has led out of its folder.
    """

    def __init__(self, file: LocalFile) -> None:
        self.path = file.path
        self._lock = threading.Lock()
        self._closing = False
        self._descriptor: int | None = None
        try:
            self._descriptor = os.open(_resolved(file), _FLAGS)
            self._opened_as = os.fstat(self._descriptor)
        except OSError as error:
            self.close()
            raise rejected(unreadable_text(file.path, error)) from None
        if not stat.S_ISREG(self._opened_as.st_mode):
            self.close()
            raise rejected(f"{file.path} is no regular file")

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._opened_as.st_size

    def read(self, offset: int, count: int) -> bytes:
        """
        Read *count* bytes from *offset* on, and check that the file has not changed since it was opened.

        Raises:
            RejectedError: The file has changed, or cannot be read.
        """
        data = bytearray()
        try:
            with self._lock:
                if self._descriptor is None:
                    raise rejected(f"{self.path} was closed")
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                while len(data) < count and (more := os.read(self._descriptor, count - len(data))):
                    data += more
                now = os.fstat(self._descriptor)
        except OSError as error:
            raise rejected(unreadable_text(self.path, error)) from None
        finally:
            if self._closing:  # close() was called during the read, and left the closing to it
                self.close()
        self._compare(now, len(data) < count)
        return bytes(data)

    def _compare(self, now: os.stat_result, short: bool) -> None:
        if short or now.st_size != self._opened_as.st_size:
            text = (
                f"{self.path} changed while it was uploaded: from {self._opened_as.st_size:,} to {now.st_size:,} bytes"
            )
            raise rejected(text)
        if now.st_mtime_ns != self._opened_as.st_mtime_ns:
            raise rejected(f"{self.path} changed while it was uploaded")

    def close(self) -> None:
        """
        Close the file, or let a running read close it at its end.

        A descriptor must not be closed during a read: the system could give its number to another file.
        """
        self._closing = True
        if self._lock.acquire(blocking=False):
            try:
                descriptor, self._descriptor = self._descriptor, None
                if descriptor is not None:
                    os.close(descriptor)
            finally:
                self._lock.release()


_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def _resolved(file: LocalFile) -> str:
    path = os.path.realpath(file.path)
    if file.base is not None and not is_inside(path, file.base):
        raise rejected(leads_out_text(file.path, file.base))
    return path


def open_source(source: Source) -> bytes | OpenFile:
    """
    Return a source's bytes if they are in memory or at most CHUNK, else the open file.

    Raises:
        RejectedError: The source is invalid, or cannot be read.
    """
    if isinstance(source, InvalidValue):
        raise rejected(source.reason)
    if isinstance(source, InMemory):
        return source.content
    opened = OpenFile(source)
    if opened.size > CHUNK:
        return opened
    try:
        return opened.read(0, opened.size)
    finally:
        opened.close()


@contextmanager
def as_file(source: Source, name: str) -> Generator[Path, None, None]:
    """
    Provide a source as a local file, for libraries that take nothing else.

    Args:
        source: The source. Bytes in memory are written to a temporary file.
        name: The file's name.

    Raises:
        RejectedError: The source is invalid or cannot be read, or the file has changed at the end of the block.
    """
    if isinstance(source, LocalFile):
        opened = OpenFile(source)
        try:
            path = _resolved(source)
            yield Path(path if os.path.basename(path) == name else source.path)
            opened.read(max(0, opened.size - 1), min(1, opened.size))
        finally:
            opened.close()
        return
    content = open_source(source)
    assert isinstance(content, bytes)
    import tempfile  # not at the top: it imports as much as all the rest of a client

    with tempfile.TemporaryDirectory(prefix="runqueue-") as folder:
        path = os.path.join(folder, name)
        Path(path).write_bytes(content)
        yield Path(path)
