"""A test run that is cut off leaves no server behind, whatever ends it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from support.mlflow_server import wait_until

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
WAITING = ROOT / "tests" / "support" / "scripts" / "waiting.py"
PATIENCE = 120.0
"""Seconds for what takes ten where nothing else runs."""


def running_in(folders: list[Path]) -> list[psutil.Process]:
    """The processes that work in one of these folders, which is where each server is started."""
    found = []
    for process in psutil.process_iter():
        try:
            place = Path(process.cwd())
        except (psutil.Error, OSError):  # it has just ended, is a zombie, or is another user's
            continue
        if any(place.is_relative_to(folder) for folder in folders):
            found.append(process)
    return found


@pytest.mark.whole
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT], ids=lambda number: number.name)
def test_a_test_run_that_is_cut_off_leaves_no_server_behind(
    number: signal.Signals, workers: int, tmp_path: Path
) -> None:
    """Neither of its `mlflow server` nor of its PostgreSQL, in a single process or with a worker of pytest-xdist."""
    report = tmp_path / "folders"
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "-p", "no:cacheprovider", str(WAITING)]
    environment = {**os.environ, "FOLDERS": str(report), "PYTEST_DEBUG_TEMPROOT": str(tmp_path)}
    for variable in [each for each in environment if each.startswith(("PYTEST_XDIST", "PYTEST_ADDOPTS"))]:
        del environment[variable]
    with (tmp_path / "output").open("wb") as output:
        run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        wait_until(lambda: report.exists() or run.poll() is not None, PATIENCE, "the servers do not run")
        assert report.exists(), (tmp_path / "output").read_text()
        folders = [Path(line) for line in report.read_text().splitlines()]
        names = {process.name() for process in running_in(folders)}
        assert "postgres" in names and len(names) > 1, names
        run.send_signal(number)
        wait_until(lambda: not running_in(folders), PATIENCE, "a server is left")
        wait_until(lambda: not folders[1].exists(), PATIENCE, "PostgreSQL's folder is left")
    finally:
        run.kill()
        run.wait()
