"""Streaming to a real server: what four threads log arrives point by point, through flushes, a kill and a restart."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import runqueue
from support.mlflow_server import MlflowServer, wait_until
from support.proxy import FaultyProxy
from support.readback import Point, Readback
from support.threads import in_threads
from support.wire_log import assert_within_limits

pytestmark = pytest.mark.live

THREADS = 4
RUNS = 8
KEYS = 2
PATIENCE = 120.0


@pytest.fixture
def steps(whole: bool) -> int:
    """Of each thread in each run; with metrics of its own, so that no point is logged twice."""
    points = 50_000 if whole else 20_000
    return points // (THREADS * RUNS * KEYS)


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[MlflowServer]:
    """A server that the test may kill."""
    with MlflowServer(tmp_path / "server") as server:
        yield server


def kill(server: MlflowServer) -> None:
    """Kill the server as an out-of-memory killer does: no answer is finished."""
    assert server._process is not None
    os.killpg(server._process.pid, signal.SIGKILL)
    server.stop()


def log_all(
    client: runqueue.Client, runs: list[runqueue.PendingRunId], steps: int, progress: list[int], *, flushes: bool
) -> None:
    """Log from four threads to every run, each thread half of a step's points for a key, with flushes as barriers."""

    def work(thread: int) -> None:
        for step in range(steps):
            for run in runs:
                values = {f"t{thread}-{key}": step + key / 2 for key in range(KEYS)}
                client.log_metrics(run, values, step, timestamp=1_000 + step)
            progress[thread] = step
            if flushes and step % 100 == 99:
                client.flush()

    in_threads(work, THREADS)


def assert_all_there(readback: Readback, runs: list[runqueue.PendingRunId], steps: int) -> None:
    expected = {
        f"t{thread}-{key}": [Point(step, 1_000 + step, step + key / 2) for step in range(steps)]
        for thread in range(THREADS)
        for key in range(KEYS)
    }
    for number, run in enumerate(runs):
        stored = readback.run(run.run_id)
        assert stored.content.metrics == expected
        assert stored.content.params == {"number": str(number)}
        assert stored.status == "FINISHED"


def begin(client: runqueue.Client, experiment_id: str) -> list[runqueue.PendingRunId]:
    runs = [client.create_run(experiment_id) for _ in range(RUNS)]
    for number, run in enumerate(runs):
        client.log_param(run, "number", number)
    return runs


def test_four_threads_stream_to_eight_runs_with_flushes_between(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, steps: int
) -> None:
    """50,000 points, each stored once; 20,000 without `--whole`. Requests are full as long as there is a backlog."""
    with runqueue.Client(proxy.uri, flush_interval=0.5, max_pending=10_000, on_failure="raise") as client:
        runs = begin(client, experiment_id)
        log_all(client, runs, steps, [0] * THREADS, flushes=True)
        client.flush()
        assert client.statistics().pending == 0
        for run in runs:
            client.set_terminated(run)
    statistics = client.statistics()
    assert statistics.accepted == statistics.stored == THREADS * RUNS * steps * KEYS + 2 * RUNS
    assert_within_limits(proxy.requests)
    assert_all_there(readback, runs, steps)
    assert sorted(readback.run_ids(experiment_id, view="ALL")) == sorted(str(run.run_id) for run in runs)


def test_a_server_that_is_killed_and_started_again_in_the_middle_gets_everything_once(
    own_server: MlflowServer, caplog: pytest.LogCaptureFixture, steps: int
) -> None:
    """No log call fails, the outage is logged, and every run gets its points once, in order."""
    with Readback(own_server.uri) as readback:
        experiment_id = readback.new_experiment("streamed")
        progress = [0] * THREADS
        with runqueue.Client(own_server.uri, flush_interval=0.5, retry_timeout=1, on_failure="raise") as client:
            runs = begin(client, experiment_id)
            client.flush()
            worker = threading.Thread(target=log_all, args=(client, runs, steps, progress), kwargs={"flushes": False})
            worker.start()
            wait_until(lambda: client.statistics().stored > 3_000, PATIENCE, "nothing is stored")
            kill(own_server)
            worker.join(PATIENCE)
            assert not worker.is_alive()
            wait_until(lambda: "does not take data" in caplog.text, PATIENCE, "the outage was not said")
            left = client.statistics()
            assert left.pending + left.in_flight > 0 and left.failed == left.dropped == 0
            own_server.start()
            wait_until(lambda: client.statistics().pending == 0, PATIENCE, "it was not sent")
            for run in runs:
                client.set_terminated(run)
        statistics = client.statistics()
        assert statistics.accepted == statistics.stored == THREADS * RUNS * steps * KEYS + 2 * RUNS
        assert_all_there(readback, runs, steps)
        assert sorted(readback.run_ids(experiment_id, view="ALL")) == sorted(str(run.run_id) for run in runs)
