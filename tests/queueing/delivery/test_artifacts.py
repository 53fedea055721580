"""Artifacts are uploaded beside the other entries of their run: after its creation, before its final status."""

from __future__ import annotations

import random
from typing import Any

import anyio
import pytest

from runqueue.queueing import Lane, RejectedError, Report, Scope, StoreError
from runqueue.queueing.batches._batch import ARTIFACT, METRIC, RUN, STATUS
from runqueue.queueing.lanes._uploads import MAX_UPLOAD_LANES
from support.chaos import Chaos
from support.engine import (
    Bench,
    Entry,
    Request,
    artifacts,
    bench,
    bounds,
    check_counts,
    fill,
    flat,
    metrics,
    named,
    points,
    run,
    status,
)

pytestmark = pytest.mark.anyio


def files(count: int, start: int = 0) -> list[Any]:
    return [artifacts(**{f"file {at}": at}) for at in range(start, start + count)]


def kinds(b: Bench) -> list[int]:
    """The kinds of each request, in the order in which the requests began."""
    return [request.entries[0][0] for request in b.store.requests]


def down(request: Request) -> StoreError | None:
    return StoreError("down", retriable=True) if request.entries[0][0] == ARTIFACT else None


async def test_artifacts_go_behind_the_creation_beside_the_metrics_and_before_the_final_status() -> None:
    """A long upload delays no metric."""
    async with bench(limits=bounds(metrics=10)) as b:
        b.store.upload_seconds = 1_000.0
        b.lane("r", run(), *files(3), status(), *points(30), run_exists=False)
        assert await b.flush() == Report(total=34)
        assert (kinds(b)[0], kinds(b)[-1]) == (RUN, STATUS)
        starts = {kind: [r.at for r in b.store.requests if r.entries[0][0] == kind] for kind in (METRIC, STATUS)}
        assert starts[METRIC][-1] - starts[METRIC][0] == pytest.approx(2.0)
        assert starts[STATUS][0] - starts[METRIC][0] >= 1_000
        assert b.store.early == []


async def test_artifacts_hold_no_worker_slot_and_never_more_than_their_own() -> None:
    """One worker sends metrics while four files of four runs are under way."""
    async with bench(max_workers=1, uploads=2, limits=bounds(metrics=1)) as b:
        b.store.upload_seconds = 100.0
        for name in "abcd":
            b.lane(name, *files(4), *points(2))
        await b.flush()
        at_once = [
            sum(o.at <= r.at < o.at + 100 for o in b.store.requests if o.entries[0][0] == ARTIFACT)
            for r in b.store.requests
            if r.entries[0][0] == ARTIFACT
        ]
        assert max(at_once) == 2
        assert max(r.at for r in b.store.requests if r.entries[0][0] == METRIC) - b.store.requests[0].at < 10


async def test_of_one_key_the_last_artifact_is_stored_last() -> None:
    """Artifacts of other paths may overtake."""
    async with bench(lambda request: StoreError("x", retriable=True) if random.random() < 0.3 else None) as b:
        for value in range(20):
            b.lane("r", artifacts(a=value, b=value))
        await b.flush()
        stored = [(key, value) for _, key, value, _ in b.store.stored["r"]]
        for key in "ab":
            assert [value for each, value in stored if each == key] == list(range(20))


async def test_the_files_of_one_run_go_side_by_side() -> None:
    """Not one after the other."""
    async with bench() as b:
        b.lane("r", artifacts(**{f"f{at}": at for at in range(400)}))
        await b.flush()
        assert len(b.store.requests) == 400
        assert b.store.most_busy == min(4, MAX_UPLOAD_LANES)


async def test_an_artifact_that_is_refused_fails_alone_and_the_final_status_is_sent() -> None:
    """An artifact fails like any other entry of a run."""

    def script(request: Request) -> StoreError | None:
        return RejectedError("gone", scope=Scope.BATCH) if request.entries[0][1] == "bad" else None

    async with bench(script) as b:
        b.lane("r", artifacts(good=1, bad=2, better=3), status())
        report = await b.flush()
        assert named(report.failures) == [(ARTIFACT, "bad", 2, None)]
        assert all(failure.final for failure in report.failures)
        assert kinds(b)[-1] == STATUS
        assert b.accumulator.counts()["stored"] == 2


async def test_an_outage_of_the_artifacts_store_costs_no_metric_and_holds_back_the_final_status() -> None:
    """Artifacts and status stay queued, and a later flush sends them in order."""
    async with bench(down, timeout=20) as b:
        b.lane("r", *files(3), *points(5), status())
        report = await b.flush()
        assert sorted(named(report.failures))[:1] == [(STATUS, "status", "FINISHED", None)]
        assert sum(failure.weight for failure in report.failures) == 3
        assert not any(failure.final for failure in report.failures)
        assert [e for e in b.store.stored["r"] if e[0] == METRIC] == flat(points(5))
        (reason,) = {str(failure.error) for failure in report.failures if failure.kind == STATUS}
        assert reason == "the artifacts that come before it were not stored: down"
        b.store.script = None
        assert await b.flush() == Report(total=3)
        assert kinds(b)[-1] == STATUS
        assert b.store.early == []


@pytest.mark.parametrize("ends", [True, False])
async def test_in_an_outage_of_the_artifacts_store_a_flush_waits_for_its_metrics_though_another_began(
    ends: bool,
) -> None:
    """Each flush gives up only the entries whose attempt a later flush does not count."""
    async with bench(down, timeout=5, limits=bounds(metrics=1)) as b:
        lane = b.lane("r", *files(3))
        await b.flush()
        fill(lane, [*points(10), *([status()] if ends else [])])
        reports: list[Report] = []

        async def flush() -> None:
            reports.append(await b.flush())

        async with anyio.create_task_group() as tasks:
            began = anyio.current_time()
            tasks.start_soon(flush)
            await anyio.sleep(0.5)  # while the probe is under way
            tasks.start_soon(flush)
        assert anyio.current_time() - began == pytest.approx(10, abs=1)
        kept = sorted([ARTIFACT] * 3 + [STATUS] * ends)
        assert [[entry[0] for entry in sorted(named(report.failures))] for report in reports] == [kept, kept]
        assert len(b.store.stored["r"]) == 10


async def test_an_outage_of_the_metrics_store_costs_no_artifact() -> None:
    """Artifacts are uploaded while metrics cannot be sent."""
    async with bench(
        lambda r: None if r.entries[0][0] == ARTIFACT else StoreError("x", retriable=True), timeout=20
    ) as b:
        b.lane("r", *files(3), *points(5))
        report = await b.flush()
        assert {entry[0] for entry in named(report.failures)} == {METRIC}
        assert b.accumulator.counts()["stored"] == 3


async def test_the_last_flush_sends_the_final_status_without_artifacts_that_cannot_be_stored() -> None:
    """No flush follows, and an ended run must not be left RUNNING."""
    async with bench(down, timeout=20) as b:
        b.lane("r", *files(3), status())
        flush = b.sender.begin(last=True)
        await b.sender.completion(flush, None)
        report = flush.report()
        assert {entry[0] for entry in named(report.failures)} == {ARTIFACT}
        assert b.store.stored["r"] == flat([status()])


async def test_the_last_flush_leaves_time_for_the_final_status() -> None:
    """An upload takes longer than the flush may last."""
    async with bench() as b:
        b.store.upload_seconds = 1_000.0
        b.lane("r", *files(3), status())
        flush = b.sender.begin(last=True)
        await b.sender.completion(flush, 20)
        assert {entry[0] for entry in named(flush.report().failures)} == {ARTIFACT}
        assert b.store.stored["r"] == flat([status()])


async def test_a_final_status_waits_only_for_what_was_logged_before_its_flush() -> None:
    """Artifacts of later flushes do not delay it; otherwise a busy logger could delay it for ever."""
    async with bench() as b:
        b.store.upload_seconds = 10.0
        lane = b.lane("r", *files(1), status())
        first = b.sender.begin()
        await anyio.sleep(1)
        b.store.upload_seconds = 1_000.0
        b.lane("r", *files(40, start=100))
        second = b.sender.begin()
        with anyio.fail_after(100):
            await b.sender.completion(first, None)
        assert first.report().failures == ()
        await b.sender.completion(second, None)
        assert lane.is_settled


async def test_a_flush_of_a_nested_run_does_not_wait_for_the_artifacts_of_its_parent() -> None:
    """It waits for the parent's creation only."""
    async with bench() as b:
        parent = b.lane("p", run(), *files(2), run_exists=False)
        child = b.lane("c", run(), *files(2), *points(2), run_exists=False, parent=parent)
        assert await b.flush(child) == Report(total=6)
        assert b.store.stored["p"] == flat([run()])
        assert b.accumulator.counts()["pending"] == 2
        assert await b.flush() == Report(total=2)


async def test_artifacts_of_a_run_that_cannot_be_created_stay_queued() -> None:
    """They are reported as queued, under their own kind."""
    async with bench(lambda request: RejectedError("no such experiment") if request.creates_run else None) as b:
        b.lane("r", run(), *files(3), run_exists=False)
        report = await b.flush()
        assert sorted(entry[0] for entry in named(report.failures)) == [RUN, ARTIFACT, ARTIFACT, ARTIFACT]
        assert not any(failure.final for failure in report.failures)
        b.store.script = None
        assert await b.flush() == Report(total=4)


async def test_a_flush_that_timed_out_leaves_artifacts_queued_and_sends_none_twice() -> None:
    """Uploads under way at the timeout are settled later."""
    async with bench() as b:
        b.store.upload_seconds = 10.0
        b.lane("r", *files(12), status())
        report = await b.flush(timeout=15)
        assert 0 < sum(failure.weight for failure in report.failures) < 12
        await anyio.sleep(100)
        check_counts(b.accumulator)
        await b.flush()
        assert sorted(e for e in b.store.stored["r"] if e[0] == ARTIFACT) == sorted(flat(files(12)))
        assert len(b.store.requests) == 13
        assert kinds(b)[-1] == STATUS


async def test_an_upload_that_lasts_is_not_taken_for_a_store_that_is_stuck() -> None:
    """An upload may last as long as it makes progress; without progress it is given up."""
    beats = 0

    async with bench(patience=30) as b:
        b.sender._upload_progress = lambda: beats
        b.store.upload_seconds = 1_000.0
        b.lane("r", *files(1))
        async with anyio.create_task_group() as tasks:

            async def beat() -> None:
                nonlocal beats
                while True:
                    await anyio.sleep(10)
                    beats += 1

            tasks.start_soon(beat)
            assert await b.flush() == Report(total=1)
            tasks.cancel_scope.cancel()
        b.lane("r", *files(1))
        report = await b.flush()
        assert [str(failure.error) for failure in report.failures] == [
            "still queued when no request had ended for 30 s"
        ]


async def test_a_client_that_streams_sends_artifacts_by_its_ticks() -> None:
    """The lane is released when the run has ended."""
    async with bench(interval=2.0, max_pending=100) as b:
        b.lane("r", run(), *files(5), *points(3), status(), run_exists=False).ended = True
        await anyio.sleep(30)
        assert b.accumulator.counts()["stored"] == 9
        assert kinds(b)[-1] == STATUS
        await anyio.sleep(30)
        assert b.accumulator.all() == []
        assert b.intake.pending == 0


async def test_ticks_try_artifacts_again_and_metrics_go_on() -> None:
    """The outage lasts longer than the retry policy allows."""
    async with bench(down, interval=2.0, timeout=10) as b:
        b.lane("r", *files(3), status())
        for step in range(50):
            b.lane("r", metrics(step, loss=step))
            await anyio.sleep(1)
        assert len([e for e in b.store.stored["r"] if e[0] == METRIC]) > 40
        b.store.script = None
        await anyio.sleep(120)
        assert b.accumulator.counts()["pending"] == 0
        assert b.store.early == []
        order = [entry[0] for entry in b.store.stored["r"]]
        assert max(at for at, kind in enumerate(order) if kind == ARTIFACT) < order.index(STATUS)


async def test_artifacts_of_a_run_that_will_never_be_sent_make_room() -> None:
    """They are dropped and counted, like the other entries of the run."""
    async with bench(
        lambda request: RejectedError("no such experiment") if request.creates_run else None,
        interval=2.0,
        max_pending=10,
    ) as b:
        b.lane("r", run(), *files(9), run_exists=False)
        await anyio.sleep(10)
        b.lane("s", *points(1))
        await anyio.sleep(10)
        assert b.dropped["r"] == 9
        assert b.accumulator.counts() == {
            "accepted": 11, "pending": 1, "in_flight": 0, "stored": 1, "failed": 0, "dropped": 9
        }  # fmt: skip


async def test_what_is_abandoned_counts_the_artifacts() -> None:
    """Artifacts in the inbox and in closed windows are counted."""
    async with bench(down, timeout=1) as b:
        b.lane("r", *files(3))
        await b.flush()
        b.lane("r", *files(2))
        assert b.accumulator.abandon(failed=True) == 5
        assert b.accumulator.counts()["pending"] == 0


def test_a_window_of_artifacts_alone_leaves_no_window_behind() -> None:
    """It does not reopen a window that a flush has closed."""
    from support.engine import lane_of

    lane = lane_of(*points(1))
    lane.close_window()
    fill(lane, files(2))
    lane.close_window(extendable=True)
    assert (lane.last_closed, len(lane._windows)) == (1, 1)
    fill(lane, points(1, start=1))
    lane.close_window(extendable=True)
    assert lane.last_closed == 2, "what the flush has closed stays so"
    assert repr(lane) == "<Lane run=r pending=4 in_flight=0 settled=0>"


@pytest.mark.sample("*-?")
@pytest.mark.parametrize("seed", range(30))
async def test_whatever_happens_each_artifact_is_stored_or_reported_once_and_before_the_final_status(seed: int) -> None:
    """Flushes of all runs and of one, with timeouts, cancelled, overlapping, through outages: all counts are exact."""
    chaos = Chaos(random.Random(seed), scope=Scope.BATCH)
    logged: dict[str, list[Entry]] = {}
    failed: list[tuple[Any, Entry]] = []
    lanes: list[Lane] = []

    async def flush(b: Bench) -> None:
        lane = chaos.random.choice([None, None, *lanes])
        with anyio.move_on_after(chaos.random.choice([1.0, 15.0, 1_000.0])):
            report = await b.flush(lane, chaos.random.choice([None, 0.2, 2.0, 20.0]))
            failed.extend((f.run, entry) for f in report.failures if f.final for entry in named([f]))

    async with bench(chaos, limits=bounds(metrics=10), max_workers=3, uploads=3, timeout=10) as b:
        b.store.upload_seconds = 3.0
        for number in range(4):
            name = f"r{number}"
            logged[name] = []
            lanes.append(b.lane(name, run(), run_exists=False, parent=lanes[-1] if number % 2 else None))
        async with anyio.create_task_group() as tasks:
            for seqlock in range(20):
                for name, entries in logged.items():
                    for at in range(chaos.random.randrange(4)):
                        bad = chaos.random.random() < 0.1
                        record = artifacts(
                            **{"bad" if bad else f"{seqlock} {at}": (seqlock, at), f"more {seqlock}": at}
                        )
                        entries += flat([record])
                        b.lane(name, record, metrics(seqlock, good=at))
                tasks.start_soon(flush, b)
                await anyio.sleep(chaos.random.choice([0.0, 0.3, 4.0, 25.0]))
                check_counts(b.accumulator)
            for name in logged:
                b.lane(name, status())
            tasks.start_soon(flush, b)
        chaos.is_calm = True
        await anyio.sleep(100)
        report = await b.flush()
        assert all(failure.final for failure in report.failures)
        failed += [(f.run, entry) for f in report.failures for entry in named([f])]
        assert await b.flush() == Report(total=0)
        for name, entries in logged.items():
            stored = [entry for entry in b.store.stored[name] if entry[0] == ARTIFACT]
            lost = [entry for each, entry in failed if each == name and entry[0] == ARTIFACT]
            assert sorted(stored + lost, key=str) == sorted(entries, key=str)
            assert {entry for entry in entries if entry[1] == "bad"} <= set(lost)
            assert b.store.stored[name][-1][0] == STATUS
        assert b.store.early == []
        assert b.accumulator.counts()["pending"] == 0
