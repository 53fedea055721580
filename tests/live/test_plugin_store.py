"""
A tracking store that an mlflow plugin brings for a scheme of its own. The plugin is really installed; the points are
read back by MLflow's own client. Each test runs in a process of its own.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from support.mlflow_server import clean_environment
from support.toy_plugin import install

pytestmark = pytest.mark.live

POINTS = 2_500
LOG = """
import json, sys
import runqueue
with runqueue.Client(sys.argv[1]) as client:
    parent = client.create_run(experiment_name="toys", run_name="parent", tags={"team": "vision"})
    run = client.create_run(experiment_name="toys", parent_run_id=parent)
    for step in range(int(sys.argv[2])):
        client.log_metrics(run, {"loss": 1 / (step + 1), "acc": step / 7}, step=step, timestamp=1_000 + step)
    client.log_params(run, {f"p{each}": "x" * each for each in range(250)})
    client.log_inputs(run, [runqueue.Dataset("digits", digest="d1")])
    client.log_metric(run, "loss", "no number")
    client.set_terminated(run, "FINISHED")
    early = "mlflow" in sys.modules
    try:
        client.flush()
    except runqueue.FlushError as error:
        failed = [[entry.key for entry in failure.entries] for failure in error.failures]
    counts = client.statistics()
facts = {"runs": [parent.run_id, run.run_id], "failed": failed, "early": early}
print(json.dumps(facts | {"stored": counts.stored, "pending": counts.pending}))
"""
READ = """
import json, sys
import mlflow
client = mlflow.MlflowClient(sys.argv[1])
parent, run = map(client.get_run, sys.argv[2:])
history = {key: [[p.step, p.timestamp, p.value] for p in client.get_metric_history(run.info.run_id, key)]
           for key in run.data.metrics}
print(json.dumps({
    "metrics": history,
    "params": run.data.params,
    "parent": run.data.tags["mlflow.parentRunId"],
    "status": run.info.status,
    "inputs": [each.dataset.digest for each in run.inputs.dataset_inputs],
    "name": parent.info.run_name,
    "team": parent.data.tags["team"],
    "experiment": client.get_experiment(run.info.experiment_id).name,
}))
"""


def run(
    *command: str, environment: dict[str, str], folder: Path, succeeds: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a script in this folder, which is its home as well."""
    done = subprocess.run(
        [sys.executable, *command],
        check=False,
        cwd=folder,
        env=environment | {"HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert (done.returncode == 0) is succeeds, done.stderr
    return done


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of processes in which the plugin is installed."""
    return install(tmp_path / "site")


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """An empty folder."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.mark.whole
def test_a_plugins_store_keeps_every_point(installed: dict[str, str], home: Path) -> None:
    """In batches, with the order, limits and failures of any store."""
    uri = f"toy://here{home}"
    facts = json.loads(run("-c", LOG, uri, str(POINTS), environment=installed, folder=home).stdout)
    assert facts["failed"] == [["loss"]] and not facts["early"]
    assert (facts["stored"], facts["pending"]) == (2 + 2 * POINTS + 250 + 1, 0)

    read = json.loads(run("-c", READ, uri, *facts["runs"], environment=installed, folder=home).stdout)
    expected = {
        "loss": [[step, 1_000 + step, 1 / (step + 1)] for step in range(POINTS)],
        "acc": [[step, 1_000 + step, step / 7] for step in range(POINTS)],
    }
    assert {key: sorted(points) for key, points in read["metrics"].items()} == expected
    assert read["params"] == {f"p{each}": "x" * each for each in range(250)}
    assert (read["parent"], read["status"], read["inputs"]) == (facts["runs"][0], "FINISHED", ["d1"])
    assert (read["name"], read["team"], read["experiment"]) == ("parent", "vision", "toys")
    with sqlite3.connect(home / "toy.db") as database:
        assert database.execute("SELECT count(*) FROM metrics").fetchone() == (2 * POINTS,)
    database.close()


def test_without_the_plugin_its_scheme_is_refused_at_once(tmp_path: Path) -> None:
    """The error names the URI, and nothing is created."""
    script = "import sys, runqueue; runqueue.Client(sys.argv[1])"
    done = run("-c", script, "toy://here/x", environment=clean_environment(), folder=tmp_path, succeeds=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("runqueue.ConfigError") and "'toy://here/x'" in last and "plugin" in last


@pytest.mark.whole
def test_the_doctor_knows_the_plugins_store(installed: dict[str, str], home: Path) -> None:
    """It names the plugin. Without the plugin, one line says that the scheme is unknown."""
    uri = f"toy://here{home}"
    command = ("-m", "runqueue", "doctor", "--tracking-uri", uri)
    rows = dict(line.split(":", 1) for line in run(*command, environment=installed, folder=home).stdout.splitlines())
    assert rows["store"].strip() == "MLflow's own, by the plugin for toy"
    assert rows["reachable"].strip() == "yes"
    assert rows["transport"].strip() == "calls of mlflow in worker threads"
    done = run(*command, environment=clean_environment(), folder=home, succeeds=False)
    assert done.returncode == 1
    assert "no store is known" in done.stderr and done.stderr.count("\n") == 1
