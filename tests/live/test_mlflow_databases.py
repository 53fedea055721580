"""MLflow's own API, queued in front of the stores that MLflow has in its own process: databases and files."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.embedded import NOLOAD, mlflow_client
from support.postgres import Postgres, shared_postgres
from support.scripts_of_mlflow import QUEUED_LAUNCHES, SCRIPTS, run_script

pytestmark = [pytest.mark.live, NOLOAD]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with shared_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "file", "postgresql", "postgresql+psycopg2", "postgresql+psycopg"])
def uri(
    request: pytest.FixtureRequest, first_use: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A plain tracking URI."""
    kind, _, driver = request.param.partition("+")
    if kind == "postgresql":
        server: Postgres = request.getfixturevalue("postgres")
        yield server.uri("mlflow", driver or None)
    elif kind == "file":
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        yield (tmp_path / "files").as_uri()
    else:
        shutil.copy(first_use / "mlflow.db", tmp_path)
        yield f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.mark.sample("sqlite")
def test_a_prefix_queues_what_is_logged_into_a_database(uri: str, tmp_path: Path) -> None:
    """The environment alone sets the URI. When the script has ended, everything is stored, in order."""
    variables = {"MLFLOW_ALLOW_FILE_STORE": "true"} if uri.startswith("file:") else {}
    watched = tmp_path / "watched.py"
    watched.write_text(
        (SCRIPTS / "logging_loop.py").read_text("utf-8")
        + "print('QUEUED', repr(mlflow.MlflowClient()._tracking_client.store).startswith('<QueuedStore'))\n",
        "utf-8",
    )
    experiment = f"loop {uuid.uuid4().hex}"
    done = run_script(QUEUED_LAUNCHES["environment"], watched, uri, experiment, tmp_path, variables)
    assert done.returncode == 0, done.stderr
    assert "QUEUED True" in done.stdout
    client = mlflow_client(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["done"] == "yes"
    assert run.data.params == {f"param {number}": str(number) for number in range(20)}
    expected = {"loss": [1 / (step + 1) for step in range(150)], "accuracy": [step / 150 for step in range(150)]}
    for key, values in expected.items():
        points = client.get_metric_history(run.info.run_id, key)
        assert [(point.step, point.value) for point in points] == list(enumerate(values))
