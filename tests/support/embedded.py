"""Tools for tests of the embedded default: stores of a test's own, read back by MLflow's own client."""

from __future__ import annotations

import importlib
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.mlflow_server import clean_environment
from support.readback import Content, Point, StoredInput, content

NOLOAD = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
"""
MLflow's own warning under SQLAlchemy 2.1, once a process, at whatever call comes first; were it an error, MLflow's
store would be broken for the rest of the process.
"""

FIRST_USE = """
import json, pathlib, sys
import runqueue
with runqueue.Client() as client:
    parent = client.create_run(experiment_name="first use", run_name="parent", tags={"t": "1"})
    run = client.create_run(experiment_name="first use", parent_run_id=parent)
    client.log_metrics(run, {"m": 1.5, "nan": float("nan")}, step=3, timestamp=4)
    client.set_terminated(run)
    early = [name for name in ("mlflow", "sqlalchemy", "httpx", "anyio") if name in sys.modules]
    client.flush()
    late = [name for name in ("mlflow", "httpx") if name in sys.modules]
facts = {"uri": client.tracking_uri, "runs": [parent.run_id, run.run_id], "early": early, "late": late}
pathlib.Path("facts.json").write_text(json.dumps(facts))
"""


def only(*stores: str) -> pytest.MarkDecorator:
    """Restrict a test to one kind of store."""
    return pytest.mark.parametrize("embedded_uri", stores, indirect=True)


def run_script(script: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, cwd=folder, env=clean_environment()
    )


def mlflow_client(uri: str) -> Any:
    """Return MLflow's own client (untyped, as its entities are). Importing MLflow takes seconds."""
    mlflow: Any = importlib.import_module("mlflow")
    return mlflow.MlflowClient(uri)


def read(uri: str, run_id: str | None) -> tuple[Any, Content]:
    """Return a run as MLflow's own client reads it, NaN as -1 so that results can be compared."""
    assert run_id is not None
    client = mlflow_client(uri)
    run = client.get_run(run_id)
    histories = {key: client.get_metric_history(run_id, key) for key in run.data.metrics}
    return run, content(
        params=run.data.params,
        tags={key: tag for key, tag in run.data.tags.items() if not key.startswith(("mlflow.", "runqueue."))},
        metrics={
            key: [Point(p.step, p.timestamp, -1.0 if math.isnan(p.value) else p.value) for p in points]
            for key, points in histories.items()
        },
        inputs=[
            StoredInput(
                given.dataset.name,
                given.dataset.digest,
                given.dataset.source_type,
                given.dataset.source,
                given.dataset.schema or "",
                given.dataset.profile or "",
                tuple(sorted((tag.key, tag.value) for tag in given.tags)),
            )
            for given in (run.inputs.dataset_inputs if run.inputs else ())
        ],
    )


def mlflow_store(uri: str) -> Any:
    """Return the very store object that a client of this URI uses: MLflow keeps one a process."""
    utils: Any = importlib.import_module("mlflow.tracking._tracking_service.utils")
    return utils._get_store(uri)


def run_ids(uri: str, experiment_id: str = "0") -> list[str]:
    return [run.info.run_id for run in mlflow_client(uri).search_runs([experiment_id], max_results=1_000)]
