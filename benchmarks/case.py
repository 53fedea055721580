"""
What is measured: one `Case` for each row group of the table, in the table `CASES`. A case is data; its measurement is a
plain function that runs in a fresh process with one peer.
"""

from collections.abc import Callable

from attrs import field, frozen
from attrs.validators import gt

from benchmarks.delivery import deliver_one_run, expected_counts
from benchmarks.enqueue import enqueue_one, enqueue_single, enqueue_ten
from benchmarks.peer import Peer


@frozen(kw_only=True)
class Case:
    """One thing that is measured, for several peers."""

    name: str
    """How the command line, the table and the JSON call it."""

    title: str
    """What it does, for the table."""

    unit: str
    """Unit of the measured value; less is better in every case."""

    peers: tuple[str, ...]
    """Names in `benchmarks.peer.PEERS`."""

    size: int = field(validator=gt(0))
    """How much is done in one process: calls or metrics, as the measurement says."""

    quick_size: int = field(validator=gt(0))
    """The same under `--quick`."""

    measure: Callable[[Peer, int, str], float]
    """(peer, size, tracking URI) -> the measured value. Called once in a process."""

    expected_counts: Callable[[int], dict[str, int]] | None = None
    """size -> what the counting server must have received; `None`: the case sends nothing and gets no server."""

    def size_of(self, *, quick: bool) -> int:
        """The size of a measurement, with or without `--quick`."""
        return self.quick_size if quick else self.size


ENQUEUE_PEERS = ("floor", "mlflow", "runqueue")
DELIVERY_PEERS = ("mlflow", "runqueue", "runqueue-aiohttp")

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="enqueue-10",
            title="log_metrics of 10 metrics, caller's thread",
            unit="µs/metric",
            peers=ENQUEUE_PEERS,
            size=50_000,
            quick_size=10_000,
            measure=enqueue_ten,
        ),
        Case(
            name="enqueue-1",
            title="log_metrics of 1 metric, caller's thread",
            unit="µs/call",
            peers=ENQUEUE_PEERS,
            size=200_000,
            quick_size=50_000,
            measure=enqueue_one,
        ),
        Case(
            name="enqueue-single",
            title="log_metric, caller's thread",
            unit="µs/call",
            peers=ENQUEUE_PEERS,
            size=200_000,
            quick_size=50_000,
            measure=enqueue_single,
        ),
        Case(
            name="delivery",
            title="1 run, 10 metrics a call, to a server that answers {}; CPU of all threads",
            unit="µs/metric",
            peers=DELIVERY_PEERS,
            size=200_000,
            quick_size=50_000,
            measure=deliver_one_run,
            expected_counts=expected_counts,
        ),
    )
}
