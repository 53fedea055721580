"""
A small service on asyncio or trio that works on several jobs at once and logs each of them as a run of its own.

    python examples/async_service.py --backend trio

Each job estimates pi from random points; its run is a child of the service's run. The log methods are plain calls that
never wait, so a job may call them anywhere; only `await client.flush()` waits for the server, and lets the other tasks
go on meanwhile. The last line on stdout is the id of the parent run.
"""

import argparse
import random
import sys

import anyio
import anyio.lowlevel

import runqueue

STEPS = 50
POINTS_PER_STEP = 200


async def estimate_pi(client: runqueue.AsyncClient, service: runqueue.PendingRunId, seed: int) -> None:
    """One job: draw points, and log the estimate after each step."""
    run = client.create_run(experiment_id="0", run_name=f"pi-{seed}", parent_run_id=service)
    client.log_params(run, {"seed": seed, "steps": STEPS, "points_per_step": POINTS_PER_STEP})
    rng = random.Random(seed)
    inside = 0
    for step in range(1, STEPS + 1):
        inside += sum(rng.random() ** 2 + rng.random() ** 2 < 1 for _ in range(POINTS_PER_STEP))
        estimate = 4 * inside / (step * POINTS_PER_STEP)
        client.log_metrics(run, {"estimate": estimate, "inside": inside}, step=step)
        await anyio.lowlevel.checkpoint()  # the other jobs' turn
    client.set_tags(run, {"phase": "done"})
    client.set_terminated(run, "FINISHED")


async def serve(tracking_uri: str | None, jobs: int) -> None:
    """Run all jobs side by side, store what they logged, and print the id of the parent run."""
    async with runqueue.AsyncClient(tracking_uri) as client:
        service = client.create_run(experiment_id="0", run_name="pi-service", tags={"example": "async_service.py"})
        client.log_params(service, {"jobs": jobs})
        async with anyio.create_task_group() as tasks:
            for seed in range(jobs):
                # The parent has not been created on the server yet: its children wait for it, the jobs do not.
                tasks.start_soon(estimate_pi, client, service, seed)
        client.set_terminated(service, "FINISHED")
        await client.flush()
        print(f"{jobs} jobs logged: {client.statistics()}")
        print(service.run_id)


def main() -> int:
    parser = argparse.ArgumentParser(description="Work on several jobs at once and log each as a run.")
    parser.add_argument("--tracking-uri", help="where to log (default: as mlflow itself would resolve it)")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--jobs", type=int, default=8)
    options = parser.parse_args()
    try:
        anyio.run(serve, options.tracking_uri, options.jobs, backend=options.backend)
    except runqueue.RunqueueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
