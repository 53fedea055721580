"""
Values that users pass and get: datasets, entries, failures, statistics, reports.
"""

# Rule of this file: the classes are immutable, and no log call makes an object of them, except for datasets.

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, overload

import attrs

EntryKind: TypeAlias = Literal["metric", "param", "tag", "dataset", "artifact", "run"]


@attrs.frozen
class Dataset:
    """
    A dataset that a run reads, as MLflow stores it.

    MLflow's limits, from its data model: 500 characters of name, 36 of digest, 65,535 of source, 1,048,575 of schema,
    16,777,215 of profile. A dataset that the server rejects fails alone.

    Args:
        name: A name for people, e.g. "iris".
        digest: A fingerprint of the content: datasets of one name and digest are stored as one.
        source_type: The kind of source, e.g. "local", "s3", "hugging_face".
        source: The origin of the data: a URI, or JSON in the form that the kind of source defines.
        schema: The schema as JSON, in the form of `mlflow.types.Schema`. None: no schema.
        profile: Summary statistics as JSON. None: none.
        tags: Tags of this input, e.g. {"mlflow.data.context": "train"}.
    """

    name: str
    digest: str
    source_type: str = "local"
    source: str = ""
    schema: str | None = None
    profile: str | None = None
    tags: Mapping[str, str] = attrs.field(factory=dict[str, str])


@attrs.frozen
class Entry:
    """One metric point, param, tag, dataset or artifact, or the creation or final status of a run."""

    kind: EntryKind
    key: str | None = None
    """The key of a metric, param or tag as given, the name of a dataset, or the path of an artifact in the run."""
    value: Any = None
    """The value as given, or as the log call has converted it."""
    step: Any = None
    """The step of a metric as given; None means 0."""
    timestamp: Any = None
    """The time of a metric, in milliseconds since the epoch."""


def _portable(entry: Entry) -> Entry:
    """The entry, with text in place of values that cannot be pickled: a report must be able to leave the process."""
    try:
        pickle.dumps(entry)
    except Exception:
        return Entry(entry.kind, entry.key, repr(entry.value), repr(entry.step), repr(entry.timestamp))
    return entry


class Entries(Sequence[Entry]):
    """
    The entries of a failure, as a sequence that makes each Entry when it is asked for.

    A server that is down for an hour may leave a million entries unsent. A report of them must not take more memory
    than the queue did.

    Args:
        parts: For each part of the sequence, the number of its entries and a function that makes those from one index
            up to another.
    """

    def __init__(self, parts: Sequence[tuple[int, Callable[[int, int], Iterator[Entry]]]]) -> None:
        self._parts = [part for part in parts if part[0]]
        self._count = sum(count for count, _ in self._parts)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        for count, entries in self._parts:
            yield from entries(0, count)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Entry, ...]: ...
    def __getitem__(self, index: int | slice) -> Entry | tuple[Entry, ...]:
        if isinstance(index, slice):
            start, stop, step = index.indices(self._count)
            return self._range(start, stop) if step == 1 else tuple(self)[index]
        position = index + self._count if index < 0 else index
        if position >= 0:
            for count, entries in self._parts:
                if position < count:
                    return next(entries(position, position + 1))
                position -= count
        raise IndexError(index)

    def _range(self, start: int, stop: int) -> tuple[Entry, ...]:
        found: list[Entry] = []
        for count, entries in self._parts:
            if max(0, start) < min(count, stop):
                found += entries(max(0, start), min(count, stop))
            start, stop = start - count, stop - count
        return tuple(found)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Entries, tuple, list)):
            return NotImplemented
        return tuple(self) == tuple(cast("Sequence[Any]", other))

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"Entries({shown}{', ...' if len(self) > 3 else ''} {len(self):,} in all)"

    def __reduce__(self) -> tuple[Any, ...]:
        return (tuple, ([_portable(entry) for entry in self],))


@attrs.frozen
class OperationFailure:
    """Entries of one run and one operation that were not stored, for one cause."""

    run_id: Any
    """The run: its real id (`str`) once it exists, else its `PendingRunId`."""
    operation: str
    """The name of the method that logged them, e.g. "log_metrics"."""
    entries: Sequence[Entry]
    """The entries. There are fewer than `count` if only the number of the others was kept; see `Client.failures`."""
    error: Exception
    """The cause: a `StoreError`, or an error that says what is wrong with the entry."""
    final: bool
    """Whether they have failed for good. False: they are still queued, and the next flush sends them."""
    count: int = 0
    """The number of entries. The creation of a run counts 1, a final status 0."""

    def summary(self) -> str:
        """Describe the entries in one line, e.g. "log_metrics of 3 entries (metric 'loss' at step 7, ...)"."""
        if not self.entries:
            return f"{self.operation} of {self.count:,} entries"
        first = self.entries[0]
        example = first.kind if first.key is None else f"{first.kind} {first.key!r}"
        if first.kind == "metric":
            example += f" at step {first.step}"
        if len(self.entries) == 1 and self.count <= 1:
            return f"{self.operation} ({example})"
        return f"{self.operation} of {self.count:,} entries ({example}, ...)"


@attrs.frozen(kw_only=True)
class Statistics:
    """
    Counts since the client was made, in entries unless another unit is named. The creation of a run counts 1, an
    artifact 1, a final status 0.

    `accepted = pending + in_flight + stored + failed + dropped`; the counts are exact while no call is under way.
    """

    accepted: int
    """Accepted by a log call."""
    pending: int
    """Queued, and not in a request."""
    in_flight: int
    """In a request that is under way or will be repeated."""
    stored: int
    """Confirmed by the server."""
    failed: int
    """Failed for good; `Client.failures` holds them."""
    dropped: int
    """Given up without a request, with a warning: e.g. those that were queued when a block ended by an exception."""
    cut: int
    """Keys and values that were cut to the server's lengths."""
    retried: int
    """Attempts after the first one of each batch."""
    requests: int
    """Requests of any kind that were sent to the store, repeated ones included."""
    bytes_sent: int
    """Bytes of their bodies."""


@attrs.frozen(kw_only=True)
class FlushReport:
    """The outcome of one flush."""

    total: int
    """Entries that the flush began with."""
    failures: tuple[OperationFailure, ...]
    """Those that were not stored."""

    @property
    def stored(self) -> int:
        """Entries that were stored."""
        return self.total - sum(failure.count for failure in self.failures)
