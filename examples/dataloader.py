"""
Workers that log to the run of the process which has started them, as the workers of a data loader do.

    python examples/dataloader.py --workers 3

The parent hands the run to its workers before any request was made: a placeholder names the same run in every process.
Each worker logs by a client of its own, which was forked or pickled with it: without the parent's data, thread and
connections. The last line on stdout is the id of the run.
"""

import argparse
import multiprocessing
import sys
import time

import runqueue

BATCHES = 20


def load(run: runqueue.Run, worker: int) -> None:
    """Load some batches, and log how long each took; what is queued is sent when the worker ends."""
    for batch in range(BATCHES):
        begun = time.perf_counter()
        sorted(range(20_000), key=lambda number: -number)
        run.log_metric(f"worker_{worker}/load_ms", 1_000 * (time.perf_counter() - begun), step=batch)


def main() -> int:
    parser = argparse.ArgumentParser(description="Log from the workers of a data loader.")
    parser.add_argument("--tracking-uri", help="where to log (default: as mlflow itself would resolve it)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--method", choices=multiprocessing.get_all_start_methods(), default=None)
    options = parser.parse_args()
    try:
        client = runqueue.Client(options.tracking_uri, flush_interval=1.0)
    except runqueue.RunqueueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    context = multiprocessing.get_context(options.method)
    with client, client.start_run(experiment_id="0", run_name="loader", tags={"example": "dataloader.py"}) as run:
        run.log_params({"workers": options.workers, "batches": BATCHES})
        workers = [context.Process(target=load, args=(run, worker)) for worker in range(options.workers)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        run.log_metric("failed_workers", sum(worker.exitcode != 0 for worker in workers))
    print(run.run_id)
    return 0


if __name__ == "__main__":
    sys.exit(main())
