"""The clients behind the peers: functions that make one, and adapters for libraries with other method names."""

# Rules of this file: a library is imported by the function that makes its client. `runqueue.Client` and MLflow's
# queueing client need no adapter; the others' costs one Python call, about 0.05 µs beside their ten and more. Nothing
# here may reach the network: offline modes, and the folders that `harness.py` sets, which are thrown away.

import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from attrs import asdict, frozen


class QueueingClient(Protocol):
    """The calls of the cases. Not every peer has all of them, nor is every peer in every case."""

    # `Any`: MLflow hands out its own PendingRunId, and annotates a dict where any mapping will do.
    def create_run(self, experiment_id: str) -> Any: ...

    def log_metrics(self, run_id: Any, metrics: Any, step: int | None = None) -> None: ...

    def set_terminated(self, run_id: Any, status: str | None = None) -> None: ...

    def flush(self) -> Any: ...


@frozen(kw_only=True)
class Options:
    """Settings that a case asks for, as `runqueue.Client` names them; `None`: the client's default."""

    max_workers: int | None = None
    """MLflow's queueing client is given a pool of as many threads; others ignore it."""

    flush_interval: float | None = None
    """Seconds; others than runqueue ignore it: they stream in their own way, or not at all."""

    max_pending: int | None = None

    def given(self) -> dict[str, Any]:
        """Return the options that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Floor:
    """
    The lower bound of a call that keeps its argument: copy the dict into a tuple, append the tuple.

    It is a method, since every client's call is one. A line of code in the loop itself would be an unfair bound.
    """

    def __init__(self) -> None:
        self._append = deque[tuple[str, int | None, dict[str, float]]]().append

    def create_run(self, experiment_id: str) -> str:
        return experiment_id

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._append((run_id, step, {**metrics}))

    def log_metric(self, run_id: str, key: str, value: float, step: int | None = None) -> None:
        self._append((run_id, step, {key: value}))


class MlflowLogBatch:
    """
    `MlflowClient.log_batch`, MLflow's cheapest call for several metrics: the fluent functions look up the active run,
    its models and its datasets as well.
    """

    def __init__(self, tracking_uri: str, *, synchronous: bool) -> None:
        import mlflow
        from mlflow.entities import Metric

        mlflow.set_tracking_uri(tracking_uri)
        self._client = mlflow.MlflowClient(tracking_uri)
        self._metric = Metric
        self._synchronous = synchronous

    def create_run(self, experiment_id: str) -> str:
        run_id: str = self._client.create_run(experiment_id).info.run_id
        return run_id

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int | None = None) -> None:
        now = time.time_ns() // 1_000_000
        points = [self._metric(key, value, now, step or 0) for key, value in metrics.items()]
        self._client.log_batch(run_id, metrics=points, synchronous=self._synchronous)

    def flush(self) -> None:
        import mlflow

        if not self._synchronous:
            mlflow.flush_async_logging()


class Wandb:
    """A run that wandb writes to a file, in a process of its own."""

    def __init__(self) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_disable_meta=True)
        self._run = wandb.init(project="benchmark", mode="offline", settings=settings)

    def create_run(self, experiment_id: str) -> None:
        return None

    def log_metrics(self, run_id: None, metrics: dict[str, Any], step: int | None = None) -> None:
        self._run.log(metrics, step=step)

    def flush(self) -> None:
        """It has no such call: what it does in the background goes on."""

    def finish(self) -> None:
        self._run.finish()


class Neptune:
    """A run that neptune-scale writes to a SQLite file."""

    def __init__(self) -> None:
        import neptune_scale

        self._run = neptune_scale.Run(
            project="benchmark/benchmark", mode="offline", log_directory=Path.cwd(), enable_console_log_capture=False
        )

    def create_run(self, experiment_id: str) -> None:
        return None

    def log_metrics(self, run_id: None, metrics: dict[str, float | int], step: int | None = None) -> None:
        self._run.log_metrics(metrics, step=step or 0)

    def flush(self) -> None:
        """It has no such call in this mode."""

    def finish(self) -> None:
        self._run.close()


class Trackio:
    """A run that trackio writes to a SQLite file, in a thread of its own."""

    def __init__(self) -> None:
        import trackio

        self._run = trackio.init(project="benchmark", embed=False, auto_log_gpu=False, auto_log_cpu=False)

    def create_run(self, experiment_id: str) -> None:
        return None

    def log_metrics(self, run_id: None, metrics: dict[str, float], step: int | None = None) -> None:
        self._run.log(metrics, step=step)

    def flush(self) -> None:
        """It has no such call: what it does in the background goes on."""

    def finish(self) -> None:
        self._run.finish()


def floor(tracking_uri: str, options: Options) -> Floor:
    return Floor()


def nothing(tracking_uri: str, options: Options) -> None:
    return None


def mlflow_queueing(tracking_uri: str, options: Options) -> QueueingClient:
    from mlflow.utils.autologging_utils import client as module

    if options.max_workers is not None:
        # Its pool has twice as many threads as the machine has cores, and at most 8: no argument changes it.
        pool = type(module._AUTOLOGGING_QUEUEING_CLIENT_THREAD_POOL)(options.max_workers)
        module._AUTOLOGGING_QUEUEING_CLIENT_THREAD_POOL = pool
    # MLflow leaves __init__ without annotations, which mypy --strict counts as an untyped call.
    client: QueueingClient = module.MlflowAutologgingQueueingClient(tracking_uri)  # type: ignore[no-untyped-call]
    return client


def mlflow_async(tracking_uri: str, options: Options) -> MlflowLogBatch:
    return MlflowLogBatch(tracking_uri, synchronous=False)


def mlflow_sync(tracking_uri: str, options: Options) -> MlflowLogBatch:
    return MlflowLogBatch(tracking_uri, synchronous=True)


def wandb_offline(tracking_uri: str, options: Options) -> Wandb:
    return Wandb()


def neptune_offline(tracking_uri: str, options: Options) -> Neptune:
    return Neptune()


def trackio_local(tracking_uri: str, options: Options) -> Trackio:
    return Trackio()


def runqueue_httpx(tracking_uri: str, options: Options) -> QueueingClient:
    import runqueue

    return runqueue.Client(tracking_uri, transport="httpx", **options.given())


def runqueue_auto(tracking_uri: str, options: Options) -> QueueingClient:
    import runqueue

    return runqueue.Client(tracking_uri, transport="auto", **options.given())


def quiet_environment(folder: Path) -> dict[str, str]:
    """
    Return the variables of a worker: this process's, without those that would change a peer or redirect its requests
    (settings, credentials, proxies); telemetry off, one thread for numpy, and all files in *folder*.
    """
    foreign = ("MLFLOW_", "_MLFLOW_", "DATABRICKS_", "WANDB_", "NEPTUNE_", "TRACKIO_", "HF_", "XDG_")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(foreign) and not name.lower().endswith("_proxy")
    }
    return kept | {
        "HOME": str(folder),
        "TMPDIR": str(folder),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_ERROR_REPORTING": "false",
        "NEPTUNE_MODE": "offline",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HOME": str(folder / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
