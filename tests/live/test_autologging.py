"""
Autologging stores the same through `QueueingClient` as through MLflow's client: one script, one server, everything read
back by plain HTTP and compared, ids and times aside.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.mlflow_server import clean_environment
from support.proxy import FaultyProxy
from support.readback import Readback, StoredRun
from support.wire_log import entries

pytestmark = pytest.mark.live

SCRIPT = Path(__file__).parents[1] / "support" / "scripts" / "fit_twice.py"
RANDOM_TAGS = {"mlflow.runName", "mlflow.parentRunId", "runqueue.create_id"}
"""Tags with random values: a name that the server invents, and ids."""


def fit_twice(flavor: str, proxy: FaultyProxy, folder: Path) -> tuple[str, str]:
    """Run the script; return the ids of its experiments, without and with `install()`."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), flavor, proxy.uri],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=folder,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert "was never closed" not in done.stderr and "were not sent" not in done.stderr, done.stderr
    plain, queueing = done.stdout.split()[-2:]
    return plain, queueing


def stored_in(experiment_id: str, readback: Readback) -> list[dict[str, Any]]:
    """Return all runs and logged models of an experiment, sorted, without random ids and times."""
    runs = {run_id: readback.run(run_id) for run_id in readback.run_ids(experiment_id)}
    models = readback.post("logged-models/search", {"experiment_ids": [experiment_id]}).get("models", [])
    found = [_run(run, runs) for run in runs.values()] + [_model(model, runs) for model in models]
    return sorted(found, key=repr)


def _run(run: StoredRun, runs: dict[str, StoredRun]) -> dict[str, Any]:
    parent = runs.get(run.tags.get("mlflow.parentRunId", ""))
    return {
        "status": run.status,
        "ended": run.end_time is not None,
        "started with its parent": parent is not None and parent.start_time == run.start_time,
        "parent": parent and parent.content.params,
        "tags": {key: value for key, value in run.tags.items() if key not in RANDOM_TAGS},
        "params": run.content.params,
        "metrics": {
            key: [(point.step, _shown(key, point.value)) for point in points]
            for key, points in sorted(run.content.metrics.items())
        },
        "inputs": run.content.inputs,
    }


def _model(model: dict[str, Any], runs: dict[str, StoredRun]) -> dict[str, Any]:
    info, data = model["info"], model.get("data", {})
    return {
        "model": info["name"],
        "status": info["status"],
        "of a run with": runs[info["source_run_id"]].content.params,
        "params": sorted((each["key"], each["value"]) for each in data.get("params", [])),
        "metrics": sorted(
            (
                each["key"],
                each.get("step", 0),
                _shown(each["key"], each["value"]),
                each.get("dataset_name"),
                each.get("dataset_digest"),
                runs[each["run_id"]].content.params,
            )
            for each in data.get("metrics", [])
        ),
    }


def _shown(key: str, value: float) -> float | str:
    return "a time" if key.endswith("_time") else value


def user_agents(proxy: FaultyProxy, kind: str) -> list[str]:
    """Return which clients have sent entries of this kind, in the order of the requests."""
    return [
        request.headers["user-agent"].partition("/")[0]
        for request in proxy.to("runs/log-batch")
        if entries(request, kind)
    ]


@pytest.mark.sample("sklearn")
@pytest.mark.parametrize("flavor", ["sklearn", "xgboost", "lightgbm"])
def test_autologging_stores_the_same_through_either_client(
    flavor: str, proxy: FaultyProxy, readback: Readback, tmp_path: Path
) -> None:
    """Runs, children, status, params, every metric point, tags, datasets, logged models and their metrics."""
    plain_id, queueing_id = fit_twice(flavor, proxy, tmp_path)
    plain, queueing = stored_in(plain_id, readback), stored_in(queueing_id, readback)
    assert queueing == plain
    by_whom = user_agents(proxy, "params")
    half = by_whom.index("runqueue")
    assert half > 0 and set(by_whom[half:]) == {"runqueue"}, "runqueue has sent the second half, and all of it"
    runs = [each for each in plain if "inputs" in each]
    assert all(run["inputs"] and run["params"] and run["metrics"] for run in runs), "there is something to compare"
    if flavor == "sklearn":
        assert [run["parent"] is not None for run in runs].count(True) == 6, "a child for each point of the grid"
        children = [readback.run(each) for each in readback.run_ids(queueing_id)]
        assert sum("runqueue.create_id" in run.tags for run in children) == 6
        assert any("best_cv_score" in run["metrics"] for run in runs)
    else:
        assert any("best_iteration" in run["metrics"] for run in runs), "early stopping goes through the client"
