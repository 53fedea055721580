"""
A training loop that streams: every metric is on the server some seconds after it was logged, while training goes on.

    python examples/streaming.py --steps 2000

With `flush_interval=` the log calls still only queue; a background thread sends what waits. Nothing has to be closed:
what is queued at the end of the script, after an exception, Ctrl-C or SIGTERM is sent within `exit_timeout`, and the
run ends FINISHED, FAILED or KILLED. The last line on stdout is the id of the run.
"""

import argparse
import random
import sys

import runqueue


def train(run: runqueue.Run, steps: int, seed: int) -> None:
    """Fit a line to noisy points by gradient descent, and log every step."""
    rng = random.Random(seed)
    slope = intercept = 0.0
    rate = 0.05
    for step in range(1, steps + 1):
        x = rng.uniform(-1, 1)
        error = slope * x + intercept - (3 * x + 1 + rng.gauss(0, 0.1))
        slope -= rate * error * x
        intercept -= rate * error
        run.log_metrics({"loss": error * error, "slope": slope, "intercept": intercept}, step=step)
    run.set_tag("phase", "trained")


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, and stream every step.")
    parser.add_argument("--tracking-uri", help="where to log (default: as mlflow itself would resolve it)")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        client = runqueue.Client(options.tracking_uri, flush_interval=1.0)
    except runqueue.RunqueueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    with client, client.start_run(experiment_id="0", run_name="line", tags={"example": "streaming.py"}) as run:
        run.log_params({"steps": options.steps, "seed": options.seed})
        train(run, options.steps, options.seed)
    print(client.statistics())
    print(run.run_id)
    return 0 if client.statistics().failed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
