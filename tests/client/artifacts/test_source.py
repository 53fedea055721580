"""The sources of artifacts: paths as MLflow accepts them, folders, links, and files that change or vanish."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

import runqueue
from runqueue.artifacts import _reading as reading
from runqueue.artifacts import _source as artifacts
from runqueue.artifacts._server import served_at
from runqueue.errors import CallTypeError, ConfigError, RejectedError
from runqueue.http._upload import CHUNK
from runqueue.wire._records import InvalidValue

# As untyped as MLflow's own modules are.
EXCEPTIONS: Any = importlib.import_module("mlflow.exceptions")
BASE: Any = importlib.import_module("mlflow.store.artifact.artifact_repo")
SERVED: Any = importlib.import_module("mlflow.store.artifact.mlflow_artifacts_repo")

PATHS = st.text(alphabet="ab./ \0", max_size=8)


# -- paths -----------------------------------------------------------------------------------------------------------


@given(PATHS)
def test_a_folder_is_accepted_if_mlflow_accepts_it(path: str) -> None:
    """Except for a NUL, which no file system allows."""
    try:
        BASE.verify_artifact_path(path)
        taken = "\0" not in path
    except EXCEPTIONS.MlflowException:
        taken = False
    if taken:
        assert artifacts.artifact_folder(path) == path
    else:
        with pytest.raises(ConfigError):
            artifacts.artifact_folder(path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../up", "..", ".", "", "/", "//x", "a\0b"])
def test_a_file_outside_of_the_run_raises_at_the_call(client: runqueue.Client, path: str) -> None:
    """Nothing is queued."""
    with pytest.raises(ConfigError):
        client.log_text("r", "text", path)
    assert client.statistics().accepted == 0


@pytest.mark.parametrize("path", ["/etc", "../up", "a/..", "a/", "./a", "..", ".", "a//b"])
def test_a_folder_outside_of_the_run_raises_at_the_call(client: runqueue.Client, tmp_path: Path, path: str) -> None:
    """So does a path that is not in its shortest form."""
    file = tmp_path / "f"
    file.write_text("x")
    for log in (client.log_artifact, client.log_artifacts):
        with pytest.raises(ConfigError, match="no path below the run's artifacts"):
            log("r", file, path)
    assert client.statistics().accepted == 0


def test_a_file_is_named_as_by_mlflow() -> None:
    """By the shortest form of its path."""
    assert artifacts.artifact_file_path("a/../b//c.txt") == "b/c.txt"
    assert artifacts.artifact_file_path("dir/") == "dir"
    assert artifacts.artifact_file_path(Path("x/y")) == "x/y"


def test_a_value_that_is_no_path_raises_at_once(client: runqueue.Client) -> None:
    """The call is wrong, not a file."""
    wrong: Any = 7
    calls: tuple[Callable[[], None], ...] = (
        lambda: client.log_artifact("r", wrong),
        lambda: client.log_artifacts("r", wrong),
        lambda: client.log_artifact("r", "x", wrong),
        lambda: client.log_text("r", "x", wrong),
        lambda: client.log_text("r", wrong, "x"),
        lambda: client.log_figure("r", wrong, "x.png"),
        lambda: client.log_image("r", wrong, "x.png"),
        lambda: client.log_image("r", wrong),
        lambda: client.log_image("r", wrong, "x.png", key="k"),
    )
    for call in calls:
        with pytest.raises(CallTypeError):
            call()
    with pytest.raises(ConfigError):
        client.log_artifact("r", "")


TRACKING = ["http://h:5000", "https://h/prefix", "http://h:5000/a/b"]
PLACES = [
    "mlflow-artifacts:/1/run/artifacts",
    "mlflow-artifacts://other:8080/1/run/artifacts",
    "mlflow-artifacts://other/x",
    "mlflow-artifacts:///1/run",
    "mlflow-artifacts:/workspaces/w/1/run",
]


@pytest.mark.parametrize("tracking", TRACKING)
@pytest.mark.parametrize("place", PLACES)
def test_the_url_of_the_artifacts_is_that_of_mlflow(place: str, tracking: str) -> None:
    """For each form of an artifact URI."""
    assert served_at(place, tracking) == SERVED.MlflowArtifactsRepository.resolve_uri(place, tracking)


def test_a_bad_artifact_uri_is_rejected_with_advice() -> None:
    """The message says what to do."""
    with pytest.raises(RejectedError, match="set it to http"):
        served_at("mlflow-artifacts:/1/run", "")
    with pytest.raises(RejectedError, match="names a port, and no host"):
        served_at("mlflow-artifacts://5000/1", "http://h")


# -- what is listed --------------------------------------------------------------------------------------------------


def tree(folder: Path) -> Path:
    top = folder / "top"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "a.txt").write_text("a")
    (top / "sub" / "b.txt").write_text("bb")
    (top / "sub" / "deep" / "c.txt").write_text("ccc")
    (folder / "outside.txt").write_text("secret")
    return top


def shown(found: dict[str, artifacts.Source]) -> dict[str, Any]:
    return {name: each.reason if isinstance(each, InvalidValue) else each.size for name, each in found.items()}


def test_a_folder_is_listed_with_all_below_it(tmp_path: Path) -> None:
    """As it is at the time of the call."""
    top = tree(tmp_path)
    assert shown(artifacts.files_in(top, "")) == {"a.txt": 1, "sub/b.txt": 2, "sub/deep/c.txt": 3}
    assert set(artifacts.files_in(top, "x/y")) == {"x/y/a.txt", "x/y/sub/b.txt", "x/y/sub/deep/c.txt"}
    assert set(artifacts.file_or_folder(str(top) + "/", "x")) == {
        "x/top/a.txt",
        "x/top/sub/b.txt",
        "x/top/sub/deep/c.txt",
    }


def test_a_link_that_leaves_the_folder_is_rejected(tmp_path: Path) -> None:
    """It fails alone, when it is read, because its target may change. A link that stays inside is followed."""
    top = tree(tmp_path)
    (top / "out").symlink_to(tmp_path / "outside.txt")
    (top / "in").symlink_to(top / "a.txt")
    (top / "far").symlink_to(tmp_path)
    (top / "near").symlink_to(top / "sub")
    found = artifacts.files_in(top, "")
    assert set(found) == {"a.txt", "sub/b.txt", "sub/deep/c.txt", "out", "in", "far"}
    assert reading.open_source(found["in"]) == b"a"
    for name in ("out", "far"):
        with pytest.raises(RejectedError, match="a symbolic link leads out of"):
            reading.open_source(found[name])
    (tmp_path / "top" / "sub" / "b.txt").unlink()
    (tmp_path / "top" / "sub" / "b.txt").symlink_to(tmp_path / "outside.txt")  # since it was listed
    with pytest.raises(RejectedError, match="a symbolic link leads out of"):
        reading.open_source(found["sub/b.txt"])


def test_a_link_that_was_named_itself_is_followed(tmp_path: Path) -> None:
    """As by MLflow: the user has named it. So is a link to the folder."""
    top = tree(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "outside.txt")
    assert reading.open_source(artifacts.file_or_folder(link, "")["link"]) == b"secret"
    folder = tmp_path / "again"
    folder.symlink_to(top)
    assert {name: reading.open_source(each) for name, each in artifacts.files_in(folder, "").items()} == {
        "a.txt": b"a", "sub/b.txt": b"bb", "sub/deep/c.txt": b"ccc"
    }  # fmt: skip


def test_a_missing_file_fails_in_the_report(tmp_path: Path) -> None:
    """The call does not raise: it must not end a training."""
    (reason,) = shown(artifacts.file_or_folder(tmp_path / "gone", "x")).values()
    assert reason == f"{tmp_path / 'gone'} cannot be read: No such file or directory"
    assert list(artifacts.file_or_folder(tmp_path / "gone", "x")) == ["x/gone"]
    assert shown(artifacts.files_in(tmp_path / "gone", "")) == {"gone": reason}
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    assert "No such file" in shown(artifacts.files_in(tmp_path, ""))["dangling"]


# -- reading ---------------------------------------------------------------------------------------------------------


def a_file(path: Path, size: int = 0) -> artifacts.LocalFile:
    return artifacts.LocalFile(str(path), None, size)


def test_a_pipe_is_rejected_without_a_wait(tmp_path: Path) -> None:
    """Opening one blocks until there is a writer."""
    os.mkfifo(tmp_path / "pipe")
    for source in artifacts.files_in(tmp_path, "").values():
        with pytest.raises(RejectedError, match="is no regular file"):
            reading.open_source(source)


@pytest.mark.parametrize("change", ["grows", "shrinks", "touched"])
def test_a_file_that_changes_while_it_is_read_fails(tmp_path: Path, change: str) -> None:
    """The bytes would be none that the file ever had."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * 3 * CHUNK)
    opened = reading.open_source(a_file(path))
    assert isinstance(opened, reading.OpenFile)
    assert len(opened.read(0, CHUNK)) == CHUNK
    if change == "touched":
        os.utime(path, ns=(1, 1))
    else:
        os.truncate(path, (4 if change == "grows" else 2) * CHUNK)
    with pytest.raises(RejectedError, match="changed while it was uploaded"):
        opened.read(CHUNK, CHUNK)
    opened.close()


def test_a_file_that_is_replaced_while_it_is_read_is_stored_as_it_was(tmp_path: Path) -> None:
    """Renaming a new file over it does not change the open one."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * 2 * CHUNK)
    opened = reading.open_source(a_file(path))
    assert isinstance(opened, reading.OpenFile)
    (tmp_path / "new").write_bytes(b"y")
    os.replace(tmp_path / "new", path)
    assert opened.read(CHUNK, CHUNK) == b"x" * CHUNK
    opened.close()


def test_a_file_is_read_when_it_is_uploaded_and_not_before(tmp_path: Path) -> None:
    """Its content at that time is stored, whatever its size was at the call."""
    path = tmp_path / "f"
    path.write_text("before")
    source = artifacts.file_or_folder(path, "")["f"]
    path.write_text("and after it")
    assert reading.open_source(source) == b"and after it"
    with reading.as_file(source, "f") as given:
        assert given == path


def test_a_file_that_changes_while_a_repository_reads_it_fails(tmp_path: Path) -> None:
    """MLflow's repositories read files by themselves."""
    path = tmp_path / "f"
    path.write_text("before")
    with pytest.raises(RejectedError, match="changed while it was uploaded"), reading.as_file(a_file(path), "f"):
        path.write_text("and after")


def test_a_file_closed_in_the_middle_of_a_read_is_closed_by_its_reader(tmp_path: Path) -> None:
    """The reader's descriptor must not become another file's."""
    path = tmp_path / "f"
    path.write_bytes(b"x" * 10)
    opened = reading.OpenFile(a_file(path))
    number = opened._descriptor
    assert number is not None
    closed = threading.Event()

    def close() -> None:
        opened.close()
        closed.set()

    with opened._lock:
        threading.Thread(target=close).start()
        assert closed.wait(10)
        os.fstat(number)
    opened.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


def test_bytes_in_memory_become_a_temporary_file_of_their_name(tmp_path: Path) -> None:
    """For libraries that take only files. It is deleted afterwards."""
    with reading.as_file(artifacts.InMemory(b"text"), "notes.txt") as path:
        assert (path.name, path.read_bytes()) == ("notes.txt", b"text")
    assert not path.exists()
