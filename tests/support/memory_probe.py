"""
How much memory a client needs to refuse an answer. A script, so that nothing else has touched the memory before:

    python memory_probe.py URI RUN_ID TRANSPORT

Sends one metric, which has to be stored, and a second one, which has to fail. Prints what it has measured, as JSON.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Literal, cast

import runqueue

_STATUS = Path("/proc/self/status")


def memory_bytes(field: str) -> int:
    """Return VmRSS (resident now) or VmHWM (its peak); where there is no /proc, the peak for both."""
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main(uri: str, run_id: str, transport: str) -> None:
    client = runqueue.Client(uri, retry_timeout=1, transport=cast(Literal["auto", "httpx"], transport))
    with client:
        client.log_metric(run_id, "before", 1.0)
        client.flush()
        before = memory_bytes("VmRSS")
        client.log_metric(run_id, "refused", 1.0)
        try:
            client.flush()
        except runqueue.FlushError as error:
            # A peak from before counts as growth, which can only fail the test wrongly, not pass it.
            measured = {
                "grown_bytes": memory_bytes("VmHWM") - before,
                "final": all(failure.final for failure in error.failures),
                "error": str(error),
            }
            sys.stdout.write(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
