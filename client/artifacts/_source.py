"""
The sources of artifacts, by their paths among the run's artifacts, as a log call names them.

    InMemory     bytes that the call has made, because what they were made of may change after it
    LocalFile    a file, which is read when it is uploaded; what it holds then is stored
"""

# Rules of this file:
# - It runs in the caller's thread: files are listed, and not opened.
# - A path among the run's artifacts is checked here, by MLflow's rules (`mlflow.utils.validation.path_not_unique`): it is
#   relative, in its shortest form, and stays inside. A bad one raises.
# - A local file that cannot be listed becomes an InvalidValue, and fails alone.

from __future__ import annotations

import os
import posixpath
from pathlib import PurePath
from typing import Any, TypeAlias

import attrs

from runqueue.errors import CallTypeError, ConfigError
from runqueue.wire._records import InvalidValue


@attrs.define(eq=False)
class InMemory:
    """The bytes of an artifact."""

    content: bytes = attrs.field(repr=False)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content)

    def release(self) -> None:
        """Free the memory of an artifact that has failed for good: a report may keep its record."""
        self.content = b""


@attrs.frozen(eq=False)
class LocalFile:
    """
    A file to upload.

    Args:
        path: The absolute path.
        base: The resolved folder that the file must be in. None: the user named the file itself, which may be a link.
        size: Bytes at the time of the call, for showing an upload's progress.
    """

    path: str
    base: str | None
    size: int


Source: TypeAlias = InMemory | LocalFile | InvalidValue


# -- paths -----------------------------------------------------------------------------------------------------------


def artifact_folder(artifact_path: Any) -> str:
    """
    Check a call's `artifact_path`, and return it; "" is the root of the run's artifacts.

    Raises:
        CallTypeError: It is no text.
        ConfigError: It leads outside, or is not in its shortest form.
    """
    if artifact_path is None:
        return ""
    return _checked(_text(artifact_path, "artifact_path"), "artifact_path")


def artifact_file_path(artifact_file: Any) -> str:
    """
    Check a call's `artifact_file`, and return it in its shortest form: like MLflow, `b.txt` for `a/../b.txt`.

    Raises:
        CallTypeError: It is no text.
        ConfigError: It leads outside, or names no file.
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


# -- sources ---------------------------------------------------------------------------------------------------------


def file_or_folder(local_path: Any, target: str) -> dict[str, Source]:
    """
    Return the sources of a file, or, like MLflow, of a folder, which is stored under its own name.

    Args:
        local_path: The file or folder.
        target: The folder among the run's artifacts.

    Returns:
        The sources by their paths among the run's artifacts.
    """
    path = _local(local_path, "local_path")
    name = posixpath.join(target, os.path.basename(path))
    if os.path.isdir(path):
        return files_in(path, name)
    try:
        size = os.stat(path).st_size
    except OSError as error:
        return {name: InvalidValue(path, unreadable_text(path, error))}
    return {name: LocalFile(path, None, size)}


def files_in(local_dir: Any, target: str) -> dict[str, Source]:
    """
    Return the sources of all files in a folder and its subfolders. Like MLflow, it does not follow links to folders.

    Args:
        local_dir: The folder.
        target: The folder among the run's artifacts.

    Returns:
        The sources by their paths among the run's artifacts.
    """
    top = _local(local_dir, "local_dir")
    found: dict[str, Source] = {}

    def path_in_run(path: str) -> str:
        return posixpath.join(target, PurePath(os.path.relpath(path, top)).as_posix())

    def unreadable(error: OSError) -> None:
        path = str(error.filename or top)
        name = (target or os.path.basename(top)) if path == top else path_in_run(path)
        found[name] = InvalidValue(path, unreadable_text(path, error))

    base = os.path.realpath(top)
    for root, folders, names in os.walk(top, onerror=unreadable):
        for name in folders:
            path = os.path.join(root, name)
            if os.path.islink(path) and not is_inside(os.path.realpath(path), base):
                found[path_in_run(path)] = InvalidValue(path, leads_out_text(path, base))
        for name in names:
            path = os.path.join(root, name)
            try:
                found[path_in_run(path)] = LocalFile(path, base, os.stat(path).st_size)
            except OSError as error:
                found[path_in_run(path)] = InvalidValue(path, unreadable_text(path, error))
    return found


def _local(path: Any, name: str) -> str:
    try:
        given = os.fsdecode(path)
    except TypeError:
        raise CallTypeError(f"{name} takes a path, not {type(path).__name__}") from None
    if not given or "\0" in given:
        raise ConfigError(f"{name}={given[:300]!r} is no path")
    return os.path.abspath(given)  # now, as the working folder may change before the upload


def is_inside(path: str, base: str) -> bool:
    """Tell if a resolved path is a folder or below it."""
    return path == base or path.startswith(base.rstrip(os.sep) + os.sep)


def unreadable_text(path: str, error: OSError) -> str:
    """Return the message for a file that cannot be read."""
    return f"{path} cannot be read: {error.strerror or error}"


def leads_out_text(path: str, base: str) -> str:
    """Return the message for a file that a link leads out of its folder."""
    return f"{path} is refused: a symbolic link leads out of {base}"


def size_of(source: Source) -> int:
    """Return a source's bytes, as they were known at the call."""
    return 0 if isinstance(source, InvalidValue) else source.size
