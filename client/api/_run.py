"""
A run with its log calls, and a block that ends it.

Rules of this file: nothing is kept here but the run's id, and who ends it; every call goes to the client. The status that
a block ends with is told by its exception alone. A run is ended by the process that has made it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from runqueue._run_id import Experiment, PendingRunId, RunId
from runqueue.errors import ConfigError
from runqueue.runtime import _fork
from runqueue.settings import _environment as environment

if TYPE_CHECKING:
    from typing_extensions import Self


class RunClient(Protocol):
    """What a handle needs of its client; see `runqueue.Client`."""

    def create_run(
        self,
        experiment_id: str | None = ...,
        start_time: int | None = ...,
        tags: Mapping[str, Any] | None = ...,
        run_name: str | None = ...,
        *,
        experiment_name: str | None = ...,
        parent_run_id: RunId | None = ...,
    ) -> PendingRunId: ...

    def set_terminated(self, run_id: RunId, status: str | None = ..., end_time: int | None = ...) -> None: ...

    def log_metrics(
        self,
        run_id: RunId,
        metrics: Mapping[str, Any],
        step: int | None = ...,
        dataset: Any = ...,
        model_id: str | None = ...,
        *,
        timestamp: int | None = ...,
    ) -> None: ...

    def log_metric(
        self, run_id: RunId, key: str, value: Any, step: int | None = ..., timestamp: int | None = ...
    ) -> None: ...

    def log_params(self, run_id: RunId, params: Mapping[str, Any]) -> None: ...

    def set_tags(self, run_id: RunId, tags: Mapping[str, Any]) -> None: ...

    def log_inputs(
        self,
        run_id: RunId,
        datasets: Iterable[Any] | None,
        *,
        contexts: Iterable[str | None] | None = ...,
        tags_list: Iterable[Mapping[str, Any] | None] | None = ...,
    ) -> None: ...

    def _enter_run(self, run_id: str) -> None: ...

    def log_artifact(self, run_id: RunId, local_path: str | PathLike[str], artifact_path: str | None = ...) -> None: ...

    def log_artifacts(self, run_id: RunId, local_dir: str | PathLike[str], artifact_path: str | None = ...) -> None: ...

    def log_text(self, run_id: RunId, text: str, artifact_file: str) -> None: ...

    def log_dict(self, run_id: RunId, dictionary: Any, artifact_file: str) -> None: ...

    def log_figure(
        self, run_id: RunId, figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = ...
    ) -> None: ...

    def log_image(
        self,
        run_id: RunId,
        image: Any,
        artifact_file: str | None = ...,
        key: str | None = ...,
        step: int | None = ...,
        timestamp: int | None = ...,
    ) -> None: ...

    def _end_run(self, run_id: RunId, status: str, *, raised: bool) -> None: ...


class Run:
    """
    A run, made by `start_run`, `attach` or `run_from_env`. Its calls are those of the client without the run id.

    As a context manager (`with`, or `async with` in coroutines; neither waits) it queues the run's final status at the
    end of the block: FINISHED, also after `sys.exit(0)`; KILLED after KeyboardInterrupt or a cancellation; FAILED after
    any other exception or exit status. A run that was attached to is not ended: its maker does that.
    """

    def __init__(self, client: RunClient, run_id: RunId, *, experiment: Experiment, ends: bool) -> None:
        self._client = client
        self._run_id = run_id
        self._experiment = experiment
        self._ends = ends
        if ends:
            _fork.register(self)

    def _after_fork(self) -> None:
        """In a child: the end of the block there is not the end of the run."""
        self._ends = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickled handle is one that was attached to the same run, by a client with the same settings."""
        return (_attached, (self._client, self._run_id, self._experiment))

    @property
    def id(self) -> RunId:
        """What the client's methods take as `run_id`: a `PendingRunId`, or the id of an existing run."""
        return self._run_id

    @property
    def run_id(self) -> str | None:
        """The real id once the run exists, None before."""
        return self._run_id.run_id if isinstance(self._run_id, PendingRunId) else self._run_id

    def start_run(
        self,
        experiment_id: str | None = None,
        *,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> Run:
        """A run nested in this one, in the same experiment unless another is named; see `Client.start_run`."""
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
        """See `Client.log_metrics`."""
        self._client.log_metrics(self._run_id, metrics, step, dataset, model_id, timestamp=timestamp)

    def log_metric(self, key: str, value: Any, step: int | None = None, timestamp: int | None = None) -> None:
        """See `Client.log_metric`."""
        self._client.log_metric(self._run_id, key, value, step, timestamp)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """See `Client.log_params`."""
        self._client.log_params(self._run_id, params)

    def log_param(self, key: str, value: Any) -> None:
        """See `Client.log_param`."""
        self._client.log_params(self._run_id, {key: value})

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """See `Client.set_tags`."""
        self._client.set_tags(self._run_id, tags)

    def set_tag(self, key: str, value: Any) -> None:
        """See `Client.set_tag`."""
        self._client.set_tags(self._run_id, {key: value})

    def log_inputs(
        self,
        datasets: Iterable[Any] | None,
        *,
        contexts: Iterable[str | None] | None = None,
        tags_list: Iterable[Mapping[str, Any] | None] | None = None,
    ) -> None:
        """See `Client.log_inputs`."""
        self._client.log_inputs(self._run_id, datasets, contexts=contexts, tags_list=tags_list)

    def log_input(self, dataset: Any, context: str | None = None, tags: Mapping[str, Any] | None = None) -> None:
        """See `Client.log_input`."""
        self._client.log_inputs(self._run_id, [dataset], contexts=[context], tags_list=[tags])

    def log_artifact(self, local_path: str | PathLike[str], artifact_path: str | None = None) -> None:
        """See `Client.log_artifact`."""
        self._client.log_artifact(self._run_id, local_path, artifact_path)

    def log_artifacts(self, local_dir: str | PathLike[str], artifact_path: str | None = None) -> None:
        """See `Client.log_artifacts`."""
        self._client.log_artifacts(self._run_id, local_dir, artifact_path)

    def log_text(self, text: str, artifact_file: str) -> None:
        """See `Client.log_text`."""
        self._client.log_text(self._run_id, text, artifact_file)

    def log_dict(self, dictionary: Any, artifact_file: str) -> None:
        """See `Client.log_dict`."""
        self._client.log_dict(self._run_id, dictionary, artifact_file)

    def log_figure(self, figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = None) -> None:
        """See `Client.log_figure`."""
        self._client.log_figure(self._run_id, figure, artifact_file, save_kwargs=save_kwargs)

    def log_image(
        self,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
    ) -> None:
        """See `Client.log_image`."""
        self._client.log_image(self._run_id, image, artifact_file, key, step, timestamp)

    def set_terminated(self, status: str | None = None, end_time: int | None = None) -> None:
        """See `Client.set_terminated`. The end of a block then does not end the run a second time."""
        self._client.set_terminated(self._run_id, status, end_time)
        self._ends = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._ends:
            self._ends = False
            self._client._end_run(self._run_id, final_status(exc), raised=exc is not None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(exc_type, exc, traceback)

    def __repr__(self) -> str:
        return f"<Run {self._run_id if isinstance(self._run_id, str) else repr(self._run_id)}>"


def _started(
    client: RunClient,
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
    return Run(client, pending, experiment=experiment, ends=True)


def _attached(client: RunClient, run_id: RunId, experiment: Experiment) -> Run:
    return Run(client, run_id, experiment=experiment, ends=False)


class RunCalls:
    """The calls of a client that give a handle. A mixin: the rest of the client is the `RunClient` it needs."""

    def start_run(
        self: RunClient,
        experiment_id: str | None = None,
        *,
        experiment_name: str | None = None,
        run_name: str | None = None,
        tags: Mapping[str, Any] | None = None,
        parent: Run | RunId | None = None,
    ) -> Run:
        """
        Queue the creation of a run, for a block that ends it.

            with client.start_run(experiment_name="nightly", run_name="demo") as run:
                run.log_metrics({"loss": 0.7}, step=1)

        Args:
            experiment_id: Of the experiment the run belongs to.
            experiment_name: Instead of `experiment_id`: looked up, and created when it does not exist.
            run_name: None: the server makes one up.
            tags: Of the run, from its start.
            parent: The run is nested in this one, and in its experiment unless another is given: a handle or an id.

        Raises:
            ConfigError: A value is bad, or no experiment is given.
            ClosedError: The client was closed.
        """
        return _started(self, (experiment_id, experiment_name), run_name, tags, parent)

    def attach(self: RunClient, run_id: Run | RunId) -> Run:
        """
        A handle on a run that exists, or that another part of the program has made; its block does not end it.

        Raises:
            ConfigError: It is no run id.
        """
        if isinstance(run_id, Run):
            run_id = run_id.id
        if not isinstance(run_id, (str, PendingRunId)) or not run_id:
            raise ConfigError(f"attach takes a run id, a PendingRunId or a Run, not {run_id!r}")
        return Run(self, run_id, experiment=(None, None), ends=False)

    def run_from_env(self: RunClient) -> Run:
        """
        The same for the run that `MLFLOW_RUN_ID` names, as MLflow Projects sets it for an entry point.

        MLflow Projects ends that run FINISHED or FAILED when the entry point has ended, but not when it is cancelled: so
        a SIGTERM ends it KILLED, as it does runs that the client has made (where the client streams, and unless
        `handle_signals=False`). Processes that only help with the run had better `attach` to it.

        Raises:
            ConfigError: It is not set.
        """
        run_id = environment.text("MLFLOW_RUN_ID")
        if run_id is None:
            raise ConfigError("the environment variable MLFLOW_RUN_ID is not set: there is no run to attach to")
        self._enter_run(run_id)
        return Run(self, run_id, experiment=(None, None), ends=False)


def final_status(exc: BaseException | None) -> str:
    """What a block that ended so makes of its run."""
    if exc is None or (isinstance(exc, SystemExit) and exc.code in (None, 0)):
        return "FINISHED"
    cancelled = type(exc).__name__ in ("CancelledError", "Cancelled")  # of asyncio and trio, neither is imported for it
    return "KILLED" if cancelled or isinstance(exc, KeyboardInterrupt) else "FAILED"
