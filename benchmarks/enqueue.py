"""
Enqueue cases: what a call costs the thread that logs.

The clock is the wall clock, not the thread's CPU clock: a call that waits for a lock is idle, yet its caller waits. The
queueing clients send nothing, as they are never flushed; peers that send or write in the background do so meanwhile,
and what that costs the caller is counted.

The garbage collector stays on, as its users have it. But first it has all of its debts: what imports have left is swept
before the clock starts, and not, in one build and not in the next, in the midst of the calls.
"""

import gc
import time
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any

from benchmarks.steps import log_steps, steps, values
from benchmarks.work import Work


def enqueue_ten(work: Work) -> dict[str, float]:
    """`log_metrics` of 10 metrics a call, in µs per metric."""
    return {"caller": _time_log_metrics(work, metrics_per_call=10) / 10}


def enqueue_one(work: Work) -> dict[str, float]:
    """`log_metrics` of 1 metric a call, in µs per call."""
    return {"caller": _time_log_metrics(work, metrics_per_call=1)}


def enqueue_single(work: Work) -> dict[str, float]:
    """
    `log_metric`, in µs per call. A peer without that form is called as its users have to: `log_metrics` of a dict made
    for the call.
    """
    client = work.connect()
    run_id = client.create_run("0")
    logged = list(islice(cycle(values(0)), work.calls))
    log_metric: Callable[[Any, str, float, int], None] | None = getattr(client, "log_metric", None)
    log_metrics = client.log_metrics
    gc.collect()
    if log_metric is None:
        began = time.perf_counter_ns()
        for step, value in enumerate(logged):
            log_metrics(run_id, {"loss": value}, step)
    else:
        began = time.perf_counter_ns()
        for step, value in enumerate(logged):
            log_metric(run_id, "loss", value, step)
    return {"caller": (time.perf_counter_ns() - began) / 1_000 / work.calls}


def _time_log_metrics(work: Work, metrics_per_call: int) -> float:
    """µs a call."""
    client = work.connect()
    run_id = client.create_run("0")
    steps(work.calls, metrics_per_call)  # makes the dicts
    gc.collect()
    began = time.perf_counter_ns()
    log_steps(client, run_id, work.calls, metrics_per_call)
    return (time.perf_counter_ns() - began) / 1_000 / work.calls
