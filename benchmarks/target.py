"""
What a figure must reach: a `Target` is data in the table of cases, a `Judgement` is its result in one run.

Targets are judged by medians, and only by `python -m benchmarks`: no test asserts a time.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias

from attrs import field, frozen

Medians: TypeAlias = Mapping[tuple[str, int], Mapping[str, float]]
"""(peer, size) -> quantity -> median."""

Relation: TypeAlias = Literal["value", "÷", "cheaper", "spread"]

_PHRASES: Mapping[Relation, str] = {
    "value": "{peer}",
    "÷": "{peer} ÷ {other}",
    "cheaper": "{other} ÷ {peer}",
    "spread": "{peer}, largest ÷ smallest of all sizes",
}


@frozen(kw_only=True)
class Target:
    """One bound on one quantity of one peer, alone or beside another peer of the same run."""

    quantity: str
    peer: str = "runqueue"

    relation: Relation = "value"
    """The peer's own value, its ratio to the other's, the other's to it, or how far its sizes lie apart."""

    other: str | None = None
    """The peer it is compared with."""

    at_most: float | None = None
    at_least: float | None = None

    aim: float | None = None
    """What is wished for beyond the bound; it is shown, and never judged."""

    def __attrs_post_init__(self) -> None:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a target has one bound: at_most or at_least")
        if (self.other is None) == (self.relation in ("÷", "cheaper")):
            raise ValueError(f"{self.relation!r} and another peer do not go together")

    @property
    def text(self) -> str:
        """What is bounded, in words."""
        return f"{self.quantity}: " + _PHRASES[self.relation].format(peer=self.peer, other=self.other)

    @property
    def bound(self) -> str:
        """The bound in words."""
        bound = f"at most {self.at_most:g}" if self.at_most is not None else f"at least {self.at_least:g}"
        return bound if self.aim is None else f"{bound}, aim {self.aim:g}"

    def judge(self, medians: Medians) -> "Judgement":
        """Compare the target with the measurements. A judgement without a measurement names what is missing."""
        own = self._of(self.peer, medians)
        if not own:
            return Judgement(target=self, missing=self.peer)
        if self.relation == "value":
            return Judgement(target=self, reached=own[-1])
        if self.relation == "spread":
            if len(own) < 2:
                return Judgement(target=self, missing="a second size")
            return Judgement(target=self, reached=max(own) / min(own) if min(own) > 0 else float("inf"))
        assert self.other is not None
        others = self._of(self.other, medians)
        if not others:
            return Judgement(target=self, missing=self.other)
        over, under = (own[-1], others[-1]) if self.relation == "÷" else (others[-1], own[-1])
        return Judgement(target=self, reached=over / under if under > 0 else float("inf"))

    def _of(self, peer: str, medians: Medians) -> list[float]:
        """Return the peer's values, by size."""
        sizes = sorted(size for name, size in medians if name == peer and self.quantity in medians[name, size])
        return [medians[peer, size][self.quantity] for size in sizes]


@frozen(kw_only=True)
class Judgement:
    """The result of a target in one run."""

    target: Target
    reached: float | None = None
    """What was measured; `None`: it could not be."""

    missing: str | None = field(default=None)
    """What was not measured, if it could not be judged."""

    @property
    def met(self) -> bool:
        """Whether the figure was measured and lies within the bound."""
        if self.reached is None:
            return False
        target = self.target
        return self.reached <= target.at_most if target.at_most is not None else self.reached >= (target.at_least or 0)

    @property
    def verdict(self) -> str:
        return "reached" if self.met else "not measured" if self.reached is None else "falls short"

    def __str__(self) -> str:
        found = f"{self.missing} is missing" if self.reached is None else f"{self.reached:.3f}"
        return f"{self.verdict:<13} {self.target.text} = {found} ({self.target.bound})"
