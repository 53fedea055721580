"""Limits, and how batches are filled and halved."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue.queueing import Batch, Bounds, ConfigError, Joined, Limits, Record, Slice
from runqueue.queueing.batches._batch import DATASET, MERGED, METRIC, PARAM, STATUS, TAG, must_take, record_of
from support.engine import Sized, bounds, datasets, drain, flat, inside, lane_of, per_kind, tags

FULL = Limits(metrics=1_000, params=100, tags=100, entities=1_000, datasets=1_000, bytes=1_000_000)

small = st.integers(1, 12)
counts = st.integers(0, 60)


@st.composite
def windows(draw: st.DrawFn, sizes: st.SearchStrategy[int] | None = None) -> list[Record]:
    """The records of several calls: params with distinct keys, tags and metrics, in calls of any size."""
    records: list[Record] = []
    serial = 0
    for kind, count in draw(st.lists(st.tuples(st.sampled_from(MERGED), st.integers(1, 9)), max_size=25)):
        entries: dict[str, Any] = {}
        for _ in range(count):
            serial += 1
            entries[f"k{serial}"] = Sized(draw(sizes)) if sizes is not None else serial
        records.append(record_of(kind, entries, 0) if kind == METRIC else record_of(kind, entries, True))
    return records


@st.composite
def bounds_of(draw: st.DrawFn, body: int = 1_000_000) -> Bounds:
    return bounds(params=draw(small), tags=draw(small), metrics=draw(small), entities=draw(small), body=body)


def holds(limits: Bounds, batches: list[Batch]) -> bool:
    """Whether one batch could hold all of these entries."""
    kinds = [kind for batch in batches for kind, _, _, _ in inside(batch)]
    return (
        all(kinds.count(kind) <= limits.caps[kind] for kind in (PARAM, TAG, METRIC, DATASET))
        and len(kinds) <= limits.entities
        and sum(batch.size for batch in batches) <= limits.body
    )


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "10", 2.5])
@pytest.mark.parametrize("field", ["metrics", "params", "tags", "entities", "datasets", "bytes"])
def test_limits_take_only_whole_numbers_from_one(field: str, value: object) -> None:
    """A bound that cannot be honoured is refused at once, with its name."""
    with pytest.raises(ConfigError, match=f"Limits\\({field}=\\.\\.\\.\\)"):
        Limits(**{field: value})  # type: ignore[arg-type]


def test_limits_fall_back_field_by_field() -> None:
    """A field that is None takes the store's bound."""
    assert Limits(metrics=200).over(FULL) == Limits(
        metrics=200, params=100, tags=100, entities=1_000, datasets=1_000, bytes=1_000_000
    )
    assert Limits().over(FULL) == FULL


def test_bounds_refuse_limits_that_are_not_set() -> None:
    """The engine has no defaults of its own."""
    with pytest.raises(ConfigError, match="not set: params, bytes"):
        Bounds.of(Limits(metrics=1, tags=1, entities=1, datasets=1), envelope=0, create_tags=1, create_tag_bytes=1)


def test_bounds_refuse_a_body_smaller_than_its_envelope() -> None:
    """A limit that leaves no room for an entry is refused."""
    with pytest.raises(ConfigError, match="bytes=320"):
        Bounds.of(Limits(bytes=320).over(FULL), envelope=320, create_tags=1, create_tag_bytes=1)


def test_bounds_keep_riders_within_the_other_limits() -> None:
    """The other limits hold for the request that creates a run, too."""
    made = Bounds.of(
        Limits(entities=50, bytes=1_000).over(FULL), envelope=320, create_tags=1_000, create_tag_bytes=250_000
    )
    assert (made.body, made.create_tags, made.create_tag_bytes) == (680, 50, 680)
    assert [made.room(kind) for kind in (PARAM, METRIC, DATASET, STATUS)] == [50, 50, 1_000, 1]


@given(st.lists(counts, min_size=3, max_size=3), st.lists(small, min_size=3, max_size=3), small)
def test_must_take_leaves_no_kind_too_much(queued: list[int], rooms: list[int], entities: int) -> None:
    """The entries that must be taken fit into one batch, and the rest fits into the remaining batches."""
    caps = [min(room, entities) for room in rooms]
    if not any(queued):
        return
    n = max(-(-sum(queued) // entities), *(-(-have // cap) for have, cap in zip(queued, caps, strict=True)))
    taken = must_take(queued, caps, entities)
    assert sum(taken) <= entities
    for have, cap, take in zip(queued, caps, taken, strict=True):
        assert 0 <= take <= min(cap, have)
        assert have - take <= (n - 1) * cap


@given(windows(), bounds_of())
def test_batches_lose_nothing_keep_order_and_obey_every_count(records: list[Record], limits: Bounds) -> None:
    """Every queued entry arrives once, in the order of its kind, in batches within the bounds."""
    lane = lane_of(*records)
    lane.close_window()
    batches = drain(lane, limits)
    assert all(holds(limits, [batch]) for batch in batches)
    assert per_kind(entry for batch in batches for entry in inside(batch)) == per_kind(flat(records))
    assert lane.is_settled


@given(windows(), bounds_of())
def test_the_number_of_batches_is_minimal_where_counts_bind(records: list[Record], limits: Bounds) -> None:
    """No plan needs fewer requests than the largest of these quotients."""
    lane = lane_of(*records)
    lane.close_window()
    have = [sum(len(record[1]) for record in records if record[0] == kind) for kind in MERGED]
    lower = max(-(-sum(have) // limits.entities), *(-(-n // limits.caps[k]) for n, k in zip(have, MERGED, strict=True)))
    assert len(drain(lane, limits)) == lower


@given(windows(st.integers(1, 59)), bounds_of(body=60))
def test_no_two_neighbours_fit_into_one_where_bytes_bind(records: list[Record], limits: Bounds) -> None:
    """A batch is closed only if the next entry does not fit into it."""
    lane = lane_of(*records)
    lane.close_window()
    batches = drain(lane, limits)
    assert all(holds(limits, [batch]) for batch in batches)
    assert not any(holds(limits, [one, two]) for one, two in pairwise(batches))
    assert sum(batch.count for batch in batches) == len(flat(records))


@given(st.lists(st.lists(st.integers(1, 59), min_size=1, max_size=9), max_size=9), small)
def test_datasets_are_batched_by_their_own_bound(calls: list[list[int]], cap: int) -> None:
    """Datasets obey their own count and the bound of bytes, and keep their order."""
    records = [datasets(*map(Sized, call)) for call in calls]
    lane = lane_of(*records)
    lane.close_window()
    limits = bounds(datasets=cap, body=60, entities=1)
    batches = drain(lane, limits)
    assert all(batch.count <= cap and batch.size <= 60 for batch in batches)
    assert [entry for batch in batches for entry in inside(batch)] == flat(records)
    for one, two in pairwise(batches):
        assert one.count + two.count > cap or one.size + two.size > 60


def test_a_run_of_250_params_120_tags_and_5000_metrics_takes_five_batches() -> None:
    """
    With MLflow's limits the bound on entities decides: 5,370 entries need six batches, and five without the params and
    tags of one batch.
    """
    lane = lane_of(
        record_of(PARAM, {f"p{n}": n for n in range(250)}),
        tags({f"t{n}": n for n in range(120)}),
        *(record_of(METRIC, {f"m{n}": n for n in range(10)}, step) for step in range(500)),
    )
    lane.close_window()
    assert [batch.count for batch in drain(lane)] == [1_000, 1_000, 1_000, 1_000, 1_000, 370]


@given(st.lists(st.integers(1, 7), min_size=1, max_size=12))
def test_halves_hold_the_whole_in_order_and_neither_is_empty(sizes: list[int]) -> None:
    """A batch is cut once, inside of a record if necessary."""
    batch = Batch.of(3, (Slice(record_of(METRIC, {n: n for n in range(size)}, at), 0, [b"%d" % n for n in range(size)])
                         for at, size in enumerate(sizes)))  # fmt: skip
    if batch.count < 2:
        return
    first, second = batch.halves()
    assert (first.count, second.count) == (batch.count // 2, batch.count - batch.count // 2)
    assert first.size + second.size == batch.size
    assert first.serial == second.serial == 3
    assert [*first.pieces(METRIC), *second.pieces(METRIC)] == list(batch.pieces(METRIC))


@given(st.lists(st.text(max_size=5), min_size=1, max_size=9), st.data())
def test_joined_fragments_come_apart_as_they_were(keys: list[str], data: st.DataObject) -> None:
    """A slice has the same bytes before and after it is cut, and so have its parts."""
    pieces = [key.replace(";", "").encode() + b";" for key in keys]
    whole = Slice(record_of(METRIC, dict.fromkeys(keys), 0), 0, Joined(b",".join(pieces), len(pieces), b";"))
    assert (whole.count, whole.stop, whole.size) == (len(pieces), len(pieces), sum(map(len, pieces)) + len(pieces))
    at = data.draw(st.integers(0, len(pieces)))
    head, tail = whole.split(at)
    assert (head.pieces, tail.pieces, tail.start) == (pieces[:at], pieces[at:], at)


def test_batches_and_slices_tell_what_they_hold() -> None:
    """The size in the repr includes the comma behind each fragment."""
    part = Slice(record_of(PARAM, {"a": 1, "b": 2, "c": 3}), 1, [b"12", b"345"])
    assert repr(part) == "<Slice kind=1 1:3 bytes=7>"
    assert repr(Batch.of(1, [part])) == "<Batch entries=2 bytes=7>"
    assert [(key, one.start, one.pieces) for key, one in part.keyed()] == [("b", 1, [b"12"]), ("c", 2, [b"345"])]
    assert [part.fitting(count, size) for count, size in [(2, 7), (1, 7), (2, 6), (2, 2)]] == [2, 1, 1, 0]
