"""
Who is measured: one `Peer` for each client, in the table `PEERS`.

Rule: a peer's library is imported by its `connect` and nowhere else, so that a worker loads only the peer it measures.
"""

import importlib.util
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from attrs import frozen


class QueueingClient(Protocol):
    """
    What the cases call. `runqueue.Client` and MLflow's queueing client share these signatures, so neither needs an
    adapter, which would cost time on the measured path.
    """

    # `Any`: MLflow hands out its own PendingRunId, and annotates a dict where any mapping will do.
    def create_run(self, experiment_id: str) -> Any: ...

    def log_metrics(self, run_id: Any, metrics: Any, step: int | None = None) -> None: ...

    def set_terminated(self, run_id: Any, status: str | None = None) -> None: ...

    def flush(self) -> Any: ...


class Floor:
    """
    The least that a client which keeps what it is given can do in a call: copy the dict into a tuple, append the tuple.

    It is a method because every client's is: a line of code in the loop itself would be a floor that nobody can reach.
    """

    def __init__(self) -> None:
        self._append = deque[tuple[str, int | None, dict[str, float]]]().append

    def create_run(self, experiment_id: str) -> str:
        return experiment_id

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._append((run_id, step, {**metrics}))

    def log_metric(self, run_id: str, key: str, value: float, step: int | None = None) -> None:
        self._append((run_id, step, {key: value}))

    def set_terminated(self, run_id: str, status: str | None = None) -> None:
        raise NotImplementedError("the floor sends nothing: it is a peer of the enqueue cases only")

    def flush(self) -> None:
        raise NotImplementedError("the floor sends nothing: it is a peer of the enqueue cases only")


def _floor(tracking_uri: str) -> QueueingClient:
    return Floor()


def _mlflow_queueing(tracking_uri: str) -> QueueingClient:
    from mlflow.utils.autologging_utils.client import MlflowAutologgingQueueingClient

    # MLflow leaves __init__ without annotations, which mypy --strict counts as an untyped call.
    client: QueueingClient = MlflowAutologgingQueueingClient(tracking_uri)  # type: ignore[no-untyped-call]
    return client


def _runqueue_httpx(tracking_uri: str) -> QueueingClient:
    import runqueue

    return runqueue.Client(tracking_uri, transport="httpx")


def _runqueue_auto(tracking_uri: str) -> QueueingClient:
    import runqueue

    return runqueue.Client(tracking_uri, transport="auto")


@frozen(kw_only=True)
class Peer:
    """One client, as one user would set it up."""

    name: str
    """How the command line, the table and the JSON call it."""

    title: str
    """What it is, for the legend under the table."""

    connect: Callable[[str], QueueingClient]
    """Makes the client for a tracking URI. No request is sent by it."""

    requires: tuple[str, ...]
    """Modules without which this peer is left out, and said to be."""

    def missing(self) -> list[str]:
        """The modules that this peer requires and this environment lacks."""
        return [module for module in self.requires if importlib.util.find_spec(module) is None]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="floor",
            title="a method that copies the dict into a tuple and appends it to a deque",
            connect=_floor,
            requires=(),
        ),
        Peer(
            name="mlflow",
            title="MlflowAutologgingQueueingClient",
            connect=_mlflow_queueing,
            requires=("mlflow",),
        ),
        Peer(
            name="runqueue",
            title='runqueue.Client(transport="httpx")',
            connect=_runqueue_httpx,
            requires=("runqueue",),
        ),
        Peer(
            name="runqueue-aiohttp",
            title='runqueue.Client(transport="auto") with the extra `aiohttp` installed',
            connect=_runqueue_auto,
            requires=("runqueue", "httpx_aiohttp"),
        ),
    )
}
