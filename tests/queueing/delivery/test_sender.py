"""Pumps: the order of lanes, what waits for what, and what a failure affects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from runqueue.queueing import Accumulator, Encoding, Lane, RejectedError, Report, Scope, StoreError
from runqueue.queueing.batches._batch import METRIC
from runqueue.queueing.delivery._sender import Sender
from support.engine import (
    FakeStore,
    Request,
    bench,
    bounds,
    datasets,
    encode,
    entries_of,
    fill,
    flat,
    metrics,
    named,
    points,
    run,
    status,
    tags,
)

pytestmark = pytest.mark.anyio

TEN = bounds(metrics=10)


def refuse_runs(*runs: Any) -> Callable[[Request], StoreError | None]:
    return lambda request: RejectedError("no such experiment") if request.creates_run and request.run in runs else None


async def test_no_more_requests_run_at_once_than_there_are_workers() -> None:
    """The bound is reached and never exceeded."""
    async with bench(limits=TEN, max_workers=3) as b:
        for n in range(10):
            b.lane(n, *points(30))
        assert await b.flush() == Report(total=300)
        assert b.store.most_busy == 3
        assert b.store.times() == [float(n // 3) for n in range(30)]


async def test_lanes_go_side_by_side_and_each_in_its_own_order() -> None:
    """Four runs take the time of one, and no run ever has two requests under way."""
    async with bench(limits=TEN) as b:
        for n in range(4):
            b.lane(n, run(), *points(25), datasets("d"), status(), run_exists=False)
        started = anyio.current_time()
        assert await b.flush() == Report(total=4 * 27)
        assert anyio.current_time() - started == pytest.approx(6)
        for n in range(4):
            assert b.store.stored[n] == flat([run(), *points(25), datasets("d"), status()])


async def test_a_long_lane_does_not_starve_the_others() -> None:
    """Lanes get the only worker in turn."""
    async with bench(limits=TEN, max_workers=1) as b:
        b.lane("long", *points(50))
        b.lane("a", *points(20))
        b.lane("b", *points(20))
        await b.flush()
        runs = b.store.runs()
        assert [set(runs[:3]), set(runs[3:6]), *runs[6:]] == [{"long", "a", "b"}] * 2 + ["long"] * 3


async def test_a_child_waits_for_its_parent_but_not_for_its_data() -> None:
    """The parent is created first, with any number of flushes and workers; then both are sent side by side."""
    async with bench(limits=TEN) as b:
        parent = b.accumulator.open("parent", run_exists=False)
        b.lane("child", run(), run_exists=False, parent=parent)
        b.lane("parent", run(), *points(30))
        await b.flush()
        assert [(request.run, request.at) for request in b.store.requests if request.creates_run] == [
            ("parent", b.store.requests[0].at),
            ("child", b.store.requests[0].at + 1),
        ]
        assert b.store.times()[-1] == 3


async def test_a_rejected_creation_keeps_everything_queued_and_reports_all_and_its_children() -> None:
    """Once the cause is repaired, the next flush creates the runs and stores everything in order."""
    broken = ["bad"]
    async with bench(lambda request: refuse_runs(*broken)(request)) as b:
        bad = b.lane("bad", run(), *points(3), status(), run_exists=False)
        child = b.lane("child", run(), tags({"t": 1}), run_exists=False, parent=bad)
        b.lane("grandchild", run(), run_exists=False, parent=child)
        b.lane("good", run(), *points(3), run_exists=False)
        report = await b.flush()
        assert (report.total, report.not_stored) == (11, 7)
        assert [(f.run, f.final) for f in report.failures] == [
            ("bad", False), ("bad", False), ("bad", False), ("bad", False), ("bad", False),
            ("child", False), ("child", False), ("grandchild", False),
        ]  # fmt: skip
        assert {str(f.error) for f in report.failures if f.run == "bad"} == {"no such experiment"}
        assert {str(f.error) for f in report.failures if f.run == "child"} == {
            "its parent, the run bad, was not created"
        }
        assert sorted(b.store.runs()) == ["bad", "good", "good"]
        assert b.accumulator.counts()["pending"] == 7
        broken.clear()
        assert await b.flush() == Report(total=7)
        assert b.store.stored["bad"] == flat([run(), *points(3), status()])
        assert b.store.stored["child"] == flat([run(), tags({"t": 1})])


async def test_a_failed_run_affects_no_other_run() -> None:
    """One of eight runs is unknown; seven complete."""
    gone = StoreError("no such run", scope=Scope.LANE)
    async with bench(lambda r: gone if r.run == 3 else None, limits=TEN) as b:
        for n in range(8):
            b.lane(n, *points(30), status())
        report = await b.flush()
        assert {failure.run for failure in report.failures} == {3}
        assert (report.total, report.not_stored, b.accumulator.counts()["stored"]) == (240, 30, 210)
        assert all(failure.final for failure in report.failures)


async def test_an_exception_of_the_store_fails_only_its_batch_and_never_the_engine() -> None:
    """A defect in a store is reported as such, and later batches are sent."""
    async with bench(lambda r: ZeroDivisionError("oops") if r.number == 0 else None, limits=TEN) as b:
        b.lane("r", *points(25))
        report = await b.flush()
        assert named(report.failures) == flat(points(10))
        assert str(report.failures[0].error) == "the store failed unexpectedly: ZeroDivisionError: oops"
        assert b.store.stored["r"] == flat(points(15, 10))


async def test_a_refused_name_on_a_final_status_does_not_end_the_engine() -> None:
    """A flag that does not apply here costs one failure, not the client."""
    async with bench(lambda r: RejectedError("Invalid name", bars_key=True)) as b:
        b.lane("r", status())
        b.lane("s", datasets({"name": "d"}))
        report = await b.flush()
        assert [entries_of(failure.record)[0][1] for failure in report.failures] == ["status", "dataset"]


async def test_an_assertion_in_the_encoder_does_not_end_the_engine() -> None:
    """The same holds for joined fragments that cannot be cut apart."""
    from runqueue.queueing import Fragments, Joined, Record

    def careless(record: Record, memory: dict[Any, Any]) -> Fragments:
        return (Joined(b"a;,b;,c;", 2, b";"), None) if record[0] == METRIC else encode(record, memory)

    accumulator = Accumulator(careless)
    async with Sender(accumulator, FakeStore(), bounds=bounds(metrics=1)) as sender:
        fill(accumulator.open("r", run_exists=True), [metrics(0, a=1, b=1), status()])
        report = await sender.flush()
        assert report.not_stored == 2


async def test_a_sender_that_is_closed_in_mid_request_gives_the_batch_back() -> None:
    """The entries of the cut request are pending again."""
    accumulator = Accumulator(encode)
    lane = accumulator.open("r", run_exists=True)
    fill(lane, points(25))
    async with Sender(accumulator, FakeStore(), bounds=TEN) as sender:
        sender.begin()
        await anyio.sleep(1.5)
        assert accumulator.counts()["in_flight"] == 10
    assert accumulator.counts() == {
        "accepted": 25, "pending": 15, "in_flight": 0, "stored": 10, "failed": 0, "dropped": 0,
    }  # fmt: skip
    assert named(lane.outstanding(1, Exception())) == flat(points(15, 10))
    assert accumulator.abandon(failed=True) == 15


async def test_a_flush_that_waits_while_the_sender_is_closed_reports_what_is_left() -> None:
    """Its caller neither hangs nor gets a report of a timeout that was never set."""
    accumulator = Accumulator(encode)
    fill(accumulator.open("r", run_exists=True), points(25))
    reports: list[Report] = []
    async with anyio.create_task_group() as tasks, Sender(accumulator, FakeStore(), bounds=TEN) as sender:

        async def flush() -> None:
            reports.append(await sender.flush())

        tasks.start_soon(flush)
        await anyio.sleep(1.5)
    (report,) = reports
    assert (report.not_stored, [failure.final for failure in report.failures]) == (15, [False] * 15)
    assert "None" not in str(report.failures[0].error)


async def test_an_exception_leaves_the_sender_as_it_is() -> None:
    """The engine's task group does not wrap the block's own exception."""
    with pytest.raises(ZeroDivisionError):
        async with Sender(Accumulator(encode), FakeStore(), bounds=TEN):
            raise ZeroDivisionError


async def test_leftovers_of_a_creation_are_sent_before_the_rest() -> None:
    """They are counted as entries of their own."""
    async with bench() as b:
        b.store.leftovers = [tags({"x": 1}, False)]
        b.lane("r", run(), *points(2), run_exists=False)
        assert (await b.flush()).failures == ()
        assert b.store.stored["r"] == flat([run(), tags({"x": 1}), *points(2)])


async def test_the_repr_of_a_sender_shows_its_state() -> None:
    """The repr shows the health, busy lanes, and flushes under way."""
    async with bench(limits=TEN) as b:
        assert repr(b.sender) == "<Sender healthy pumps=0 flushes=0>"
        b.lane("a", *points(3))
        b.lane("b", *points(3))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush)
            await anyio.sleep(0.5)
            assert repr(b.sender) == "<Sender healthy pumps=2 flushes=1>"
        assert repr(b.sender) == "<Sender healthy pumps=0 flushes=0>"


async def test_the_next_batch_is_encoded_while_the_answer_is_awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins with the second request, when the time of an answer is known."""
    encoded: list[float] = []

    def many(records: Any, memory: Any) -> Any:
        encoded.append(anyio.current_time())
        return encode.many(records, memory)

    async with bench(limits=TEN) as b:
        monkeypatch.setattr(b.accumulator, "_encode", Encoding(encode.one, many))
        b.lane("r", *points(40))
        began = anyio.current_time()
        await b.flush()
        assert [round(at - began, 3) for at in encoded] == [0, 1, 1.9, 2.9]


async def test_nothing_is_encoded_ahead_where_other_runs_wait_for_a_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other runs fill the time, and thousands of bodies would lie in memory."""
    lanes = 6
    ahead = 0

    def prepare(lane: Lane, limits: Any) -> None:
        nonlocal ahead
        ahead += 1

    async with bench(limits=TEN, max_workers=2) as b:
        monkeypatch.setattr(Lane, "prepare", prepare)
        for n in range(lanes):
            b.lane(n, *points(30))
        await b.flush()
    assert ahead <= 3  # at the end, when no more than the slots are left
