"""Ticks: when entries are sent without a flush, how outages and refusals affect that, and which notices are emitted."""

# Rules of this file: time is virtual; producers are tasks of the same loop. Log calls that wait need threads, and are
# tested in test_intake.

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runqueue.queueing import Failure, Lane, QueueFullError, Record, RejectedError, Report, Scope, StoreError
from runqueue.queueing._report import MAX_FULL_FAILURES
from runqueue.queueing.batches._batch import METRIC, RUN
from runqueue.queueing.delivery._retry import PROBE_PAUSE
from runqueue.queueing.delivery._stream import DROP_NOTICE_INTERVAL, FULL_BATCH_LINGER, LATENESS, MOST_BATCHES
from runqueue.queueing.lanes._intake import CALM_BATCHES
from support.chaos import Chaos
from support.engine import (
    Bench,
    Entry,
    Request,
    bench,
    bounds,
    check_counts,
    datasets,
    fill,
    flat,
    metrics,
    named,
    params,
    points,
    run,
    status,
)
from support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio

TEN = bounds(metrics=10, entities=10)
HUNDRED = bounds(metrics=100, entities=100)


class Server:
    """Answers with `error` while one is set; it may be limited to the creation of some runs."""

    def __init__(self, error: StoreError | None = None, *, runs: tuple[Any, ...] | None = None) -> None:
        self.error = error
        self.runs = runs

    def __call__(self, request: Request) -> StoreError | None:
        return self.error if self.runs is None or (request.creates_run and request.run in self.runs) else None


def down() -> StoreError:
    return StoreError("503", retriable=True)


def refused() -> StoreError:
    return RejectedError("no such experiment")


def sizes(b: Bench, run: Any = "r") -> list[int]:
    return [len(request.entries) for request in b.store.requests if request.run == run]


async def until(condition: Callable[[], bool], step: float = 0.25) -> None:
    """Check the condition every *step* virtual seconds."""
    for _ in range(100_000):
        if condition():
            return
        await anyio.sleep(step)
    raise AssertionError("what the test waits for did not happen")


async def log(lane: Lane, count: int, every: float, start: int = 0) -> None:
    """Log so many points, one a call."""
    for record in points(count, start):
        lane.append(record)
        await anyio.sleep(every)


# -- when ------------------------------------------------------------------------------------------------------------


async def test_what_is_queued_is_sent_once_an_interval() -> None:
    """The interval starts with the first record after a pause; later records are sent with it."""
    async with bench(interval=10) as b:
        await anyio.sleep(7)
        started = anyio.current_time()
        for _ in range(2):
            b.lane("r", *points(3))
            await anyio.sleep(4)
            b.lane("r", *points(3))
            await anyio.sleep(8)
            b.lane("r", *points(3))
        await anyio.sleep(20)
        assert [request.at - started for request in b.store.requests] == pytest.approx([10, 20, 30])
        assert sizes(b) == [6, 9, 3]


async def test_a_full_batch_is_sent_at_once_and_what_is_left_waits_for_the_interval() -> None:
    """The remainder is not sent as a small batch."""
    async with bench(interval=100, limits=TEN) as b:
        started = anyio.current_time()
        b.lane("r", *points(9))
        await anyio.sleep(1)
        assert b.store.requests == []
        b.lane("r", *points(14, 9))
        await anyio.sleep(50)
        assert [(request.at - started, len(request.entries)) for request in b.store.requests] == [(1, 10), (2, 10)]
        await anyio.sleep(50)
        assert sizes(b) == [10, 10, 3]
        assert b.store.requests[-1].at - started == pytest.approx(100)


async def test_many_lanes_that_fill_no_batch_go_at_the_interval() -> None:
    """Side by side, as many at once as there are workers."""
    async with bench(interval=10, limits=TEN, max_workers=8) as b:
        for n in range(50):
            b.lane(n, *points(9))
        await anyio.sleep(9.9)
        assert b.store.requests == []
        await anyio.sleep(20)
        assert all(sizes(b, n) == [9] for n in range(50))
        assert b.store.most_busy == 8


async def test_only_the_lane_that_is_full_goes_before_its_time() -> None:
    """The other lanes go on filling."""
    async with bench(interval=10, limits=TEN) as b:
        b.lane("small", *points(9))
        b.lane("full", *points(10))
        await anyio.sleep(5)
        assert b.store.runs() == ["full"]
        await anyio.sleep(10)
        assert b.store.runs() == ["full", "small"]


@pytest.mark.parametrize("records", [[params(a=1, b=2)], [datasets("d")], [status()], [run()]])
async def test_whatever_is_logged_is_sent(records: list[Record]) -> None:
    """This includes kinds other than metrics and records without entries, after a pause as well."""
    async with bench(interval=10) as b:
        for n in range(2):
            await anyio.sleep(1_000)
            b.lane(n, *records, run_exists=records[0][0] != RUN)
            await anyio.sleep(20)
            assert b.store.stored[n] == flat(records)


async def test_an_idle_stream_does_not_wake_at_all() -> None:
    """After a day of sleep it reacts as fast as before."""
    async with bench(interval=2) as b:
        for _ in range(3):
            b.lane("r", *points(5))
            await anyio.sleep(20)
            wakes = b.stream.looks
            await anyio.sleep(86_400)
            assert b.stream.looks == wakes
        assert len(b.store.requests) == 3


async def test_before_it_sleeps_for_good_it_looks_once_more_and_lets_nobody_slip_by_meanwhile() -> None:
    """From the first look on, every record wakes the stream."""
    async with bench(interval=2) as b:
        b.lane("r", *points(5))
        await until(lambda: b.intake.mark < 0 and bool(b.store.requests))
        asleep = b.stream.looks
        for _ in range(100):
            assert b.intake.mark < 0
            await anyio.sleep(0.25)
        assert b.stream.looks == asleep + 1


async def test_a_record_that_slipped_by_before_the_sleep_is_found_by_the_last_look() -> None:
    """Its thread had compared the inbox with the mark before the mark was lowered."""
    async with bench(interval=2) as b:
        lane = b.lane("r")
        call = lane.append  # which its thread is in the midst of
        await anyio.sleep(1)
        b.intake.admitted += 1
        lane.inbox_entries += 1
        fill(lane, [metrics(0, a=1)])
        del call
        await anyio.sleep(4)
        assert b.store.stored["r"] == flat([metrics(0, a=1)])


async def test_a_wake_up_during_a_tick_is_not_lost() -> None:
    """A log call may come from a store's thread, or from the handler of a warning."""
    async with bench(interval=10, limits=TEN) as b:
        later = points(30, 10)

        def script(request: Request) -> StoreError | None:
            if later and request.number == 0:
                b.lane("r", *later)
                b.lane("other", *points(10))
            return None

        b.store.script = script
        b.lane("r", *points(10))
        await anyio.sleep(6)
        assert b.store.stored["r"] == flat([*points(10), *later])
        assert b.store.stored["other"] == flat(points(10))


async def test_records_that_a_notice_handler_logs_are_sent_too() -> None:
    """The receiver of a notice may log."""
    async with bench(lambda r: RejectedError("no") if r.number == 0 else None, interval=10, limits=TEN) as b:

        def notify(failures: list[Failure], dropped: dict[Any, int]) -> None:
            b.lane("r", *points(10))

        b.stream._notify_user = notify
        b.lane("r", metrics(0, bad=1))
        await anyio.sleep(10_000)
        assert b.store.stored["r"] == flat(points(10))
        check_counts(b.accumulator)


# -- how much --------------------------------------------------------------------------------------------------------


@pytest.mark.sample("*-7")
@pytest.mark.parametrize("width", [1, 7, 30])
async def test_under_a_backlog_every_request_is_full(width: int) -> None:
    """Ticks and wake-ups send no small batches, whatever a record holds."""
    async with bench(interval=2, limits=HUNDRED, seconds=5) as b:
        lane = b.lane("r")
        records = [metrics(step, **{f"m{n}": step for n in range(width)}) for step in range(9_000 // width)]
        for record in records:
            lane.append(record)
            await anyio.sleep(width / 150)
        await anyio.sleep(1_000)
        assert b.store.stored["r"] == flat(records)
        assert set(sizes(b)[1:-1]) == {100}
        assert len(b.store.requests) <= math.ceil(len(records) * width / 100) + 1


async def test_records_that_do_not_divide_a_batch_leave_no_crumbs() -> None:
    """With seven metrics a record, 98 are sent each time, never 98 and then 2."""
    async with bench(interval=60, limits=HUNDRED, seconds=0.01) as b:
        lane = b.lane("r")
        for step in range(1_000):
            lane.append(metrics(step, **{f"m{n}": step for n in range(7)}))
            await anyio.sleep(0.02)
        await anyio.sleep(100)
        assert sum(sizes(b)) == 7_000
        assert min(sizes(b)[:-1]) >= 94


@pytest.mark.parametrize("stall", [0.0, 0.8])
async def test_in_a_steady_flow_the_engine_looks_by_itself_and_no_call_wakes_the_engine(
    stall: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wake-up costs the caller a wait for the interpreter's lock. A producer that pauses is expected to continue."""
    wakes: list[float] = []
    async with bench(interval=60, limits=HUNDRED, seconds=0.01) as b:
        plain_wake = b.stream.wake

        def wake() -> None:
            wakes.append(anyio.current_time())
            plain_wake()

        monkeypatch.setattr(b.intake, "wake", wake)
        lane = b.lane("r")
        for at in range(40):
            await log(lane, 50, 0.01, 50 * at)
            await anyio.sleep(stall if at % 8 == 0 else 0)
        began, looks = wakes[0], b.stream.looks
        await anyio.sleep(100)
        assert len(wakes) <= 2, wakes
        assert len(wakes) < 2 or wakes[1] - began < 2
        assert looks < (40 if not stall else 80)
        assert b.store.stored["r"] == flat(points(2_000))


@pytest.mark.parametrize(
    ("pace", "max_pending", "batches"),
    [
        (100, math.inf, 1),
        (300, math.inf, 1),
        (500, math.inf, 2),
        (1_000, math.inf, 3),
        (9_000, math.inf, MOST_BATCHES),
        (1_000, 800, 2),
        (1_000, 799, 1),
        (1_000, 103, 1),
    ],
)
async def test_in_a_steady_flow_full_batches_go_together(pace: int, max_pending: float, batches: int) -> None:
    """They wait for each other for a quarter of a second if there is room; a slower flow sends each when it is full."""
    async with bench(interval=3_600, limits=HUNDRED, max_pending=max_pending, seconds=0.001) as b:
        lane, full_at = b.lane("r"), []
        for at in range(30):
            await log(lane, 100, 1 / pace, 100 * at)
            full_at.append(anyio.current_time())
        await anyio.sleep(2)
        assert b.store.stored["r"] == flat(points(3_000))
        begun = [request.at for request in b.store.requests]
        assert (
            max(at - full for at, full in zip(begun, full_at, strict=True))
            < FULL_BATCH_LINGER + 2 * 100 * (LATENESS - 1) / pace + 0.1
        )
        looks = 1 + sum(after - before > 0.005 for before, after in pairwise(begun[6:]))
        assert len(begun[6:]) / looks == pytest.approx(batches, rel=0.25)


async def test_while_nobody_waits_the_engine_gives_way_to_the_callers() -> None:
    """
    It pauses before each piece of work on a batch; but not during a flush, not in a backlog, and not near the bound.
    """
    pauses: list[float] = []

    def pause() -> None:
        pauses.append(anyio.current_time())

    async with bench(interval=2.0, limits=TEN, max_pending=1_000, pause=pause) as b:
        b.lane("r", *points(10))
        await anyio.sleep(1.5)
        assert len(pauses) == 1 + 3  # one at the wake-up, three around the request
        await anyio.sleep(10)
        pauses.clear()
        b.lane("r", *points(35))
        await b.flush()
        assert pauses == []
        b.lane("r", *points(10 * (CALM_BATCHES + 2)))
        await anyio.sleep(1.5)
        assert pauses == []
        await anyio.sleep(CALM_BATCHES)
        assert len(pauses) >= 3 * (CALM_BATCHES - 1)
    pauses.clear()
    async with bench(interval=2.0, limits=TEN, max_pending=15, pause=pause) as b:
        b.lane("r", *points(10))
        await anyio.sleep(1.5)
        assert b.accumulator.counts()["pending"] == 0
        assert pauses == []
    async with bench(limits=TEN, pause=pause) as b:
        b.lane("r", *points(10))
        await b.flush()
    assert pauses == []


async def test_a_burst_of_many_full_batches_goes_in_full_ones() -> None:
    """One wake-up sends all of them."""
    async with bench(interval=10, limits=HUNDRED) as b:
        b.lane("r", *points(1_234))
        await anyio.sleep(60)
        assert sizes(b) == [100] * 12 + [34]


async def test_params_alone_are_sent_in_full_requests() -> None:
    """A batch of params is smaller than a batch of metrics."""
    async with bench(interval=10, limits=bounds(metrics=100, entities=100, params=20)) as b:
        b.lane("r", *(params(**{f"p{n}": n}) for n in range(90)))
        await anyio.sleep(60)
        assert sizes(b) == [20, 20, 20, 20, 10]


async def test_a_limit_below_that_of_entities_is_what_a_full_batch_means() -> None:
    """With 300 metrics a request and 1,000 entities, a wake-up at 1,000 sends three full batches and no remainder."""
    async with bench(interval=100, limits=bounds(metrics=300)) as b:
        b.lane("r", *points(1_000))
        await anyio.sleep(50)
        assert sizes(b) == [300, 300, 300]


async def test_a_child_that_is_full_asks_only_for_the_creation_of_its_parent() -> None:
    """The parent's data is not sent in small batches along with it."""
    async with bench(interval=100, limits=TEN, seconds=5) as b:
        parent = b.lane("parent", run(), *points(5), run_exists=False)
        child = b.lane("child", run(), run_exists=False, parent=parent)
        for n in range(8):
            b.lane("child", *points(10, 10 * n))
            await anyio.sleep(1)
        await anyio.sleep(80)
        assert sizes(b, "parent") == [1]
        assert len(parent.inbox) == 5 and child.run_exists
        await anyio.sleep(100)
        assert sizes(b, "parent") == [1, 5]


# -- order -----------------------------------------------------------------------------------------------------------


async def test_what_is_logged_after_a_final_status_is_sent_too() -> None:
    """In the same tick before it, in a later tick after it."""
    async with bench(interval=10) as b:
        lane = b.lane("r", metrics(0, a=1), status())
        b.lane("r", metrics(1, a=1))
        await anyio.sleep(15)
        assert b.store.stored["r"] == flat([metrics(0, a=1), metrics(1, a=1), status()])
        b.lane("r", metrics(2, a=1))
        await anyio.sleep(15)
        b.lane("r", status("FAILED"))
        await anyio.sleep(15)
        assert b.store.stored["r"][3:] == flat([metrics(2, a=1), status("FAILED")])
        assert lane.is_settled


async def test_data_that_joins_a_tick_while_its_final_status_is_under_way_follows_it() -> None:
    """No entry is left in a window that looks finished."""
    async with bench(interval=10, limits=TEN, seconds=3) as b:
        b.lane("r", status())
        await anyio.sleep(11)
        b.lane("r", *points(10), status("KILLED"))
        await anyio.sleep(30)
        assert b.store.stored["r"] == flat([status(), *points(10), status("KILLED")])


async def test_one_runs_order_holds_through_ticks_wake_ups_and_flushes() -> None:
    """Create, data, inputs, final status, flush after flush."""
    async with bench(interval=3, limits=TEN) as b:
        lane = b.lane("r", run(), params(p=1), run_exists=False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(log, lane, 200, 0.05)
            for _ in range(4):
                await anyio.sleep(2.2)
                await b.flush()
        b.lane("r", datasets("d"), status())
        await b.flush()
        stored = b.store.stored["r"]
        assert stored[0] == flat([run()])[0]
        assert stored[-2:] == flat([datasets("d"), status()])
        assert [entry for entry in stored if entry[0] == METRIC] == flat(points(200))


# -- flushes ---------------------------------------------------------------------------------------------------------


async def test_a_flush_waits_for_what_ticks_have_begun() -> None:
    """A flush is a barrier for everything that was logged before it."""
    async with bench(interval=2, limits=TEN, seconds=3) as b:
        lane = b.lane("r")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(log, lane, 40, 0.1)
            await anyio.sleep(4)
            assert not (await b.flush()).failures
            assert len(b.store.stored["r"]) == 40


@pytest.mark.parametrize("every", [0.01, 0.3, 2.5])
async def test_a_flush_under_a_busy_producer_ends(every: float) -> None:
    """A window that a flush has closed is not reopened by ticks, with or without data."""
    async with bench(interval=1, limits=TEN, seconds=1) as b:
        lane = b.lane("r", *points(95))

        async def produce() -> None:
            await log(lane, 100_000, every, 95)

        async with anyio.create_task_group() as tasks:
            await anyio.sleep(0.5)
            started = anyio.current_time()
            tasks.start_soon(b.flush)
            tasks.start_soon(produce)
            report = await b.flush()
            assert report.total <= 95
            assert anyio.current_time() - started <= 11
            tasks.cancel_scope.cancel()


async def test_a_tick_that_finds_nothing_does_not_open_what_a_flush_has_closed() -> None:
    """Otherwise the flush would wait for data of the next hour."""
    async with bench(interval=2, limits=TEN, seconds=3) as b:
        lane = b.lane("r", *points(35))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush)
            await anyio.sleep(5)
            flushed = lane.last_closed
            b.lane("r", *points(5, 35))
            await anyio.sleep(3)
            assert lane.last_closed > flushed
        assert b.store.stored["r"] == flat(points(35))
        await anyio.sleep(10)
        assert b.store.stored["r"] == flat(points(40))


async def test_a_flush_whose_time_is_over_does_not_stop_the_ticks() -> None:
    """Entries that it reports as queued are still sent."""
    async with bench(interval=2, limits=TEN) as b:
        b.lane("r", *points(50))
        assert (await b.flush(timeout=1.5)).not_stored == 40
        await anyio.sleep(10)
        assert b.store.stored["r"] == flat(points(50))


# -- failures on the way ---------------------------------------------------------------------------------------------


def fault_bad(request: Request) -> StoreError | None:
    bad = [key for _, key, _, _ in request.entries if key in ("bad", "worse")]
    return RejectedError(f"{bad[0]} is refused") if bad else None


@pytest.mark.parametrize("releases_failures", [False, True])
async def test_failures_met_on_the_way_are_reported_once_a_cause_and_reported_by_the_next_flush(
    releases_failures: bool,
) -> None:
    """The flush reports all of them, once, whether or not it raises them."""
    async with bench(fault_bad, interval=2, limits=TEN, releases_failures=releases_failures) as b:
        for step in range(5):
            b.lane("a", metrics(step, bad=1), metrics(step, good=1))
            b.lane("b", metrics(step, worse=1))
            await anyio.sleep(20)
        assert sorted(str(failure.error) for failure in b.reported) == ["bad is refused", "worse is refused"]
        report = await b.flush()
        assert (report.total, report.not_stored) == (10, 10)
        assert await b.flush() == Report(total=0)
        assert b.accumulator.ledger.failed == len(b.accumulator.ledger.log.full) == 10


async def test_failures_that_nobody_flushes_for_do_not_fill_the_memory() -> None:
    """Where no flush raises them, failures beyond the bound are released."""
    async with bench(
        lambda r: StoreError("gone", scope=Scope.LANE), interval=2, limits=HUNDRED, releases_failures=True
    ) as b:
        lane = b.lane("r")
        count = 0
        while count < 3 * MAX_FULL_FAILURES:
            b.lane("r", *points(1_000))
            count += 1_000
            await anyio.sleep(5)
        assert len(lane._account._failures) <= MAX_FULL_FAILURES + 1_000
        assert b.accumulator.counts()["failed"] == count
        assert len(b.reported) == 1


@pytest.mark.sample("asyncio-1", "trio-7")
@pytest.mark.parametrize("lanes", [1, 7])
async def test_failures_that_wait_for_a_flush_are_kept_in_full_up_to_a_bound_and_counted_beyond(lanes: int) -> None:
    """A million failures over many ticks: the flush that raises them reports exact counts."""
    million, size = 1_000_000, 10_000
    gone = StoreError("gone", scope=Scope.LANE)
    async with bench(lambda r: gone, interval=2, limits=HUNDRED) as b:
        for at in range(million // size):
            b.lane(at % lanes, metrics(at, **{f"m{n}": n for n in range(size)}))
            await anyio.sleep(5)
        kept = [failure for lane in b.accumulator.all() for failure in lane._account._failures]
        assert sum(failure.weight for failure in kept) == MAX_FULL_FAILURES
        assert len(kept) <= MAX_FULL_FAILURES
        report = await b.flush()
        assert (report.total, report.not_stored) == (million, million)
        assert len(report.failures) <= len(kept) + lanes
        assert all(failure.final for failure in report.failures)
        assert len(b.accumulator.ledger.log.full) <= MAX_FULL_FAILURES
        assert sum(count for *_, count in b.accumulator.ledger.log.beyond_bound()) == million - MAX_FULL_FAILURES
        assert await b.flush() == Report(total=0)
        b.lane(0, *points(3))
        report = await b.flush()
        assert (report.total, named(report.failures)) == (3, flat(points(3)))


async def test_counted_failures_belong_to_the_flush_whose_window_holds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failures of ticks during a flush are reported by the next flush, also where they are only counted."""
    monkeypatch.setattr("runqueue.queueing.lanes._account.MAX_FULL_FAILURES", 10)
    async with bench(lambda r: StoreError("no"), interval=2, limits=TEN) as b:
        b.lane("r", *points(100))
        reports: list[Report] = []

        async def flush() -> None:
            reports.append(await b.flush())

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(flush)
            await anyio.sleep(1)
            for _ in range(10):
                b.lane("r", *points(20))
                await anyio.sleep(5)
        reports.append(await b.flush())
        assert [(report.total, report.not_stored) for report in reports] == [(100, 100), (200, 200)]


async def test_a_refused_run_is_reported_at_once_and_once() -> None:
    """A training may go on for days before the first flush, with a run that does not exist."""
    async with bench(Server(refused(), runs=("bad", "worse")), interval=2) as b:
        for name in ("bad", "worse", "good"):
            b.lane(name, run(), *points(3), run_exists=False)
        await anyio.sleep(100)
        ((notices, kind, final),) = [(each.run, each.kind, each.final) for each in b.reported]
        assert notices in ("bad", "worse") and (kind, final) == (RUN, False)
        assert sorted(b.store.runs()) == ["bad", "good", "good", "worse"]


async def test_ticks_do_not_retry_a_refused_run_and_a_flush_does() -> None:
    """Its data and its children's data stay queued, and are sent in order once the cause is repaired."""
    server = Server(refused(), runs=("bad",))
    async with bench(server, interval=2, limits=TEN) as b:
        bad = b.lane("bad", run(), *points(25), status(), run_exists=False)
        b.lane("child", run(), *points(25), run_exists=False, parent=bad)
        for _ in range(50):
            b.lane("child", metrics(100, late=1))
            await anyio.sleep(2)
        assert b.store.runs() == ["bad"]
        report = await b.flush()
        assert b.store.runs() == ["bad", "bad"]
        assert report.not_stored == report.total == 102
        assert not any(failure.final for failure in report.failures)
        server.error = None
        await anyio.sleep(100)
        assert b.store.runs() == ["bad", "bad"]
        assert not (await b.flush()).failures
        assert b.store.stored["bad"] == flat([run(), *points(25), status()])
        assert len(b.store.stored["child"]) == 76
        b.lane("child", *points(1))
        await anyio.sleep(10)
        assert len(b.store.stored["child"]) == 77


async def test_a_lane_that_is_refused_does_not_wake_the_engine_for_each_record() -> None:
    """The lane stays full; further log calls must not wake the engine each time."""
    async with bench(Server(refused(), runs=("bad",)), interval=2, limits=TEN) as b:
        lane = b.lane("bad", run(), run_exists=False)
        await anyio.sleep(10)
        wakes = b.stream.looks
        await log(lane, 10_000, 0.01)
        assert b.stream.looks - wakes < 150


# -- the bound -------------------------------------------------------------------------------------------------------


async def test_at_the_bound_what_is_queued_for_refused_runs_goes_first() -> None:
    """Drops are counted by run. The creation and the final status stay, as a flush may still send them."""
    server = Server(refused(), runs=("bad",))
    async with bench(server, interval=2, limits=TEN, max_pending=50) as b:
        bad = b.lane("bad", run(), *points(20), status(), run_exists=False)
        b.lane("child", run(), *points(5), run_exists=False, parent=bad)
        await anyio.sleep(10)
        good = b.lane("good")
        for record in points(50):
            with suppress(QueueFullError):
                good.append(record)
                continue
            await anyio.sleep(3)
            good.append(record)
            check_counts(b.accumulator)
        await anyio.sleep(10)
        assert b.dropped == {"bad": 20, "child": 5}
        assert b.store.stored["good"] == flat(points(50))
        counts = b.accumulator.counts()
        assert (counts["dropped"], counts["pending"]) == (25, 2)
        server.error = None
        assert not (await b.flush()).failures
        assert b.store.stored["bad"] == flat([run(), status()])
        assert b.store.stored["child"] == flat([run()])


async def test_room_is_made_for_a_record_that_does_not_fit_although_the_bound_is_not_reached() -> None:
    """With ninety of a hundred pending, a record of twenty does not fit."""
    async with bench(Server(refused(), runs=("bad",)), interval=2, max_pending=100) as b:
        b.lane("bad", run(), *points(89), run_exists=False)
        await anyio.sleep(10)
        large = metrics(0, **{f"m{n}": n for n in range(20)})
        with pytest.raises(QueueFullError):
            b.lane("good", large)
        await anyio.sleep(0.1)
        b.lane("good", large)
        assert b.dropped == {"bad": 89}


async def test_a_drop_of_no_entries_is_not_reported() -> None:
    """A full queue with nothing left to drop is reported once, not at every look."""
    notices: list[dict[Any, int]] = []
    async with bench(Server(refused(), runs=(0, 1, 2)), interval=2, max_pending=3) as b:
        b.stream._notify_user = lambda failures, dropped: notices.append(dropped)
        for n in range(3):
            b.lane(n, run(), run_exists=False)
        await anyio.sleep(100)
        assert all(count for dropped in notices for count in dropped.values())


async def test_a_full_queue_is_sent_at_once_where_nothing_is_under_way() -> None:
    """A bound below a full batch does not cost a producer an interval each time."""
    async with bench(interval=1_000, max_pending=50, seconds=1) as b:
        lane = b.lane("r")
        started = anyio.current_time()
        for record in points(500):
            while True:
                try:
                    lane.append(record)
                    break
                except QueueFullError:
                    await anyio.sleep(0.1)
        assert anyio.current_time() - started < 50
        assert b.intake.pending <= 50
        assert min(sizes(b)) == 50


async def test_dropped_entries_wake_a_producer_that_waits_for_room() -> None:
    """Dropped entries make room without the end of a request."""
    async with bench(Server(refused(), runs=("bad",)), interval=2, max_pending=20) as b:
        b.lane("bad", run(), *points(10), run_exists=False)
        await anyio.sleep(10)
        b.lane("bad", *points(9))
        with anyio.fail_after(10):
            while b.intake.pending >= 20:
                await b.sender.progress()


async def test_drops_are_reported_by_run() -> None:
    """With `drop`, and a producer a hundred times faster than the server."""
    async with bench(interval=2, limits=TEN, max_pending=30, on_full="drop", seconds=1) as b:
        highest = 0
        for step in range(3_000):
            b.lane(step % 3, metrics(step, loss=step))
            highest = max(highest, b.intake.pending)
            await anyio.sleep(0.001)
        await anyio.sleep(100)
        counts = b.accumulator.counts()
        assert highest <= 30
        assert counts["accepted"] == 3_000 == counts["stored"] + counts["dropped"]
        assert b.dropped.total() == counts["dropped"] > 0 and set(b.dropped) == {0, 1, 2}


@pytest.mark.sample("asyncio-*")
@pytest.mark.parametrize(
    ("script", "seconds"),
    [(None, math.inf), (lambda _: down(), 0.01), (None, 3.0)],
    ids=["silent", "failing", "slow"],
)
async def test_drops_are_reported_at_once_and_once_a_minute_and_wake_nobody(script: Any, seconds: float) -> None:
    """A training of 15 hours that drops entries at each step gets one notice a minute."""
    notices: list[tuple[float, int]] = []
    async with bench(script, interval=2, limits=TEN, max_pending=30, on_full="drop", seconds=seconds, timeout=20) as b:
        b.stream._notify_user = lambda _, dropped: notices.extend(
            (anyio.current_time(), count) for count in dropped.values()
        )
        began = anyio.current_time()
        await log(b.lane("r"), 60_000, every=0.01)
        assert notices[0][0] - began < 1
        assert len(notices) <= 600 / DROP_NOTICE_INTERVAL + 1
        assert sum(count for _, count in notices) >= 0.89 * b.accumulator.counts()["dropped"] > 40_000
        assert b.stream.looks <= 60_000 / 20


@pytest.mark.sample("asyncio-1-*", "trio-7-5.0")
@pytest.mark.parametrize("every", [0.01, 5.0])
@pytest.mark.parametrize("width", [1, 7])
async def test_however_long_the_interval_a_full_queue_does_not_wait_for_its_end(every: float, width: int) -> None:
    """After an outage there is room again as soon as a probe succeeds, also where the bound is not quite reached."""
    server = Server(down())
    records = [metrics(0, **{f"m{n}": n for n in range(width)})] * round(300 / every)
    async with bench(server, interval=3_600, limits=TEN, max_pending=30, on_full="drop", seconds=0.01, timeout=20) as b:
        lane = b.lane("r")

        async def log() -> int:
            before = b.accumulator.counts()["dropped"]
            for record in records:
                lane.append(record)
                await anyio.sleep(every)
            return b.accumulator.counts()["dropped"] - before

        assert await log() == (len(records) - 30 // width) * width
        server.error = None
        assert await log() <= (PROBE_PAUSE + 5) / every * width


async def test_a_full_queue_is_looked_at_once_a_second_although_nobody_logs_any_more() -> None:
    """A producer that awaits room makes no further log call."""
    server = Server(down())
    async with bench(server, interval=3_600, limits=TEN, max_pending=30, on_full="drop", seconds=0.01, timeout=20) as b:
        await log(b.lane("r"), 31, every=0.01)
        await anyio.sleep(300)
        server.error = None
        await until(lambda: b.intake.pending == 0)
        assert b.store.times()[-1] <= 300 + PROBE_PAUSE + 5


@pytest.mark.parametrize("refused", [5, 50])
async def test_after_drain_there_is_room_for_the_refused_record(refused: int) -> None:
    """With seven of ten pending, a producer of records of five would otherwise never get room."""
    async with bench(interval=3_600, max_pending=10, seconds=100) as b:
        lane = b.lane("r", metrics(0, **{f"m{n}": n for n in range(7)}))
        large = metrics(1, **{f"m{n}": n for n in range(refused)})
        await b.stream.drain()  # nothing was refused: there is room for an entry
        with pytest.raises(QueueFullError):
            lane.append(large)
        await b.stream.drain()
        lane.append(large)
        assert b.stream.looks < 250
        assert b.intake.largest_refused == 1


@pytest.mark.parametrize("interval", [2, 600, 3_600])
async def test_what_is_dropped_after_a_word_on_it_is_reported_a_minute_later(interval: float) -> None:
    """Also if nothing is queued by then, and however long the interval is."""
    notices: list[tuple[float, int]] = []
    async with bench(interval=interval, limits=TEN, max_pending=30, on_full="drop") as b:
        b.stream._notify_user = lambda _, dropped: notices.extend(
            (anyio.current_time(), count) for count in dropped.values()
        )
        began = anyio.current_time()
        for _ in range(2):
            b.lane("r", *points(50))
            await anyio.sleep(0.1)
        await anyio.sleep(10_000)
        assert [(round(at - began), count) for at, count in notices] == [(0, 20), (DROP_NOTICE_INTERVAL, 50)]
        assert b.stream.looks < 100


@pytest.mark.parametrize("interval", [0.05, 0.5, 2])
async def test_a_server_that_is_well_between_bursts_does_not_make_a_word_of_each(interval: float) -> None:
    """The queue is emptied each time, and overflows with the next burst."""
    notices: list[int] = []
    async with bench(interval=interval, limits=TEN, max_pending=30, on_full="drop", seconds=0.01) as b:
        b.stream._notify_user = lambda _, dropped: notices.extend(dropped.values())
        for _ in range(600):
            b.lane("r", *points(50))
            await anyio.sleep(2 * interval)
        await anyio.sleep(2 * DROP_NOTICE_INTERVAL)
        assert sum(notices) == b.accumulator.counts()["dropped"] == 600 * 20
        assert len(notices) <= 600 * 2 * interval / DROP_NOTICE_INTERVAL + 2


async def test_runs_that_are_made_beside_a_dead_server_do_not_wake_the_engine_each() -> None:
    """New runs are accepted beyond the bound, and each look visits all of them."""
    async with bench(
        Server(down()), interval=2, limits=TEN, max_pending=30, on_full="drop", seconds=0.01, timeout=20
    ) as b:
        b.lane("first", *points(40))
        await anyio.sleep(60)
        b.stream.looks = 0
        for n in range(500):
            b.lane(n, run(), *points(5), run_exists=False).append(status())
            await anyio.sleep(0.1)
        assert b.stream.looks <= 4 * 50


# -- outages ---------------------------------------------------------------------------------------------------------


async def test_after_an_outage_of_many_ticks_everything_arrives_once_in_order_and_in_full_requests() -> None:
    """An hour of queueing leaves one long window behind, not a thousand short ones."""
    server = Server()
    async with bench(server, interval=2, limits=HUNDRED, timeout=20) as b:
        lane = b.lane("r", run(), run_exists=False)
        await log(lane, 10, 0.5)
        server.error = down()
        await log(lane, 5_000, 0.5, 10)
        server.error = None
        before = len(b.store.requests)
        await log(lane, 100, 0.5, 5_010)
        await anyio.sleep(50)
        assert b.store.stored["r"] == flat([run(), *points(5_110)])
        assert len(b.store.requests) - before <= 5_100 / 100 + 30
        assert set(sizes(b)[before + 1 : before + 49]) == {100}
        assert len(b.outages) == 1


async def test_an_outage_that_was_given_up_is_probed_by_one_request_at_a_time_in_growing_pauses() -> None:
    """At most thirty seconds apart, however many runs wait."""
    server = Server(down())
    async with bench(server, interval=2, limits=TEN, timeout=20, seconds=0.5) as b:
        for n in range(20):
            b.lane(n, *points(25))
        await until(lambda: b.sender.outage.given_up)
        before, b.store.most_busy = len(b.store.requests), 0
        await anyio.sleep(600)
        probes = [request.at for request in b.store.requests[before:]]
        pauses = [later - earlier for earlier, later in pairwise(probes)]
        assert b.store.most_busy == 1
        assert 20 <= len(probes) <= 30
        assert pauses == sorted(pauses) and max(pauses) <= 32
        assert b.accumulator.counts()["pending"] == 500
        server.error = None
        await anyio.sleep(100)
        assert b.store.stored == {n: flat(points(25)) for n in range(20)}
        assert len(b.outages) == 1


@pytest.mark.parametrize("error", [down(), StoreError("401", scope=Scope.STORE)])
async def test_a_fast_producer_does_not_wake_a_stream_that_cannot_send(error: StoreError) -> None:
    """Full lanes do not wake the stream until the server is back."""
    server = Server(error)
    async with bench(server, interval=2, limits=TEN, timeout=5) as b:
        lane = b.lane("r", *points(20))
        await anyio.sleep(60)
        assert b.sender.outage.given_up
        wakes = b.stream.looks
        await log(lane, 10_000, 0.01, 20)
        assert b.stream.looks - wakes < 150
        server.error = None
        await anyio.sleep(2_000)
        assert b.store.stored["r"] == flat(points(10_020))
        assert set(sizes(b)) == {10}


async def test_a_401_that_stays_is_reported_once_and_treated_as_an_outage() -> None:
    """Everything stays queued with a probe from time to time, and is delivered when the credentials are valid again."""
    server = Server(StoreError("401", scope=Scope.STORE))
    async with bench(server, interval=2, limits=TEN) as b:
        b.lane("r", *points(5))
        await anyio.sleep(300)
        b.lane("r", *points(20, 5))
        await anyio.sleep(300)
        assert [str(error) for error in b.outages] == ["401"]
        assert 15 <= len(b.store.requests) <= 30
        server.error = None
        await anyio.sleep(60)
        assert b.store.stored["r"] == flat(points(25))
        server.error = StoreError("401 again", scope=Scope.STORE)
        b.lane("r", *points(1, 25))
        await anyio.sleep(100)
        assert [str(error) for error in b.outages] == ["401", "401 again"]


async def test_a_flush_in_an_outage_reports_and_ticks_go_on() -> None:
    """Entries that it could not send stay queued and arrive once."""
    server = Server(down())
    async with bench(server, interval=2, limits=TEN, timeout=5) as b:
        b.lane("r", *points(25))
        report = await b.flush()
        assert report.not_stored == 25 and not any(failure.final for failure in report.failures)
        server.error = None
        await anyio.sleep(100)
        assert b.store.stored["r"] == flat(points(25))
        assert await b.flush() == Report(total=0)


# -- its end ---------------------------------------------------------------------------------------------------------


async def test_when_it_has_ended_the_next_call_wakes_the_engine() -> None:
    """If the engine ended by a defect, the next log call starts another one."""
    async with bench(interval=2) as b:
        b.lane("r", *points(3))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.stream.run)
            await anyio.sleep(1)
            tasks.cancel_scope.cancel()
        assert b.intake.mark < 0 and b.intake.signalled_full_at < 0 and not b.intake._woken


# -- everything at once ----------------------------------------------------------------------------------------------


async def random_actions(source: random.Random, interval: float, most: float, drops: bool) -> None:
    """Log, flush and sleep at random with a failing server; then check every entry."""
    chaos = Chaos(source)
    logged: dict[Any, list[Record]] = defaultdict(list)
    reported: dict[Any, Counter[Entry]] = defaultdict(Counter)
    lanes: list[Lane] = []

    def record_of(lane: Lane, entry: Record) -> None:
        before = intake.pending
        try:
            lane.append(entry)
        except QueueFullError:
            assert not drops
        else:
            if intake.pending > before:
                logged[lane.run].append(entry)
            assert intake.pending <= most or before == 0 or intake.pending == before

    async def flush() -> None:
        report = await b.flush(source.choice([None, *lanes]), source.choice([None, 0.5, 20.0]))
        for failure in report.failures:
            if failure.final:
                reported[failure.run].update(named([failure]))

    async with bench(
        chaos,
        limits=TEN,
        max_workers=3,
        timeout=10,
        interval=interval,
        max_pending=most,
        on_full="drop" if drops else "raise",
    ) as b:
        intake = b.intake
        for n in range(4):
            lanes.append(b.accumulator.open(n, run_exists=False, parent=lanes[n - 1] if n % 2 else None))
            lanes[-1].push(run())
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                for lane in lanes:
                    for _ in range(source.randrange(12)):
                        step = len(logged[lane.run])
                        names = source.choice(
                            [["good"], ["bad"], ["good", "other"], ["a", "b", "c", "d", "e", "f", "g"]]
                        )
                        record_of(lane, metrics(step, **dict.fromkeys(names, step)))
                if source.random() < 0.3:
                    tasks.start_soon(flush)
                await anyio.sleep(source.choice([0.0, 0.3, 4.0, 25.0]))
                check_counts(b.accumulator)
        chaos.is_calm = True
        await anyio.sleep(200)
        await flush()
        for failure in (await b.flush()).failures:
            assert failure.final
            reported[failure.run].update(named([failure]))
        counts = b.accumulator.counts()
        assert counts["pending"] == counts["in_flight"] == intake.pending == 0
        given_up = b.dropped  # at the bound, of runs that were refused
        for lane in lanes:
            stored = b.store.stored[lane.run]
            assert stored[:1] == flat([run()])
            everything = flat(logged[lane.run])
            arrived = set(stored[1:])
            assert len(arrived) == len(stored) - 1, "stored twice"
            expected = [entry for entry in everything if entry in arrived]
            assert sorted(stored[1:]) == sorted(expected), "made up"
            # A rejected batch is bisected, and its parts are not always stored in order.
            places = {entry: place for place, entry in enumerate(expected)}
            assert all(abs(places[entry] - place) < 10 for place, entry in enumerate(stored[1:])), "out of order"
            assert not arrived & reported[lane.run].keys(), "stored, and reported as not stored"
            missing = Counter(everything) - Counter(stored[1:]) - reported[lane.run]
            assert missing.total() <= given_up[lane.run], "lost without a word"
        if most == math.inf:
            assert not given_up


def virtually(backend: str, function: Callable[..., Any], *args: Any) -> None:
    """Run a coroutine function in virtual time, outside of the fixtures' loop."""
    if backend == "trio":
        import trio.testing

        options: dict[str, Any] = {"clock": trio.testing.MockClock(autojump_threshold=0)}
    else:
        options = {"loop_factory": VirtualTimeLoop}
    anyio.run(function, *args, backend=backend, backend_options=options)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=settings().max_examples // 3)
@given(st.integers(0, 1_000_000), st.sampled_from([0.5, 2, 30]), st.sampled_from([15, 60, math.inf]), st.booleans())
def test_whatever_happens_each_entry_is_stored_reported_or_dropped_once_and_in_order(
    backend: str, seed: int, interval: float, most: float, drops: bool
) -> None:
    """Ticks, wake-ups, flushes and time-outs through outages, refusals and full queues: all counts are exact."""
    virtually(backend, random_actions, random.Random(seed), interval, most, drops)
