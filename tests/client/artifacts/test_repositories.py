"""Artifacts by MLflow's own repositories: which errors are retried, and how they are described."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import runqueue
from runqueue.artifacts._repositories import _store_error
from support.proxy import Fault, ScriptedServer

NewClient: TypeAlias = Callable[..., runqueue.Client]
RUN = "a" * 32
ROOT = "toy://ann:s3cret-pw@h/bucket"


class Toy:
    """A repository as a plugin provides it."""

    faults: list[Exception]
    stored: list[tuple[str, str | None, bytes]]

    def __init__(self, artifact_uri: str, **_: Any) -> None:
        assert artifact_uri == ROOT

    def log_artifact(self, local_file: str, artifact_path: str | None = None) -> None:
        if self.faults:
            raise self.faults.pop(0)
        self.stored.append((Path(local_file).name, artifact_path, Path(local_file).read_bytes()))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, server: ScriptedServer) -> Iterator[type[Toy]]:
    """The repository, registered, and named by the run's artifact URI."""
    module: Any = importlib.import_module("mlflow.store.artifact.artifact_repository_registry")
    registry = module._artifact_repository_registry._registry
    monkeypatch.setitem(registry, "toy", Toy)
    run = {"run": {"info": {"run_id": RUN, "artifact_uri": ROOT}}}
    server.fail("runs/get", Fault.answer(200, run), times=None)
    Toy.faults, Toy.stored = [], []
    yield Toy


def failure(client: runqueue.Client) -> runqueue.OperationFailure:
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    (found,) = caught.value.failures
    return found


def test_a_plugins_repository_gets_files_under_their_names(
    toy: type[Toy], new_client: NewClient, tmp_path: Path
) -> None:
    """Also for bytes in memory, and for links."""
    (tmp_path / "real").write_text("real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    client = new_client()
    client.log_artifact(RUN, tmp_path / "link", "dir")
    client.log_artifact(RUN, tmp_path / "real")
    client.log_text(RUN, "text", "a/b.txt")
    client.flush()
    assert sorted(toy.stored) == [("b.txt", "a", b"text"), ("link", "dir", b"real"), ("real", None, b"real")]


@pytest.mark.parametrize("fault", [ConnectionError("reset"), TimeoutError("late"), OSError(28, "No space left")])
def test_a_temporary_error_is_retried(toy: type[Toy], new_client: NewClient, fault: Exception) -> None:
    """By the engine, as for each other request."""
    toy.faults = [fault, fault]
    client = new_client()
    client.log_text(RUN, "text", "a")
    client.flush()
    assert toy.stored == [("a", None, b"text")]
    assert client.statistics().retried == 2


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        (PermissionError(13, "Permission denied"), "PermissionError: [Errno 13] Permission denied"),
        (ValueError(f"cannot log to {ROOT}"), "ValueError: cannot log to toy://***@h/bucket"),
        (ValueError("password s3cret-pw refused"), "ValueError: password *** refused"),
        (ModuleNotFoundError("No module named 'boto3'", name="boto3"), "pip install boto3"),
    ],
)
def test_a_permanent_error_fails_the_artifact_alone_and_shows_no_secret(
    toy: type[Toy], new_client: NewClient, fault: Exception, text: str
) -> None:
    """Other artifacts are stored."""
    toy.faults = [fault]
    client = new_client()
    client.log_text(RUN, "text", "a")
    found = failure(client)
    assert text in str(found.error)
    assert "s3cret" not in repr(found)
    assert (found.operation, found.final, found.entries) == ("log_artifact", True, (runqueue.Entry("artifact", "a"),))
    client.log_text(RUN, "text", "a")
    client.flush()
    assert client.statistics().stored == 1


def test_a_failure_of_an_artifact_is_pickled_without_its_content(toy: type[Toy], new_client: NewClient) -> None:
    """A report may leave the process."""
    toy.faults = [ValueError("bad")]
    client = new_client()
    client.log_text(RUN, "s" * 10_000, "a")
    found = failure(client)
    pickled = pickle.dumps(found)
    assert len(pickled) < 2_000
    again = pickle.loads(pickled)
    assert tuple(again.entries) == (runqueue.Entry("artifact", "a"),)
    assert (str(again.error), again.final) == ("ValueError: bad", True)


def test_answers_of_object_stores_are_judged_by_their_status() -> None:
    """Each library keeps the status in another place."""

    class BotoError(Exception):
        def __init__(self) -> None:
            self.response = {"ResponseMetadata": {"HTTPStatusCode": 503}}

    class AzureError(Exception):
        status_code = 403

    class HTTPClientError(Exception):
        pass

    outer = RuntimeError("failed to upload")
    outer.__cause__ = BotoError()
    assert _store_error(outer, ROOT).retriable
    assert _store_error(HTTPClientError("no connection"), ROOT).retriable
    assert not _store_error(AzureError("forbidden"), ROOT).retriable


def test_each_file_counts_as_one_entry(toy: type[Toy], new_client: NewClient, tmp_path: Path) -> None:
    """The files of a folder are queued all or none."""
    for at in range(5):
        (tmp_path / str(at)).write_text("x")
    client = new_client(max_pending=7, on_full="raise")
    client.log_artifacts(RUN, tmp_path)
    with pytest.raises(runqueue.QueueFullError):
        client.log_artifacts(RUN, tmp_path, "again")
    assert client.statistics().pending == 5
    client.flush()
    stats = client.statistics()
    assert (stats.accepted, stats.stored, stats.dropped) == (5, 5, 0)
    assert len(toy.stored) == 5
