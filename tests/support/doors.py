"""
The ways in which a script that knows of MLflow alone comes to the queued store, and none: what it is compared with.
"""

# Rules of this file: the script itself is not touched; a door is a command line and an environment.

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
class Door:
    """How a script is started."""

    command: tuple[str, ...]
    prefix: str = ""
    """Before the tracking URI."""


DOORS = {
    "one line": Door((sys.executable, "-c", _ENABLED)),
    "no line": Door((sys.executable, "-m", "runqueue", "run")),
    "environment": Door((sys.executable,), "runqueue+"),
}
PLAIN = Door((sys.executable,))


def start(
    door: Door, script: Path, uri: str, experiment: str, folder: Path, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """
    Run a script to its end.

    Args:
        door: The way in.
        script: Of `SCRIPTS`, or another.
        uri: The plain tracking URI.
        experiment: Its name.
        folder: To work in.
        variables: More of the environment.
    """
    environment = clean_environment() | {
        "MLFLOW_TRACKING_URI": door.prefix + uri,
        "MLFLOW_EXPERIMENT_NAME": experiment,
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [*door.command, str(script)],
        cwd=folder,
        env=environment | dict(variables or {}),
        check=False,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
