"""Refusals that an outage could cause as well: no entry fails for good without proof that the store works."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from runqueue.queueing import Batch, Lane, Report, Scope, StoreError
from runqueue.queueing.batches._evidence import UNPROVEN
from support.engine import Request, bench, bounds, flat, metrics, named, params, points, run, status, tags

pytestmark = pytest.mark.anyio

TEN = bounds(metrics=10)
INTERNAL = StoreError("500", retriable=True, rejects_after=3, scope=Scope.ENTRY)
READ_FAULTS = {
    "500": INTERNAL,
    "503": StoreError("503", retriable=True),
    "no connection": StoreError("no connection", retriable=True),
}


class Server:
    """Stores requests and answers reads until its state is changed; some entries it always refuses."""

    def __init__(self, *bad: Any) -> None:
        self.bad = set(bad)
        self.down: StoreError | None = None
        self.read_only = False
        self.reads = 0

    def write(self, request: Request) -> StoreError | None:
        return INTERNAL if self.down or self.read_only or self.bad & set(request.entries) else None

    async def read(self, lane: Lane, batch: Batch) -> None:
        self.reads += 1
        await anyio.sleep(0.1)
        if self.down is not None:
            raise self.down


@pytest.mark.parametrize("fault", READ_FAULTS.values(), ids=READ_FAULTS)
@pytest.mark.parametrize("run_exists", [True, False])
async def test_an_outage_is_waited_out_though_every_answer_could_be_a_rejection(
    fault: StoreError, run_exists: bool
) -> None:
    """During minutes of INTERNAL_ERROR nothing is halved, nothing fails, and the run's order is kept."""
    server = Server()
    server.down = fault
    records = [*points(25), status()]
    async with bench(server.write, check=server.read, limits=TEN) as b:
        b.lane("r", *([] if run_exists else [run()]), *records, run_exists=run_exists)

        async def mend() -> None:
            await anyio.sleep(200)
            server.down = None

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(mend)
            assert not (await b.flush()).failures
        assert b.store.stored["r"] == flat([*([] if run_exists else [run()]), *records])
        failed = [request for request in b.store.requests if request.at < 200]
        assert len({tuple(request.entries) for request in failed}) == 1
        assert server.reads <= len(failed) / 2


@pytest.mark.parametrize("fault", READ_FAULTS.values(), ids=READ_FAULTS)
async def test_an_outage_longer_than_retrying_leaves_everything_queued_and_whole(fault: StoreError) -> None:
    """Several flushes fail; afterwards everything is stored in as few requests as possible."""
    server = Server()
    server.down = fault
    async with bench(server.write, check=server.read, timeout=20, limits=TEN) as b:
        for lane in range(3):
            b.lane(lane, *points(25))
        for _ in range(12):
            report = await b.flush()
            assert report.not_stored == report.total == 75
            assert not any(failure.final for failure in report.failures)
            await anyio.sleep(60)
        server.down = None
        sent = len(b.store.requests)
        assert await b.flush() == Report(total=75)
        assert len(b.store.requests) == sent + 9
        assert all(b.store.stored[lane] == flat(points(25)) for lane in range(3))


async def test_a_stream_waits_through_an_outage_and_stores_everything() -> None:
    """Ticks go on, and entries that are logged in the meantime wait."""
    server = Server()
    server.down = INTERNAL
    async with bench(server.write, check=server.read, interval=2, timeout=60, limits=TEN) as b:
        for step in range(300):
            b.lane(step % 3, metrics(step, loss=step))
            await anyio.sleep(4)
        assert b.accumulator.counts()["failed"] == 0
        server.down = None
        await anyio.sleep(120)
        assert b.accumulator.counts()["stored"] == 300
        for lane in range(3):
            assert [step for *_, step in b.store.stored[lane]] == list(range(lane, 300, 3))


@pytest.mark.parametrize("timeout", [0, 20, 300])
async def test_a_store_that_is_read_and_takes_nothing_costs_no_entry_of_a_large_batch(timeout: float) -> None:
    """A full disk: nothing was stored, so nothing proves that a thousand entries are bad. All are stored later."""
    server = Server()
    server.read_only = True
    async with bench(server.write, check=server.read, timeout=timeout) as b:
        b.lane("r", *points(1_000))
        for _ in range(10):
            report = await b.flush()
            assert report.not_stored == report.total == 1_000
            assert not any(failure.final for failure in report.failures)
            await anyio.sleep(30)
        server.read_only = False
        assert await b.flush() == Report(total=1_000)
        assert sorted(b.store.stored["r"]) == sorted(flat(points(1_000)))


async def test_a_store_that_takes_nothing_costs_a_stream_a_few_entries_at_most() -> None:
    """One entry a tick, alone each time, for hours: after a bounded number of failures it counts as an outage."""
    server = Server()
    async with bench(server.write, check=server.read, interval=2, timeout=60) as b:
        b.lane("r", *points(1))
        await anyio.sleep(10)
        server.read_only = True
        for step in range(1, 300):
            b.lane("r", metrics(step, loss=step))
            await anyio.sleep(20)
        assert b.accumulator.counts()["failed"] <= UNPROVEN
        assert len(b.outages) == 1
        server.read_only = False
        await anyio.sleep(120)
        counts = b.accumulator.counts()
        assert counts["failed"] <= UNPROVEN
        assert counts["stored"] == 300 - counts["failed"]


async def test_one_bad_entry_with_nothing_else_to_send_fails_and_is_named() -> None:
    """The store answers reads, so it is not down."""
    bad = flat([params(kept="new")])[0]
    server = Server(bad)
    async with bench(server.write, check=server.read) as b:
        b.lane("r", params(kept="new"))
        report = await b.flush()
        assert named(report.failures) == [bad]
        assert report.failures[0].final
        assert (len(b.store.requests), server.reads) == (3, 2)
        assert repr(b.sender) == "<Sender healthy pumps=0 flushes=0>"


@pytest.mark.parametrize("place", [0, 1, 7, 8, 15])
async def test_a_bad_entry_among_good_ones_is_found_wherever_it_stands(place: int) -> None:
    """The other entries are stored, and that is the proof."""
    bad = flat(points(16))[place]
    server = Server(bad)
    async with bench(server.write, check=server.read) as b:
        b.lane("r", *points(16))
        report = await b.flush()
        assert named(report.failures) == [bad]
        assert report.failures[0].final
        assert len(b.store.stored["r"]) == 15
        assert len(b.store.requests) <= 5 * 3 + 4 + 3 * (place == 0)


async def test_many_bad_entries_at_the_head_of_a_batch_keep_nothing_from_being_stored() -> None:
    """
    A hundred conflicting params before metrics: the search continues from the other end and finds its proof there.
    """
    bad = flat([params(**{f"p{n}": n for n in range(100)})])
    server = Server(*bad)
    async with bench(server.write, check=server.read, seconds=0.1, timeout=60) as b:
        b.lane("r", params(**{f"p{n}": n for n in range(100)}), *points(400), status())
        report = await b.flush()
        assert sorted(named(report.failures)) == sorted(bad)
        assert all(failure.final for failure in report.failures)
        assert per_status(b.store.stored["r"]) == [*sorted(flat(points(400))), *flat([status()])]


def per_status(entries: list[Any]) -> list[Any]:
    """The requests, sorted between the final statuses."""
    return [*sorted(entries[:-1]), entries[-1]]


async def test_bad_entries_alone_that_are_many_wait_for_a_proof_and_hold_up_nothing() -> None:
    """A restarted script logs other params, and metrics later: the metrics are stored, and the params fail then."""
    bad = flat([params(**{f"p{n}": n for n in range(30)})])
    server = Server(*bad)
    async with bench(server.write, check=server.read, seconds=0.1) as b:
        lane = b.lane("r", params(**{f"p{n}": n for n in range(30)}))
        for _ in range(3):
            report = await b.flush()
            assert (report.total, report.not_stored) == (30, 30)
            assert not any(failure.final for failure in report.failures)
        b.lane("r", *points(5), status())
        report = await b.flush()
        assert sorted(named(report.failures)) == sorted(bad)
        assert all(failure.final for failure in report.failures)
        assert b.store.stored["r"] == flat([*points(5), status()])
        assert lane.is_settled


async def test_a_run_in_doubt_does_not_keep_others_from_being_tried() -> None:
    """This holds also if nothing was stored for so long that every request is a probe."""
    bad = [flat([params(**{f"p{n}": n})])[0] for n in range(30)]
    server = Server(*bad)
    async with bench(server.write, check=server.read, timeout=30) as b:
        b.lane("bad", params(**{f"p{n}": n for n in range(30)}))
        for _ in range(300):
            await b.flush()
            await anyio.sleep(10)
        b.lane("good", *points(5))
        await b.flush()
        assert b.store.stored["good"] == flat(points(5))
        failures = [*(await b.flush()).failures, *(await b.flush()).failures]
        assert b.accumulator.counts()["failed"] == 30, failures


async def test_a_read_that_refuses_the_credentials_ends_the_flush() -> None:
    """Only the credentials are at fault."""
    server = Server()
    server.down = StoreError("401", scope=Scope.STORE)
    async with bench(server.write, check=server.read, limits=TEN) as b:
        b.lane("r", *points(25))
        report = await b.flush()
        assert (report.not_stored, {str(failure.error) for failure in report.failures}) == (25, {"401"})
        assert len(b.store.requests) == 2


async def test_a_store_whose_reads_prove_nothing_is_taken_for_one_that_works() -> None:
    """Behind a gateway that blocks reads, bisection goes on as it would without checks."""
    bad = flat(points(16))[5]
    server = Server(bad)

    async def read(lane: Lane, batch: Batch) -> None:
        raise StoreError("405")

    async with bench(server.write, check=read) as b:
        b.lane("r", *points(16))
        assert named((await b.flush()).failures) == [bad]


async def test_an_entry_that_an_outage_has_put_in_doubt_is_tried_again() -> None:
    """The store recovers during a search: an entry that was refused before is tried again and stored."""
    server = Server()
    server.read_only = True
    async with bench(server.write, check=server.read, timeout=300) as b:
        b.lane("r", *points(50))

        def write(request: Request) -> StoreError | None:
            server.read_only = len([each for each in b.store.requests if len(each.entries) == 1]) < 60
            return server.write(request)

        b.store.script = write
        assert not (await b.flush()).failures
        assert sorted(b.store.stored["r"]) == sorted(flat(points(50)))


async def test_a_tag_in_doubt_never_overwrites_a_later_one() -> None:
    """The store recovers during a search: the last value of a tag stays the last."""
    server = Server()
    server.read_only = True

    def write(request: Request) -> StoreError | None:
        if len(request.entries) == 1 and request.number > 5:  # the first one stands alone, and is refused
            server.read_only = len(b.store.requests) < 9
        return server.write(request)

    async with bench(write, check=server.read) as b:
        b.lane("r", tags({"t": "old"}), tags({"t": "new"}), *points(2))
        report = await b.flush()
        stored = [value for _, key, value, _ in b.store.stored["r"] if key == "t"]
        assert stored[-1:] == ["new"]
        assert len(stored) + len(report.failures) == 2
