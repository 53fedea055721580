"""
Parts for tests of the engine: records, a plain encoder, a store that answers by script, and checks of the counts.

An **entry** is `(kind, key, value, step)`; only metrics have a step. Values of the classes `Fault`, `Sized` and
`Explosive` make the encoder fail, or make fragments of a given size.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeAlias

import anyio
import attrs

from runqueue.queueing import (
    Accumulator,
    Batch,
    Bounds,
    Encoding,
    Failure,
    Fragments,
    Joined,
    Lane,
    Ledger,
    Record,
    Report,
    StoreError,
)
from runqueue.queueing.batches._batch import ARTIFACT, DATASET, METRIC, PARAM, RUN, STATUS, TAG, record_of
from runqueue.queueing.delivery._dispatch import Check
from runqueue.queueing.delivery._retry import RetryPolicy
from runqueue.queueing.delivery._sender import Sender
from runqueue.queueing.delivery._stream import Stream
from runqueue.queueing.lanes._intake import Intake, OnFull

Entry: TypeAlias = tuple[int, Any, Any, Any]
ETERNITY = 1_000_000.0
"""Virtual seconds after which a test that still waits fails."""


@attrs.frozen
class Fault:
    """A value that the encoder reports as faulty."""

    error: Exception


@attrs.frozen
class Sized:
    """A value whose fragment has *size* bytes."""

    size: int


@attrs.frozen
class Explosive:
    """A value at which the encoder raises."""

    error: Exception


# -- records ---------------------------------------------------------------------------------------------------------


def run(carried: int = 0) -> Record:
    return record_of(RUN, ("run",), tuple(f"carried {at}" for at in range(carried)))


def params(**entries: Any) -> Record:
    return record_of(PARAM, entries)


def tags(entries: Mapping[str, Any], rides: bool = True) -> Record:
    return record_of(TAG, dict(entries), rides)


def metrics(step: int = 0, /, **entries: Any) -> Record:
    return record_of(METRIC, entries, step)


def datasets(*entries: Any) -> Record:
    return record_of(DATASET, entries)


def artifacts(**entries: Any) -> Record:
    return record_of(ARTIFACT, entries)


def status(word: str = "FINISHED") -> Record:
    return record_of(STATUS, (), word)


def points(count: int, start: int = 0) -> list[Record]:
    """*count* records of one metric point each, with the steps from *start* on."""
    return [metrics(step, loss=step) for step in range(start, start + count)]


def entries_of(record: Record) -> list[Entry]:
    kind, held = record[0], record[1]
    if kind == STATUS:
        return [(STATUS, "status", record[2], None)]
    if isinstance(held, dict):
        return [(kind, key, value, record[2] if kind == METRIC else None) for key, value in held.items()]
    return [(kind, "dataset" if kind == DATASET else "run", value, None) for value in held]


def flat(records: Iterable[Record]) -> list[Entry]:
    return [entry for record in records for entry in entries_of(record)]


def inside(batch: Batch) -> list[Entry]:
    """The entries of a batch, checked against its fragments."""
    found: list[Entry] = []
    for part in batch.slices():
        mine = entries_of(part.record)[part.start : part.stop]
        assert b",".join(map(fragment, mine)) == part.joined
        found += mine
    return found


def named(failures: Iterable[Failure]) -> list[Entry]:
    return [entry for failure in failures for entry in entries_of(failure.record)[failure.start : failure.stop]]


def fragment(entry: Entry) -> bytes:
    kind, key, value, step = entry
    if kind == ARTIFACT:
        return b""
    if isinstance(value, Sized):
        return b"x" * value.size
    return f"{kind}:{key}={value}".encode() + (_tail(step) if kind == METRIC else b"")


def _tail(step: Any) -> bytes:
    return f"@{step};".encode()


def _encode_one(record: Record, memory: dict[Any, Any]) -> Fragments:
    pieces: list[bytes] = []
    faults: dict[int, Exception] = {}
    for at, entry in enumerate(entries_of(record)):
        value = entry[2]
        if isinstance(value, Explosive):
            raise value.error
        if isinstance(value, Fault):
            faults[at] = value.error
        pieces.append(fragment(entry))
    if record[0] == METRIC and not faults and not any(isinstance(value, Sized) for value in record[1].values()):
        return Joined(b",".join(pieces), len(pieces), _tail(record[2])), None
    return pieces, faults or None


def _encode_many(records: Sequence[Record], memory: dict[Any, Any]) -> tuple[bytes, list[bytes]] | None:
    made = [_encode_one(record, memory)[0] for record in records]
    joined = [each for each in made if isinstance(each, Joined)]
    if len(joined) < len(made):
        return None
    return b",".join(each.joined for each in joined), [each.tail for each in joined]


encode = Encoding(_encode_one, _encode_many)


# -- lanes, by plain calls -------------------------------------------------------------------------------------------

Judge: TypeAlias = Callable[[list[Entry]], StoreError | None]


def bounds(
    *,
    params: int = 100,
    tags: int = 100,
    metrics: int = 1_000,
    entities: int = 1_000,
    datasets: int = 1_000,
    body: int = 1_000_000,
    create_tags: int = 1_000,
    create_tag_bytes: int = 250_000,
) -> Bounds:
    return Bounds(
        caps=(1, params, tags, metrics, datasets, 1, 1),
        entities=entities,
        body=body,
        create_tags=min(create_tags, entities),
        create_tag_bytes=min(create_tag_bytes, body),
    )


def lane_of(*records: Record, run_exists: bool = True, run: str = "r") -> Lane:
    lane = Lane(run, encode, Ledger(), run_exists=run_exists)
    fill(lane, records)
    return lane


def fill(lane: Lane, records: Iterable[Record]) -> None:
    """Put records into the inbox, past the intake."""
    put = lane.inbox.appender()
    for each in records:
        put(each)


def ledger_of(lane: Lane) -> Ledger:
    """The ledger that counts the lane's entries."""
    return lane._account.ledger


def pending_of(lane: Lane) -> int:
    """Entries of the lane that are queued or in flight, counted one by one."""
    return sum(lane.inbox.weights()) + sum(
        failure.weight
        for member in lane.with_uploads
        for failure in member.outstanding(member.last_closed, Exception())
    )


def check_counts(accumulator: Accumulator) -> None:
    """Assert that each entry is counted once, and that every pending entry is in a lane."""
    counts = accumulator.counts()
    ledger = accumulator.ledger
    settled = ledger.stored + ledger.failed + ledger.dropped + ledger.refused
    assert min(counts.values()) >= 0, counts
    assert counts["accepted"] == counts["pending"] + counts["in_flight"] + settled
    assert sum(map(pending_of, accumulator.all())) == counts["pending"] + counts["in_flight"]
    in_flight = [member.in_flight for lane in accumulator.all() for member in lane.with_uploads]
    assert sum(batch.weight for batch in in_flight if batch) == counts["in_flight"]
    if accumulator.intake is not None:
        assert accumulator.intake.pending == counts["pending"] + counts["in_flight"]
        assert all(lane.inbox_entries == sum(lane.inbox.weights()) for lane in accumulator.all())


def check_lane(lane: Lane) -> None:
    """Assert the same of one lane, and that its windows count their entries of each kind right."""
    ledger = ledger_of(lane)
    assert ledger.drawn + sum(lane.inbox.weights()) == (
        pending_of(lane) + ledger.stored + ledger.failed + ledger.dropped
    )
    assert ledger.in_flight == (lane.in_flight.weight if lane.in_flight else 0)
    for window in lane._windows:
        for kind in (PARAM, TAG, METRIC, DATASET):
            really = sum(len(item[1]) if isinstance(item, tuple) else item.weight for item in window.items(kind))
            assert window.counts[kind] == really, f"kind {kind}"


def drain(lane: Lane, limits: Bounds | None = None, judge: Judge | None = None, most: int = 100_000) -> list[Batch]:
    """
    Deliver the closed windows of a lane to a judge, until the lane is empty or cannot go on.

    Args:
        lane: The lane to empty.
        limits: Bounds of a batch.
        judge: Returns the error of a batch, by its entries. None: every batch is stored.
        most: The largest number of batches.

    Returns:
        The batches in the order of delivery.
    """
    delivered: list[Batch] = []
    check_lane(lane)
    while len(delivered) < most and (batch := lane.take(limits or bounds())) is not None:
        check_lane(lane)
        delivered.append(Batch.of(batch.serial, batch.slices()))  # a copy: a rejection may change the batch
        error = judge(inside(batch)) if judge else None
        if error is None:
            lane.store()
        elif not lane.reject(error):
            check_lane(lane)
            break
        check_lane(lane)
    return delivered


def stored_by(judge: Judge, batches: Iterable[Batch]) -> list[Entry]:
    """The entries that a judge has accepted. It must decide by the entries alone."""
    return [entry for batch in batches if judge(inside(batch)) is None for entry in inside(batch)]


def per_kind(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    """The entries by kind: inside one stage, only the order of each kind is promised."""
    kinds: dict[int, list[Entry]] = defaultdict(list)
    for entry in entries:
        kinds[entry[0]].append(entry)
    return dict(kinds)


# -- the whole engine ------------------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Request:
    run: Any
    entries: list[Entry]
    at: float
    """The virtual time at which it began."""
    number: int
    """The number of requests before it."""
    creates_run: bool


Script: TypeAlias = "Callable[[Request], StoreError | Exception | None]"


class FakeStore:
    """Takes `seconds` for each request, and stores its batch unless the script returns an error."""

    def __init__(self, script: Script | None = None, seconds: float = 1.0) -> None:
        self.script = script
        self.seconds = seconds
        self.upload_seconds = seconds
        self.requests: list[Request] = []
        self.stored: dict[Any, list[Entry]] = defaultdict(list)
        self.leftovers: Sequence[Record] = ()
        self.breaches: list[str] = []
        self.early: list[Any] = []
        """Runs whose final status was sent while their artifacts were in flight."""
        self.busy: Counter[Lane] = Counter()
        self.most_busy = 0

    async def __call__(self, lane: Lane, batch: Batch) -> Sequence[Record]:
        if not (batch.creates_run or lane.run_exists):
            self.breaches.append(f"{lane.run} was sent data before it was created")
        if STATUS in batch.groups and any(
            ARTIFACT in side.in_flight.groups for side in lane.upload_lanes if side.in_flight
        ):
            self.early.append(lane.run)
        if lane.parent is not None and not (lane.run_exists or lane.parent.run_exists):
            self.breaches.append(f"{lane.run} was created before its parent")
        if self.busy[lane]:
            self.breaches.append(f"two requests of {lane.run} at once")
        request = Request(lane.run, inside(batch), anyio.current_time(), len(self.requests), batch.creates_run)
        self.requests.append(request)
        self.busy[lane] += 1
        self.most_busy = max(self.most_busy, self.busy.total())
        try:
            await anyio.sleep(self.seconds if ARTIFACT not in batch.groups else self.upload_seconds)
            error = self.script(request) if self.script else None
        finally:
            self.busy -= Counter((lane,))  # removes counts of 0, which would keep the lane alive
        if error is not None:
            raise error
        self.stored[lane.run] += request.entries
        return self.leftovers if batch.creates_run else ()

    def runs(self) -> list[Any]:
        return [request.run for request in self.requests]

    def times(self) -> list[float]:
        """Seconds from the first request to each request."""
        return [round(request.at - self.requests[0].at, 6) for request in self.requests]


class CountingStream(Stream):
    """Counts its looks."""

    looks = 0

    def _is_idle(self) -> bool:
        self.looks += 1
        return super()._is_idle()


@attrs.frozen
class Bench:
    """An engine under test."""

    accumulator: Accumulator
    store: FakeStore
    sender: Sender
    outages: list[StoreError] = attrs.field(factory=list)
    """The errors of the outages that the sender has reported."""
    reported: list[Failure] = attrs.field(factory=list)
    """The failures that the stream has reported."""
    dropped: Counter[Any] = attrs.field(factory=Counter)
    """The numbers of dropped entries that the stream has reported, by run."""
    streams: list[CountingStream] = attrs.field(factory=list)
    """The stream, if there is one."""

    @property
    def stream(self) -> CountingStream:
        return self.streams[0]

    @property
    def intake(self) -> Intake:
        assert self.accumulator.intake is not None
        return self.accumulator.intake

    def lane(self, run: Any, *records: Record, run_exists: bool = True, parent: Lane | None = None) -> Lane:
        lane = self.accumulator.open(run, run_exists=run_exists, parent=parent)
        if self.accumulator.intake is None:
            fill(lane, records)
        else:  # only `append` counts the entries for the intake
            for record in records:
                lane.append(record)
        return lane

    async def flush(self, lane: Lane | None = None, timeout: float | None = None) -> Report:
        report = await self.sender.flush(lane, timeout)
        check_counts(self.accumulator)
        return report


@asynccontextmanager
async def bench(
    script: Script | None = None,
    *,
    check: Check | None = None,
    seconds: float = 1.0,
    limits: Bounds | None = None,
    max_workers: int = 8,
    uploads: int = 4,
    timeout: float = 300.0,
    base: float = 0.5,
    patience: float = math.inf,
    interval: float | None = None,
    max_pending: float = math.inf,
    on_full: OnFull = "raise",
    releases_failures: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> AsyncIterator[Bench]:
    """
    An engine with a store that answers by script; at the end of the block its counts are checked.

    Args:
        script: Returns the error of a request. None: every request is stored.
        check, max_workers, uploads, pause, patience: See `Sender`.
        seconds: Virtual seconds that a request takes.
        limits: Bounds of a batch.
        timeout: Seconds after the first failure at which retrying ends.
        base: Base of the back-off in seconds. 0: only `retry_after` leads to a wait, so that times are exact.
        interval: Seconds between two ticks of a stream. None: there is no stream.
        max_pending: Entries that may be pending.
        on_full: See `Intake`; "block" is for tests with threads.
        releases_failures: See `Stream`.
    """
    limits = limits or bounds()
    streams = interval is not None

    def make_intake(ledger: Ledger) -> Intake:
        return Intake(
            ledger,
            max_pending=max_pending,
            on_full=on_full,
            batch_size=limits.entities if streams else math.inf,
            wake=lambda: b.stream.wake() if streams else None,
            drains=lambda: streams,
            mark=-1 if streams else max_pending,
        )

    accumulator = Accumulator(encode, make_intake if streams or max_pending < math.inf else None)
    store = FakeStore(script, seconds)
    policy = RetryPolicy(timeout=timeout, base=base)
    outages: list[StoreError] = []
    with anyio.fail_after(ETERNITY):
        async with Sender(
            accumulator,
            store,
            bounds=limits,
            check=check,
            max_workers=max_workers,
            uploads=uploads,
            retry=policy,
            on_outage=outages.append,
            streams=streams,
            pause=pause,
            patience=patience,
        ) as sender:
            b = Bench(accumulator, store, sender, outages)
            if interval is None:
                yield b
            else:
                b.streams.append(
                    CountingStream(
                        accumulator, sender, interval, partial(_note_report, b), releases_failures=releases_failures
                    )
                )
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(b.stream.run)
                    yield b
                    tasks.cancel_scope.cancel()
    check_counts(accumulator)
    assert not store.breaches


def _note_report(b: Bench, failures: list[Failure], dropped: Mapping[Any, int]) -> None:
    b.reported.extend(failures)
    b.dropped.update(dropped)
