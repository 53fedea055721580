"""The clients that are measured: one `Peer` for each, in the table `PEERS`."""

# Rules of this file: a peer's library is imported by its `connect` and nowhere else, so that a worker loads only the
# peer it measures.

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from attrs import frozen

from benchmarks import clients
from benchmarks.clients import Options


@frozen(kw_only=True)
class Peer:
    """One client, set up as its users would set it up."""

    name: str
    """How the command line, the table and the JSON call it."""

    title: str
    """What it is, for the legend under the table."""

    connect: Callable[[str, Options], Any]
    """Makes the client for a tracking URI: a `QueueingClient`, but for a case with a measurement of its own."""

    requires: tuple[str, ...] = ()
    """Modules without which this peer is left out, and said to be."""

    imports: str = ""
    """The statement by which its users import it, for the import case."""

    keywords: Callable[[], frozenset[str]] | None = None
    """The names its constructor takes, where cases may ask for options that not every version has."""

    divisor: int = 1
    """Its calls cost so much more than others' that it makes only one in so many of them, where calls are timed."""

    def left_out(self, options: Options) -> str | None:
        """Return why the peer cannot take part in a case with these options; `None` if it can."""
        missing = [module for module in self.requires if importlib.util.find_spec(module) is None]
        if missing:
            return f"{', '.join(missing)} not installed"
        if self.keywords is not None:
            unknown = [keyword for keyword in options.given() if keyword not in self.keywords()]
            if unknown:
                return f"this version of runqueue.Client does not take {', '.join(f'{key}=' for key in unknown)}"
        return None


def _runqueue_keywords() -> frozenset[str]:
    import runqueue

    return frozenset(inspect.signature(runqueue.Client).parameters)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="floor",
            title="a method that copies the dict into a tuple and appends it to a deque",
            connect=clients.floor,
        ),
        Peer(
            name="bare",
            title="threads that post full log-batch bodies, made beforehand, over http.client",
            connect=clients.nothing,
        ),
        Peer(
            name="mlflow",
            title="MlflowAutologgingQueueingClient; its thread pool has max_workers threads where a case sets them",
            connect=clients.mlflow_queueing,
            requires=("mlflow",),
            imports="from mlflow.utils.autologging_utils.client import MlflowAutologgingQueueingClient",
        ),
        Peer(
            name="mlflow-async",
            title="MlflowClient.log_batch(synchronous=False)",
            connect=clients.mlflow_async,
            requires=("mlflow",),
            divisor=5,
        ),
        Peer(
            name="mlflow-sync",
            title="MlflowClient.log_batch",
            connect=clients.mlflow_sync,
            requires=("mlflow",),
            divisor=100,
        ),
        Peer(
            name="wandb",
            title='wandb.init(mode="offline")',
            connect=clients.wandb_offline,
            requires=("wandb",),
            imports="import wandb",
            divisor=10,
        ),
        Peer(
            name="neptune",
            title='neptune_scale.Run(mode="offline")',
            connect=clients.neptune_offline,
            requires=("neptune_scale",),
            imports="import neptune_scale",
            divisor=20,
        ),
        Peer(
            name="trackio",
            title="trackio.init(), to a local folder",
            connect=clients.trackio_local,
            requires=("trackio",),
            imports="import trackio",
            divisor=5,
        ),
        Peer(
            name="runqueue",
            title='runqueue.Client(transport="httpx")',
            connect=clients.runqueue_httpx,
            requires=("runqueue",),
            imports="import runqueue",
            keywords=_runqueue_keywords,
        ),
        Peer(
            name="runqueue-aiohttp",
            title='runqueue.Client(transport="auto"), the default: httpx-aiohttp',
            connect=clients.runqueue_auto,
            requires=("runqueue", "httpx_aiohttp"),
            keywords=_runqueue_keywords,
        ),
    )
}
