"""
A run as an object: its log calls take no run id, and as a block it ends its run. `RunCalls` makes them for a client.
"""

# Rules of this file: a `Run` keeps the run's id and whether its block ends the run; every call goes to the client. A
# run is ended only by the process that has created it.

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any

from runqueue._run_id import Experiment, PendingRunId, RunId
from runqueue.api._artifact_calls import ArtifactCalls
from runqueue.errors import ConfigError
from runqueue.runtime import _fork
from runqueue.settings import _environment as environment

if TYPE_CHECKING:
    from typing_extensions import Self


class Run:
    """
    A run with its log calls. `Client.start_run`, `Client.attach` and `Client.run_from_env` return it.

        with client.start_run(experiment_name="nightly") as run:
            run.log_metrics({"loss": 0.7}, step=1)

    As a context manager (`with`, or `async with` in coroutines; neither waits) it queues the run's final status at the
    end of the block: FINISHED, also after `sys.exit(0)`; KILLED after KeyboardInterrupt or a cancellation; FAILED after
    any other exception. A run that was attached to keeps its status: the process that has created it ends it.

    A `Run` can be pickled; its copy is attached to the same run.
    """

    def __init__(self, client: ArtifactCalls, run_id: RunId, *, experiment: Experiment, ends_run: bool) -> None:
        self._client = client
        self._run_id = run_id
        self._experiment = experiment
        self._ends_run = ends_run
        if ends_run:
            _fork.register(self)

    def _after_fork(self) -> None:
        """In a child: the parent ends the run."""
        self._ends_run = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (_attached, (self._client, self._run_id, self._experiment))

    @property
    def id(self) -> RunId:
        """The run as the client's methods take it for `run_id`: the id of an existing run, or a `PendingRunId`."""
        return self._run_id

    @property
    def run_id(self) -> str | None:
        """The run's real id. None: the run does not exist yet."""
        return self._run_id.run_id if isinstance(self._run_id, PendingRunId) else self._run_id

    def start_run(
        self,
        experiment_id: str | None = None,
        *,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> Run:
        """
        Queue the creation of a run that is nested in this one; see `Client.start_run`.

        Args:
            experiment_id: The id of the run's experiment. None: `experiment_name`, else the experiment of this run.
            experiment_name: The name of the run's experiment, which is created if it does not exist. None:
                `experiment_id`, else the experiment of this run.
            run_name: The run's name. None: the server makes one up.
            tags: The run's first tags, by key; the `str()` of each value is stored. None: no tags.

        Raises:
            ConfigError, CallTypeError, QueueFullError, ClosedError: As for `Client.create_run`.
        """
        return _started(self._client, (experiment_id, experiment_name), run_name, tags, self)

    def log_metrics(
        self,
        metrics: Mapping[str, Any],
        step: int | None = None,
        dataset: Any = None,
        model_id: str | None = None,
        *,
        timestamp: int | None = None,
    ) -> None:
        """
        Queue metric points of one step and one time; see `Client.log_metrics`.

        Args:
            metrics: Values by key. A value may be anything that `float()` takes, except text.
            step: A whole number. None: 0.
            dataset: The dataset that the metrics were computed on: any object with a `name` and a `digest`. None: no
                dataset.
            model_id: The id of the logged model that the metrics belong to. None: no model.
            timestamp: Milliseconds since the epoch. None: now.
        """
        self._client.log_metrics(self._run_id, metrics, step, dataset, model_id, timestamp=timestamp)

    def log_metric(self, key: str, value: Any, step: int | None = None, timestamp: int | None = None) -> None:
        """
        Queue one metric point; see `Client.log_metric`.

        Args:
            key: The metric's name.
            value: Anything that `float()` takes, except text.
            step: A whole number. None: 0.
            timestamp: Milliseconds since the epoch. None: now.
        """
        self._client.log_metric(self._run_id, key, value, step, timestamp)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """
        Queue params; see `Client.log_params`.

        Args:
            params: Values by key; the `str()` of each value is stored.
        """
        self._client.log_params(self._run_id, params)

    def log_param(self, key: str, value: Any) -> None:
        """
        Queue one param; see `Client.log_param`.

        Args:
            key: The param's name.
            value: Its `str()` is stored.
        """
        self._client.log_params(self._run_id, {key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """
        Queue tags; see `Client.set_tags`.

        Args:
            tags: Values by key; the `str()` of each value is stored.
        """
        self._client.set_tags(self._run_id, tags)

    def set_tag(self, key: str, value: Any) -> None:
        """
        Queue one tag; see `Client.set_tag`.

        Args:
            key: The tag's name.
            value: Its `str()` is stored.
        """
        self._client.set_tags(self._run_id, {key: value})

    def log_inputs(
        self,
        datasets: Iterable[Any] | None,
        *,
        contexts: Iterable[str | None] | None = None,
        tags_list: Iterable[Mapping[str, Any] | None] | None = None,
    ) -> None:
        """
        Queue the datasets that the run reads; see `Client.log_inputs`.

        Args:
            datasets: Datasets of `mlflow.data`, `DatasetInput` of mlflow, or `runqueue.Dataset`. None and [] do
                nothing.
            contexts: For each dataset the purpose it is read for, or None. None: no purposes.
            tags_list: For each dataset more tags of this input, or None. None: no more tags.
        """
        self._client.log_inputs(self._run_id, datasets, contexts=contexts, tags_list=tags_list)

    def log_input(self, dataset: Any, context: str | None = None, tags: Mapping[str, Any] | None = None) -> None:
        """
        Queue one dataset that the run reads; see `Client.log_input`.

        Args:
            dataset: A dataset of `mlflow.data`, a `DatasetInput` of mlflow, or a `runqueue.Dataset`.
            context: The purpose it is read for, e.g. "training". None: no purpose.
            tags: More tags of this input. None: no more tags.
        """
        self._client.log_inputs(self._run_id, [dataset], contexts=[context], tags_list=[tags])

    def log_artifact(self, local_path: str | PathLike[str], artifact_path: str | None = None) -> None:
        """
        Queue a file or a folder for upload; see `Client.log_artifact`.

        Args:
            local_path: The file; it is read when it is uploaded.
            artifact_path: The folder among the run's artifacts. None: their root.
        """
        self._client.log_artifact(self._run_id, local_path, artifact_path)

    def log_artifacts(self, local_dir: str | PathLike[str], artifact_path: str | None = None) -> None:
        """
        Queue all files of a folder for upload; see `Client.log_artifacts`.

        Args:
            local_dir: The folder; it is listed now.
            artifact_path: The folder among the run's artifacts. None: their root.
        """
        self._client.log_artifacts(self._run_id, local_dir, artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """
        Queue text for upload; see `Client.log_text`.

        Args:
            text: The content of the file.
            artifact_file: The path among the run's artifacts.
        """
        self._client.log_text(self._run_id, text, artifact_file)

    def log_dict(self, dictionary: Any, artifact_file: str) -> None:
        """
        Queue a dictionary for upload; see `Client.log_dict`.

        Args:
            dictionary: The content; it is encoded now.
            artifact_file: The path among the run's artifacts. The file holds YAML if it ends in .yml or .yaml, else
                JSON.
        """
        self._client.log_dict(self._run_id, dictionary, artifact_file)

    def log_figure(self, figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = None) -> None:
        """
        Queue a figure of matplotlib or plotly for upload; see `Client.log_figure`.

        Args:
            figure: The figure; it is drawn now.
            artifact_file: The path among the run's artifacts; its ending chooses the format.
            save_kwargs: Arguments of the library's function that saves the figure. None: none.
        """
        self._client.log_figure(self._run_id, figure, artifact_file, save_kwargs=save_kwargs)

    def log_image(
        self,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
    ) -> None:
        """
        Queue an image for upload; see `Client.log_image`.

        Args:
            image: An array of numpy, an image of Pillow, or an `mlflow.Image`; it is encoded now.
            artifact_file: The path among the run's artifacts. None: `key` is given.
            key: The name of a series of images. None: `artifact_file` is given.
            step: The image's step in the series. None: 0.
            timestamp: The image's time in the series, in milliseconds since the epoch. None: now.
        """
        self._client.log_image(self._run_id, image, artifact_file, key, step, timestamp)

    def set_terminated(self, status: str | None = None, end_time: int | None = None) -> None:
        """
        Queue the final status of the run; see `Client.set_terminated`. The end of a block then sets none.

        Args:
            status: "FINISHED", "FAILED", "KILLED", "RUNNING" or "SCHEDULED". None: "FINISHED".
            end_time: Milliseconds since the epoch. None: now.
        """
        self._client.set_terminated(self._run_id, status, end_time)
        self._ends_run = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ends_run:
            self._ends_run = False
            self._client._end_run(self._run_id, final_status(exc), raised=exc is not None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)

    def __repr__(self) -> str:
        return f"<Run {self._run_id if isinstance(self._run_id, str) else repr(self._run_id)}>"


class RunCalls(ArtifactCalls):
    """Adds the calls that return a `Run` to a client."""

    def start_run(
        self,
        experiment_id: str | None = None,
        *,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: Run | RunId | None = None,
    ) -> Run:
        """
        Queue the creation of a run, and return it for a block that ends it.

            with client.start_run(experiment_name="nightly", run_name="demo") as run:
                run.log_metrics({"loss": 0.7}, step=1)

        Args:
            experiment_id: The id of the run's experiment. None: `experiment_name` is given, or `parent` is a `Run`.
            experiment_name: The name of the run's experiment, which is created if it does not exist. None:
                `experiment_id` is given, or `parent` is a `Run`.
            run_name: The run's name. None: the server makes one up.
            tags: The run's first tags, by key; the `str()` of each value is stored. None: no tags.
            parent: The run in which this one is nested: a `Run`, an id or a placeholder. Of a `Run` the experiment is
                taken over, unless another one is given. None: no run.

        Raises:
            ConfigError: No experiment is given, or a value is bad.
            CallTypeError: A value is of the wrong type.
            QueueFullError: The queue is full; see `max_pending`.
            ClosedError: The client was closed.
        """
        return _started(self, (experiment_id, experiment_name), run_name, tags, parent)

    def attach(self, run_id: Run | RunId) -> Run:
        """
        Return a `Run` for a run that exists, or is created elsewhere in the program. Its block does not end the run.

        Args:
            run_id: The run: its id, its placeholder, or another `Run`.

        Raises:
            ConfigError: `run_id` is none of these.
        """
        if isinstance(run_id, Run):
            run_id = run_id.id
        if not isinstance(run_id, (str, PendingRunId)) or not run_id:
            raise ConfigError(f"attach takes a run id, a PendingRunId or a Run, not {run_id!r}")
        return _attached(self, run_id, (None, None))

    def run_from_env(self) -> Run:
        """
        Return a `Run` for the run in the environment variable MLFLOW_RUN_ID, which MLflow Projects sets for entry
        points.

        MLflow Projects sets that run FINISHED or FAILED when the entry point has ended, but not when it is cancelled.
        So at SIGTERM a client that streams sets it KILLED, unless `handle_signals=False`. A process that only helps
        with the run had better call `attach`.

        Raises:
            ConfigError: The variable is not set.
        """
        run_id = environment.text("MLFLOW_RUN_ID")
        if run_id is None:
            raise ConfigError("the environment variable MLFLOW_RUN_ID is not set: there is no run to attach to")
        self._enter_run(run_id)
        return _attached(self, run_id, (None, None))


def final_status(exc: BaseException | None) -> str:
    """The status of a run whose block has ended by this exception."""
    if exc is None or (isinstance(exc, SystemExit) and exc.code in (None, 0)):
        return "FINISHED"
    cancelled = type(exc).__name__ in ("CancelledError", "Cancelled")  # asyncio's and trio's, which may not be imported
    return "KILLED" if cancelled or isinstance(exc, KeyboardInterrupt) else "FAILED"


def _started(
    client: ArtifactCalls,
    experiment: Experiment,
    run_name: str | None,
    tags: Mapping[str, Any] | None,
    parent: Run | RunId | None,
) -> Run:
    if isinstance(parent, Run):
        if experiment == (None, None):
            experiment = parent._experiment
        parent = parent.id
    pending = client.create_run(
        experiment[0], tags=tags, run_name=run_name, experiment_name=experiment[1], parent_run_id=parent
    )
    return Run(client, pending, experiment=experiment, ends_run=True)


def _attached(client: ArtifactCalls, run_id: RunId, experiment: Experiment) -> Run:
    return Run(client, run_id, experiment=experiment, ends_run=False)
