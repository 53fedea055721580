"""
Lanes of runs that have ended are let go; and whatever is appended by somebody who has looked one up before is not lost.

Rules of this file: nothing is slept for. A producer that is interrupted is one that holds what it has loaded so far.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runqueue.queueing import Accumulator, Fragments, Lane, Record, RejectedError, StoreError
from runqueue.queueing.batches._batch import STATUS
from runqueue.queueing.lanes._intake import Intake
from support.engine import Request, bench, bounds, check_counts, encode, flat, inside, metrics, points, run, status
from support.threads import in_threads
from support.virtual_time import VirtualTimeLoop

EACH = 3_000
"""Records of each thread."""
FIRST = -1
"""Instruction: none, in a first round. Python 3.12 tells of instructions only from the second round on."""

Append = Callable[[Record], Any]


class House:
    """An accumulator, with an intake or without, and what its store holds."""

    def __init__(self, *, intake: bool, encoder: Any = encode) -> None:
        self.accumulator = Accumulator(encoder, Intake if intake else None)
        self.stored: list[Any] = []

    def lane(self) -> Lane:
        """As a log call finds it."""
        return self.accumulator.lanes.get("r") or self.accumulator.open("r", run_exists=True)

    def log(self, step: int) -> None:
        self.lane().append(metrics(step, a=step))

    def end(self) -> None:
        lane = self.lane()
        lane.ended = True
        lane.append(status())

    def flush(self) -> None:
        """Do what the engine does, without waiting."""
        lanes = self.accumulator.busy()
        for lane in lanes:
            lane.close_window()
            while (batch := lane.take(bounds())) is not None:
                self.stored += [step for _, _, step, _ in inside(batch) if step != "FINISHED"]
                lane.store()
            self.accumulator.mark_live([lane])
        lanes.clear()
        self.accumulator.tidy(lambda _: False)
        check_counts(self.accumulator)

    def names(self) -> set[Any]:
        return set(self.accumulator.lanes)


@pytest.fixture(params=[False, True], ids=["classic", "intake"])
def house(request: pytest.FixtureRequest) -> House:
    """Both ways into a lane."""
    return House(intake=request.param)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What goes, goes because nobody holds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def load(house: House) -> Append:
    """A log call up to its last step: nothing but the append is left."""
    return house.lane().append


# -- what is released ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_collector")
def test_the_lane_of_a_run_that_has_ended_is_gone(house: House) -> None:
    """By all its names, at once, and not only when garbage is collected."""
    house.log(1)
    house.accumulator.alias("second name", house.lane())
    house.accumulator.resolve(house.lane(), "third name")
    house.end()
    lane = weakref.ref(house.lane())
    house.flush()
    assert (house.names(), house.accumulator.all(), house.accumulator._live) == (set(), [], [])
    assert lane() is None
    assert house.stored == [1]


def test_a_run_that_goes_on_keeps_its_lane(house: House) -> None:
    """What it knows of the run saves requests; but nobody looks at it."""
    house.log(1)
    lane = house.lane()
    house.flush()
    assert house.accumulator.all() == [lane] and house.accumulator._live == []
    house.log(2)
    house.flush()
    assert house.lane() is lane and house.stored == [1, 2]


def test_a_lane_that_was_opened_for_nothing_is_gone(house: House) -> None:
    """By a flush of this run alone, say, or as the parent of another."""
    house.lane()
    house.flush()
    assert house.accumulator.all() == []


def test_a_lane_that_remembers_how_keys_were_cut_stays() -> None:
    """Two keys that collide after the cut are found out, however late the second comes."""

    def remembering(record: Record, memory: dict[Any, Any]) -> Fragments:
        memory["cut"] = "key"
        return encode(record, memory)

    house = House(intake=True, encoder=remembering)
    house.end()
    house.flush()
    assert len(house.accumulator.all()) == 1


def test_a_lane_with_a_failure_stays_until_it_is_named(house: House) -> None:
    """A final status counts as no entry, and its failure is named all the same."""
    house.end()
    lane = house.lane()
    lane.close_window()
    assert lane.take(bounds()) is not None
    lane.reject(RejectedError("no"))
    house.flush()
    assert house.accumulator.busy() == [lane]
    assert len(lane.take_unreported(lane.last_closed)) == 1
    house.accumulator.mark_live([lane])
    house.flush()
    assert house.accumulator.all() == []


def test_a_lane_that_somebody_works_with_stays_until_then(house: House) -> None:
    """It is looked at again."""
    house.end()
    lane = house.lane()
    lane.close_window()
    while lane.take(bounds()) is not None:
        lane.store()
    house.accumulator.mark_live([lane])
    house.accumulator.tidy(lambda each: each is lane)
    assert house.accumulator.all() == [lane]
    house.accumulator.tidy(lambda _: False)
    assert house.accumulator.all() == []


def test_a_lane_is_not_released_while_another_thread_opens_one(house: House) -> None:
    """The engine does not wait for the lock: that thread may be interrupted by somebody who waits for the engine."""
    house.end()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with house.accumulator._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    house.flush()
    kept = house.accumulator.all()
    done.set()
    thread.join()
    assert len(kept) == 1
    house.flush()
    assert house.accumulator.all() == []


def test_a_lane_whose_creation_was_refused_room_is_forgotten() -> None:
    """Nothing leads to it, and nothing is counted."""
    house = House(intake=True)
    lane = house.accumulator.open("new", run_exists=False)
    house.accumulator.forget(lane)
    gone = weakref.ref(lane)
    del lane
    assert gone() is None
    assert (house.names(), house.accumulator.all(), house.accumulator._live) == (set(), [], [])


# -- producers that hold it ------------------------------------------------------------------------------------------


def test_a_producer_that_is_about_to_append_keeps_the_lane(house: House) -> None:
    """For minutes, if a signal handler came in between; then it goes."""
    house.end()
    append = load(house)
    for _ in range(3):
        house.flush()
    house.log(1)
    append(metrics(2, a=2))
    del append
    house.flush()
    assert house.stored == [1, 2]
    assert house.accumulator.all() == []


def test_a_producer_that_has_looked_the_lane_up_reaches_the_next_one(house: House) -> None:
    """Of the same run, and there is one only."""
    house.end()
    first = house.lane()
    house.flush()
    assert first.released
    first.append(metrics(1, a=1))
    house.log(2)
    first.push(metrics(3, a=3))
    assert len(house.accumulator.all()) == 1 and house.accumulator.counts()["pending"] == 3
    house.flush()
    assert house.stored == [1, 2, 3]


def test_a_name_given_to_a_lane_that_is_gone_leads_nowhere(house: House) -> None:
    """Its giver had looked it up before."""
    house.end()
    lane = house.lane()
    house.flush()
    house.accumulator.alias("late", lane)
    assert house.names() == set()


@pytest.mark.parametrize("intake", [False, True], ids=["classic", "intake"])
@pytest.mark.parametrize("alias", [False, True], ids=["looked up", "given a name"])
@pytest.mark.parametrize("held", [False, True], ids=["released", "held"])
def test_whatever_is_logged_in_the_midst_of_a_release_is_kept(intake: bool, alias: bool, held: bool) -> None:
    """By a garbage collection in the engine's own thread, before each single instruction of it."""
    at = FIRST
    while True:
        house = House(intake=intake)
        house.accumulator.alias("alias", house.lane())
        house.end()
        lanes = _settle(house)
        work = lambda a=house.accumulator, lanes=lanes: [a.release(lane) for lane in lanes]
        append = load(house) if held else None
        seen = _log_at_instruction(house, at, work, "release", "_unname", "_cancel_release", "_restore", alias=alias)
        check_counts(house.accumulator)
        del append
        assert house.accumulator.counts()["pending"] == seen
        assert len(house.accumulator.all()) <= 1
        house.flush()
        assert len(house.stored) == seen, at
        house.end()
        house.flush()
        assert house.accumulator.all() == [] and house.names() == set()
        if not seen and at >= 0:
            break
        at += 1
    assert at > 100


def test_whatever_is_logged_while_a_lane_is_unlisted_is_seen() -> None:
    """By another thread, before each single instruction of it."""
    at = FIRST
    while True:
        house = House(intake=True)
        house.log(0)
        _settle(house)
        work = lambda a=house.accumulator: a.tidy(lambda _: False)
        seen = _log_at_instruction(house, at, work, "tidy", "_stays_live")
        assert house.accumulator.counts()["pending"] == seen
        assert len(set(house.accumulator.busy())) == seen
        house.flush()
        assert len(house.stored) == seen
        if not seen and at >= 0:
            break
        at += 1
    assert at > 50


def _settle(house: House) -> list[Lane]:
    """Empty the lanes, and do nothing else."""
    lanes = house.accumulator.busy()
    for lane in lanes:
        lane.close_window()
        while lane.take(bounds()) is not None:
            lane.store()
    return lanes


def _log_at_instruction(house: House, at: int, work: Callable[[], object], *functions: str, alias: bool = False) -> int:
    """Do the work, and log before the instruction `at` of these functions; how often it came to that: once or never."""
    count = seen = 0
    code = {getattr(Accumulator, name).__code__ for name in functions}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count, seen
        if frame.f_code not in code:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            if count == at:
                sys.settrace(None)
                seen += 1
                if alias:
                    house.accumulator.alias("alias", house.lane())
                house.log(1)
            count += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return seen


PRODUCER = st.sampled_from([0, 1, 2])
STEP = st.one_of(
    st.tuples(st.sampled_from(["look up", "load", "append", "log", "end"]), PRODUCER),
    st.tuples(st.sampled_from(["flush", "close", "tidy"]), st.none()),
)


@pytest.mark.parametrize("intake", [False, True], ids=["classic", "intake"])
@settings(max_examples=3 * settings().max_examples)
@given(steps=st.lists(STEP, max_size=40))
def test_every_record_is_stored_once_whatever_is_held_meanwhile(intake: bool, steps: list[tuple[str, Any]]) -> None:
    """Three producers, each interrupted anywhere in its calls; and none overtakes itself."""
    house = House(intake=intake)
    lanes: dict[int, Lane] = {}
    appends: dict[int, Append] = {}
    logged: list[int] = []
    for serial, (what, who) in enumerate(steps):
        step = 1_000 * serial + (who or 0)
        if what == "look up":
            lanes[who] = house.lane()
        elif what == "load":
            appends[who] = lanes.pop(who).append if who in lanes else load(house)
        elif what == "append" and (who in appends or who in lanes):
            append = appends.pop(who, None) or lanes.pop(who).append
            append(metrics(step, a=step))
            del append
            logged.append(step)
        elif what == "log":
            house.log(step)
            logged.append(step)
        elif what == "end":
            house.end()
        elif what == "flush":
            house.flush()
        elif what == "close":
            for lane in house.accumulator.busy():
                lane.close_window(extendable=True)
        elif what == "tidy":
            house.accumulator.tidy(lambda _: False)
        check_counts(house.accumulator)
    lanes.clear()
    appends.clear()
    house.end()
    house.flush()
    assert house.stored == logged
    house.flush()
    assert house.accumulator.all() == [] and house.accumulator.counts()["stored"] == len(logged)


@pytest.mark.parametrize("intake", [False, True], ids=["classic", "intake"])
def test_threads_may_end_a_run_and_log_to_it_again_and_again(intake: bool) -> None:
    """While it is released as often: all is stored once, in each thread's order."""
    house = House(intake=intake)
    over = threading.Event()
    released = rounds = 0
    forget = house.accumulator.release

    def release(lane: Lane) -> bool:
        nonlocal released
        done = forget(lane)
        released += done
        return done

    house.accumulator.release = release  # type: ignore[method-assign]

    def log(thread: int) -> None:
        for step in range(EACH):
            house.lane().append(metrics(step, **{f"t{thread}": 10_000 * thread + step}))
            if step % 3 == 0:
                house.end()
                seen = rounds
                while step % 2 and rounds < seen + 2 and not over.is_set():
                    time.sleep(0)

    stored: dict[int, list[int]] = defaultdict(list)

    def engine() -> None:
        nonlocal rounds
        last = False
        while not last:
            rounds += 1
            last = over.is_set()
            lanes = house.accumulator.busy()
            for lane in lanes:
                lane.close_window()
                while (batch := lane.take(bounds())) is not None:
                    for _, _, value, _ in inside(batch):
                        if value != "FINISHED":
                            stored[value // 10_000].append(value % 10_000)
                    lane.store()
            house.accumulator.mark_live(lanes)
            house.accumulator.tidy(lambda _: False)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    worker = threading.Thread(target=engine)
    worker.start()
    try:
        in_threads(log, 4)
    finally:
        over.set()
        worker.join()
        sys.setswitchinterval(interval)
    assert {thread: steps == list(range(EACH)) for thread, steps in stored.items()} == dict.fromkeys(range(4), True)
    assert house.accumulator.counts() == {
        "accepted": 4 * EACH,
        "pending": 0,
        "in_flight": 0,
        "stored": 4 * EACH,
        "failed": 0,
        "dropped": 0,
    }
    check_counts(house.accumulator)
    assert released


# -- the whole engine ------------------------------------------------------------------------------------------------


def lanes_alive() -> int:
    return sum(type(each) is Lane for each in gc.get_objects())


@pytest.mark.anyio
@pytest.mark.parametrize(("interval", "count"), [(None, 2_000), (2.0, 20_000)])
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})], ids=["asyncio"])
async def test_20_000_finished_runs_leave_no_lanes_behind(interval: float | None, count: int, whole: bool) -> None:
    """Counted by objects; each run is created, logged to and ended. Without `--whole`, 4,000 at most."""
    if not whole:
        count = min(count, 4_000)
    gc.collect()
    before = lanes_alive()
    async with bench(interval=interval, seconds=0.01, max_workers=100) as b:
        for begun in range(0, count, 1_000):
            for n in range(begun, begun + 1_000):
                lane = b.lane(n, run(), metrics(0, a=1), run_exists=False)
                lane.ended = True
                lane.append(status())
                b.accumulator.resolve(lane, f"real {n}")
            del lane
            if interval is None:
                await b.flush()
            else:
                await anyio.sleep(3 * interval)
        assert (b.accumulator.all(), b.accumulator.lanes, b.accumulator._live) == ([], {}, [])
        assert b.accumulator.counts()["stored"] == 2 * count
        gc.collect()
        assert lanes_alive() == before


@pytest.mark.anyio
@pytest.mark.parametrize("ended", [True, False])
async def test_the_work_of_a_turn_does_not_grow_with_the_runs_that_were(
    ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked at are lanes that have something to do; those of 2,000 silent runs are not among them."""
    looked = 0
    live = Accumulator.live

    def counted(self: Accumulator) -> list[Lane]:
        nonlocal looked
        found = live(self)
        looked += len(found)
        return found

    def no_walk(self: Accumulator) -> list[Lane]:
        raise AssertionError("all lanes are walked")

    async with bench(interval=2.0, seconds=0.01, max_workers=100) as b:
        for n in range(2_000):
            lane = b.lane(n, metrics(0, a=1))
            lane.ended = ended
            lane.append(status())
        del lane
        await anyio.sleep(10)
        with monkeypatch.context() as patch:
            patch.setattr(Accumulator, "live", counted)
            patch.setattr(Accumulator, "all", no_walk)
            for step in range(10):
                b.lane("busy", metrics(step, a=1))
                await anyio.sleep(2)
            b.accumulator.counts()
        wakes = looked
        assert len(b.accumulator.all()) == (1 if ended else 2_001)
    assert 0 < wakes < 200


@pytest.mark.anyio
async def test_an_outage_keeps_lanes_and_their_release_comes_after_it() -> None:
    """Batches that were put back are found without a record in the inbox."""
    down = True

    def script(request: Request) -> StoreError | None:
        return StoreError("503", retriable=True) if down else None

    async with bench(script, interval=2.0, timeout=5, seconds=0.1) as b:
        lane = b.lane("r", *points(5))
        lane.ended = True
        lane.append(status())
        await anyio.sleep(60)
        assert b.accumulator.busy() == [lane] and not lane.inbox
        del lane
        down = False
        await anyio.sleep(60)
        assert b.store.stored["r"] == flat([*points(5), status()])
        assert b.accumulator.all() == []


@pytest.mark.anyio
async def test_a_flush_that_is_under_way_keeps_its_lanes() -> None:
    """It has still to report of them."""
    async with bench(seconds=1.0) as b:
        for name, count in (("short", 1), ("long", 1)):
            lane = b.lane(name, *points(count))
            lane.ended = True
            lane.append(status())
        b.lane("long", *[metrics(step, **{f"m{at}": 1 for at in range(1_000)}) for step in range(5)])
        first = b.sender.begin()
        assert not (await b.flush(b.accumulator.lanes["short"])).failures
        assert {lane.run for lane in b.accumulator.all()} == {"short", "long"}
        await b.sender.completion(first, None)
        assert not first.report().failures
        b.sender.tidy(first)
        assert b.accumulator.all() == []


@pytest.mark.anyio
async def test_a_failed_status_is_named_by_the_next_flush_of_a_stream() -> None:
    """Whose lane goes then."""
    async with bench(lambda r: RejectedError("gone") if r.entries[0][0] == STATUS else None, interval=2.0) as b:
        lane = b.lane("r", *points(3))
        lane.ended = True
        lane.append(status())
        del lane
        await anyio.sleep(10)
        assert len((await b.flush()).failures) == 1
        assert (await b.flush()).failures == ()
        assert b.accumulator.all() == []


@pytest.mark.anyio
async def test_runs_whose_status_is_refused_are_let_go_where_nobody_will_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once there are very many of them; each was told."""
    monkeypatch.setattr("runqueue.queueing.delivery._stream.MAX_FULL_FAILURES", 20)
    async with bench(lambda r: RejectedError("gone"), interval=2.0, releases_failures=True) as b:
        for n in range(50):
            lane = b.lane(n)
            lane.ended = True
            lane.append(status())
            await anyio.sleep(4)
        assert len(b.accumulator.all()) <= 25


@pytest.mark.anyio
async def test_a_flush_that_was_cancelled_leaves_no_lanes_behind_in_the_end() -> None:
    """What it had begun is settled after it; the next flush lets go of it."""
    async with bench(seconds=5.0) as b:
        lane = b.lane("r", metrics(0, a=1))
        lane.ended = True
        lane.append(status())
        del lane
        with anyio.move_on_after(7):
            await b.flush()
        await anyio.sleep(60)
        await b.flush()
        b.lane("other", metrics(0, a=1))
        await b.flush()
        assert [lane.run for lane in b.accumulator.all()] == ["other"]
