"""The README's way from MLflow to runqueue: both sides of its diff run, and store the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlflow
import pytest

import runqueue
from support.mlflow_server import MlflowServer
from support.readback import Readback

pytestmark = pytest.mark.live

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


def sides() -> tuple[str, str]:
    """The script before and after the diff."""
    (diff,) = re.findall(r"## Coming from MLflow\n.*?```diff\n(.*?)```", README, re.DOTALL)
    lines = diff.splitlines()
    assert sum(line.startswith(("-", "+")) for line in lines) == 5, "five lines of diff"
    before, after = ("\n".join(line[1:] for line in lines if line[0] in kept) for kept in (" -", " +"))
    return before, after


def test_both_sides_of_the_diff_store_the_same(
    mlflow_server: MlflowServer, readback: Readback, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    """Status, params, and every point of the metric; without `--whole`, of a loop of 100 steps."""
    steps = 1_000 if whole else 100
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    stored = []
    for script in sides():
        known = set(readback.run_ids("0"))
        names: dict[str, Any] = {"mlflow": mlflow, "runqueue": runqueue}
        assert "range(1_000)" in script
        exec(script.replace("1_000", str(steps)), names)  # noqa: S102 - the README is ours
        (run_id,) = set(readback.run_ids("0")) - known
        assert run_id in (names["run"], getattr(names["run"], "run_id", None))
        run = readback.run(run_id)
        points = [(point.step, point.value) for point in run.content.metrics["loss"]]
        stored.append((run.status, run.content.params, points))
    assert stored[0] == stored[1]
    assert stored[1][0] == "FINISHED" and len(stored[1][2]) == steps
