"""Results of measurements: all samples of one peer at one size of a case."""

import statistics
from collections.abc import Iterable

from attrs import field, frozen

from benchmarks.case import Case
from benchmarks.target import Judgement, Medians


@frozen(kw_only=True)
class Measurement:
    """One row of the table, for each of the case's quantities that the peer has."""

    case: Case
    peer: str
    size: int
    repeats: int = 1
    """Samples a round."""

    samples: list[dict[str, float]] = field(factory=list[dict[str, float]])

    def values(self, quantity: str) -> list[float]:
        """Return all samples of a quantity; an empty list where the peer lacks it."""
        return [sample[quantity] for sample in self.samples if quantity in sample]

    @property
    def medians(self) -> dict[str, float]:
        names = (quantity.name for quantity in self.case.quantities)
        return {name: statistics.median(self.values(name)) for name in names if self.values(name)}


@frozen(kw_only=True)
class Result:
    """One case in one run of the benchmarks: its rows, and the peers that were left out."""

    case: Case
    sizes: tuple[int, ...]
    rounds: int
    measurements: tuple[Measurement, ...]
    left_out: dict[str, str]
    """Peer -> why."""

    seconds: float = 0.0
    """How long all of it took."""

    reason: str | None = None
    """Why the whole case was left out; `None`: it was not."""

    @property
    def judgements(self) -> list[Judgement]:
        medians = medians_of(self.measurements)
        return [target.judge(medians) for target in self.case.targets]


def medians_of(measurements: Iterable[Measurement]) -> Medians:
    return {(measurement.peer, measurement.size): measurement.medians for measurement in measurements}
