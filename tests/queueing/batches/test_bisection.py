"""Isolation: an entry that the store rejects costs only itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue.queueing import Lane, Record, RejectedError, Scope, StoreError
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, STATUS, TAG, record_of
from support.engine import (
    Entry,
    bounds,
    datasets,
    drain,
    fill,
    flat,
    inside,
    lane_of,
    ledger_of,
    metrics,
    named,
    params,
    per_kind,
    points,
    run,
    status,
    stored_by,
    tags,
)


def refuses(bad: set[Entry], bars_key: bool = False) -> Any:
    """A store that rejects every batch which holds one of these entries."""

    def judge(entries: list[Entry]) -> StoreError | None:
        return RejectedError("bad", bars_key=bars_key and len(entries) == 1) if bad & set(entries) else None

    return judge


@st.composite
def judged(draw: st.DrawFn) -> tuple[list[Record], set[Entry]]:
    kinds = draw(st.lists(st.tuples(st.sampled_from((PARAM, TAG, METRIC, DATASET)), st.integers(1, 9)), max_size=12))
    records: list[Record] = []
    for at, (kind, count) in enumerate(kinds):
        if kind == DATASET:
            records.append(datasets(*(f"d{at}.{n}" for n in range(count))))
        else:
            entries = {f"k{at}.{n}": n for n in range(count)}
            records.append(record_of(kind, entries, at if kind == METRIC else True))
    entries_ = flat(records)
    bad = draw(st.sets(st.sampled_from(entries_))) if entries_ else set()
    return records, bad


@given(judged(), st.integers(1, 30))
def test_exactly_the_bad_entries_are_reported_and_all_others_stored(
    case: tuple[list[Record], set[Entry]], entities: int
) -> None:
    """For any set of bad entries, in any place, in batches of any size."""
    records, bad = case
    lane = lane_of(*records)
    lane.close_window()
    batches = drain(lane, bounds(entities=entities, datasets=entities), refuses(bad))
    stored = stored_by(refuses(bad), batches)
    assert per_kind(stored) == per_kind(entry for entry in flat(records) if entry not in bad)
    assert len(stored) == len(flat(records)) - len(bad)
    failures = lane.take_unreported(lane.last_closed)
    assert sorted(named(failures)) == sorted(bad)
    assert all(failure.final for failure in failures)
    assert lane.is_settled


@pytest.mark.parametrize("place", [0, 499, 500, 999])
@pytest.mark.parametrize("kind", ["one record", "a record each", "params, tags and metrics"])
def test_one_bad_entry_in_a_thousand_costs_at_most_21_requests(place: int, kind: str) -> None:
    """Halving a thousand entries takes ten steps of two requests."""
    records = [metrics(0, **{f"m{n}": n for n in range(1_000)})]
    if kind == "a record each":
        records = points(1_000)
    elif kind == "params, tags and metrics":
        records = [params(**{f"p{n}": n for n in range(100)}), tags({f"t{n}": n for n in range(100)}), *points(800)]
    lane = lane_of(*records)
    lane.close_window()
    bad = flat(records)[place]
    assert len(drain(lane, judge=refuses({bad}))) <= 21
    assert named(lane.take_unreported(1)) == [bad]
    assert ledger_of(lane).stored == 999


@given(judged(), st.integers(1, 30), st.randoms(use_true_random=False))
def test_a_store_that_contradicts_itself_still_gets_each_entry_stored_or_reported_once(
    case: tuple[list[Record], set[Entry]], entities: int, random: Any
) -> None:
    """Inferring a bad half only saves requests: an entry fails only if it was rejected alone."""
    records, _ = case
    lane = lane_of(*records)
    lane.close_window()
    stored: list[Entry] = []
    alone: list[Entry] = []

    def judge(entries: list[Entry]) -> StoreError | None:
        if random.random() < 0.5:
            alone.extend(entries if len(entries) == 1 else ())
            return RejectedError("flaky")
        stored.extend(entries)
        return None

    drain(lane, bounds(entities=entities, datasets=entities), judge)
    failed = named(lane.take_unreported(1))
    assert failed == alone
    assert per_kind(stored) == per_kind(entry for entry in flat(records) if entry not in set(failed))
    assert lane.is_settled


@pytest.mark.parametrize("bad_first", [True, False])
def test_a_name_that_was_refused_alone_is_not_sent_again(bad_first: bool) -> None:
    """5,000 steps of a good and a bad metric cost at most 40 requests, and every good point is stored."""
    keys = ("b/ad", "good") if bad_first else ("good", "b/ad")
    records = [metrics(step, **dict.fromkeys(keys, step)) for step in range(5_000)]

    def judge(entries: list[Entry]) -> StoreError | None:
        bad = [key for _, key, _, _ in entries if key == "b/ad"]
        return RejectedError("invalid name", bars_key=len(entries) == 1) if bad else None

    lane = lane_of(*records)
    lane.close_window()
    batches = drain(lane, judge=judge)
    assert len(batches) <= 40
    assert stored_by(judge, batches) == [entry for entry in flat(records) if entry[1] == "good"]
    assert named(lane.take_unreported(1)) == [entry for entry in flat(records) if entry[1] == "b/ad"]


def test_a_barred_name_stays_barred_in_later_windows_and_for_its_kind_alone() -> None:
    """The name is barred for its run and kind: a tag of the same name is still sent."""
    lane = lane_of(metrics(0, x=0))
    lane.close_window()
    drain(lane, judge=refuses({(METRIC, "x", 0, 0)}, bars_key=True))
    fill(lane, [metrics(1, x=1, y=1), tags({"x": "t"}), params(x="p")])
    lane.close_window()
    batches = drain(lane)
    assert [len(inside(batch)) for batch in batches] == [3]
    assert named(lane.take_unreported(2)) == [(METRIC, "x", 0, 0), (METRIC, "x", 1, 1)]


def test_a_barred_tag_or_param_is_not_sent_again_either() -> None:
    """The rule is the same for every kind that has keys."""
    lane = lane_of(tags({"t": 0}), params(p=0))
    lane.close_window()
    drain(lane, judge=refuses({(TAG, "t", 0, None), (PARAM, "p", 0, None)}, bars_key=True))
    fill(lane, [tags({"t": 1}), params(p=1)])
    lane.close_window()
    assert drain(lane) == []
    assert len(named(lane.take_unreported(2))) == 4


@pytest.mark.parametrize("record", [datasets("d"), datasets({"unhashable": 1}), status()])
def test_a_name_is_not_barred_where_there_is_no_name(record: Record) -> None:
    """Datasets and the final status have no key, and the lane goes on."""
    lane = lane_of(record)
    lane.close_window()
    assert lane.take(bounds()) is not None
    assert lane.reject(RejectedError("invalid", bars_key=True))
    assert [failure.record for failure in lane.take_unreported(1)] == [record]


def test_a_batch_scope_error_fails_the_batch_without_halving() -> None:
    """Halving would prove nothing; the next batch is sent."""
    lane = lane_of(*points(25))
    lane.close_window()
    answers = iter([StoreError("odd"), None, None])
    batches = drain(lane, bounds(metrics=10), lambda _: next(answers))
    assert [batch.count for batch in batches] == [10, 10, 5]
    assert named(lane.take_unreported(1)) == flat(points(10))


def test_a_lane_scope_error_fails_every_entry_of_a_closed_window() -> None:
    """Nothing more is sent to an unknown run: neither returned parts nor later stages and windows."""
    records = [*points(25), tags({"t": 1}), datasets("d"), status()]
    lane = lane_of(*records)
    lane.close_window()
    fill(lane, points(3, 100))
    lane.close_window()
    fill(lane, points(2, 200))
    gone = StoreError("no such run", scope=Scope.LANE)
    batches = drain(lane, bounds(metrics=10), lambda entries: RejectedError("?") if len(entries) > 9 else gone)
    assert [batch.count for batch in batches] == [11, 5]
    assert sorted(map(repr, named(lane.take_unreported(2)))) == sorted(
        map(repr, [*flat(records), *flat(points(3, 100))])
    )
    assert lane.is_settled
    assert repr(lane) == "<Lane run=r pending=2 in_flight=0 settled=30>"
    lane.close_window()
    assert [inside(batch) for batch in drain(lane)] == [flat(points(2, 200))]


def test_a_store_scope_error_keeps_everything_queued() -> None:
    """Refused credentials say nothing about the entries."""
    lane = lane_of(*points(25))
    lane.close_window()
    assert len(drain(lane, bounds(metrics=10), lambda _: StoreError("401", scope=Scope.STORE))) == 1
    assert lane.take_unreported(1) == []
    assert named(lane.outstanding(1, Exception())) == flat(points(25))
    assert [inside(batch) for batch in drain(lane, bounds(metrics=10))] == [
        flat(points(10)),
        flat(points(10, 10)),
        flat(points(5, 20)),
    ]


def test_the_final_status_is_sent_although_data_was_rejected() -> None:
    """A run whose data was rejected still ends."""
    lane = lane_of(status(), params(p=1), datasets("d"))
    lane.close_window()
    batches = drain(lane, judge=lambda entries: RejectedError("no") if entries[0][0] != STATUS else None)
    assert [inside(batch)[0][0] for batch in batches] == [PARAM, DATASET, STATUS]
    assert len(lane.take_unreported(1)) == 2


def test_a_rejected_status_is_one_failure_that_counts_no_entry() -> None:
    """The counts are of entries, and a final status is none."""
    lane = lane_of(status())
    lane.close_window()
    drain(lane, judge=lambda _: RejectedError("no"))
    (failure,) = lane.take_unreported(1)
    assert (failure.weight, failure.final, ledger_of(lane).failed) == (0, True, 0)
    assert repr(failure) == "<Failure run=r kind=5 0:1 final: no>"


def _opening(lane: Lane) -> None:
    lane.close_window()
    assert not lane.run_exists


def test_a_rejected_creation_keeps_everything_queued() -> None:
    """The run may be created later; its data waits."""
    for error in (RejectedError("no"), StoreError("no"), StoreError("no", scope=Scope.LANE)):
        lane = lane_of(run(), *points(3), status(), run_exists=False)
        _opening(lane)
        assert len(drain(lane, judge=lambda _, error=error: error)) == 1  # type: ignore[misc]
        assert lane.take_unreported(1) == []
        assert sum(failure.weight for failure in lane.outstanding(1, error)) == 4
        assert not lane.run_exists
        assert [batch.count for batch in drain(lane)] == [1, 3, 1]


def test_riders_are_dropped_after_a_rejection_and_isolated_as_a_log_batch() -> None:
    """One of the tags may be at fault: the run is created without the tags, which are then sent by log-batch."""
    records = [run(), tags({"a": 1, "bad": 2, "c": 3})]
    lane = lane_of(*records, run_exists=False)
    _opening(lane)
    bad = (TAG, "bad", 2, None)
    batches = drain(lane, judge=refuses({bad}))
    assert [[entry[1] for entry in inside(batch)] for batch in batches] == [
        ["run", "a", "bad", "c"],
        ["run"],
        ["a", "bad", "c"],
        ["a"],
        ["bad"],
        ["c"],
    ]
    assert named(lane.take_unreported(1)) == [bad]
    assert lane.run_exists
