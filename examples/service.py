"""
An asyncio service that logs each of its requests, for as long as it lives.

    python examples/service.py --requests 50

The log calls are plain calls that never wait: no request is late because the tracking server is. What is queued is
sent every second; `drain()` is where a producer that is faster than the server waits. SIGTERM, as a container's end,
delivers what is queued and sets the run KILLED. The last line on stdout is the id of the run.
"""

import argparse
import asyncio
import sys
import time

import runqueue


async def handle(run: runqueue.Run, number: int) -> None:
    """One request: some work, and how long it took."""
    begun = time.perf_counter()
    await asyncio.sleep(0.001 * (number % 7))
    run.log_metrics({"latency_ms": 1_000 * (time.perf_counter() - begun)}, step=number)


async def serve(tracking_uri: str | None, requests: int) -> runqueue.Statistics:
    """Work on all requests, ten at a time."""
    async with runqueue.AsyncClient(tracking_uri, flush_interval=1.0, max_pending=10_000) as client:
        async with client.start_run(experiment_id="0", run_name="service", tags={"example": "service.py"}) as run:
            for first in range(0, requests, 10):
                await asyncio.gather(*(handle(run, number) for number in range(first, min(first + 10, requests))))
                await client.drain()
            run.log_param("requests", requests)
        await client.flush()
        print(run.run_id)
    return client.statistics()


def main() -> int:
    parser = argparse.ArgumentParser(description="Log each request of a service.")
    parser.add_argument("--tracking-uri", help="where to log (default: as mlflow itself would resolve it)")
    parser.add_argument("--requests", type=int, default=50)
    options = parser.parse_args()
    try:
        statistics = asyncio.run(serve(options.tracking_uri, options.requests))
    except runqueue.RunqueueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0 if statistics.failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
