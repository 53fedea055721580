"""Fixtures of the live ring alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.embedded import FIRST_USE, run_script


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a script has used the embedded default for the first time."""
    folder = tmp_path_factory.mktemp(
        "first-use"
    )  # without a blank: with SQLAlchemy 2.0, MLflow makes "first%20use" of it
    done = run_script(FIRST_USE, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "nothing is ever printed to stdout"
    return folder


@pytest.fixture(params=["sqlite", "file"])
def embedded_uri(
    request: pytest.FixtureRequest, first_use: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A store of the test's own, with the default experiment in it; the working folder is its folder."""
    monkeypatch.chdir(tmp_path)
    if request.param == "file":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield f"file:{tmp_path / 'files'}"
    else:
        shutil.copy(first_use / "mlflow.db", tmp_path)  # the tables take MLflow three seconds
        yield f"sqlite:///{tmp_path / 'mlflow.db'}"
