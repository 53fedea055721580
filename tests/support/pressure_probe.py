"""
A producer that is far faster than its server. A script, so that its memory holds nothing else:

    python pressure_probe.py URI RUN_ID ON_FULL SECONDS

Logs as fast as the client takes it, for so long, and leaves the rest behind. Prints what it has measured, as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import cast

import runqueue
from runqueue.settings._config import OnFull
from support.memory_probe import memory_bytes

METRICS_A_CALL = 10
CALLS_A_LOOK = 200


def main(uri: str, run_id: str, on_full: str, seconds: str) -> None:
    logging.getLogger("runqueue").setLevel(logging.ERROR)  # drops are logged at each tick
    client = runqueue.Client(uri, flush_interval=0.5, max_workers=1, on_full=cast(OnFull, on_full), progress=False)
    keys = [f"metric_{number}" for number in range(METRICS_A_CALL)]
    client.log_metrics(run_id, dict.fromkeys(keys, 0.0))
    client.flush()
    before = peak = memory_bytes("VmRSS")
    calls = 0
    begun = time.monotonic()
    while time.monotonic() < begun + float(seconds):
        for _ in range(CALLS_A_LOOK):
            calls += 1
            client.log_metrics(run_id, {key: calls + at / 16 for at, key in enumerate(keys)}, step=calls)
        peak = max(peak, memory_bytes("VmRSS"))
    counts = client.statistics()
    measured = {
        "offered": calls * METRICS_A_CALL,
        "grown_bytes": peak - before,
        "pending": counts.pending + counts.in_flight,
        "stored": counts.stored,
        "dropped": counts.dropped,
        "failed": counts.failed,
        "accepted": counts.accepted,
    }
    sys.stdout.write(json.dumps(measured))
    sys.stdout.flush()
    os._exit(0)  # a million entries are left, which the slow server would take minutes for


if __name__ == "__main__":
    main(*sys.argv[1:])
