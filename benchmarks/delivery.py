"""
Delivery cases: the whole client, from the first call until the server has answered for everything.

The process's CPU clock (user + system, of all its threads) is read, so it does not matter on which thread a client does
its work, nor how long the server takes. The server is another process and is not counted. What is paid once in a
process (imports on first use, thread start, the first connection) is paid by a run of ten metrics before the clock
starts. The harness checks that the server has received everything.
"""

import time
from typing import Any

from benchmarks.rest import Rest
from benchmarks.steps import log_steps
from benchmarks.work import Work

METRICS_PER_CALL = 10
WARM_UP_METRICS = 10
METRICS_PER_RUN = 1_000  # a full batch, in the case of ever more runs
LEAST_MEASURED = 1_000_000  # metrics; less work than that is repeated, as it would be too short to be timed
A_RUN = "0" * 32


def one_run(work: Work) -> dict[str, float]:
    """One run: created, metrics logged 10 a call, terminated, flushed; CPU µs per metric."""
    client = work.connect()
    warm_up(client)
    began = time.process_time_ns()
    log_run(client, work.size)
    client.flush()
    return {"cpu": (time.process_time_ns() - began) / 1_000 / work.size}


def small_runs(work: Work) -> dict[str, float]:
    """Many runs of one metric each: CPU in ms, and requests, for each run."""
    client = work.connect()
    warm_up(client)
    rest = Rest(work.tracking_uri)
    requests = rest.counts()["requests"]
    began = time.process_time_ns()
    for step in range(work.size):
        run_id = client.create_run("0")
        client.log_metrics(run_id, {"loss": 1 / (step + 1)}, step)
        client.set_terminated(run_id, "FINISHED")
    client.flush()
    cpu = time.process_time_ns() - began
    return {"cpu": cpu / 1e6 / work.size, "requests": (rest.counts()["requests"] - requests) / work.size}


def more_metrics(work: Work) -> dict[str, float]:
    """Metrics for one run that exists already, then a flush; CPU µs per metric."""
    client = work.connect()
    warm_up(client)
    times = repetitions(work.size)
    began = time.process_time_ns()
    for _ in range(times):
        log_steps(client, A_RUN, work.size // METRICS_PER_CALL, METRICS_PER_CALL)
        client.flush()
    return {"cpu": (time.process_time_ns() - began) / 1_000 / (work.size * times)}


def more_runs(work: Work) -> dict[str, float]:
    """A number of runs with a full batch each, with their creation and end, then a flush; CPU µs per metric."""
    client = work.connect()
    warm_up(client)
    metrics = work.size * METRICS_PER_RUN
    times = repetitions(metrics)
    began = time.process_time_ns()
    for _ in range(times):
        for _ in range(work.size):
            log_run(client, METRICS_PER_RUN)
        client.flush()
    return {"cpu": (time.process_time_ns() - began) / 1_000 / (metrics * times)}


def log_run(client: Any, metrics: int) -> None:
    """Queue a complete run."""
    run_id = client.create_run("0")
    log_steps(client, run_id, metrics // METRICS_PER_CALL, METRICS_PER_CALL)
    client.set_terminated(run_id, "FINISHED")


def warm_up(client: Any) -> None:
    """Make a client pay the costs that a process has once."""
    log_run(client, WARM_UP_METRICS)
    client.flush()


def repetitions(metrics: int) -> int:
    """Return how often this number of metrics is logged for one measurement."""
    return max(LEAST_MEASURED // metrics, 1)


def counts_of_one_run(metrics: int) -> dict[str, int]:
    """Return what the server must have counted after one run: metrics, created runs, terminated runs."""
    return _counts(metrics, runs=1)


def counts_of_small_runs(runs: int) -> dict[str, int]:
    return _counts(runs, runs=runs)


def counts_of_more_metrics(metrics: int) -> dict[str, int]:
    return _counts(metrics * repetitions(metrics), runs=0)


def counts_of_more_runs(runs: int) -> dict[str, int]:
    times = repetitions(runs * METRICS_PER_RUN)
    return _counts(runs * METRICS_PER_RUN * times, runs=runs * times)


def _counts(metrics: int, runs: int) -> dict[str, int]:
    return {"metrics": metrics + WARM_UP_METRICS, "created": runs + 1, "updated": runs + 1, "refused": 0}
