"""Fixtures of the live tests."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.embedded import FIRST_USE, run_script


@pytest.fixture(autouse=True, scope="module")
def mlflow_has_no_tracking_uri() -> Iterator[None]:
    """Assert that a file of tests leaves no tracking URI behind in MLflow, where the next file would log to it."""
    yield
    service = sys.modules.get("mlflow.tracking._tracking_service.utils")
    assert service is None or service._tracking_uri is None
    assert "MLFLOW_TRACKING_URI" not in os.environ


@pytest.fixture(scope="session")
def first_use(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a script has used the embedded default store for the first time."""
    folder = tmp_path_factory.mktemp("first-use")  # no blank in the name: some versions of MLflow quote it as %20
    done = run_script(FIRST_USE, folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "nothing is ever printed to stdout"
    return folder


@pytest.fixture(params=["sqlite", "file"])
def embedded_uri(
    request: pytest.FixtureRequest, first_use: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A store of the test's own that has the default experiment. The working folder is the store's folder."""
    monkeypatch.chdir(tmp_path)
    if request.param == "file":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield f"file:{tmp_path / 'files'}"
    else:
        shutil.copy(first_use / "mlflow.db", tmp_path)  # a copy, since MLflow takes three seconds to create the tables
        yield f"sqlite:///{tmp_path / 'mlflow.db'}"
