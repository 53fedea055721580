"""Flushes: which entries a flush waits for, when it ends, and which failures it reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest

from runqueue.queueing import RejectedError, Report, Scope, StoreError
from support.engine import (
    Request,
    bench,
    bounds,
    fill,
    flat,
    metrics,
    named,
    params,
    per_kind,
    points,
    run,
    status,
)

pytestmark = pytest.mark.anyio

TEN = bounds(metrics=10)


def refuse_runs(*runs: Any) -> Callable[[Request], StoreError | None]:
    return lambda request: RejectedError("no such experiment") if request.creates_run and request.run in runs else None


async def test_an_empty_flush_ends_at_once() -> None:
    """It makes no request: neither without a lane, nor with an empty one."""
    async with bench() as b:
        assert await b.flush() == Report(total=0)
        b.lane("r")
        assert await b.flush() == Report(total=0)
        assert b.store.requests == []


async def test_a_flush_sends_what_was_queued_when_it_began_and_ends_under_a_busy_producer() -> None:
    """Entries that are logged during the flush wait for the next one."""
    async with bench(limits=TEN) as b:
        lane = b.lane("r", *points(30))

        async def produce() -> None:
            step = 30
            while True:
                fill(lane, [metrics(step, loss=step)])
                step += 1
                await anyio.sleep(0.01)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(produce)
            with anyio.fail_after(10):
                assert await b.flush() == Report(total=30)
            tasks.cancel_scope.cancel()
        assert b.store.stored["r"] == flat(points(30))
        waiting = len(lane.inbox)
        assert waiting > 200
        assert await b.flush() == Report(total=waiting)
        assert b.store.stored["r"] == flat(points(30 + waiting))


async def test_a_flush_of_one_run_sends_that_run_alone() -> None:
    """The entries of other runs stay queued, and are not reported."""
    async with bench() as b:
        mine, other = b.lane("mine", *points(3)), b.lane("other", *points(5))
        assert await b.flush(mine) == Report(total=3)
        assert b.store.runs() == ["mine"]
        assert repr(other) == "<Lane run=other pending=5 in_flight=0 settled=0>"


async def test_a_flush_of_a_child_creates_its_parents_and_sends_nothing_else_of_them() -> None:
    """A child run cannot exist before its parents, but their data can wait."""
    async with bench() as b:
        top = b.lane("top", run(), *points(3), run_exists=False)
        middle = b.lane("middle", run(), *points(3), run_exists=False, parent=top)
        child = b.lane("child", run(), *points(2), run_exists=False, parent=middle)
        assert await b.flush(child) == Report(total=5)
        assert b.store.runs() == ["top", "middle", "child", "child"]
        assert b.accumulator.counts()["pending"] == 6


async def test_a_flush_of_a_child_sends_only_the_creation_of_a_parent_that_failed_before() -> None:
    """Nor does it send entries of the parent for which an earlier flush had closed a window."""
    broken = ["top"]
    async with bench(lambda request: refuse_runs(*broken)(request)) as b:
        top = b.lane("top", run(), *points(3), run_exists=False)
        child = b.lane("child", run(), *points(2), run_exists=False, parent=top)
        await b.flush(top)
        broken.clear()
        assert [failure.run for failure in (await b.flush(child)).failures if failure.run == "child"] == []
        assert b.store.runs() == ["top", "top", "child", "child"]


async def test_a_flush_that_times_out_reports_the_rest_as_queued_and_a_later_one_completes_exactly() -> None:
    """The request under way is neither cancelled nor repeated."""
    async with bench(limits=TEN) as b:
        b.lane("r", *points(50))
        started = anyio.current_time()
        report = await b.flush(timeout=2.5)
        assert anyio.current_time() - started == pytest.approx(2.5)
        assert (report.total, report.not_stored) == (50, 30)
        assert not any(failure.final for failure in report.failures)
        assert named(report.failures) == flat(points(30, 20))
        assert "timed out after 2.5 s" in str(report.failures[0].error)
        await anyio.sleep(100)
        assert len(b.store.requests) == 3
        assert await b.flush() == Report(total=20)
        assert b.store.stored["r"] == flat(points(50))
        assert len(b.store.requests) == 5


async def test_a_flush_right_after_one_that_timed_out_waits_for_the_request_under_way() -> None:
    """The second flush neither repeats that request nor overtakes it."""
    async with bench(limits=TEN) as b:
        b.lane("r", *points(30))
        await b.flush(timeout=0.5)
        assert await b.flush() == Report(total=30)
        assert b.store.stored["r"] == flat(points(30))
        assert len(b.store.requests) == 3


async def test_a_flush_without_time_sends_one_batch_a_run_at_most() -> None:
    """With a timeout of 0 s, the first request may have begun when the flush ends, and no other one."""
    async with bench(limits=TEN) as b:
        b.lane("r", *points(25))
        started = anyio.current_time()
        report = await b.flush(timeout=0)
        assert (report.total, report.not_stored, anyio.current_time()) == (25, 25, started)
        await anyio.sleep(10)
        assert len(b.store.requests) <= 1
        assert not (await b.flush()).failures
        assert b.store.stored["r"] == flat(points(25))


async def test_a_cancelled_flush_leaves_the_rest_queued_and_a_later_one_completes_exactly() -> None:
    """As after a timeout, the request under way is settled when it ends."""
    async with bench(limits=TEN) as b:
        b.lane("r", params(p=1), *points(40), status())
        with anyio.move_on_after(1.5):
            await b.flush()
        assert b.accumulator.counts()["in_flight"] == 10
        await anyio.sleep(100)
        assert len(b.store.requests) == 2
        assert b.accumulator.counts()["in_flight"] == 0
        assert not (await b.flush()).failures
        assert per_kind(b.store.stored["r"]) == per_kind(flat([params(p=1), *points(40), status()]))


async def test_failures_of_a_cancelled_flush_are_reported_by_the_next() -> None:
    """A cancelled flush loses no failure."""
    async with bench(lambda _: RejectedError("no")) as b:
        lane = b.lane("r", metrics(0, a=1))
        with anyio.move_on_after(0.5):
            await b.flush()
        await anyio.sleep(5)
        assert lane.is_settled
        report = await b.flush()
        assert (report.total, named(report.failures)) == (1, flat([metrics(0, a=1)]))
        assert await b.flush() == Report(total=0)


async def test_a_failure_is_reported_once_by_the_first_flush_to_end_whose_window_holds_it() -> None:
    """Of two overlapping flushes, only one reports a failure."""
    bad = metrics(0, bad=1)
    reports: dict[str, Report] = {}
    async with bench(lambda r: RejectedError("no") if flat([bad])[0] in r.entries else None, limits=TEN) as b:
        lane = b.lane("r", bad, *points(9))

        async def flush(name: str, delay: float) -> None:
            await anyio.sleep(delay)
            reports[name] = await b.flush()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flush, "first", 0)
            await anyio.sleep(0.5)
            fill(lane, points(5, 100))
            b.lane("other", *points(3))
            tasks.start_soon(flush, "second", 0)
        assert (reports["first"].total, named(reports["first"].failures)) == (10, flat([bad]))
        assert reports["second"] == Report(total=18)
        assert await b.flush() == Report(total=0)
        assert b.store.stored["r"] == flat([*points(9), *points(5, 100)])


async def test_a_failure_of_a_later_window_waits_for_its_own_flush() -> None:
    """A flush reports only failures of entries that were queued when it began."""
    bad = metrics(7, bad=1)
    script = lambda r: RejectedError("no") if flat([bad])[0] in r.entries else None
    async with bench(script, limits=TEN, max_workers=1) as b:
        lane = b.lane("r", *points(5))
        slow = b.lane("slow", *points(60))
        reports: list[Report] = []

        async def first() -> None:
            reports.append(await b.flush())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await anyio.sleep(0.5)
            fill(lane, [bad])
            second = await b.flush(lane)
            assert named(second.failures) == flat([bad])
            assert not slow.is_settled and not reports
        assert reports == [Report(total=65)]


async def test_the_timeout_of_one_flush_does_not_stop_a_lane_that_another_flush_waits_for() -> None:
    """A pump goes on as long as a flush waits for its lane."""
    async with bench(limits=TEN) as b:
        b.lane("r", *points(50))
        reports: list[Report] = []

        async def patient() -> None:
            reports.append(await b.flush())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(patient)
            await anyio.sleep(0.1)
            hasty = await b.flush(timeout=1)
            assert hasty.not_stored == 40
        assert reports == [Report(total=50)]


async def test_entries_that_only_a_timed_out_flush_has_asked_for_are_not_sent() -> None:
    """They stay queued, even when an earlier flush still waits for the same run."""
    async with bench(limits=TEN) as b:
        lane = b.lane("r", *points(30))

        async def patient() -> None:
            assert await b.flush() == Report(total=30)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(patient)
            await anyio.sleep(0.1)
            fill(lane, points(30, 30))
            assert (await b.flush(timeout=1)).not_stored == 50
        await anyio.sleep(100)
        assert b.accumulator.counts()["stored"] == 30


async def test_a_flush_ends_when_its_run_is_stored_though_all_workers_are_busy() -> None:
    """Finding that a lane is empty takes no worker slot."""
    async with bench(max_workers=1) as b:
        first, second = b.lane("first", *points(3)), b.lane("second", *points(3))
        async with anyio.create_task_group() as tasks:
            started = anyio.current_time()
            tasks.start_soon(b.flush, first)
            await anyio.sleep(0.5)
            b.store.seconds = 1_000
            tasks.start_soon(b.flush, second)
            assert await b.flush(first) == Report(total=3)
            assert anyio.current_time() - started == pytest.approx(1)


@pytest.mark.parametrize("scope", [Scope.ENTRY, Scope.BATCH, Scope.LANE])
async def test_a_flush_ends_when_its_last_entry_is_rejected_though_all_workers_are_busy(scope: Scope) -> None:
    """Nor does it after a rejection, while later entries of the run wait for another flush."""
    script = lambda r: StoreError("no", scope=scope) if r.number == 0 else None
    async with bench(script, max_workers=1) as b:
        first, second = b.lane("first", *points(1)), b.lane("second", *points(3))
        ended: list[float] = []

        async def flush() -> None:
            await b.flush(first)
            ended.append(anyio.current_time())

        async with anyio.create_task_group() as tasks:
            started = anyio.current_time()
            tasks.start_soon(flush)
            await anyio.sleep(0.5)
            b.store.seconds = 1_000
            tasks.start_soon(b.flush, second)
            await anyio.sleep(0.1)
            fill(first, points(1, 1))
            tasks.start_soon(b.flush, first)
        assert ended[0] - started == pytest.approx(1)


async def test_a_flush_does_not_wait_for_ever_for_a_store_that_never_answers() -> None:
    """The store's thread cannot be stopped: its request stays in flight, is not repeated, and counts when it ends."""
    async with bench(limits=TEN, seconds=10_000, max_workers=2, patience=60) as b:
        stuck, other = b.lane("stuck", *points(20)), b.lane("other", *points(20))
        started = anyio.current_time()
        report = await b.flush()
        assert anyio.current_time() - started == pytest.approx(60)
        assert report.not_stored == 40
        assert {str(each.error) for each in report.failures} == {"still queued when no request had ended for 60 s"}
        assert not any(failure.final for failure in report.failures)
        assert (await b.flush(stuck)).not_stored == 20
        await anyio.sleep(20_000)
        assert b.accumulator.counts()["stored"] == 20
        b.store.seconds = 1
        assert await b.flush() == Report(total=20)
        assert b.store.stored == {lane.run: flat(points(20)) for lane in (stuck, other)}


async def test_a_flush_waits_as_long_as_requests_end() -> None:
    """There is no bound on the whole, even if half of the requests fail."""
    script = lambda r: StoreError("down", retriable=True) if r.number % 2 else None
    async with bench(script, limits=TEN, seconds=50, patience=60, base=0) as b:
        b.lane("r", *points(200))
        assert await b.flush() == Report(total=200)
