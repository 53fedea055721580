"""
Throughput cases: metrics a second into a real `mlflow server`, beside a bare loop of full log-batch posts.

The bare loop's bodies are made before its clock starts, and it has one connection and one thread for each request at
once; the clients' clock holds everything from the first call to the end of the flush. All log to runs made beforehand;
several runs for each request at once, so that none idles at the end. Afterwards everything is read back.
"""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.clients import Options
from benchmarks.delivery import METRICS_PER_CALL
from benchmarks.rest import Rest
from benchmarks.steps import log_steps, steps
from benchmarks.work import Work

METRICS_A_BATCH = 1_000  # MLflow's limit
RUNS_AT_ONCE = 2  # runs for each request at once
TWO_AT_ONCE = Options(max_workers=2)
FOUR_AT_ONCE = Options(max_workers=4)


def into_server(work: Work) -> dict[str, float]:
    """Log metrics in whole batches, evenly to all runs."""
    at_once = work.options.max_workers
    assert at_once is not None
    rest = Rest(work.tracking_uri)
    runs = [_create_run(rest) for _ in range(at_once * RUNS_AT_ONCE)]
    metrics = work.size // len(runs) // METRICS_A_BATCH * METRICS_A_BATCH
    wall = _bare(work, runs, metrics, at_once) if work.peer.name == "bare" else _client(work, runs, metrics)
    rest.close()
    rest = Rest(work.tracking_uri)  # a new one: the server closes a connection that has been idle for seconds
    for run_id in runs:
        _read_back(rest, run_id, metrics)
    rest.close()
    return {"rate": metrics * len(runs) / wall}


def _client(work: Work, runs: list[str], metrics: int) -> float:
    client = work.connect()
    warm_up = _create_run(Rest(work.tracking_uri))
    log_steps(client, warm_up, 1, METRICS_PER_CALL)
    client.flush()
    began = time.perf_counter()
    for run_id in runs:
        log_steps(client, run_id, metrics // METRICS_PER_CALL, METRICS_PER_CALL)
    client.flush()
    return time.perf_counter() - began


def _bare(work: Work, runs: list[str], metrics: int, at_once: int) -> float:
    bodies = [_bodies(run_id, metrics) for run_id in runs]
    connections = [Rest(work.tracking_uri) for _ in range(at_once)]
    for connection in connections:
        connection.post("/runs/log-batch", json.dumps({"run_id": _create_run(connection)}).encode())

    def post_all(connection: Rest) -> None:
        while bodies:
            try:
                of_a_run = bodies.pop()
            except IndexError:  # another thread was faster
                return
            for body in of_a_run:
                connection.post("/runs/log-batch", body)

    with ThreadPoolExecutor(at_once) as pool:
        began = time.perf_counter()
        for done in [pool.submit(post_all, connection) for connection in connections]:
            done.result()
        wall = time.perf_counter() - began
    for connection in connections:
        connection.close()
    return wall


def _bodies(run_id: str, metrics: int) -> list[bytes]:
    now = time.time_ns() // 1_000_000
    points = [
        {"key": key, "value": value, "timestamp": now, "step": step}
        for step, row in enumerate(steps(metrics // METRICS_PER_CALL, METRICS_PER_CALL))
        for key, value in row.items()
    ]
    return [
        json.dumps({"run_id": run_id, "metrics": points[first : first + METRICS_A_BATCH]}).encode()
        for first in range(0, metrics, METRICS_A_BATCH)
    ]


def _create_run(rest: Rest) -> str:
    answer: Any = rest.post("/runs/create", b'{"experiment_id": "0"}')
    run_id: str = answer["run"]["info"]["run_id"]
    return run_id


def _read_back(rest: Rest, run_id: str, metrics: int) -> None:
    """Raise an error unless the server has all metrics of the run."""
    stored = 0
    for column in range(METRICS_PER_CALL):
        query: dict[str, object] = {"run_id": run_id, "metric_key": f"metric_{column}", "max_results": 25_000}
        while True:
            answer = rest.get("/metrics/get-history", query)
            stored += len(answer.get("metrics", []))
            if not answer.get("next_page_token"):
                break
            query["page_token"] = answer["next_page_token"]
    if stored != metrics:
        raise RuntimeError(f"run {run_id}: {stored:,} metrics are stored, {metrics:,} were logged")
