"""Entries that cannot be sent: each fails alone."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest

from runqueue.queueing import Batch, Fragments, Joined, Lane, Ledger, Record, RejectedError
from runqueue.queueing.batches._batch import METRIC, PARAM, RUN, STATUS, record_of
from support.engine import (
    Explosive,
    Fault,
    Sized,
    bounds,
    check_lane,
    datasets,
    drain,
    encode,
    fill,
    flat,
    inside,
    lane_of,
    metrics,
    named,
    params,
    status,
    tags,
)


def keys(batches: list[Batch]) -> list[list[str]]:
    return [[key for _, key, _, _ in inside(batch)] for batch in batches]


def test_faulted_entries_fail_alone() -> None:
    """An entry that cannot be encoded is reported, and its neighbours are sent."""
    wrong = TypeError("no number")
    records = [metrics(7, a=Fault(wrong), b=1, c=Fault(wrong), d=2), metrics(8, e=Fault(wrong)), metrics(9, f=3)]
    lane = lane_of(*records)
    lane.close_window()
    assert keys(drain(lane)) == [["b", "d", "f"]]
    failures = lane.take_unreported(1)
    assert [(f.record[2], f.start, f.stop, f.error, f.final) for f in failures] == [
        (7, 0, 1, wrong, True),
        (7, 2, 3, wrong, True),
        (8, 0, 1, wrong, True),
    ]


def test_fragments_that_do_not_come_apart_cost_their_record_only() -> None:
    """The defect shows late: the entries set aside for the next batch must not be lost with it."""

    def careless(record: Record, memory: dict[Any, Any]) -> Fragments:
        return (Joined(b"a;,b;,c;", 2, b";"), None) if record[0] == METRIC else encode(record, memory)

    lane = Lane("r", careless, Ledger(), run_exists=True)
    fill(lane, [params(p=1), params(p=2, q=1), metrics(0, a=1, b=1), status()])
    lane.close_window()
    batches = drain(lane, bounds(entities=3))
    assert [batch.count for batch in batches] == [2, 1]
    assert named(lane.take_unreported(1)) == [*flat([metrics(0, a=1, b=1)]), (PARAM, "p", 2, None)]
    assert lane.is_settled


def test_a_rejected_batch_that_does_not_come_apart_is_not_lost() -> None:
    """The defect shows when the batch is to be halved."""

    def careless(record: Record, memory: dict[Any, Any]) -> Fragments:
        return Joined(b"a;,b;,c;", 4, b";"), None

    lane = Lane("r", careless, Ledger(), run_exists=True)
    fill(lane, [metrics(0, a=1, b=1, c=1, d=1)])
    lane.close_window()
    assert lane.take(bounds()) is not None
    with suppress(AssertionError):
        lane.reject(RejectedError("no"))
    check_lane(lane)


def test_an_encoder_that_raises_costs_its_record_only() -> None:
    """A defect in the encoder may cost one call, never a run."""
    defect = ZeroDivisionError("ours")
    lane = lane_of(metrics(0, a=1), metrics(1, b=Explosive(defect), c=1), metrics(2, d=1), status())
    lane.close_window()
    assert keys(drain(lane)) == [["a", "d"], ["status"]]
    assert [(f.start, f.stop, f.error) for f in lane.take_unreported(1)] == [(0, 1, defect), (1, 2, defect)]


@pytest.mark.parametrize("record", [params(big=Sized(100)), tags({"big": Sized(100)}), datasets(Sized(100))])
def test_an_entry_larger_than_a_request_fails_alone(record: Record) -> None:
    """It can never be sent, and must not block other entries."""
    lane = lane_of(record, metrics(0, a=Sized(99), b=Sized(100), c=1))
    lane.close_window()
    batches = drain(lane, bounds(body=100))
    assert [key for batch in keys(batches) for key in batch] == ["a", "c"]
    failures = lane.take_unreported(1)
    assert {entry[2] for entry in named(failures)} == {Sized(100)}
    assert all("100 bytes are more than a request may have" in str(failure.error) for failure in failures)
    assert len(failures) == 2


@pytest.mark.parametrize("value", [Sized(100), Fault(TypeError("no"))])
def test_nothing_is_sent_to_a_run_whose_creation_cannot_be_encoded(value: object) -> None:
    """The creation is reported as failed, and no data is sent for a run that does not exist."""
    lane = lane_of(record_of(RUN, (value,), ()), metrics(0, a=1), status(), run_exists=False)
    lane.close_window()
    assert keys(drain(lane, bounds(body=100))) == []
    reported = [*lane.take_unreported(1), *lane.outstanding(1, Exception())]
    assert {failure.kind for failure in reported} == {RUN, METRIC, STATUS}
