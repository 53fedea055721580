"""A producer a hundred times faster than its server, for a minute: memory stays within what `max_pending` allows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runqueue.settings._config import DEFAULT_MAX_PENDING
from support import pressure_probe
from support.mlflow_server import clean_environment
from support.proxy import Fault, ScriptedServer

BYTES_AN_ENTRY = 80
"""Of metrics logged ten a call; what `Config.max_pending` and the README say."""
ANSWER_SECONDS = 0.5
"""A request of 1,000 metrics at most, one at a time: 2,000 a second."""


@pytest.fixture
def slow_server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as server:
        server.fail("runs/log-batch", Fault(delay=ANSWER_SECONDS), times=None)
        yield server


def test_a_producer_a_hundred_times_faster_than_its_server_stays_within_the_bound(
    slow_server: ScriptedServer, whole: bool
) -> None:
    """
    With `on_full="drop"` it runs at its own pace, with "block" at the server's; both for a minute, side by side.

    Without `--whole`, for a quarter of a minute: the queue is full after a few seconds.
    """
    seconds = 60 if whole else 15
    script = str(Path(pressure_probe.__file__))
    environment = clean_environment() | {"PYTHONPATH": str(Path(script).parents[1])}
    probes = {
        on_full: subprocess.Popen(
            [sys.executable, script, slow_server.uri, run_id * 32, on_full, str(seconds)],
            stdout=subprocess.PIPE,
            env=environment,
        )
        for on_full, run_id in (("drop", "a"), ("block", "b"))
    }
    try:
        measured = {on_full: json.loads(probe.communicate(timeout=5 * seconds)[0]) for on_full, probe in probes.items()}
    finally:
        for probe in probes.values():
            probe.kill()
            probe.wait()
    for counts in measured.values():
        assert counts["grown_bytes"] <= 1.2 * DEFAULT_MAX_PENDING * BYTES_AN_ENTRY, counts
        assert counts["pending"] <= DEFAULT_MAX_PENDING
        assert counts["failed"] == 0
        assert counts["accepted"] == counts["offered"] + pressure_probe.METRICS_A_CALL
        assert counts["accepted"] == counts["stored"] + counts["pending"] + counts["dropped"]
    assert measured["drop"]["offered"] >= 100 * measured["drop"]["stored"]
    assert measured["drop"]["pending"] >= 0.99 * DEFAULT_MAX_PENDING, "the bound was not tried"
    assert measured["block"]["dropped"] == 0
    assert measured["block"]["pending"] >= 0.99 * DEFAULT_MAX_PENDING
