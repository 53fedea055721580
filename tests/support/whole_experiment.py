"""
The content of an experiment, read without the library, ids and times left out: the experiments of two runs of one
script are equal.
"""

# Rules of this file: what differs by its nature from process to process is named here, and nothing else is left out.

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from support.mlflow_server import MlflowServer
from support.readback import Readback

_MADE_UP = re.compile(r"[a-z]+-[a-z]+-\d+")
"""The name of a run that was given none."""
_OF_THE_PROCESS = frozenset(("mlflow.user", "mlflow.log-model.history"))
_IDS = re.compile(r"m-[0-9a-f]{32}|[0-9a-f]{32}")
_TIMED = ("_time", "training_time")
"""Metrics that say how long something took."""


def whole_experiment(server: MlflowServer, reader: Readback, name: str) -> dict[str, Any]:
    """
    Return the content of an experiment.

    Args:
        server: The server, whose artifacts are read from its folder.
        reader: A reader of this server.
        name: The experiment's name.
    """
    experiment_id = reader.experiment_id(name)
    ids = reader.run_ids(experiment_id, "ALL")
    raw = [reader.get("runs/get", {"run_id": run_id})["run"] for run_id in ids]
    names = {run["info"]["run_id"]: _name(run) for run in raw}
    models = reader.post("logged-models/search", {"experiment_ids": [experiment_id]}).get("models", [])
    folder = server.folder / "artifacts" / experiment_id
    return {
        "runs": _sorted(_run(reader, run, names, folder) for run in raw),
        "models": _sorted(_model(model, names, folder) for model in models),
    }


def _run(reader: Readback, run: dict[str, Any], names: dict[str, str], folder: Path) -> dict[str, Any]:
    info, data = run["info"], run.get("data", {})
    stored = reader.run(info["run_id"])
    tags = {
        key: value
        for key, value in stored.tags.items()
        if key not in _OF_THE_PROCESS and not key.startswith("mlflow.source.")
    }
    parent = tags.pop("mlflow.parentRunId", None)
    if tags.get("mlflow.runName") and _MADE_UP.fullmatch(tags["mlflow.runName"]):
        del tags["mlflow.runName"]
    inputs, outputs = run.get("inputs", {}), run.get("outputs", {})
    return {
        "name": names[info["run_id"]],
        "parent": None if parent is None else names[parent],
        "status": info["status"],
        "ended": "end_time" in info,
        "stage": info["lifecycle_stage"],
        "params": stored.content.params,
        "tags": {key: _IDS.sub("<id>", value) for key, value in tags.items()},
        "metrics": {
            key: [(point.step, repr(point.value)) for point in points]
            for key, points in stored.content.metrics.items()
            if not key.endswith(_TIMED)
        },
        "metric keys": sorted(metric["key"] for metric in data.get("metrics", [])),
        "datasets": [tuple(dataset) for dataset in stored.content.inputs],
        "model inputs": len(inputs.get("model_inputs", [])),
        "model outputs": [int(output.get("step", 0)) for output in outputs.get("model_outputs", [])],
        "artifacts": _files(folder / info["run_id"] / "artifacts"),
    }


def _model(model: dict[str, Any], names: dict[str, str], folder: Path) -> dict[str, Any]:
    info, data = model["info"], model.get("data", {})
    return {
        "name": info["name"],
        "type": info.get("model_type", ""),
        "status": info["status"],
        "run": names.get(info.get("source_run_id", "")),
        "params": _pairs(data.get("params", [])),
        "tags": sorted(each["key"] for each in info.get("tags", [])),
        "metrics": sorted(
            (each["key"], int(each.get("step", 0)), each["value"], each.get("dataset_name", ""))
            for each in data.get("metrics", [])
            if not each["key"].endswith(_TIMED)
        ),
        "artifacts": _files(folder / "models" / info["model_id"] / "artifacts"),
    }


def _files(folder: Path) -> dict[str, str]:
    """Return files by path: their content, or that they exist where they hold ids, times, pictures or addresses."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.suffix == ".txt" else ""
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _name(run: dict[str, Any]) -> str:
    name = str(run["info"]["run_name"])
    return "" if _MADE_UP.fullmatch(name) else name


def _pairs(items: list[dict[str, str]]) -> dict[str, str]:
    return {item["key"]: item.get("value", "") for item in items}


def _sorted(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda each: json.dumps(each, sort_keys=True, default=str))
