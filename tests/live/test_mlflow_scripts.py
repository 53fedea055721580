"""Scripts written for MLflow alone leave the same on a real server whether their writes are queued or not."""

from __future__ import annotations

import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.mlflow_server import MlflowServer
from support.proxy import Fault, FaultyProxy
from support.readback import Readback
from support.scripts_of_mlflow import QUEUED_LAUNCHES, SCRIPTS, UNQUEUED_LAUNCH, Launch, run_script
from support.whole_experiment import whole_experiment

pytestmark = pytest.mark.live

NAMES = ("handwritten", "sklearn_autolog", "xgboost_autolog", "transformers_callback")

Outcome = tuple[dict[str, Any], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run_unqueued(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """Returns the content and the output of a script without queueing; each script runs once."""
    known: dict[str, Outcome] = {}

    def found(name: str) -> Outcome:
        if name not in known:
            experiment = f"{name} {uuid.uuid4().hex}"
            done = run_script(
                UNQUEUED_LAUNCH, SCRIPTS / f"{name}.py", mlflow_server.uri, experiment, tmp_path_factory.mktemp(name)
            )
            assert done.returncode == 0, done.stderr
            with Readback(mlflow_server.uri) as reader:
                known[name] = whole_experiment(mlflow_server, reader, experiment), done
        return known[name]

    return found


@pytest.mark.sample("sklearn_autolog-environment")
@pytest.mark.parametrize("launch", QUEUED_LAUNCHES.values(), ids=QUEUED_LAUNCHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_script_leaves_the_same_with_queued_writes(
    name: str,
    launch: Launch,
    run_unqueued: Callable[[str], Outcome],
    proxy: FaultyProxy,
    mlflow_server: MlflowServer,
    readback: Readback,
    tmp_path: Path,
) -> None:
    """
    Runs, params, tags, every metric point, datasets, models, artifacts, parents and status; and the writes were queued.
    """
    expected, plain = run_unqueued(name)
    experiment = f"{name} {uuid.uuid4().hex}"
    done = run_script(launch, SCRIPTS / f"{name}.py", proxy.uri, experiment, tmp_path)
    assert done.returncode == 0, done.stderr
    found = whole_experiment(mlflow_server, readback, experiment)
    assert len(found["runs"]) == len(expected["runs"])
    for ours, theirs in zip(found["runs"], expected["runs"], strict=True):
        assert ours == theirs
    assert found == expected
    assert _lines(done.stdout) == _lines(plain.stdout)
    assert "runqueue+" not in done.stdout
    assert proxy.count("runs/log-batch") > 0
    if name == "handwritten":  # only the entries that cannot be queued go to the plain store
        assert proxy.count("runs/log-metric") == 2
        assert proxy.count("runs/log-parameter") == 1
        assert proxy.count("runs/set-tag") == 1


def _lines(text: str) -> list[str]:
    """
    Return the script's own lines, and for each of MLflow's links a line without ids, sorted, as threads print too.
    """
    lines = re.sub(r"[0-9a-f]{32}|\d{13}", "<id>", text).splitlines()
    return sorted(line.split(" at: ")[0].split(" View run ")[0] for line in lines if line)


def test_logging_is_five_times_faster_than_mlflow_itself_where_the_server_is_20_ms_away(
    proxy: FaultyProxy, readback: Readback, tmp_path: Path, whole: bool
) -> None:
    """
    The same script and server, one launch after the other, each timed to the end of its `end_run`; everything is
    stored. Without `--whole`, one of the queued launches.
    """
    launches = QUEUED_LAUNCHES if whole else {"no line": QUEUED_LAUNCHES["no line"]}
    proxy.fail("", Fault.delayed(0.020), times=None)
    seconds: dict[str, float] = {}
    for name, launch in (("plain", UNQUEUED_LAUNCH), *launches.items()):
        experiment = f"loop {uuid.uuid4().hex}"
        done = run_script(launch, SCRIPTS / "logging_loop.py", proxy.uri, experiment, tmp_path)
        assert done.returncode == 0, done.stderr
        (took,) = re.findall(r"SECONDS (\S+)", done.stdout)
        seconds[name] = float(took)
        (run_id,) = readback.run_ids(readback.experiment_id(experiment))
        stored = readback.run(run_id)
        assert stored.status == "FINISHED"
        assert len(stored.content.params) == 20 and stored.content.tags == {"done": "yes"}
        assert {key: len(points) for key, points in stored.content.metrics.items()} == dict.fromkeys(
            ("loss", "accuracy", "rate"), 150
        )
    ratios = {name: seconds["plain"] / each for name, each in seconds.items() if name != "plain"}
    print(
        f"plain: {seconds['plain']:.2f} s;", ", ".join(f"{name}: {each:.0f} x faster" for name, each in ratios.items())
    )
    assert min(ratios.values()) >= 5
