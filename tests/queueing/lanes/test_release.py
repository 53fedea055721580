"""Lanes of runs that have ended are released, and no record is lost that a log call appends to such a lane."""

# Rules of this file: no test sleeps. An interrupted producer is played by a test that holds the lane, or its `append`,
# that the producer has looked up so far.

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
"""The first round logs at no instruction: Python 3.12 traces instructions only from the second round on."""

Append = Callable[[Record], Any]


class Queue:
    """An accumulator, with an intake or without, and the steps that its store has taken."""

    def __init__(self, *, intake: bool, encoder: Any = encode) -> None:
        self.accumulator = Accumulator(encoder, Intake if intake else None)
        self.stored: list[Any] = []

    def lane(self) -> Lane:
        """The lane of the run, looked up as a log call does."""
        return self.accumulator.lanes.get("r") or self.accumulator.open("r", run_exists=True)

    def log(self, step: int) -> None:
        self.lane().append(metrics(step, a=step))

    def end(self) -> None:
        lane = self.lane()
        lane.ended = True
        lane.append(status())

    def flush(self) -> None:
        """Flush and release as the engine does, without waiting."""
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
def queue(request: pytest.FixtureRequest) -> Queue:
    """A queue without an intake, and one with it."""
    return Queue(intake=request.param)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector, an object is freed only when its last reference goes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def load(queue: Queue) -> Append:
    """Look up `append` as a log call does, and do not call it."""
    return queue.lane().append


# -- which lanes are released -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_collector")
def test_the_lane_of_a_run_that_has_ended_is_gone(queue: Queue) -> None:
    """It is gone under all its names, at once, without a garbage collection."""
    queue.log(1)
    queue.accumulator.alias("second name", queue.lane())
    queue.accumulator.resolve(queue.lane(), "third name")
    queue.end()
    lane = weakref.ref(queue.lane())
    queue.flush()
    assert (queue.names(), queue.accumulator.all(), queue.accumulator._live) == (set(), [], [])
    assert lane() is None
    assert queue.stored == [1]


def test_a_run_that_goes_on_keeps_its_lane(queue: Queue) -> None:
    """Its knowledge of the run saves requests; but the engine's looks skip it."""
    queue.log(1)
    lane = queue.lane()
    queue.flush()
    assert queue.accumulator.all() == [lane] and queue.accumulator._live == []
    queue.log(2)
    queue.flush()
    assert queue.lane() is lane and queue.stored == [1, 2]


def test_a_lane_that_was_opened_and_never_filled_is_gone(queue: Queue) -> None:
    """A flush of one run opens such a lane, for example, or a run whose parent it is."""
    queue.lane()
    queue.flush()
    assert queue.accumulator.all() == []


def test_a_lane_whose_encoder_has_cut_keys_stays() -> None:
    """So two keys that collide after the cut are noticed, however late the second one is logged."""

    def remembering(record: Record, memory: dict[Any, Any]) -> Fragments:
        memory["cut"] = "key"
        return encode(record, memory)

    queue = Queue(intake=True, encoder=remembering)
    queue.end()
    queue.flush()
    assert len(queue.accumulator.all()) == 1


def test_a_lane_with_a_failure_stays_until_the_failure_is_reported(queue: Queue) -> None:
    """This holds for a final status too, though it counts as no entry."""
    queue.end()
    lane = queue.lane()
    lane.close_window()
    assert lane.take(bounds()) is not None
    lane.reject(RejectedError("no"))
    queue.flush()
    assert queue.accumulator.busy() == [lane]
    assert len(lane.take_unreported(lane.last_closed)) == 1
    queue.accumulator.mark_live([lane])
    queue.flush()
    assert queue.accumulator.all() == []


def test_a_lane_that_is_needed_stays(queue: Queue) -> None:
    """The engine looks at it again."""
    queue.end()
    lane = queue.lane()
    lane.close_window()
    while lane.take(bounds()) is not None:
        lane.store()
    queue.accumulator.mark_live([lane])
    queue.accumulator.tidy(lambda each: each is lane)
    assert queue.accumulator.all() == [lane]
    queue.accumulator.tidy(lambda _: False)
    assert queue.accumulator.all() == []


def test_a_lane_is_not_released_while_another_thread_opens_one(queue: Queue) -> None:
    """The engine does not wait for the lock: a signal handler in that thread may be waiting for the engine."""
    queue.end()
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with queue.accumulator._lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)
    queue.flush()
    kept = queue.accumulator.all()
    done.set()
    thread.join()
    assert len(kept) == 1
    queue.flush()
    assert queue.accumulator.all() == []


def test_a_lane_whose_first_record_was_refused_is_forgotten() -> None:
    """No name leads to the lane, and nothing is counted."""
    queue = Queue(intake=True)
    lane = queue.accumulator.open("new", run_exists=False)
    queue.accumulator.forget(lane)
    gone = weakref.ref(lane)
    del lane
    assert gone() is None
    assert (queue.names(), queue.accumulator.all(), queue.accumulator._live) == (set(), [], [])


# -- producers that hold a lane ---------------------------------------------------------------------------------------


def test_a_producer_that_is_about_to_append_keeps_the_lane(queue: Queue) -> None:
    """For minutes, if a signal handler came in between. Afterwards the lane is released."""
    queue.end()
    append = load(queue)
    for _ in range(3):
        queue.flush()
    queue.log(1)
    append(metrics(2, a=2))
    del append
    queue.flush()
    assert queue.stored == [1, 2]
    assert queue.accumulator.all() == []


def test_a_producer_that_has_looked_the_lane_up_reaches_the_next_one(queue: Queue) -> None:
    """Its records go to the next lane of the run, of which there is only one."""
    queue.end()
    first = queue.lane()
    queue.flush()
    assert first.released
    first.append(metrics(1, a=1))
    queue.log(2)
    first.push(metrics(3, a=3))
    assert len(queue.accumulator.all()) == 1 and queue.accumulator.counts()["pending"] == 3
    queue.flush()
    assert queue.stored == [1, 2, 3]


def test_an_alias_of_a_released_lane_leads_nowhere(queue: Queue) -> None:
    """The caller of `alias` had looked the lane up before its release."""
    queue.end()
    lane = queue.lane()
    queue.flush()
    queue.accumulator.alias("late", lane)
    assert queue.names() == set()


@pytest.mark.parametrize("intake", [False, True], ids=["classic", "intake"])
@pytest.mark.parametrize("alias", [False, True], ids=["looked up", "given a name"])
@pytest.mark.parametrize("held", [False, True], ids=["released", "held"])
def test_a_record_that_is_logged_during_a_release_is_kept(intake: bool, alias: bool, held: bool) -> None:
    """
    The record is logged by a garbage collection in the engine's thread, before each instruction of the release in turn.
    """
    at = FIRST
    while True:
        queue = Queue(intake=intake)
        queue.accumulator.alias("alias", queue.lane())
        queue.end()
        lanes = _settle(queue)
        work = lambda a=queue.accumulator, lanes=lanes: [a.release(lane) for lane in lanes]
        append = load(queue) if held else None
        seen = _log_at_instruction(queue, at, work, "release", "_unname", "_cancel_release", "_restore", alias=alias)
        check_counts(queue.accumulator)
        del append
        assert queue.accumulator.counts()["pending"] == seen
        assert len(queue.accumulator.all()) <= 1
        queue.flush()
        assert len(queue.stored) == seen, at
        queue.end()
        queue.flush()
        assert queue.accumulator.all() == [] and queue.names() == set()
        if not seen and at >= 0:
            break
        at += 1
    assert at > 100


def test_a_record_that_is_logged_while_its_lane_is_unlisted_is_seen() -> None:
    """The record is logged by another thread, before each instruction of the unlisting in turn."""
    at = FIRST
    while True:
        queue = Queue(intake=True)
        queue.log(0)
        _settle(queue)
        work = lambda a=queue.accumulator: a.tidy(lambda _: False)
        seen = _log_at_instruction(queue, at, work, "tidy", "_stays_live")
        assert queue.accumulator.counts()["pending"] == seen
        assert len(set(queue.accumulator.busy())) == seen
        queue.flush()
        assert len(queue.stored) == seen
        if not seen and at >= 0:
            break
        at += 1
    assert at > 50


def _settle(queue: Queue) -> list[Lane]:
    """Empty the lanes, and release none."""
    lanes = queue.accumulator.busy()
    for lane in lanes:
        lane.close_window()
        while lane.take(bounds()) is not None:
            lane.store()
    return lanes


def _log_at_instruction(queue: Queue, at: int, work: Callable[[], object], *functions: str, alias: bool = False) -> int:
    """Do the work, and log before instruction `at` of these functions. Returns the number of logged records: 0 or 1."""
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
                    queue.accumulator.alias("alias", queue.lane())
                queue.log(1)
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
def test_every_record_is_stored_once_whatever_producers_hold_meanwhile(
    intake: bool, steps: list[tuple[str, Any]]
) -> None:
    """Each of three producers is interrupted anywhere in its calls, and keeps the order of its records."""
    queue = Queue(intake=intake)
    lanes: dict[int, Lane] = {}
    appends: dict[int, Append] = {}
    logged: list[int] = []
    for serial, (what, producer) in enumerate(steps):
        step = 1_000 * serial + (producer or 0)
        if what == "look up":
            lanes[producer] = queue.lane()
        elif what == "load":
            appends[producer] = lanes.pop(producer).append if producer in lanes else load(queue)
        elif what == "append" and (producer in appends or producer in lanes):
            append = appends.pop(producer, None) or lanes.pop(producer).append
            append(metrics(step, a=step))
            del append
            logged.append(step)
        elif what == "log":
            queue.log(step)
            logged.append(step)
        elif what == "end":
            queue.end()
        elif what == "flush":
            queue.flush()
        elif what == "close":
            for lane in queue.accumulator.busy():
                lane.close_window(extendable=True)
        elif what == "tidy":
            queue.accumulator.tidy(lambda _: False)
        check_counts(queue.accumulator)
    lanes.clear()
    appends.clear()
    queue.end()
    queue.flush()
    assert queue.stored == logged
    queue.flush()
    assert queue.accumulator.all() == [] and queue.accumulator.counts()["stored"] == len(logged)


@pytest.mark.parametrize("intake", [False, True], ids=["classic", "intake"])
def test_threads_may_end_a_run_and_log_to_it_again_and_again(intake: bool) -> None:
    """Its lane is released as often. Each record is stored once, in its thread's order."""
    queue = Queue(intake=intake)
    over = threading.Event()
    released = rounds = 0
    forget = queue.accumulator.release

    def release(lane: Lane) -> bool:
        nonlocal released
        done = forget(lane)
        released += done
        return done

    queue.accumulator.release = release  # type: ignore[method-assign]

    def log(thread: int) -> None:
        for step in range(EACH):
            queue.lane().append(metrics(step, **{f"t{thread}": 10_000 * thread + step}))
            if step % 3 == 0:
                queue.end()
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
            lanes = queue.accumulator.busy()
            for lane in lanes:
                lane.close_window()
                while (batch := lane.take(bounds())) is not None:
                    for _, _, value, _ in inside(batch):
                        if value != "FINISHED":
                            stored[value // 10_000].append(value % 10_000)
                    lane.store()
            queue.accumulator.mark_live(lanes)
            queue.accumulator.tidy(lambda _: False)

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
    assert queue.accumulator.counts() == {
        "accepted": 4 * EACH,
        "pending": 0,
        "in_flight": 0,
        "stored": 4 * EACH,
        "failed": 0,
        "dropped": 0,
    }
    check_counts(queue.accumulator)
    assert released


# -- the whole engine ------------------------------------------------------------------------------------------------


def lanes_alive() -> int:
    return sum(type(each) is Lane for each in gc.get_objects())


@pytest.mark.anyio
@pytest.mark.parametrize(("interval", "count"), [(None, 2_000), (2.0, 20_000)])
@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})], ids=["asyncio"])
async def test_20_000_finished_runs_leave_no_lanes_behind(interval: float | None, count: int, whole: bool) -> None:
    """
    Each run is created, logged to and ended; the test counts the `Lane` objects. Without `--whole`: 1,000 runs.
    """
    if not whole:
        count = 1_000
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
async def test_the_work_of_a_look_does_not_grow_with_the_number_of_earlier_runs(
    ended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine looks only at lanes that have something to do, not at those of 2,000 silent runs."""
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
    """A lane with batches that were given back is kept, though its inbox is empty."""
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
    """It has not yet reported on them."""
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
async def test_a_failed_status_is_reported_by_the_next_flush_of_a_stream() -> None:
    """The lane is released after that flush."""
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
async def test_runs_whose_status_is_refused_are_released_where_no_flush_reports_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When there are very many of them. A notice has named each cause."""
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
    """The requests that it had begun are settled later; the next flush releases their lanes."""
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
