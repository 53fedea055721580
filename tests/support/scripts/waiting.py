"""A test that starts both kinds of servers and waits until its test run is cut off; see tests/live/test_cut_off.py."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from support.mlflow_server import MlflowServer
from support.postgres import shared_postgres


def test_waits(mlflow_server: MlflowServer) -> None:
    with shared_postgres() as database:
        report = Path(os.environ["FOLDERS"])
        report.with_suffix(".part").write_text(f"{mlflow_server.folder}\n{database.folder}")
        report.with_suffix(".part").rename(report)  # whole at once, for the one that waits for it
        threading.Event().wait()
