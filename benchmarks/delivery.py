"""
Delivery case: the whole client, from the first call until the server has answered for everything.

The process's CPU clock (user + system, of all its threads) is read, so it does not matter on which thread a client does
its work, nor how long the server takes. The server is another process and is not counted.
"""

import time

from benchmarks.enqueue import log_steps
from benchmarks.peer import Peer

METRICS_PER_CALL = 10
WARM_UP_METRICS = 10


def deliver_one_run(peer: Peer, metrics: int, tracking_uri: str) -> float:
    """
    One run: created, *metrics* logged 10 a call, terminated, flushed; in CPU µs per metric.

    A first run of ten metrics goes before it, uncounted: imports on first use, thread start and the connection are paid
    once per process, not per metric. The harness checks that the server has received both runs in full.
    """
    client = peer.connect(tracking_uri)

    def log_run(metrics: int) -> None:
        run_id = client.create_run("0")
        log_steps(client, run_id, metrics // METRICS_PER_CALL, METRICS_PER_CALL)
        client.set_terminated(run_id, "FINISHED")
        client.flush()

    log_run(WARM_UP_METRICS)
    began = time.process_time_ns()
    log_run(metrics)
    return (time.process_time_ns() - began) / 1_000 / metrics


def expected_counts(metrics: int) -> dict[str, int]:
    """What the server must have counted after `deliver_one_run`: metrics, created runs, terminated runs."""
    return {"metrics": metrics + WARM_UP_METRICS, "created": 2, "updated": 2, "refused": 0}
