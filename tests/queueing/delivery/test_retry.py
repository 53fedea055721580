"""The retry policy: which batches are sent again, when, how often, and when trying ends."""

from __future__ import annotations

import math
from itertools import pairwise

import anyio
import pytest

from runqueue.queueing import RejectedError, Report, Scope, StoreError
from support.engine import bench, bounds, flat, named, points, run

pytestmark = pytest.mark.anyio

TEN = bounds(metrics=10)


def later(after: float | None = None, rejects_after: int | None = None, scope: Scope | None = None) -> StoreError:
    return StoreError("503", retriable=True, retry_after=after, rejects_after=rejects_after, scope=scope)


FINAL = StoreError("404")
ENTRY = RejectedError("400")
INTERNAL = later(rejects_after=3, scope=Scope.ENTRY)


@pytest.mark.parametrize(
    ("answers", "deliveries", "stored"),
    [
        ([], 1, 1),
        ([later()], 2, 1),
        ([later()] * 4, 5, 1),
        ([later(1.0)] * 2, 3, 1),
        ([later(0.0)], 2, 1),
        ([FINAL], 1, 0),
        ([later(), FINAL], 2, 0),
        ([ENTRY], 1, 0),
        ([later(), ENTRY], 2, 0),
        ([INTERNAL], 2, 1),
        ([INTERNAL] * 2, 3, 1),
        ([INTERNAL] * 3, 3, 0),
        ([INTERNAL, later(), INTERNAL], 4, 1),
        ([INTERNAL, later(), INTERNAL, later(), INTERNAL], 5, 0),
        ([StoreError("gone", scope=Scope.LANE)], 1, 0),
        ([ZeroDivisionError("ours")], 1, 0),
    ],
)
async def test_an_error_says_itself_how_often_its_batch_is_sent(
    answers: list[Exception], deliveries: int, stored: int
) -> None:
    """The exact number of deliveries for each row of answers."""
    async with bench(lambda r: answers[r.number] if r.number < len(answers) else None) as b:
        b.lane("r", *points(1))
        report = await b.flush()
        assert len(b.store.requests) == deliveries
        assert b.accumulator.counts()["stored"] == stored
        assert [failure.final for failure in report.failures] == [True] * (1 - stored)
        assert b.accumulator.ledger.retried == deliveries - 1


async def test_back_off_grows_and_is_jittered() -> None:
    """The n-th wait is at most base * 2**(n-1) seconds, 30 at most."""
    async with bench(lambda r: later() if r.number < 12 else None, seconds=0) as b:
        b.lane("r", *points(1))
        await b.flush()
        times = b.store.times()
        waits = [after - before for before, after in pairwise(times)]
        assert all(0 <= wait <= min(30, 0.5 * 2**n) for n, wait in enumerate(waits))
        assert len(set(waits)) > 6


async def test_a_bad_entry_among_many_is_isolated_by_an_error_that_is_retriable_at_first() -> None:
    """A store that answers 500 to one bad entry: three times for each batch that holds the entry."""
    bad = flat(points(1, 7))[0]
    async with bench(lambda r: INTERNAL if bad in r.entries else None) as b:
        b.lane("r", *points(16))
        report = await b.flush()
        assert named(report.failures) == [bad]
        assert len(b.store.requests) <= 5 * 3 + 4


async def test_trying_ends_retry_timeout_after_the_first_failure() -> None:
    """The last attempt is at the deadline; the batch stays at the head of its lane, in order."""
    down = True
    async with bench(lambda _: later(1.0) if down else None, seconds=0, timeout=10, base=0, limits=TEN) as b:
        b.lane("r", *points(25))
        report = await b.flush()
        assert b.store.times() == [float(n) for n in range(11)]
        assert (report.total, report.not_stored) == (25, 25)
        assert not any(failure.final for failure in report.failures)
        assert str(report.failures[0].error) == "503"
        assert repr(b.sender) == "<Sender given up pumps=0 flushes=0>"
        down = False
        await anyio.sleep(1)
        assert await b.flush() == Report(total=25)
        assert b.store.stored["r"] == flat(points(25))
        assert repr(b.sender) == "<Sender healthy pumps=0 flushes=0>"


async def test_retry_timeout_is_counted_across_lanes_from_the_last_success() -> None:
    """A lane that fails later gets no time of its own; a success gives time to all lanes."""
    async with bench(lambda r: later(1.0) if r.run != "healthy" or r.number > 40 else None, seconds=0, timeout=10,
                     base=0, limits=bounds(metrics=1)) as b:  # fmt: skip
        started = anyio.current_time()
        b.lane("bad", *points(1))
        b.store.seconds = 0

        async def again() -> None:
            await anyio.sleep(5)
            lane = b.lane("healthy", *points(1))
            assert await b.flush(lane) == Report(total=1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(again)
            report = await b.flush()
        assert report.not_stored == 1
        assert 15 <= anyio.current_time() - started <= 17


async def test_a_second_lane_shares_the_time_of_the_first() -> None:
    """The outage concerns the store, not a single run."""
    async with bench(lambda _: later(1.0), seconds=0, timeout=10, base=0) as b:
        started = anyio.current_time()
        b.lane("first", *points(1))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush)
            await anyio.sleep(8.5)
            second = b.lane("second", *points(1))
            assert (await b.flush(second)).not_stored == 1
        assert anyio.current_time() - started == pytest.approx(10, abs=0.01)


async def test_after_the_outage_one_probe_fails_and_ends_the_flush() -> None:
    """A flush during an outage costs one request, however many runs there are."""
    async with bench(lambda _: later(), timeout=5, limits=TEN) as b:
        for n in range(8):
            b.lane(n, *points(25))
        assert (await b.flush()).not_stored == 200
        for _ in range(3):
            await anyio.sleep(60)
            sent = len(b.store.requests)
            started = anyio.current_time()
            report = await b.flush()
            assert (report.total, report.not_stored) == (200, 200)
            assert len(b.store.requests) == sent + 1
            assert anyio.current_time() - started == pytest.approx(1)


async def test_after_the_outage_a_successful_probe_releases_everything() -> None:
    """
    One request goes first; when it is stored, all lanes are sent side by side, and everything is stored once, in order.
    """
    down = True
    async with bench(lambda _: later() if down else None, timeout=5, limits=TEN) as b:
        for n in range(8):
            b.lane(n, *points(25))
        await b.flush()
        down = False
        sent = len(b.store.requests)
        b.store.most_busy = 0
        assert await b.flush() == Report(total=200)
        times = [request.at - b.store.requests[sent].at for request in b.store.requests[sent:]]
        assert sum(at < 0.5 for at in times) == 1
        assert sum(at < 1.5 for at in times) == 9
        assert b.store.most_busy == 8
        for n in range(8):
            assert b.store.stored[n] == flat(points(25))
        assert len(times) == 8 * 3


async def test_one_probe_at_a_time_also_when_flushes_overlap() -> None:
    """Pumps that wait when the outage is declared do not bypass the probe."""
    async with bench(lambda _: later(), timeout=5, limits=TEN, max_workers=2) as b:
        for n in range(6):
            b.lane(n, *points(15))
        await b.flush()
        b.store.most_busy = 0
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(b.flush)
                await anyio.sleep(0.3)
        assert b.store.most_busy == 1


@pytest.mark.parametrize("fault", [later(), StoreError("401", scope=Scope.STORE)], ids=str)
@pytest.mark.parametrize("joins", [True, False])
async def test_a_probe_that_was_under_way_does_not_speak_for_a_flush_that_began_after_it(
    fault: StoreError, joins: bool
) -> None:
    """The user may have repaired the server in between: the flush needs an attempt of its own."""
    mended = math.inf
    async with bench(lambda r: fault if r.at < mended else None, timeout=5, limits=TEN) as b:
        probing, other = b.lane("a", *points(15)), b.lane("b", *points(15))
        await b.flush()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush, probing)
            await anyio.sleep(0.5)
            mended = anyio.current_time()
            assert await b.flush(probing if joins else other) == Report(total=15)
        assert (await b.flush()).failures == ()


async def test_flushes_that_follow_each_other_in_an_outage_cost_a_probe_each() -> None:
    async with bench(lambda _: later(), timeout=5, limits=TEN) as b:
        lane = b.lane("a", *points(15))
        await b.flush()
        sent = len(b.store.requests)
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(b.flush, lane)
                await anyio.sleep(0.1)
        assert len(b.store.requests) == sent + 2  # the one under way, and one for all who came meanwhile


async def test_in_an_outage_no_flush_waits_for_those_that_come_after_it() -> None:
    """Each flush gets one attempt that began after it, and ends even if new flushes keep coming."""
    lasted: list[float] = []
    async with bench(lambda _: later(), timeout=5, limits=TEN) as b:
        lane = b.lane("a", *points(15))
        await b.flush()

        async def flush() -> None:
            began = anyio.current_time()
            report = await b.flush(lane)
            assert (report.not_stored, {str(each.error) for each in report.failures}) == (15, {"503"})
            lasted.append(anyio.current_time() - began)

        async with anyio.create_task_group() as tasks:
            for _ in range(50):
                tasks.start_soon(flush)
                await anyio.sleep(0.3)
    assert len(lasted) == 50
    assert max(lasted) <= 2.01


async def test_retry_after_holds_back_all_lanes() -> None:
    """The store asked the client to wait, not one run."""
    async with bench(lambda r: later(10.0) if r.number == 0 else None, base=0, limits=TEN, max_workers=1) as b:
        for n in range(3):
            b.lane(n, *points(15))
        assert await b.flush() == Report(total=45)
        times = b.store.times()
        assert times[0] == 0
        assert min(times[1:]) == 11  # a second for the first request, then ten


async def test_no_request_falls_inside_the_second_that_was_asked_for() -> None:
    """429 with Retry-After: 1, twice."""
    async with bench(lambda r: later(1.0) if r.number < 2 else None, seconds=0.1, limits=TEN) as b:
        b.lane("a", *points(5))
        b.lane("b", *points(5))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush)
            await anyio.sleep(0.5)
            await b.flush(b.lane("c", *points(5)))
        assert min(b.store.times()[2:]) >= 1.1
        assert b.accumulator.counts()["stored"] == 15


async def test_a_retry_after_beyond_the_deadline_ends_the_flush_at_once() -> None:
    """Waiting for an attempt that is never made would waste time; the next flush probes once all the same."""
    async with bench(lambda r: later(100.0) if r.number == 0 else None, timeout=50, limits=TEN, max_workers=1) as b:
        b.lane("a", *points(15))
        b.lane("b", *points(15))
        started = anyio.current_time()
        report = await b.flush()
        assert (report.not_stored, len(b.store.requests), anyio.current_time() - started) == (30, 1, 1)
        assert {str(failure.error) for failure in report.failures} == {"503"}
        assert await b.flush() == Report(total=30)


async def test_a_flush_ends_when_its_run_is_stored_though_the_store_asked_to_wait() -> None:
    """Retry-After holds back requests, and this run has none left."""
    async with bench(lambda r: later(60.0) if r.run == "b" and r.number < 2 else None, base=0) as b:
        a = b.lane("a", *points(3))
        b.lane("b", *points(3))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush)
            await anyio.sleep(0.5)
            started = anyio.current_time()
            assert await b.flush(a) == Report(total=3)
            assert anyio.current_time() - started < 1


async def test_a_lane_that_backs_off_holds_no_worker() -> None:
    """With one worker, another run is sent while the first one waits."""
    async with bench(lambda r: later() if r.run == "a" and r.number < 6 else None, max_workers=1, limits=TEN) as b:
        first, second = b.lane("a", *points(5)), b.lane("b", *points(40))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(b.flush, first)
            await anyio.sleep(0.5)
            await b.flush(second)
        assert b.store.runs()[:2] == ["a", "b"]
        assert b.accumulator.counts()["stored"] == 45


async def test_refused_credentials_end_the_flush_at_once_and_keep_everything() -> None:
    """The credentials are the same for all runs, so that one request is enough."""
    bad = True
    refused = StoreError("401", scope=Scope.STORE)
    async with bench(lambda _: refused if bad else None, limits=TEN, max_workers=2) as b:
        for n in range(5):
            b.lane(n, run(), *points(25), run_exists=False)
        report = await b.flush()
        assert (report.total, report.not_stored) == (130, 130)
        assert {str(failure.error) for failure in report.failures} == {"401"}
        assert not any(failure.final for failure in report.failures)
        assert len(b.store.requests) == 2
        await b.flush()
        assert len(b.store.requests) == 3
        bad = False
        assert await b.flush() == Report(total=130)
        assert b.store.stored[4] == flat([run(), *points(25)])


async def test_a_pump_that_is_no_longer_awaited_does_not_sleep_on() -> None:
    """A pump of a flush that timed out ends as soon as its request fails."""
    async with bench(lambda _: later(200.0), seconds=2, base=0) as b:
        b.lane("r", *points(3))
        await b.flush(timeout=1)
        await anyio.sleep(2)
        assert repr(b.sender) == "<Sender failing pumps=0 flushes=0>"


async def test_a_creation_is_retried_like_any_other_request() -> None:
    """A child waits for it, and both runs are created once."""
    async with bench(lambda r: later() if r.number < 3 else None) as b:
        parent = b.lane("parent", run(), *points(2), run_exists=False)
        b.lane("child", run(), run_exists=False, parent=parent)
        assert await b.flush() == Report(total=4)
        assert [request.run for request in b.store.requests if request.creates_run] == ["parent"] * 4 + ["child"]


async def test_a_creation_that_was_given_up_after_three_answers_has_three_again_in_the_next_flush() -> None:
    """The count starts anew with each flush."""
    async with bench(lambda r: INTERNAL if r.number < 5 else None) as b:
        b.lane("r", run(), run_exists=False)
        assert (await b.flush()).not_stored == 1
        assert len(b.store.requests) == 3
        assert await b.flush() == Report(total=1)
        assert len(b.store.requests) == 6


async def test_an_outage_at_the_creation_reports_parent_and_child_and_the_next_flush_completes() -> None:
    """All entries wait for the store, in order."""
    down = True
    async with bench(lambda _: later() if down else None, timeout=5) as b:
        parent = b.lane("parent", run(), *points(2), run_exists=False)
        b.lane("child", run(), *points(2), run_exists=False, parent=parent)
        report = await b.flush()
        assert (report.not_stored, {str(failure.error) for failure in report.failures}) == (6, {"503"})
        down = False
        assert await b.flush() == Report(total=6)
        assert b.store.runs()[-4:].count("child") == 2


async def test_without_retry_timeout_a_bad_entry_is_still_isolated_in_the_end() -> None:
    """An error that becomes a rejection after three answers must not block the head of a run for ever."""
    bad = flat(points(1, 0))[0]
    async with bench(lambda r: INTERNAL if bad in r.entries else None, timeout=0, limits=TEN) as b:
        b.lane("r", *points(5))
        failures = [failure for _ in range(30) for failure in (await b.flush()).failures if failure.final]
        assert named(failures) == [bad]
        assert b.accumulator.counts()["stored"] == 4
