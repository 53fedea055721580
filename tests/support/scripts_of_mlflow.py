"""The ways to run a script that is written for MLflow alone: with queued writes, and without, for comparison."""

# Rules of this file: the script itself is not changed; a launch is a command line and environment variables.

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import attrs

from support.mlflow_server import clean_environment

SCRIPTS = Path(__file__).parent / "scripts"
PATIENCE = 240.0

_ENABLED = "import sys, runpy; import runqueue.integrations.mlflow as q; q.enable(); sys.argv = sys.argv[1:]; "
_ENABLED += "runpy.run_path(sys.argv[0], run_name='__main__')"


@attrs.frozen
class Launch:
    """A way to start a script."""

    command: tuple[str, ...]
    prefix: str = ""
    """Before the tracking URI."""


QUEUED_LAUNCHES = {
    "one line": Launch((sys.executable, "-c", _ENABLED)),
    "no line": Launch((sys.executable, "-m", "runqueue", "run")),
    "environment": Launch((sys.executable,), "runqueue+"),
}
UNQUEUED_LAUNCH = Launch((sys.executable,))


def run_script(
    launch: Launch, script: Path, uri: str, experiment: str, folder: Path, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Run a script to its end.

    Args:
        launch: How to start it.
        script: A file of `SCRIPTS`, or another one.
        uri: The plain tracking URI.
        experiment: The name of the experiment.
        folder: The working folder.
        variables: Further environment variables.
    """
    environment = clean_environment() | {
        "MLFLOW_TRACKING_URI": launch.prefix + uri,
        "MLFLOW_EXPERIMENT_NAME": experiment,
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [*launch.command, str(script)],
        cwd=folder,
        env=environment | dict(variables or {}),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
