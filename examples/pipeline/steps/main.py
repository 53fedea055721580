"""The whole of it: each step is a run below this one, and gets the run of the step before as a parameter."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import mlflow

from pipeline_run import step_run

PROJECT = Path(__file__).parents[1]


def launch(entry_point: str, **parameters: str) -> str:
    """
    Run a step in this process group, so that cancelling the pipeline cancels the step too.

    Returns:
        The id of its run.

    Raises:
        mlflow.exceptions.ExecutionException: It has failed.
    """
    step = mlflow.projects.run(  # type: ignore[no-untyped-call]
        str(PROJECT), entry_point, parameters=parameters, run_name=entry_point, env_manager="local"
    )
    run_id: str = step.run_id
    return run_id


def main() -> int:
    parser = argparse.ArgumentParser(description="Run all steps.")
    parser.add_argument("--dataset", default="wine")
    parser.add_argument("--source", default="https://archive.ics.uci.edu/dataset/109/wine")
    parser.add_argument("--test-share", default="0.25")
    parser.add_argument("--epochs", default="40")
    parser.add_argument("--rate", default="0.02")
    parser.add_argument("--pause", default="0")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    # MLflow Projects nests runs in the one that is active.
    with step_run("main", vars(options)) as (client, run), mlflow.start_run(run_id=run.run_id):
        download = launch("download", dataset=options.dataset, source=options.source)
        run.set_tag("download_run", download)
        process = launch("process", download_run=download, test_share=options.test_share, seed=options.seed)
        run.set_tag("process_run", process)
        train = launch(
            "train",
            data=f"runs:/{process}/data",
            epochs=options.epochs,
            rate=options.rate,
            pause=options.pause,
            seed=options.seed,
        )
        run.set_tag("train_run", train)
        results = mlflow.MlflowClient().get_run(train).data.metrics
        run.log_metrics(results)
        run.log_dict({"download": download, "process": process, "train": train, "results": results}, "pipeline.json")
        client.flush()  # the end of the block sets the run FINISHED
    return 0


if __name__ == "__main__":
    sys.exit(main())
