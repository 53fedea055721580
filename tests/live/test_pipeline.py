"""The pipeline of the examples, on a real server: finished, cancelled and run again, by MLflow Projects and by hand."""

# Rules of this file: MLflow's own `mlflow run` and `mlflow.projects` start what they would start for a user. What a
# step should have found is computed here from the same data, and not read from what it has logged.

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_wine
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from support.embedded import mlflow_client
from support.mlflow_server import MlflowServer, clean_environment, wait_until
from support.process import Ended, Process
from support.readback import Readback, StoredRun

pytestmark = pytest.mark.live

PROJECT = Path(__file__).parents[2] / "examples" / "pipeline"
STEPS = ("download", "process", "train")
EPOCHS = 6
PATIENCE = 180.0
"""Seconds for a pipeline: four processes that import MLflow, one after the other."""
EXIT_BOUND = 25.0
"""Seconds that a step has to send what is queued, `Client(exit_timeout=20)`, and some to be seen to have done so."""

DRIVER = """
import json
import mlflow
project, entry_point, parameters, experiment_id, gate = sys.argv[2:]
submitted = mlflow.projects.run(
    project, entry_point, parameters=json.loads(parameters), experiment_id=experiment_id, env_manager="local",
    synchronous=False,
)
say("run", submitted.run_id, submitted.get_status())
if gate:
    open(gate).read()
    submitted.cancel()
say("waited", submitted.wait(), submitted.get_status())
"""
"""Starts an entry point and waits for it, or cancels it once the test opens the gate, a named pipe."""


def variables(server: MlflowServer, folder: Path) -> dict[str, str]:
    """Return the variables of a user's shell in which the virtual environment is active."""
    return {
        "MLFLOW_TRACKING_URI": server.uri,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE": "1",  # the examples lie in the tree
        "TMPDIR": str(folder),  # MLflow leaves what it fetches there
    }


def run(server: MlflowServer, folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        cwd=folder,
        env=clean_environment() | variables(server, folder) | more,
    )


def by_entry_point(readback: Readback, experiment_id: str) -> dict[str, StoredRun]:
    """Return the runs that MLflow Projects has created in an experiment, by entry point; there is one for each."""
    runs = [readback.run(run_id) for run_id in readback.run_ids(experiment_id)]
    named = {each.tags["mlflow.project.entryPoint"]: each for each in runs if "mlflow.project.entryPoint" in each.tags}
    assert len(named) == sum("mlflow.project.entryPoint" in each.tags for each in runs)
    return named


def values(stored: StoredRun) -> dict[str, list[tuple[int, float]]]:
    """Return the points of each metric, without their times."""
    return {key: [(point.step, point.value) for point in points] for key, points in stored.content.metrics.items()}


def artifacts(server: MlflowServer, stored: StoredRun, folder: Path) -> dict[str, bytes]:
    """Return the content of all artifacts of a run, by path."""
    target = folder / f"artifacts of {stored.run_id}"
    target.mkdir()
    client = mlflow_client(server.uri)
    for file in client.list_artifacts(stored.run_id):
        client.download_artifacts(stored.run_id, file.path, str(target))
    return {str(path.relative_to(target)): path.read_bytes() for path in sorted(target.rglob("*")) if path.is_file()}


def expected_metrics(epochs: int, rate: float = 0.02) -> dict[str, list[tuple[int, Any]]]:
    """Compute what the train step should find."""
    frame: Any = load_wine(as_frame=True).frame.astype(float)
    train, test = train_test_split(frame, test_size=0.25, random_state=0, stratify=frame["target"])
    features = frame.columns.drop("target")
    mean, deviation = train[features].mean(), train[features].std()
    train_x, test_x = ((part[features] - mean) / deviation for part in (train, test))
    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=rate, random_state=0)
    found: dict[str, list[tuple[int, Any]]] = {"train_loss": [], "test_loss": [], "test_accuracy": []}
    for epoch in range(1, epochs + 1):
        model.partial_fit(train_x, train["target"], classes=[0.0, 1.0, 2.0])
        for key, value in {
            "train_loss": log_loss(train["target"], model.predict_proba(train_x)),
            "test_loss": log_loss(test["target"], model.predict_proba(test_x)),
            "test_accuracy": model.score(test_x, test["target"]),
        }.items():
            found[key].append((epoch, pytest.approx(value, rel=1e-9)))
    return found


def check_pipeline(
    server: MlflowServer, readback: Readback, experiment_id: str, main: StoredRun, folder: Path, *, epochs: int
) -> None:
    """Assert that the server has all that a finished pipeline leaves."""
    steps = by_entry_point(readback, experiment_id)
    assert {name: steps[name].status for name in STEPS} == dict.fromkeys(STEPS, "FINISHED")
    assert main.status == "FINISHED" and main.end_time is not None
    assert [steps[name].name for name in STEPS] == list(STEPS)
    assert {steps[name].tags["mlflow.parentRunId"] for name in STEPS} == {main.run_id}
    download, process, train = (steps[name] for name in STEPS)

    source = "https://archive.ics.uci.edu/dataset/109/wine"
    assert download.content.params == {"dataset": "wine", "source": source}
    assert process.content.params == {"download_run": download.run_id, "test_share": "0.25", "seed": "0"}
    assert train.content.params == {
        "data": f"runs:/{process.run_id}/data",
        "epochs": str(epochs),
        "rate": "0.02",
        "pause": "0",
        "seed": "0",
    }
    parameters = {"dataset": "wine", "source": source, "test_share": "0.25", "epochs": str(epochs), "rate": "0.02"}
    assert main.content.params == parameters | {"pause": "0", "seed": "0"}

    assert values(download) == {"rows": [(0, 178.0)], "columns": [(0, 14.0)]}
    assert values(process) == {"train_rows": [(0, 133.0)], "test_rows": [(0, 45.0)]}
    assert values(train) == expected_metrics(epochs)
    assert values(main) == {key: [(0, points[-1][1])] for key, points in values(train).items()}
    assert main.content.tags == {f"{name}_run": steps[name].run_id for name in STEPS}

    (raw,) = download.content.inputs
    assert (raw.name, raw.source_type, raw.tags) == ("wine", "http", (("mlflow.data.context", "raw"),))
    assert sorted((each.name, dict(each.tags)["mlflow.data.context"]) for each in process.content.inputs) == [
        ("test", "test"),
        ("train", "train"),
    ]
    assert all(dict(each.tags)["download_run"] == download.run_id for each in process.content.inputs)

    table: Any = load_wine(as_frame=True).frame
    assert artifacts(server, download, folder) == {"raw/raw.csv": table.to_csv(index=False).encode()}
    kept = artifacts(server, process, folder)
    assert sorted(kept) == ["data/test.csv", "data/train.csv", "scaling.json"]
    assert [len(kept[f"data/{name}.csv"].splitlines()) for name in ("train", "test")] == [134, 46]
    kept = artifacts(server, train, folder)
    assert sorted(kept) == ["model/linear.json", "report.txt"]
    assert len(json.loads(kept["model/linear.json"])["weights"]) == 3
    kept = artifacts(server, main, folder)
    assert sorted(kept) == ["pipeline.json"]
    assert json.loads(kept["pipeline.json"])["train"] == train.run_id


def cancelled(
    server: MlflowServer,
    readback: Readback,
    experiment_id: str,
    folder: Path,
    entry_point: str,
    parameters: Mapping[str, str],
) -> tuple[Ended, float]:
    """
    Start an entry point by `mlflow.projects.run`, and cancel it as soon as the train step has logged three epochs.

    Returns:
        What was printed until the last process has ended, and how many seconds that took from the cancelling.
    """
    gate = folder / "gate"
    os.mkfifo(gate)
    arguments = (server.uri, str(PROJECT), entry_point, json.dumps(parameters), experiment_id, str(gate))

    training = {"experiment_ids": [experiment_id], "filter": "tags.`mlflow.project.entryPoint` = 'train'"}

    def trains() -> bool:
        latest = [
            metric
            for found in readback.post("runs/search", training).get("runs", [])
            for metric in found["data"].get("metrics", [])
        ]
        return any(metric["key"] == "test_loss" and int(metric["step"]) >= 3 for metric in latest)

    with Process(DRIVER, *arguments, folder=folder, variables=variables(server, folder)) as driver:
        wait_until(trains, PATIENCE, "no epoch was logged")
        begun = time.monotonic()
        gate.write_text("now")
        ended = driver.end()  # the steps hold its stdout until they have ended
        return ended, time.monotonic() - begun


def check_killed(ended: Ended, train: StoredRun) -> None:
    """Assert that the run is KILLED, and has every epoch that the step has printed."""
    printed = [int(epoch) for epoch in re.findall(r"^epoch (\d+) ", ended.out, re.MULTILINE)]
    assert printed == list(range(1, len(printed) + 1)) and len(printed) >= 3
    assert (train.status, train.end_time is not None) == ("KILLED", True)
    last = len(train.content.metrics["test_loss"])
    assert last >= len(printed)
    assert values(train) == expected_metrics(last)


@pytest.mark.whole
def test_a_pipeline_finishes(mlflow_server: MlflowServer, readback: Readback, tmp_path: Path) -> None:
    """Run by the command line."""
    first = readback.new_experiment("finished")
    command = ["mlflow", "run", str(PROJECT), "--env-manager", "local", "--experiment-id", first]
    done = run(mlflow_server, tmp_path, *command, "-P", f"epochs={EPOCHS}")
    assert done.returncode == 0, done.stderr
    main = by_entry_point(readback, first)["main"]
    check_pipeline(mlflow_server, readback, first, main, tmp_path, epochs=EPOCHS)


@pytest.mark.whole
def test_a_pipeline_is_cancelled_while_it_trains(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path
) -> None:
    """Started by the API."""
    second = readback.new_experiment("cancelled")
    ended, seconds = cancelled(mlflow_server, readback, second, tmp_path, "main", {"epochs": "100000", "pause": "0.05"})
    assert seconds < EXIT_BOUND, ended.err
    assert "waited False FAILED" in ended.out.splitlines()  # MLflow's status for a run that was cancelled or has failed
    runs = by_entry_point(readback, second)
    assert {name: stored.status for name, stored in runs.items()} == {
        "main": "KILLED",
        "download": "FINISHED",
        "process": "FINISHED",
        "train": "KILLED",
    }
    check_killed(ended, runs["train"])
    assert runs["main"].content.tags == {f"{name}_run": runs[name].run_id for name in ("download", "process")}


@pytest.mark.whole
def test_a_pipeline_runs_by_hand(mlflow_server: MlflowServer, readback: Readback, tmp_path: Path) -> None:
    """Without MLflow Projects around it."""
    third = readback.new_experiment("all by hand")
    script = str(PROJECT / "steps" / "main.py")
    again = run(mlflow_server, tmp_path, sys.executable, script, "--epochs", str(EPOCHS), MLFLOW_EXPERIMENT_ID=third)
    assert again.returncode == 0, again.stderr
    (made,) = re.findall(r"^main: run ([0-9a-f]{32})$", again.stdout, re.MULTILINE)
    stored = readback.run(made)
    assert (stored.name, "mlflow.project.entryPoint" in stored.tags) == ("main", False)
    check_pipeline(mlflow_server, readback, third, stored, tmp_path, epochs=EPOCHS)


@pytest.mark.whole
def test_steps_by_hand_make_their_own_runs_and_the_last_is_cancelled_and_run_again(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path
) -> None:
    """Each step gets the run of the step before. MLflow Projects starts the last one, on the data of the others."""
    experiment_id = readback.new_experiment("by hand")
    made: dict[str, str] = {}
    for name, options in (("download", []), ("process", ["--download-run", "download"])):
        options = [made.get(option, option) for option in options]
        script = str(PROJECT / "steps" / f"{name}.py")
        done = run(mlflow_server, tmp_path, sys.executable, script, *options, MLFLOW_EXPERIMENT_ID=experiment_id)
        assert done.returncode == 0, done.stderr
        (made[name],) = re.findall(rf"^{name}: run ([0-9a-f]{{32}})$", done.stdout, re.MULTILINE)
        stored = readback.run(made[name])
        assert (stored.name, stored.status) == (name, "FINISHED")
    assert stored.content.params == {"download_run": made["download"], "test_share": "0.25", "seed": "0"}
    assert values(stored) == {"train_rows": [(0, 133.0)], "test_rows": [(0, 45.0)]}

    parameters = {"data": f"runs:/{made['process']}/data", "epochs": "100000", "pause": "0.01"}
    ended, seconds = cancelled(mlflow_server, readback, experiment_id, tmp_path, "train", parameters)
    assert seconds < EXIT_BOUND, ended.err
    train = by_entry_point(readback, experiment_id)["train"]
    assert f"run {train.run_id} RUNNING" in ended.out.splitlines()
    assert "waited False FAILED" in ended.out.splitlines()
    check_killed(ended, train)

    other = readback.new_experiment("again")
    again = json.dumps(parameters | {"epochs": "3", "pause": "0"})
    arguments = (mlflow_server.uri, str(PROJECT), "train", again, other, "")
    with Process(DRIVER, *arguments, folder=tmp_path, variables=variables(mlflow_server, tmp_path)) as driver:
        ended = driver.end(PATIENCE)
    assert "waited True FINISHED" in ended.out.splitlines()
    train = by_entry_point(readback, other)["train"]
    assert (train.status, values(train)) == ("FINISHED", expected_metrics(3))


@pytest.mark.whole
def test_a_step_that_fails_fails_the_pipeline(mlflow_server: MlflowServer, readback: Readback, tmp_path: Path) -> None:
    """No later step is run."""
    experiment_id = readback.new_experiment("failed")
    command = ["mlflow", "run", str(PROJECT), "--env-manager", "local", "--experiment-id", experiment_id]
    done = run(mlflow_server, tmp_path, *command, "-P", "dataset=beer")
    assert done.returncode == 1
    assert "no dataset 'beer': one of wine, iris, cancer" in done.stderr
    runs = by_entry_point(readback, experiment_id)
    assert {name: stored.status for name, stored in runs.items()} == {"main": "FAILED", "download": "FAILED"}
