"""
Try the built wheel as a user would: in an environment that holds nothing of the project but that wheel.

    python .ci/smoke.py PYTHON      PYTHON: the interpreter of that environment

A real `mlflow server` is started with the interpreter that runs this file. The README's first block of code logs to it, and
the run is read back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.mlflow_server import MlflowServer, clean_environment


def first_block(readme: str) -> str:
    """The first block of Python in the README."""
    return readme.partition("```python\n")[2].partition("```")[0]


def asked(uri: str, path: str, body: dict[str, Any]) -> Any:
    """The answer of a call of MLflow's REST API."""
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def main(python: Path) -> None:
    """
    Raises:
        CalledProcessError: A command has failed.
        AssertionError: A command has printed, or the server has stored, something else than expected.
    """
    with tempfile.TemporaryDirectory() as folder, MlflowServer(Path(folder)) as server:
        environment = clean_environment() | {"MLFLOW_TRACKING_URI": server.uri, "HOME": folder}

        def run(*command: str) -> str:
            print("$", *(each.splitlines()[0] for each in command[:3]), flush=True)
            done = subprocess.run(
                command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=120
            )
            print(done.stdout, end="", flush=True)
            return done.stdout

        where = run(str(python), "-c", "import runqueue; print(runqueue.__file__)")
        assert "site-packages" in where, "the wheel is not what is imported"
        command = str(python.parent / "runqueue")
        assert run(command, "--version").strip().startswith("runqueue"), "no version"
        assert server.uri in run(command, "doctor"), "the doctor looked elsewhere"
        printed = run(str(python), "-W", "error", "-c", first_block((ROOT / "README.md").read_text("utf-8")))
        run_id = printed.split()[0]
        (stored,) = asked(server.uri, "runs/search", {"experiment_ids": ["0"]})["runs"]
        assert stored["info"]["run_id"] == run_id
        assert stored["info"]["status"] == "FINISHED"
        assert {each["key"]: each["value"] for each in stored["data"]["params"]} == {"lr": "0.0003", "layers": "12"}
        assert {each["key"]: each["step"] for each in stored["data"]["metrics"]} == {"loss": 999, "acc": 999}
        assert [each["dataset"]["name"] for each in stored["inputs"]["dataset_inputs"]] == ["digits"]


if __name__ == "__main__":
    main(Path(os.path.abspath(sys.argv[1])))  # not resolved: a link in an environment must not lead out of it
