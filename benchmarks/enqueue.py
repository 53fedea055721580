"""
Enqueue cases: what a call costs the thread that logs. Nothing is sent: no server runs, nothing is flushed.

The clock is the wall clock, not the thread's CPU clock: a call that waits for a lock is idle, yet its caller waits.
"""

import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from benchmarks.peer import Peer, QueueingClient

# Training loops log the same keys at every step, with new values.
VALUES_PER_KEY = 100


def enqueue_ten(peer: Peer, calls: int, tracking_uri: str) -> float:
    """`log_metrics` of 10 metrics a call, in µs per metric."""
    return _time_log_metrics(peer, calls, tracking_uri, metrics_per_call=10) / (calls * 10)


def enqueue_one(peer: Peer, calls: int, tracking_uri: str) -> float:
    """`log_metrics` of 1 metric a call, in µs per call."""
    return _time_log_metrics(peer, calls, tracking_uri, metrics_per_call=1) / calls


def enqueue_single(peer: Peer, calls: int, tracking_uri: str) -> float:
    """
    `log_metric`, in µs per call. A peer without that form is called as its users have to: `log_metrics` of a dict made
    for the call.
    """
    client = peer.connect(tracking_uri)
    run_id = client.create_run("0")
    values = list(islice(cycle(_values(0)), calls))
    log_metric: Callable[[Any, str, float, int], None] | None = getattr(client, "log_metric", None)
    log_metrics = client.log_metrics
    if log_metric is None:
        began = time.perf_counter_ns()
        for step, value in enumerate(values):
            log_metrics(run_id, {"loss": value}, step)
    else:
        began = time.perf_counter_ns()
        for step, value in enumerate(values):
            log_metric(run_id, "loss", value, step)
    return (time.perf_counter_ns() - began) / 1_000 / calls


def log_steps(client: QueueingClient, run_id: Any, calls: int, metrics_per_call: int) -> None:
    """Log steps 0, 1, … of one run, as a training loop does: the keys stay, the values change."""
    log_metrics = client.log_metrics
    for step, metrics in enumerate(_steps(calls, metrics_per_call)):
        log_metrics(run_id, metrics, step)


def _time_log_metrics(peer: Peer, calls: int, tracking_uri: str, metrics_per_call: int) -> float:
    client = peer.connect(tracking_uri)
    run_id = client.create_run("0")
    began = time.perf_counter_ns()
    log_steps(client, run_id, calls, metrics_per_call)
    return (time.perf_counter_ns() - began) / 1_000


def _steps(calls: int, metrics_per_call: int) -> "islice[dict[str, float]]":
    """
    The dicts to log. They are made before the loop and come round again, so that making them is not counted; taking the
    next of them costs about 0.03 µs, which is.
    """
    columns = [_values(column) for column in range(metrics_per_call)]
    rows = [{f"metric_{column}": value for column, value in enumerate(row)} for row in zip(*columns, strict=True)]
    return islice(cycle(rows), calls)


def _values(column: int) -> list[float]:
    return [(column + 1) / (step + 3) for step in range(VALUES_PER_KEY)]
