"""
What a case is: a group of rows of the table, as data. Its measurement is a plain function that runs in a fresh process
with one peer. The table itself is in `cases.py`.
"""

import importlib.util
from collections.abc import Callable, Mapping

from attrs import field, frozen
from attrs.validators import deep_iterable, gt, min_len

from benchmarks.backend import RAW, Backend
from benchmarks.clients import Options
from benchmarks.quantity import Quantity
from benchmarks.target import Target
from benchmarks.work import Work

FULL_ROUNDS = 5
QUICK_ROUNDS = 1

_PLAIN = Options()


@frozen(kw_only=True)
class Case:
    """One thing that is measured, for several peers."""

    name: str
    """How the command line, the table and the JSON call it."""

    group: str
    """Cases that the command line takes together, and that belong together in a chart."""

    title: str
    """What it does, for the table."""

    quantities: tuple[Quantity, ...] = field(validator=min_len(1))
    """What is counted; the first is the one that charts show."""

    peers: tuple[str, ...]
    """Names in `benchmarks.peer.PEERS`."""

    sizes: tuple[int, ...] = field(validator=[min_len(1), deep_iterable(gt(0))])
    """How much is done in one process: calls, metrics or runs, as the measurement says. Several: each is a row."""

    quick_sizes: tuple[int, ...] = field(validator=[min_len(1), deep_iterable(gt(0))])
    """The same under `--quick`."""

    measure: Callable[[Work], Mapping[str, float]]
    """What is measured, by the quantities' names. Called once in a process."""

    backend: Backend = RAW
    """What the clients talk to."""

    options: Options = _PLAIN
    """Settings of the clients."""

    one_processor: bool = False
    """Client and server share one: what counts CPU counts else what a virtual machine takes to wake the other."""

    expected_counts: Callable[[int], dict[str, int]] | None = None
    """size -> what the counting server must have received, exactly; `None`: it is not asked."""

    targets: tuple[Target, ...] = ()

    rounds: int = field(default=FULL_ROUNDS, validator=gt(0))
    """Samples of each peer, unless the command line says how many."""

    samples: Mapping[str, int] = field(factory=dict[str, int])
    """Peers that are measured so many times a round, as they are done too soon for one sample to tell much."""

    quick_peers: tuple[str, ...] | None = None
    """Who takes part under `--quick`; `None`: everybody."""

    shares: Mapping[str, int] = field(factory=dict[str, int])
    """Peers that do only one part in so many of a size: for figures a run or a metric that would take too long."""

    full_only: bool = False
    """Not part of `--quick`."""

    requires: tuple[str, ...] = ()
    """Modules without which the case is left out, and said to be."""

    def described(self) -> str:
        """Return the title, with the processors that the case runs on."""
        return f"{self.title}; client and server on one processor" if self.one_processor else self.title

    def sizes_of(self, *, quick: bool) -> tuple[int, ...]:
        return self.quick_sizes if quick else self.sizes

    def size_for(self, peer: str, size: int) -> int:
        """Return how much of a size a peer does."""
        return max(size // self.shares.get(peer, 1), 1)

    def samples_of(self, peer: str, *, quick: bool) -> int:
        """Return how many samples of a peer a round takes."""
        return 1 if quick else self.samples.get(peer, 1)

    def peers_of(self, *, quick: bool) -> tuple[str, ...]:
        return self.quick_peers if quick and self.quick_peers is not None else self.peers

    def rounds_of(self, *, quick: bool) -> int:
        return QUICK_ROUNDS if quick else self.rounds

    def left_out(self, *, quick: bool) -> str | None:
        """Return why the whole case cannot be measured; `None` if it can."""
        if quick and self.full_only:
            return "not part of --quick"
        missing = [module for module in (*self.requires, *self.backend.requires) if not _installed(module)]
        return f"{', '.join(missing)} not installed" if missing else None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
