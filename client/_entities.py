"""
What users hand in and get back: datasets, entries, failures, statistics.

Rule of this file: frozen values only; nothing here is made on the enqueue path.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, cast, overload

import attrs

EntryKind: TypeAlias = Literal["metric", "param", "tag", "dataset", "artifact", "run"]


@attrs.frozen
class Dataset:
    """
    A dataset that a run read, as MLflow stores it.

    MLflow's own limits, from its data model: 500 characters of name, 36 of digest, 65,535 of source, 1,048,575 of
    schema, 16,777,215 of profile; what the server refuses fails alone.
    """

    name: str
    """For people, e.g. "iris"."""
    digest: str
    """A fingerprint of the content: two datasets of one name and digest are one."""
    source_type: str = "local"
    """E.g. "local", "s3", "hugging_face"."""
    source: str = ""
    """Where it came from: a URI, or JSON that the type of source defines."""
    schema: str | None = None
    """JSON, as `mlflow.types.Schema` writes it."""
    profile: str | None = None
    """JSON of summary statistics."""
    tags: Mapping[str, str] = attrs.field(factory=dict[str, str])
    """Tags of this input, e.g. {"mlflow.data.context": "train"}."""


@attrs.frozen
class Entry:
    """One metric point, param, tag, dataset or artifact, or the run itself."""

    kind: EntryKind
    key: str | None = None
    """Of a metric, param or tag its key as given; of a dataset its name; of an artifact its path in the run."""
    value: Any = None
    """As given, or what it was converted to at the call."""
    step: Any = None
    """Of a metric; as given, where None means 0."""
    timestamp: Any = None
    """Of a metric, in milliseconds since the epoch."""


def _portable(entry: Entry) -> Entry:
    """An entry that can be pickled; what was logged may be anything, and a report has to get out of the process."""
    try:
        pickle.dumps(entry)
    except Exception:
        return Entry(entry.kind, entry.key, repr(entry.value), repr(entry.step), repr(entry.timestamp))
    return entry


class Entries(Sequence[Entry]):
    """
    The entries of a failure. A sequence that makes each Entry when it is asked for: a server that is down for an hour
    may leave a million of them, and to report that must not cost more memory than to queue it.
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
            return self._stretch(start, stop) if step == 1 else tuple(self)[index]
        at = index + self._count if index < 0 else index
        if at >= 0:
            for count, entries in self._parts:
                if at < count:
                    return next(entries(at, at + 1))
                at -= count
        raise IndexError(index)

    def _stretch(self, start: int, stop: int) -> tuple[Entry, ...]:
        made: list[Entry] = []
        for count, entries in self._parts:
            if max(0, start) < min(count, stop):
                made += entries(max(0, start), min(count, stop))
            start, stop = start - count, stop - count
        return tuple(made)

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
    """Entries of one run and operation that were not stored, for one cause."""

    run_id: Any
    """The real id (`str`) once there is one, else the `PendingRunId`."""
    operation: str
    """The method's name, e.g. "log_metrics"."""
    entries: Sequence[Entry]
    """What was not stored. Fewer than `count` where of some only the count was kept (see `Client.failures`)."""
    error: Exception
    """Why: a `StoreError`, or what was wrong with the entry."""
    final: bool
    """True: failed for good. False: still queued; a later flush tries again."""
    count: int = 0
    """How many entries: a created run counts 1, a final status 0."""

    def summary(self) -> str:
        """For messages, e.g. "log_metrics of 3 entries (metric 'loss' at step 7, ...)"."""
        if not self.entries:
            return f"{self.operation} of {self.count:,} entries"
        first = self.entries[0]
        what = first.kind if first.key is None else f"{first.kind} {first.key!r}"
        if first.kind == "metric":
            what += f" at step {first.step}"
        if len(self.entries) == 1 and self.count <= 1:
            return f"{self.operation} ({what})"
        return f"{self.operation} of {self.count:,} entries ({what}, ...)"


@attrs.frozen(kw_only=True)
class Statistics:
    """
    Counts since the client was made, in entries unless said otherwise. A created run counts 1, an artifact 1, a final
    status 0.

    `accepted = pending + in_flight + stored + failed + dropped`, exact when no call is under way.
    """

    accepted: int
    """Taken by a log call."""
    pending: int
    """Queued, and in no request."""
    in_flight: int
    """In a request that is under way or being repeated."""
    stored: int
    """Confirmed by the server."""
    failed: int
    """Failed for good, and reported."""
    dropped: int
    """Given up without a request, and warned of: what was queued when a block ended by an exception."""
    cut: int
    """Keys and values that were shortened to the server's lengths."""
    retried: int
    """Attempts beyond the first of each batch."""
    requests: int
    """Attempts that were sent to the store, of any kind."""
    bytes_sent: int
    """Bytes of the bodies of these."""


@attrs.frozen(kw_only=True)
class FlushReport:
    """The outcome of one flush."""

    total: int
    """Entries that the flush began with."""
    failures: tuple[OperationFailure, ...]
    """What of them was not stored."""

    @property
    def stored(self) -> int:
        """Entries that were stored."""
        return self.total - sum(failure.count for failure in self.failures)
