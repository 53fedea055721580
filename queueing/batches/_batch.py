"""Records, limits and batches: what is queued, the server's bounds on a request, and the content of one request."""

# A **record** is one queued call: a flat tuple of six items. The engine reads the first two, and none of the others.
#
#     (kind, entries, ...)        entries: a dict by entry key, or a tuple; `len(entries)` counts the entries
#
#     RUN      one entry, carried  creates the run; `carried` are the keys of the tags that the request holds already
#     PARAM    {key: value}        write-once: an equal repeat needs no request
#     TAG      {key: value}, rides `rides`: the tag may travel inside the request that creates the run
#     METRIC   {key: value}
#     DATASET  (value, ...)
#     STATUS   ()                  ends the run; it has one fragment and counts as no entry
#     ARTIFACT {key: value}        is uploaded beside the other kinds, and before STATUS
#
# Rules of this file: no clock, no socket, no thread, no await.

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, Final, TypeAlias

import attrs

from runqueue.queueing._errors import ConfigError, StoreError
from runqueue.queueing.batches import _part
from runqueue.queueing.batches._part import Pack, Part, Slice, Stretch

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
"""The order of kinds inside one window. Kinds of the same stage share a batch."""

MERGED: Final = STAGES[1]


_entries = itemgetter(1)


def record_of(kind: int, entries: Any, a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> Record:
    """A record, its unused items filled with None."""
    return (kind, entries, a, b, c, d)


def weight(record: Record) -> int:
    """The number of entries that a record counts for."""
    return len(record[1])


def weights(records: Iterable[Record]) -> Iterator[int]:
    """The weight of each record. Both maps run in C: there is no Python call per record."""
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
    A server's bounds on one batch.

    MLflow's bounds, from the documentation of `runs/log-batch` in its REST API: 1,000 metrics, 100 params, 100 tags,
    1,000 entities together, 1,000,000 bytes of body; and 1,000 datasets in a request of `runs/log-inputs`.

    Args:
        metrics: Metric points in one batch. None: the store's own bound.
        params: Params in one batch. None: as above.
        tags: Tags in one batch. None: as above.
        entities: Metric points, params and tags together in one batch. None: as above.
        datasets: Dataset inputs in one request. None: as above.
        bytes: Bytes of a request's body. None: as above.

    Raises:
        ConfigError: A bound is not a whole number from 1 on.
    """

    metrics: int | None = _limit()
    params: int | None = _limit()
    tags: int | None = _limit()
    entities: int | None = _limit()
    datasets: int | None = _limit()
    bytes: int | None = _limit()

    def over(self, base: Limits) -> Limits:
        """
        Return these limits, completed by others.

        Args:
            base: Gives the limits that are None here.
        """
        own = {key: value for key, value in attrs.asdict(self).items() if value is not None}
        return attrs.evolve(base, **own)


@attrs.frozen(kw_only=True)
class Bounds:
    """
    Limits in the form that batching uses: by kind, with every field set.

    Args:
        caps: Entries of each kind.
        entities: Metrics, params and tags together.
        body: Bytes that are left for fragments, after the rest of the body.
        riders: Tags that may travel inside the request that creates a run.
        rider_bytes: Bytes of these tags, as ASCII-escaped JSON.
    """

    caps: tuple[int, ...]
    entities: int
    body: int
    create_tags: int
    create_tag_bytes: int

    @classmethod
    def of(cls, limits: Limits, *, envelope: int, create_tags: int, create_tag_bytes: int) -> Bounds:
        """
        The bounds that follow from limits.

        Args:
            limits: Limits with every field set.
            envelope: The largest number of bytes that a body has besides its fragments.
            riders: Tags that fit into the request that creates a run.
            rider_bytes: Bytes of these tags.

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
            create_tags=min(create_tags, limits.entities),
            create_tag_bytes=min(create_tag_bytes, body),
        )

    def below(self, size: int) -> Bounds:
        """The bounds to use after the store has refused a batch of *size* bytes as too large: half of that at most."""
        body = max(1, min(self.body, size // 2))
        return attrs.evolve(self, body=body, create_tag_bytes=min(self.create_tag_bytes, body))

    def room(self, kind: int) -> int:
        """How many entries of this kind fit into one batch."""
        return min(self.caps[kind], self.entities) if kind in MERGED else self.caps[kind]


def must_take(queued: Sequence[int], caps: Sequence[int], entities: int) -> list[int]:
    """
    How many entries of each kind the next batch has to hold so that the number of batches stays minimal.

    The smallest possible number of batches is `n`, the largest of the quotients below; spreading each kind evenly over
    `n` batches reaches it. If more entries of a kind are queued than `n - 1` batches can hold, the next batch must take
    the excess. Whatever else is added to that batch keeps `n` in reach. Filling batches in a fixed order of kinds,
    without this rule, costs extra requests where the bound on entities is tighter than the sum of the bounds by kind.
    """
    n = max(-(-sum(queued) // entities), *(-(-have // cap) for have, cap in zip(queued, caps, strict=True)))
    return [max(0, have - (n - 1) * cap) for have, cap in zip(queued, caps, strict=True)]


class Batch:
    """
    The content of one request: parts of one stage, by kind.

    The fields for bisection (see `_bisection`):
        rejections: Answers so far that count as a rejection once there are enough of them.
        sibling: The other half of a rejected batch; it is tried after this one.
        suspect: This half must hold a bad entry, because its sibling was stored.
        regroup: The untried parts may be joined again once a bad entry has been found.

    The fields for proof (see `_evidence`):
        since: How many requests had been stored when the batch, or the batch it was cut from, was refused first.
        seen: How many requests had been stored when the batch was refused last.
        doubted: The refusal that proves nothing yet.
        passed: Entries of a later request have been tried since.
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
        self.serial: int = serial  # the window it was taken from
        self.rejections: int = 0
        self.sibling: Batch | None = None
        self.suspect: bool = False
        self.regroup: bool = True
        self.since: int | None = None
        self.seen: int = 0
        self.doubted: StoreError | None = None
        self.passed: bool = False
        self.groups: dict[int, list[Part]] = {}
        self.count: int = 0
        self.size: int = 0
        self.weight: int = 0

    @classmethod
    def of(cls, serial: int, parts: Iterable[Part]) -> Batch:
        batch = cls(serial)
        for part in parts:
            batch.add(part)
        return batch

    def with_parts(self, parts: Iterable[Part]) -> Batch:
        """A batch with other parts that takes this batch's place in the bisection."""
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
    def creates_run(self) -> bool:
        """Whether this batch creates the run."""
        return RUN in self.groups

    def parts(self) -> Iterator[Part]:
        for kind in sorted(self.groups):
            yield from self.groups[kind]

    def stretches(self) -> Iterator[Stretch]:
        """The stretches of records that the batch consists of, in order."""
        for part in self.parts():
            yield from part.stretches()

    def slices(self) -> Iterator[Slice]:
        """
        The parts, with packs taken apart.

        Raises:
            JoinError: A pack cannot be taken apart.
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
        """The records whose entries are in this batch."""
        return (record for part in self.groups.get(kind, ()) for record, _, _ in part.stretches())

    def halves(self) -> tuple[Batch, Batch]:
        """
        The batch cut in two, in order. Each half holds at least one entry if the batch has two.

        Raises:
            JoinError: A part cannot be taken apart.
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
