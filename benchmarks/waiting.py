"""
Latency cases: the time of a flush that mostly waits for answers, beside its lower bound: requests times latency,
divided by the requests in flight. Only the flush is timed, after a warm-up run: queueing costs CPU, which other cases
measure.
"""

import time

from benchmarks.backend import SLOW
from benchmarks.clients import Options
from benchmarks.delivery import log_run, warm_up
from benchmarks.rest import Rest
from benchmarks.work import Work

METRICS_A_BATCH = 1_000  # MLflow's limit
BATCHES_A_RUN = 5
FOUR_AT_ONCE = Options(max_workers=4)


def many_runs(work: Work) -> dict[str, float]:
    """Runs of five full batches each, four requests in flight."""
    return _flush(work, runs=work.size, batches=BATCHES_A_RUN, at_once=4)


def one_run(work: Work) -> dict[str, float]:
    """One run of full batches, one request in flight, since requests of one run are sent in order."""
    return _flush(work, runs=1, batches=work.size, at_once=1)


def _flush(work: Work, *, runs: int, batches: int, at_once: int) -> dict[str, float]:
    client = work.connect()
    warm_up(client)
    rest = Rest(work.tracking_uri)
    before = rest.counts()["requests"]
    for _ in range(runs):
        log_run(client, batches * METRICS_A_BATCH)
    began = time.perf_counter()
    client.flush()
    wall = time.perf_counter() - began
    least = runs * (batches + 2)  # its creation, and its end
    requests = rest.counts()["requests"] - before
    ideal = least * SLOW.latency / at_once
    return {"wall": wall / ideal, "requests": requests, "requests needed": requests / least}


def counts_of_many_runs(runs: int) -> dict[str, int]:
    return _counts(runs, BATCHES_A_RUN)


def counts_of_one_run(batches: int) -> dict[str, int]:
    return _counts(1, batches)


def _counts(runs: int, batches: int) -> dict[str, int]:
    metrics = runs * batches * METRICS_A_BATCH
    return {"metrics": metrics + 10, "created": runs + 1, "updated": runs + 1, "refused": 0}
