"""The run that a step logs into, whoever has started the step."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import runqueue


@contextmanager
def step_run(name: str, params: Mapping[str, str]) -> Iterator[tuple[runqueue.Client, runqueue.Run]]:
    """
    Started by MLflow Projects, a step finds its run in the environment: there since before the step, with its params,
    and ended by MLflow Projects; only a cancelled one is ended by runqueue, KILLED. Started by hand, it makes its own.

    Args:
        name: Of a run of its own.
        params: Of a run of its own, as text.

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
