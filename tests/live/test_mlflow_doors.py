"""
Scripts written for MLflow alone, through each door of the queued store: what they leave on a real server equals what
they leave without it.
"""

from __future__ import annotations

import re
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.doors import DOORS, PLAIN, SCRIPTS, Door, start
from support.mlflow_server import MlflowServer
from support.proxy import Fault, FaultyProxy
from support.readback import Readback
from support.whole_experiment import whole_experiment

pytestmark = pytest.mark.live

NAMES = ("handwritten", "sklearn_autolog", "xgboost_autolog", "transformers_callback")

Outcome = tuple[dict[str, Any], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def plainly(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Outcome]:
    """What a script does and leaves by MLflow alone; found once."""
    known: dict[str, Outcome] = {}

    def found(name: str) -> Outcome:
        if name not in known:
            experiment = f"{name} {uuid.uuid4().hex}"
            done = start(PLAIN, SCRIPTS / f"{name}.py", mlflow_server.uri, experiment, tmp_path_factory.mktemp(name))
            assert done.returncode == 0, done.stderr
            with Readback(mlflow_server.uri) as reader:
                known[name] = whole_experiment(mlflow_server, reader, experiment), done
        return known[name]

    return found


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("name", NAMES)
def test_a_script_leaves_the_same_through_each_door(
    name: str,
    door: Door,
    plainly: Callable[[str], Outcome],
    proxy: FaultyProxy,
    mlflow_server: MlflowServer,
    readback: Readback,
    tmp_path: Path,
) -> None:
    """Runs, params, tags, every metric point, datasets, models, artifacts, parents and status; and it was queued."""
    expected, plain = plainly(name)
    experiment = f"{name} {uuid.uuid4().hex}"
    done = start(door, SCRIPTS / f"{name}.py", proxy.uri, experiment, tmp_path)
    assert done.returncode == 0, done.stderr
    found = whole_experiment(mlflow_server, readback, experiment)
    assert len(found["runs"]) == len(expected["runs"])
    for ours, theirs in zip(found["runs"], expected["runs"], strict=True):
        assert ours == theirs
    assert found == expected
    assert _lines(done.stdout) == _lines(plain.stdout)
    assert "runqueue+" not in done.stdout
    assert proxy.count("runs/log-batch") > 0
    if name == "handwritten":  # what does not fit takes MLflow's own way, and nothing else does
        assert proxy.count("runs/log-metric") == 2
        assert proxy.count("runs/log-parameter") == 1
        assert proxy.count("runs/set-tag") == 1


def _lines(text: str) -> list[str]:
    """What the script itself prints, and how many links MLflow does; some of its threads', in whatever order."""
    lines = re.sub(r"[0-9a-f]{32}|\d{13}", "<id>", text).splitlines()
    return sorted(line.split(" at: ")[0].split(" View run ")[0] for line in lines if line)


def test_logging_is_five_times_faster_than_mlflow_itself_where_the_server_is_20_ms_away(
    proxy: FaultyProxy, readback: Readback, tmp_path: Path
) -> None:
    """The same script, the same server, one after the other, each to the end of its `end_run`; all is stored."""
    proxy.fail("", Fault.delayed(0.020), times=None)
    seconds: dict[str, float] = {}
    for name, door in (("plain", PLAIN), *DOORS.items()):
        experiment = f"loop {uuid.uuid4().hex}"
        done = start(door, SCRIPTS / "logging_loop.py", proxy.uri, experiment, tmp_path)
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
