"""The examples run as a visitor runs them, and the store holds what they print."""

from __future__ import annotations

import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest

from support.mlflow_server import MlflowServer, clean_environment
from support.readback import Readback, StoredRun

pytestmark = pytest.mark.live

EXAMPLES = Path(__file__).parents[2] / "examples"

READ_DATABASE = """
import sys, warnings
warnings.simplefilter("ignore")
import mlflow
client = mlflow.MlflowClient("sqlite:///mlflow.db")
(run,) = client.search_runs(["0"])
print(run.info.run_id, run.info.run_name, run.info.status)
print(sum(len(client.get_metric_history(run.info.run_id, key)) for key in run.data.metrics))
print(len(run.data.params), run.data.tags["example"], run.data.tags["phase"])
print([(each.dataset.name, each.dataset.source_type) for each in run.inputs.dataset_inputs])
print([point.step for point in client.get_metric_history(run.info.run_id, "valid_loss")])
"""
"""Prints what a database holds, in a process without the test's settings."""


def run_example(name: str, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run an example in a folder; assert that it ends with status 0."""
    done = _run([str(EXAMPLES / name), *arguments], folder, **variables)
    assert done.returncode == 0, done.stderr
    return done


def _run(arguments: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=folder,
        env=clean_environment() | variables,
    )


def logged_run_id(output: str) -> str:
    found = re.search(r"to run ([0-9a-f]{32}):", output)
    assert found is not None, output
    return found[1]


def test_the_training_example_needs_no_server_and_says_how_to_look(tmp_path: Path) -> None:
    """Without an argument it logs to a database in the folder: at least 1,000 points, params, tags and the dataset."""
    folder = tmp_path / "a new folder"
    folder.mkdir()
    done = run_example("train.py", folder)
    run_id = logged_run_id(done.stdout)
    found = re.search(r"Logged ([\d,]+) metric points, (\d+) params", done.stdout)
    assert found is not None
    points, params = int(found[1].replace(",", "")), int(found[2])
    assert points >= 1_000
    assert "pending=0, in_flight=0" in done.stdout and "failed=0, dropped=0" in done.stdout

    stored = _run(["-c", READ_DATABASE], folder)
    assert stored.stdout.splitlines() == [
        f"{run_id} digits FINISHED",
        str(points),
        f"{params} train.py trained",
        "[('digits', 'http')]",
        str([45 * epoch for epoch in range(1, 16)]),
    ], stored.stderr

    (command,) = re.findall(r"^Look at it: (.*)$", done.stdout, re.MULTILINE)
    words = shlex.split(command)
    assert words[:3] == ["mlflow", "ui", "--backend-store-uri"]
    assert os.path.samefile(folder / "mlflow.db", _path(words[3]))
    assert f"/#/experiments/0/runs/{run_id}" in done.stdout


def _path(uri: str) -> str:
    return unquote(uri.removeprefix("sqlite:///"))


@pytest.mark.whole
def test_the_training_example_logs_to_a_server_as_well(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path
) -> None:
    """The run holds every point that the example prints; the folder stays empty."""
    done = run_example("train.py", tmp_path, "--epochs", "2", MLFLOW_TRACKING_URI=mlflow_server.uri)
    run_id = logged_run_id(done.stdout)
    stored = readback.run(run_id)
    assert (stored.name, stored.status) == ("digits", "FINISHED")
    assert stored.content.params["epochs"] == "2"
    assert stored.content.tags == {"example": "train.py", "phase": "trained"}
    histories = stored.content.metrics
    assert set(histories) == {"train_loss", "train_accuracy", "valid_loss", "valid_accuracy"}
    steps = [point.step for point in histories["train_loss"]]
    assert steps == list(range(1, len(steps) + 1))
    assert [point.step for point in histories["valid_loss"]] == [len(steps) // 2, len(steps)]
    assert [(each.name, each.source_type) for each in stored.content.inputs] == [("digits", "http")]
    assert f"Look at it: {mlflow_server.uri}/#/experiments/0/runs/{run_id}" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("example", ["train.py", "async_service.py", "streaming.py", "dataloader.py", "service.py"])
def test_an_example_with_an_invalid_store_prints_one_sentence_and_no_traceback(example: str, tmp_path: Path) -> None:
    """On stderr, with an exit status of 1."""
    done = _run([str(EXAMPLES / example), "--tracking-uri", "nosuch://store"], tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("ConfigError: no store is known for the tracking URI 'nosuch://store'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_async_example_stores_each_job_as_a_child_run(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path, backend: str
) -> None:
    """Three jobs of 50 steps below one parent, on asyncio and on trio."""
    known = set(readback.run_ids("0"))
    done = run_example(
        "async_service.py", tmp_path, "--backend", backend, "--jobs", "3", "--tracking-uri", mlflow_server.uri
    )
    assert done.stderr == ""
    parent_id = done.stdout.splitlines()[-1]
    children: dict[str, StoredRun] = {}
    for run_id in set(readback.run_ids("0")) - known - {parent_id}:
        child = readback.run(run_id)
        children[child.name] = child
    parent = readback.run(parent_id)
    assert (parent.name, parent.status, parent.content.params) == ("pi-service", "FINISHED", {"jobs": "3"})
    assert sorted(children) == ["pi-0", "pi-1", "pi-2"]
    for seed in range(3):
        child = children[f"pi-{seed}"]
        assert child.tags["mlflow.parentRunId"] == parent_id
        assert child.status == "FINISHED"
        assert child.content.params == {"seed": str(seed), "steps": "50", "points_per_step": "200"}
        assert child.content.tags == {"phase": "done"}
        estimates, inside = child.content.metrics["estimate"], child.content.metrics["inside"]
        assert [point.step for point in estimates] == [point.step for point in inside] == list(range(1, 51))
        assert [point.value for point in estimates] == [4 * each.value / (each.step * 200) for each in inside]


@pytest.mark.sample("asyncio")
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_async_example_needs_no_server_either(tmp_path: Path, backend: str) -> None:
    """Without a URI it logs to a database in its folder."""
    done = run_example("async_service.py", tmp_path, "--backend", backend, "--jobs", "1")
    assert re.fullmatch(r"[0-9a-f]{32}", done.stdout.splitlines()[-1])
    assert "failed=0, dropped=0" in done.stdout
    assert (tmp_path / "mlflow.db").exists()


def test_the_streaming_example_stores_every_step(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path
) -> None:
    """Three metrics a step, the last ones included."""
    done = run_example("streaming.py", tmp_path, "--steps", "500", "--tracking-uri", mlflow_server.uri)
    assert done.stderr == "" and "failed=0, dropped=0" in done.stdout
    stored = readback.run(done.stdout.splitlines()[-1])
    assert (stored.name, stored.status) == ("line", "FINISHED")
    assert stored.content.params == {"steps": "500", "seed": "0"}
    assert stored.content.tags == {"example": "streaming.py", "phase": "trained"}
    assert sorted(stored.content.metrics) == ["intercept", "loss", "slope"]
    for points in stored.content.metrics.values():
        assert [point.step for point in points] == list(range(1, 501))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_the_loader_example_stores_what_its_workers_log(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path, method: str
) -> None:
    """All workers log to one run, whichever start method of multiprocessing is used."""
    known = set(readback.run_ids("0"))
    done = run_example("dataloader.py", tmp_path, "--method", method, "--tracking-uri", mlflow_server.uri)
    (run_id,) = set(readback.run_ids("0")) - known
    assert done.stdout.splitlines()[-1] == run_id
    stored = readback.run(run_id)
    assert (stored.name, stored.status) == ("loader", "FINISHED")
    assert stored.content.params == {"workers": "2", "batches": "20"}
    metrics = stored.content.metrics
    assert [point.value for point in metrics.pop("failed_workers")] == [0.0]
    assert sorted(metrics) == ["worker_0/load_ms", "worker_1/load_ms"]
    for points in metrics.values():
        assert [point.step for point in points] == list(range(20))


def test_the_service_example_stores_each_request(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path
) -> None:
    """One point for each request."""
    done = run_example("service.py", tmp_path, "--requests", "35", "--tracking-uri", mlflow_server.uri)
    assert done.stderr == ""
    stored = readback.run(done.stdout.splitlines()[-1])
    assert (stored.name, stored.status, stored.content.params) == ("service", "FINISHED", {"requests": "35"})
    assert [point.step for point in stored.content.metrics["latency_ms"]] == list(range(35))


@pytest.mark.sample("streaming.py")
@pytest.mark.parametrize("example", ["streaming.py", "service.py"])
def test_the_streaming_examples_need_no_server_either(tmp_path: Path, example: str) -> None:
    """Without a URI they log to a database in their folder."""
    done = run_example(example, tmp_path)
    assert re.fullmatch(r"[0-9a-f]{32}", done.stdout.splitlines()[-1])
    assert (tmp_path / "mlflow.db").exists()
