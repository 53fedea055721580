"""The run that a step logs into, started by MLflow Projects or by hand."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import runqueue


@contextmanager
def step_run(name: str, params: Mapping[str, str]) -> Iterator[tuple[runqueue.Client, runqueue.Run]]:
    """
    Log a step into its run.

    Started by MLflow Projects, a step finds the run in its environment. MLflow Projects has created the run with its
    params, and ends it; only after a cancellation runqueue ends it, as KILLED. Started by hand, the step creates a run.

    Args:
        name: The name of a run that the step creates.
        params: The params of a run that the step creates, as text.

    Raises:
        runqueue.FlushError: At the end, if something could not be stored: the step has failed then.
    """
    with runqueue.Client(flush_interval=1.0, on_failure="raise") as client:
        if "MLFLOW_RUN_ID" in os.environ:
            yield client, client.run_from_env()
            return
        experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
        with client.start_run(experiment_id=experiment_id, run_name=name) as run:
            run.log_params(params)
            client.flush()  # it has its id from here on
            print(f"{name}: run {run.run_id}", flush=True)
            yield client, run
