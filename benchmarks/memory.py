"""
Memory cases: resident memory (RSS) of the process above its start.

RSS and not tracemalloc: what a machine runs out of is RSS, it holds what C extensions and the allocator keep too, and
tracemalloc makes each allocation several times dearer, which changes how far a streaming client lags behind. At the
sizes of these cases a page is nothing. Start is when the client is connected and has logged a little (streaming: sent a
run).
"""

import gc
import time
from typing import Any

from benchmarks.delivery import METRICS_PER_CALL, WARM_UP_METRICS, warm_up
from benchmarks.steps import fresh_steps
from benchmarks.work import Work

MEGABYTE = 1e6
CALLS_A_SAMPLE = 1_000


def queued(work: Work) -> dict[str, float]:
    """Metrics queued and not sent, 10 a call: bytes of RSS for each metric."""
    client = work.connect()
    warm_up_run, run_id = client.create_run("0"), client.create_run("0")
    for step, metrics in enumerate(fresh_steps(CALLS_A_SAMPLE, METRICS_PER_CALL)):
        client.log_metrics(warm_up_run, metrics, step)
    gc.collect()
    process = _process()
    start = process.memory_info().rss
    for step, metrics in enumerate(fresh_steps(work.size // METRICS_PER_CALL, METRICS_PER_CALL)):
        client.log_metrics(run_id, metrics, step)
    return {"memory": (process.memory_info().rss - start) / work.size}


def streaming(work: Work) -> dict[str, float]:
    """
    Log as fast as the client takes metrics, while it sends them. RSS is read every thousand calls: its peak above the
    start, and the growth of its mean from the second quarter of the calls to the last one.
    """
    client = work.connect()
    warm_up(client)
    gc.collect()
    process = _process()
    run_id = client.create_run("0")
    start = process.memory_info().rss
    samples: list[int] = []
    began = time.perf_counter_ns()
    for step, metrics in enumerate(fresh_steps(work.size // METRICS_PER_CALL, METRICS_PER_CALL)):
        client.log_metrics(run_id, metrics, step)
        if step % CALLS_A_SAMPLE == 0:
            samples.append(process.memory_info().rss)
    client.set_terminated(run_id, "FINISHED")
    client.flush()
    wall = time.perf_counter_ns() - began
    peak = max(*samples, process.memory_info().rss)
    quarter = max(len(samples) // 4, 1)
    second, last = samples[quarter : 2 * quarter] or samples, samples[-quarter:]
    return {
        "peak": (peak - start) / MEGABYTE,
        "drift": (sum(last) / len(last) - sum(second) / len(second)) / MEGABYTE,
        "wall": wall / 1_000 / work.size,
    }


def counts_of_streaming(metrics: int) -> dict[str, int]:
    return {"metrics": metrics + WARM_UP_METRICS, "created": 2, "updated": 2, "refused": 0}


def _process() -> Any:
    import psutil

    return psutil.Process()
