"""`runqueue doctor` against a real server, and over MLflow's own stores; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import mlflow
import pytest

from support.mlflow_server import HOST, MlflowServer, clean_environment, free_port

pytestmark = pytest.mark.live


def doctor(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program, run in this folder, which is its home as well."""
    return subprocess.run(
        [sys.executable, "-m", "runqueue", "doctor", *arguments],
        check=False,
        cwd=folder,
        env=clean_environment() | {"HOME": str(folder)} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """The table."""
    return {key: value.strip() for key, _, value in (line.partition(":") for line in done.stdout.splitlines())}


def test_a_real_server_tells_its_version(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """By the variable, with a token that an open server does not ask for."""
    done = doctor(tmp_path, MLFLOW_TRACKING_URI=mlflow_server.uri, MLFLOW_TRACKING_TOKEN="s3cret-token")
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["resolved from"] == "the environment variable MLFLOW_TRACKING_URI"
    assert found["version"] == f"mlflow {version('mlflow')}"
    assert found["credentials"] == "token, of MLFLOW_TRACKING_TOKEN"
    assert "s3cret" not in done.stdout
    assert 0 < float(found["round trip"].split(" ")[0]) < 10_000


def test_a_path_below_a_real_server_is_said_to_be_wrong(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """The server's own 404 is no answer of its API."""
    done = doctor(tmp_path, "--tracking-uri", f"{mlflow_server.uri}/nowhere")
    assert done.returncode == 1
    assert "not as an MLflow server does" in done.stderr and done.stderr.count("\n") == 1


def test_a_database_is_looked_at_and_not_changed(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """MLflow's own store answers in a worker thread; nothing but the table is printed."""
    database = mlflow_server.folder / "mlflow.db"
    done = doctor(tmp_path, "--tracking-uri", f"sqlite:///{database}")
    found = rows(done)
    assert (done.returncode, done.stderr) == (0, "")
    assert found["transport"] == "calls of mlflow in worker threads"
    assert found["version"] == f"mlflow {mlflow.__version__}"
    assert "1,000 metrics" in found["limits"]
    assert "tls" not in found


def test_a_file_that_is_no_database_is_said_in_one_line(tmp_path: Path) -> None:
    """What SQLAlchemy says over several lines, with its hints, is one here."""
    (tmp_path / "notes.db").write_text("these are notes, and no database " * 100)
    done = doctor(tmp_path, "--tracking-uri", "sqlite:///notes.db")
    assert done.returncode == 1
    assert "file is not a database" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("path", ["mlruns", "file:mlruns"])
def test_a_folder_that_mlflow_refuses_is_said(tmp_path: Path, path: str) -> None:
    """Unless MLFLOW_ALLOW_FILE_STORE is set; either way nothing is made by looking."""
    refused = doctor(tmp_path, "--tracking-uri", path)
    assert refused.returncode == 1
    assert "MLFLOW_ALLOW_FILE_STORE" in refused.stderr and refused.stderr.count("\n") == 1
    allowed = doctor(tmp_path, "--tracking-uri", path, MLFLOW_ALLOW_FILE_STORE="true")
    assert (allowed.returncode, allowed.stderr) == (0, "")
    assert rows(allowed)["reachable"] == "not yet: the first run will make mlruns"
    assert not (tmp_path / "mlruns").exists()


def test_a_database_server_that_is_not_there_is_said_in_time(tmp_path: Path) -> None:
    """MLflow itself would try for minutes; a password in the URI is not shown."""
    uri = f"postgresql://user:s3cret-word@{HOST}:{free_port()}/runs"
    done = doctor(tmp_path, "--tracking-uri", uri, MLFLOW_HTTP_REQUEST_TIMEOUT="8")
    assert done.returncode == 1
    assert "s3cret" not in done.stdout + done.stderr
    assert "postgresql://***@" in done.stderr and "is not available" in done.stderr
    assert "cannot be opened: OperationalError" in done.stderr
    assert done.stderr.count("\n") == 1
