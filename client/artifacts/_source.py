"""
What is uploaded as an artifact, under which path, and how its bytes are read.

    InMemory    bytes that were made at the call: what they were made of may change after it
    LocalFile    a file that is read when it is uploaded; what it holds then is what is stored

A path among a run's artifacts is checked at the call, by MLflow's own rules (`mlflow.utils.validation.path_not_unique`):
relative, in its shortest spelling, and nowhere outside. What is wrong with a *file* is found when it is listed or read,
and fails it alone: it is gone, is no regular file, changes while it is read, or a symbolic link has led out of the folder
that was to be logged.

Rules of this file: no loop, no socket. A file is opened once an attempt, without following a last link that was not looked
at, and never waited for: a pipe would keep us for ever.
"""

from __future__ import annotations

import os
import posixpath
import stat
import threading
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Final, TypeAlias

import attrs

from runqueue.errors import CallTypeError, ConfigError, RejectedError
from runqueue.http._upload import CHUNK
from runqueue.queueing import Scope
from runqueue.wire._records import InvalidValue


@attrs.define(eq=False)
class InMemory:
    """Bytes in memory."""

    content: bytes = attrs.field(repr=False)

    @property
    def size(self) -> int:
        return len(self.content)

    def release(self) -> None:
        """It has failed for good, and its record may be kept for a report."""
        self.content = b""


@attrs.frozen(eq=False)
class LocalFile:
    """
    A file.

    Args:
        path: Absolute.
        base: The folder that it must not lead out of, without links. None: it was named itself, and may be a link.
        size: Bytes, when it was listed; only for showing how far an upload is.
    """

    path: str
    base: str | None
    size: int


Source: TypeAlias = InMemory | LocalFile | InvalidValue


# -- paths -----------------------------------------------------------------------------------------------------------


def artifact_folder(artifact_path: Any) -> str:
    """
    The folder among a run's artifacts that a call names; "" is their root.

    Raises:
        CallTypeError: It is no text.
        ConfigError: It leads elsewhere, or is not in its shortest spelling.
    """
    if artifact_path is None:
        return ""
    return _checked(_text(artifact_path, "artifact_path"), "artifact_path")


def artifact_file_path(artifact_file: Any) -> str:
    """
    The path among a run's artifacts of a file that a call names; like MLflow, of `a/../b.txt` it makes `b.txt`.

    Raises:
        CallTypeError: It is no text.
        ConfigError: It leads elsewhere, or names no file.
    """
    given = _text(artifact_file, "artifact_file")
    path = posixpath.normpath(given) if given else ""
    if path in ("", ".", ".."):
        raise ConfigError(f"artifact_file={given[:300]!r} names no file")
    return _checked(path, "artifact_file")


def _text(value: Any, name: str) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(value, str):
        raise CallTypeError(f"{name} takes a path as text, not {type(value).__name__}")
    return value


def _checked(path: str, name: str) -> str:
    if not path:
        return ""
    norm = posixpath.normpath(path)
    if norm != path or norm == "." or norm.startswith(("..", "/")) or "\0" in path:
        raise ConfigError(
            f"{name}={path[:300]!r} is no path below the run's artifacts: relative, without '..', '.', '//'"
        )
    if os.sep == "\\" and ("\\" in path or ":" in path):
        raise ConfigError(f"{name}={path[:300]!r} is parted by / and names no drive")
    return path


# -- what a call names -----------------------------------------------------------------------------------------------


def file_or_folder(local_path: Any, target: str) -> dict[str, Source]:
    """
    A file, or like MLflow a folder, which goes under its own name.

    Args:
        local_path: Of the file.
        target: The folder among the run's artifacts.
    """
    path = _local(local_path, "local_path")
    name = posixpath.join(target, os.path.basename(path))
    if os.path.isdir(path):
        return files_in(path, name)
    try:
        size = os.stat(path).st_size
    except OSError as error:
        return {name: InvalidValue(path, _unreadable(path, error))}
    return {name: LocalFile(path, None, size)}


def files_in(local_dir: Any, target: str) -> dict[str, Source]:
    """
    All files of a folder and of those in it, as they are now. Links to folders are not followed, as MLflow does it.

    Args:
        local_dir: The folder.
        target: The folder among the run's artifacts.
    """
    top = _local(local_dir, "local_dir")
    found: dict[str, Source] = {}

    def name_of(path: str) -> str:
        return posixpath.join(target, PurePath(os.path.relpath(path, top)).as_posix())

    def unreadable(error: OSError) -> None:
        path = str(error.filename or top)
        name = (target or os.path.basename(top)) if path == top else name_of(path)
        found[name] = InvalidValue(path, _unreadable(path, error))

    base = os.path.realpath(top)
    for root, folders, names in os.walk(top, onerror=unreadable):
        for name in folders:
            path = os.path.join(root, name)
            if os.path.islink(path) and not _inside(os.path.realpath(path), base):
                found[name_of(path)] = InvalidValue(path, _led_out(path, base))
        for name in names:
            path = os.path.join(root, name)
            try:
                found[name_of(path)] = LocalFile(path, base, os.stat(path).st_size)
            except OSError as error:
                found[name_of(path)] = InvalidValue(path, _unreadable(path, error))
    return found


def _local(path: Any, name: str) -> str:
    try:
        given = os.fsdecode(path)
    except TypeError:
        raise CallTypeError(f"{name} takes a path, not {type(path).__name__}") from None
    if not given or "\0" in given:
        raise ConfigError(f"{name}={given[:300]!r} is no path")
    return os.path.abspath(given)  # now: the working folder may be another when it is read


def _inside(path: str, base: str) -> bool:
    return path == base or path.startswith(base.rstrip(os.sep) + os.sep)


def _unreadable(path: str, error: OSError) -> str:
    return f"{path} cannot be read: {error.strerror or error}"


def _led_out(path: str, base: str) -> str:
    return f"{path} is refused: a symbolic link leads out of {base}"


# -- reading ---------------------------------------------------------------------------------------------------------


def rejected(reason: str) -> RejectedError:
    """This artifact fails, and nothing else: it says nothing of the store either."""
    return RejectedError(reason, scope=Scope.BATCH)


class OpenFile:
    """
    A file while it is uploaded; from any thread. Blocks.

    Raises:
        RejectedError: It cannot be read, or is no regular file, or is not where it seems to be.
    """

    def __init__(self, file: LocalFile) -> None:
        self.path = file.path
        self._lock = threading.Lock()
        self._left = False
        self._number: int | None = None
        try:
            self._number = os.open(_real(file), _FLAGS)
            self._seen = os.fstat(self._number)
        except OSError as error:
            self.close()
            raise rejected(_unreadable(file.path, error)) from None
        if not stat.S_ISREG(self._seen.st_mode):
            self.close()
            raise rejected(f"{file.path} is no regular file")

    @property
    def size(self) -> int:
        """Bytes, when it was opened."""
        return self._seen.st_size

    def read(self, offset: int, count: int) -> bytes:
        """
        So many bytes. With the last of them it is made sure that all of it is still what it was.

        Raises:
            RejectedError: It has changed, or cannot be read.
        """
        data = bytearray()
        try:
            with self._lock:
                if self._number is None:
                    raise rejected(f"{self.path} was closed")
                os.lseek(self._number, offset, os.SEEK_SET)
                while len(data) < count and (more := os.read(self._number, count - len(data))):
                    data += more
                now = os.fstat(self._number)
        except OSError as error:
            raise rejected(_unreadable(self.path, error)) from None
        finally:
            if self._left:  # whoever waited for us does so no longer
                self.close()
        self._compare(now, len(data) < count)
        return bytes(data)

    def _compare(self, now: os.stat_result, short: bool) -> None:
        if short or now.st_size != self._seen.st_size:
            text = f"{self.path} changed while it was uploaded: from {self._seen.st_size:,} to {now.st_size:,} bytes"
            raise rejected(text)
        if now.st_mtime_ns != self._seen.st_mtime_ns:
            raise rejected(f"{self.path} changed while it was uploaded")

    def close(self) -> None:
        """At once, or as soon as a read that is under way has ended: its number must not be given to another file."""
        self._left = True
        if self._lock.acquire(blocking=False):
            try:
                number, self._number = self._number, None
                if number is not None:
                    os.close(number)
            finally:
                self._lock.release()


_FLAGS: Final = (
    os.O_RDONLY
    | getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)


def _real(file: LocalFile) -> str:
    path = os.path.realpath(file.path)
    if file.base is not None and not _inside(path, file.base):
        raise rejected(_led_out(file.path, file.base))
    return path


def open_source(source: Source) -> bytes | OpenFile:
    """
    The bytes, where they are in memory or few; else the open file. Blocks.

    Raises:
        RejectedError: They cannot be had.
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
    A file of this name with these bytes, for whoever takes nothing else. Blocks.

    Raises:
        RejectedError: They cannot be had; or the file has changed by the end of the block.
    """
    if isinstance(source, LocalFile):
        opened = OpenFile(source)
        try:
            path = _real(source)
            yield Path(path if os.path.basename(path) == name else source.path)
            opened.read(max(0, opened.size - 1), min(1, opened.size))
        finally:
            opened.close()
        return
    content = open_source(source)
    assert isinstance(content, bytes)
    import tempfile  # with what it imports, as much as all the rest of a client

    with tempfile.TemporaryDirectory(prefix="runqueue-") as made:
        path = os.path.join(made, name)
        Path(path).write_bytes(content)
        yield Path(path)


def size_of(source: Source) -> int:
    """Bytes, as far as they were known at the call."""
    return 0 if isinstance(source, InvalidValue) else source.size
