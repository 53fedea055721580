"""Fixtures of the live ring alone."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.embedded import FIRST_USE, run_script


@pytest.fixture(autouse=True, scope="module")
def mlflow_left_alone() -> Iterator[None]:
    """No file of tests leaves a tracking URI behind in MLflow: those after it would find another store than they think."""
    yield
    service = sys.modules.get("mlflow.tracking._tracking_service.utils")
    assert service is None or service._tracking_uri is None
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a script has used the embedded default for the first time."""
    folder = tmp_path_factory.mktemp("first-use")  # no blank: of one, MLflow makes "%20" with SQLAlchemy 2.0
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
