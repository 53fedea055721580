"""
What is queued, and what goes into one request.

A **record** is one queued call, a plain tuple of six whose first two items are the engine's business and whose rest is not:

    (kind, entries, ...)        entries: a dict keyed by entry key, or a tuple; `len(entries)` counts them

    RUN      one entry, carried  creates the run; with the keys of the tags that are in it anyway
    PARAM    {key: value}        write-once: an equal repeat needs no request
    TAG      {key: value}, rides `rides`: may travel inside the request that creates the run
    METRIC   {key: value}
    DATASET  (value, ...)
    STATUS   ()                  ends the run; has one fragment and counts as no entry
    ARTIFACT {key: value}        goes on its own way, beside the others, and before STATUS (see `Lane.sides`)

A [Batch][] is made of the parts of `_part`: slices, and packs of whole records.

Rules of this file: no clock, no socket, no thread, no await.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Final, TypeAlias

import attrs

from runqueue.queueing._errors import ConfigError, StoreError
from runqueue.queueing.batches import _part
from runqueue.queueing.batches._part import Pack, Part, Slice

RUN: Final = 0
PARAM: Final = 1
TAG: Final = 2
METRIC: Final = 3
DATASET: Final = 4
STATUS: Final = 5
ARTIFACT: Final = 6
KINDS: Final = 7

Record: TypeAlias = _part.Record

STAGES: Final = ((RUN,), (PARAM, TAG, METRIC), (DATASET,), (ARTIFACT,), (STATUS,))
"""The order inside one window; the kinds of one stage share a batch."""

MERGED: Final = STAGES[1]


_entries = itemgetter(1)


def record_of(kind: int, entries: Any, a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> Record:
    """A record of fewer items than six, filled up."""
    return (kind, entries, a, b, c, d)


def weight(record: Record) -> int:
    """How many entries the record counts for."""
    return len(record[1])


def weights(records: Iterable[Record]) -> Iterator[int]:
    """The same of each record, without a call of Python's for each."""
    return map(len, map(_entries, records))


def _positive(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is None:
        return
    if type(value) is not int or value < 1:
        raise ConfigError(f"Limits({field.name}=...) takes a whole number from 1 or None, not {value!r}")


def _limit() -> Any:
    return attrs.field(default=None, validator=_positive)


@attrs.frozen(kw_only=True)
class Limits:
    """
    A server's bounds on one batch. A field that is None is the store's own.

    MLflow's, from its REST API's documentation of `runs/log-batch`: 1,000 metrics, 100 params, 100 tags, 1,000
    entities together, 1,000,000 bytes of body; 1,000 datasets a request of `runs/log-inputs`.

    Raises:
        ConfigError: A bound is not a whole number from 1.
    """

    metrics: int | None = _limit()
    """Metric points in one batch."""
    params: int | None = _limit()
    """Params in one batch."""
    tags: int | None = _limit()
    """Tags in one batch."""
    entities: int | None = _limit()
    """Metric points, params and tags together in one batch."""
    datasets: int | None = _limit()
    """Dataset inputs in one request."""
    bytes: int | None = _limit()
    """Bytes of a request's body."""

    def over(self, base: Limits) -> Limits:
        """These limits, with those of `base` where a field is None."""
        own = {key: value for key, value in attrs.asdict(self).items() if value is not None}
        return attrs.evolve(base, **own)


@attrs.frozen(kw_only=True)
class Bounds:
    """
    Limits as the batching reads them: by kind, with no None left.

    `body` is what is left of the limit of bytes for fragments; `riders` and `rider_bytes` bound the tags that travel
    inside the request that creates a run, in number and in bytes as ASCII-escaped JSON.
    """

    caps: tuple[int, ...]
    entities: int
    body: int
    riders: int
    rider_bytes: int

    @classmethod
    def of(cls, limits: Limits, *, envelope: int, riders: int, rider_bytes: int) -> Bounds:
        """
        Args:
            limits: Every field set.
            envelope: Bytes that a body has at most besides its fragments.
            riders: Tags that fit into the request that creates a run.
            rider_bytes: The same in bytes.

        Raises:
            ConfigError: The limit of bytes leaves no room for an entry.
        """
        missing = [key for key, value in attrs.asdict(limits).items() if value is None]
        if missing:
            raise ConfigError(f"these limits are not set: {', '.join(missing)}")
        assert limits.params and limits.tags and limits.metrics
        assert limits.datasets and limits.entities and limits.bytes
        body = limits.bytes - envelope
        if body < 1:
            raise ConfigError(f"Limits(bytes={limits.bytes}) is smaller than an empty batch ({envelope} bytes)")
        return cls(
            caps=(1, limits.params, limits.tags, limits.metrics, limits.datasets, 1, 1),
            entities=limits.entities,
            body=body,
            riders=min(riders, limits.entities),
            rider_bytes=min(rider_bytes, body),
        )

    def below(self, size: int) -> Bounds:
        """For a store that has refused a batch of so many bytes: half of that at most."""
        body = max(1, min(self.body, size // 2))
        return attrs.evolve(self, body=body, rider_bytes=min(self.rider_bytes, body))

    def room(self, kind: int) -> int:
        """How many entries of this kind one batch may hold."""
        return min(self.caps[kind], self.entities) if kind in MERGED else self.caps[kind]


def must_take(queued: Sequence[int], caps: Sequence[int], entities: int) -> list[int]:
    """
    How many entries of each kind the next batch has to hold so that the number of batches stays minimal.

    No plan needs fewer batches than `n`, the largest of the quotients below, and one with `n` exists (spread each
    kind evenly). A kind of which more is queued than `n - 1` batches can hold is what the next one must take; any
    filling-up on top of that keeps `n` in reach. Filling up in a fixed order without this rule costs requests
    where the bound on entities is tighter than the sum of the others.
    """
    n = max(-(-sum(queued) // entities), *(-(-have // cap) for have, cap in zip(queued, caps, strict=True)))
    return [max(0, have - (n - 1) * cap) for have, cap in zip(queued, caps, strict=True)]


class Batch:
    """
    What goes into one request: parts of one stage, by kind.

    The other fields serve the search for bad entries (`_bisection`): `rejections` counts the answers that will pass for a rejection
    when there are more of them; `sibling` is the other half of what was rejected, to be tried after this one; `suspect`
    says that this half has to hold a bad entry, because the other was stored; `regroup` that its untried parts may be
    joined again once a bad entry is found. For `_evidence`: `since` and `seen` are how much was stored when it, or what it
    is a part of, was first refused, and when it was refused last; `doubted` is the refusal that proves nothing yet; `passed` says that something
    of a later request was tried since.
    """

    __slots__ = (
        "count",
        "doubted",
        "groups",
        "passed",
        "regroup",
        "rejections",
        "seen",
        "serial",
        "sibling",
        "since",
        "size",
        "suspect",
        "weight",
    )

    def __init__(self, serial: int) -> None:
        self.serial = serial  # the window it was taken from
        self.rejections = 0
        self.sibling: Batch | None = None
        self.suspect = False
        self.regroup = True
        self.since: int | None = None
        self.seen = 0
        self.doubted: StoreError | None = None
        self.passed = False
        self.groups: dict[int, list[Part]] = {}
        self.count = 0
        self.size = 0
        self.weight = 0

    @classmethod
    def of(cls, serial: int, parts: Iterable[Part]) -> Batch:
        batch = cls(serial)
        for part in parts:
            batch.add(part)
        return batch

    def with_parts(self, parts: Iterable[Part]) -> Batch:
        """Another content in the same place of the search."""
        batch = Batch.of(self.serial, parts)
        batch.rejections, batch.sibling = self.rejections, self.sibling
        batch.suspect, batch.regroup = self.suspect, self.regroup
        batch.since, batch.seen, batch.doubted = self.since, self.seen, self.doubted
        batch.passed = self.passed
        return batch

    def add(self, part: Part) -> None:
        kind = part.record[0]
        group = self.groups.get(kind)
        if group is None:
            self.groups[kind] = [part]
        else:
            group.append(part)
        self.count += part.count
        self.size += part.size
        if kind != STATUS:
            self.weight += part.count

    @property
    def opens(self) -> bool:
        """Whether this batch creates the run."""
        return RUN in self.groups

    def parts(self) -> Iterator[Part]:
        for kind in sorted(self.groups):
            yield from self.groups[kind]

    def slices(self) -> Iterator[Slice]:
        """
        The parts, with packs taken apart.

        Raises:
            JoinError: One does not come apart.
        """
        for kind in sorted(self.groups):
            yield from self.slices_of(kind)

    def slices_of(self, kind: int) -> Iterator[Slice]:
        for part in self.groups.get(kind, ()):
            if isinstance(part, Pack):
                yield from part.slices()
            else:
                yield part

    def pieces(self, kind: int) -> Iterator[bytes]:
        """The fragments of one kind, in order, one by one."""
        for part in self.slices_of(kind):
            yield from part.pieces

    def joined(self, kind: int) -> bytes:
        """The fragments of one kind, in order, with commas between them."""
        return b",".join([part.joined for part in self.groups.get(kind, ())])

    def records(self, kind: int) -> Iterator[Record]:
        """The records that this batch holds entries of."""
        return (record for part in self.groups.get(kind, ()) for record, _, _ in part.stretches())

    def halves(self) -> tuple[Batch, Batch]:
        """
        The batch in two, its order kept; both hold at least one entry where it has two.

        Raises:
            JoinError: It does not come apart.
        """
        first, second = Batch(self.serial), Batch(self.serial)

        def share(parts: Iterable[Part], left: int) -> None:
            for part in parts:
                if left >= part.count:
                    first.add(part)
                elif left <= 0:
                    second.add(part)
                elif isinstance(part, Pack):
                    share(part.slices(), left)
                else:
                    head, tail = part.split(left)
                    first.add(head)
                    second.add(tail)
                left -= part.count

        share(self.parts(), self.count // 2)
        first.sibling = second
        first.regroup = second.regroup = self.regroup
        first.since = second.since = self.since
        return first, second

    def __repr__(self) -> str:
        return f"<Batch entries={self.count} bytes={self.size}>"
