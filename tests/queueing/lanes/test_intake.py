"""The intake: when a log call wakes the engine, and what it does where pending entries leave no room."""

# Rules of this file: no event loop. Where a call waits, another thread plays the engine. Tests wait for conditions, and
# for seconds only where seconds are what they test.

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue.queueing import (
    Accumulator,
    ClosedError,
    Failure,
    Lane,
    Ledger,
    QueueFullError,
    Record,
    RejectedError,
)
from runqueue.queueing._report import FailureLog
from runqueue.queueing.batches._batch import METRIC, RUN, weight
from runqueue.queueing.lanes import _intake
from runqueue.queueing.lanes._intake import Intake
from support.engine import bounds, check_counts, encode, flat, inside, metrics, params, points, run, status
from support.threads import in_threads

A_LONG_WHILE = 30.0
"""Seconds after which a wait that must end by itself fails its test."""


class BoundedQueue:
    """An accumulator with an intake, and the number of wake-ups."""

    def __init__(self, **settings: Any) -> None:
        self.wakes = 0
        self.accumulator = Accumulator(
            encode, lambda ledger: Intake(ledger, **{"wake": self.wake, "drains": lambda: True} | settings)
        )
        assert self.accumulator.intake is not None
        self.intake = self.accumulator.intake
        self.intake.update_bound()

    def wake(self) -> None:
        self.wakes += 1

    def lane(self, run: object = "r", *, run_exists: bool = True) -> Lane:
        return self.accumulator.open(run, run_exists=run_exists)

    def empty(self, most: float = math.inf) -> list[Any]:
        """Store up to *most* batches of ten, as the engine does; return their entries."""
        stored: list[Any] = []
        for lane in self.accumulator.all():
            lane.close_window(extendable=True)
            while most > 0 and (batch := lane.take(bounds(metrics=10))) is not None:
                stored += inside(batch)
                lane.store()
                most -= 1
        self.intake.update_bound()
        return stored

    def counts(self) -> dict[str, int]:
        check_counts(self.accumulator)
        return self.accumulator.counts()


def is_waiting(queue: BoundedQueue, count: int = 1) -> Callable[[], bool]:
    return lambda: len(queue.intake._room._waiters) >= count  # type: ignore[attr-defined]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + A_LONG_WHILE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.001)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for log calls that wait."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


# -- waking the engine -----------------------------------------------------------------------------------------------


def test_the_first_call_wakes_the_engine_and_the_next_ones_do_not() -> None:
    """One wake-up is enough until the engine has looked."""
    queue = BoundedQueue(mark=-1)
    queue.intake.mark_asleep()
    for record in points(50):
        queue.lane().append(record)
    assert queue.wakes == 1
    assert queue.intake.take_full_lanes() == []
    queue.intake.update_bound()
    for record in points(50):
        queue.lane().append(record)
    assert queue.wakes == 1
    assert queue.counts()["pending"] == 100


def test_after_the_engine_fell_asleep_the_next_call_wakes_it() -> None:
    """Any record does, a final status too, though it counts as no entry."""
    queue = BoundedQueue()
    for wakes, record in enumerate([metrics(0, a=1), status(), params(p=1)], start=1):
        queue.intake.mark_asleep()
        queue.lane().append(record)
        assert queue.wakes == wakes
        queue.intake.take_full_lanes()
        queue.empty()


def test_a_call_wakes_the_engine_after_its_record_is_in_the_inbox() -> None:
    """An engine that is woken earlier may look at an empty inbox and go to sleep again."""
    found: list[int] = []
    queue: BoundedQueue = BoundedQueue(wake=lambda: found.append(len(queue.lane().inbox)))
    queue.intake.mark_asleep()
    queue.lane().append(metrics(0, a=1))
    assert found == [1]


def test_a_call_that_waited_for_room_wakes_the_engine(pool: ThreadPoolExecutor) -> None:
    """The engine may have emptied all lanes and gone to sleep before the record is appended."""
    found: list[int] = []
    queue: BoundedQueue = BoundedQueue(max_pending=10, wake=lambda: found.append(len(queue.lane().inbox)))
    for record in points(10):
        queue.lane().append(record)
    late = pool.submit(queue.lane().append, metrics(10, loss=10))
    wait_until(is_waiting(queue))
    queue.intake.take_full_lanes()
    found.clear()
    queue.intake.mark_asleep()
    queue.empty()
    late.result(A_LONG_WHILE)
    assert found == [1]


def test_a_lane_with_a_full_batch_wakes_the_engine_once_and_is_named() -> None:
    """The records after it do not wake the engine again."""
    queue = BoundedQueue(batch_size=10)
    for record in points(9):
        queue.lane("full").append(record)
        queue.lane("other").append(record)
    assert queue.wakes == 0
    for record in points(20, 9):
        queue.lane("full").append(record)
    assert queue.wakes == 1
    assert queue.intake.take_full_lanes() == [queue.lane("full")]


def test_a_client_that_does_not_stream_wakes_no_engine() -> None:
    """No engine would look."""
    queue = BoundedQueue(drains=lambda: False, mark=math.inf)
    for record in points(5_000):
        queue.lane().append(record)
    assert queue.wakes == 0


# -- the bound -------------------------------------------------------------------------------------------------------


def test_at_the_bound_a_call_raises_and_its_record_is_not_queued() -> None:
    """No part of the record is queued, and the text says how much is pending."""
    queue = BoundedQueue(max_pending=10, on_full="raise")
    for record in points(9):
        queue.lane().append(record)
    with pytest.raises(QueueFullError, match=r"^9 of at most 10 entries are pending; 2 more do not fit"):
        queue.lane().append(metrics(9, a=1, b=2))
    queue.lane().append(metrics(9, a=1))
    assert (queue.counts()["accepted"], queue.counts()["pending"]) == (10, 10)


def test_entries_in_flight_count_as_pending() -> None:
    """Only settled entries make room."""
    queue = BoundedQueue(max_pending=10, on_full="raise")
    lane = queue.lane()
    for record in points(10):
        lane.append(record)
    lane.close_window()
    assert lane.take(bounds()) is not None
    queue.intake.update_bound()
    with pytest.raises(QueueFullError):
        lane.append(metrics(10, a=1))
    lane.store()
    queue.intake.update_bound()
    lane.append(metrics(10, a=1))


@pytest.mark.parametrize("ends", ["stored", "failed", "dropped"])
def test_every_way_of_settling_an_entry_makes_room(ends: str) -> None:
    """So do entries that failed for good, and entries that were dropped."""
    queue = BoundedQueue(max_pending=10, on_full="raise")
    lane = queue.lane(run_exists=ends != "dropped")
    if ends == "dropped":
        lane.append(run())
    for record in points(10 - queue.intake.pending):
        lane.append(record)
    if ends == "dropped":
        assert lane.keep_only(RUN) == 9
    else:
        lane.close_window()
        assert lane.take(bounds(metrics=10)) is not None
        if ends == "stored":
            lane.store()
        else:
            while lane.reject(RejectedError("no")) and lane.take(bounds()):
                pass
    queue.intake.update_bound()
    assert queue.intake.pending == (1 if ends == "dropped" else 0)
    lane.append(metrics(0, **{f"m{n}": n for n in range(9)}))
    queue.counts()


def test_a_record_larger_than_the_bound_passes_when_nothing_else_is_there() -> None:
    """Otherwise it would never fit. No record follows it until it is settled."""
    queue = BoundedQueue(max_pending=10, on_full="raise")
    large = metrics(0, **{f"m{n}": n for n in range(25)})
    queue.lane().append(metrics(0, a=1))
    with pytest.raises(QueueFullError):
        queue.lane().append(large)
    queue.empty()
    queue.lane().append(large)
    for record in (metrics(0, a=1), large):
        with pytest.raises(QueueFullError):
            queue.lane().append(record)
    assert len(queue.empty()) == 25
    queue.lane().append(large)


def test_a_final_status_always_passes() -> None:
    """It counts as no entry: a run that has ended must not stay RUNNING for want of room."""
    queue = BoundedQueue(max_pending=1, on_full="raise")
    queue.lane().append(metrics(0, a=1))
    queue.lane().append(status())
    assert queue.empty() == flat([metrics(0, a=1), status()])


def test_pushed_records_are_queued_beyond_the_bound() -> None:
    """Of a call that makes two records, the first one decides whether both are queued."""
    queue = BoundedQueue(max_pending=1, on_full="raise")
    queue.lane().append(metrics(0, a=1))
    queue.lane().push(metrics(0, b=1))
    assert queue.counts()["pending"] == 2


def test_pushed_records_wake_the_engine_too() -> None:
    """It may be the only record of a call: the one that looks for a run that another process creates."""
    queue = BoundedQueue()
    queue.intake.mark_asleep()
    queue.lane().push(metrics(0, a=1))
    assert queue.wakes == 1


def test_a_call_learns_whether_its_record_was_dropped() -> None:
    """The call drops its further records then."""
    queue = BoundedQueue(max_pending=1, on_full="drop")
    assert [bool(queue.lane().append(record)) for record in points(3)] == [False, True, True]


def test_dropped_entries_are_counted_by_run_and_reported_once() -> None:
    """The ledger counts such entries as accepted and as dropped."""
    queue = BoundedQueue(max_pending=10, on_full="drop")
    for step in range(8):
        queue.lane("a").append(metrics(step, x=1, y=2))
        queue.lane("b").append(metrics(step, x=1))
    counts = queue.counts()
    assert (counts["accepted"], counts["pending"], counts["dropped"]) == (24, 10, 14)
    dropped = queue.intake.take_dropped()
    assert sum(dropped.values()) == 14 and set(dropped) == {"a", "b"}
    assert queue.intake.take_dropped() == {}


@pytest.mark.parametrize("settings", [{"on_full": "drop"}, {"block_timeout": 0.0, "drops_after_timeout": True}])
def test_calls_that_find_no_room_wake_the_engine_once_until_entries_are_settled(settings: dict[str, Any]) -> None:
    """Otherwise, beside a dead server, each step of a training would wake the engine and wait for the interpreter."""
    queue = BoundedQueue(max_pending=10, mark=10, **settings)
    for wakes in (1, 2):
        for record in points(1_000):
            queue.lane().append(record)
            queue.intake.take_full_lanes()
        assert queue.wakes == wakes
        queue.empty()  # now there is room, and the next round fills it
    for record in points(10):
        queue.lane().append(record)
    queue.lane().append(metrics(0, a=1))
    assert queue.wakes == 3
    queue.intake.take_full_lanes()
    queue.intake.mark_asleep()  # the engine has ended with a full queue: it starts again only when it is woken
    queue.lane().append(metrics(0, a=1))
    assert queue.wakes == 4


def test_records_that_are_queued_beyond_the_bound_do_not_wake_the_engine_either() -> None:
    """Beside a dead server, a service goes on creating and ending a run for each of its requests."""
    queue = BoundedQueue(max_pending=10, mark=10, on_full="drop")
    for record in points(11):
        queue.lane().append(record)
    queue.intake.take_full_lanes()
    wakes = queue.wakes
    for n in range(100):
        queue.lane(n, run_exists=False).append(run())
        queue.lane(n).push(status())
        queue.intake.take_full_lanes()
    assert queue.wakes == wakes
    queue.intake.mark_asleep()
    queue.lane("late", run_exists=False).append(run())
    assert queue.wakes == wakes + 1


@pytest.mark.parametrize("fits", [False, True])
def test_room_for_less_than_a_record_does_not_renew_the_time_to_wait(fits: bool) -> None:
    """With 9 of 10 entries pending and none settled, each further step of a training would wait for a minute again."""
    queue = BoundedQueue(max_pending=10, block_timeout=0.2, drops_after_timeout=True)
    first, second = (metrics(step, **{f"m{n}": n for n in range(9)}) for step in range(2))
    queue.lane().append(first)
    queue.lane().append(second)
    if fits:
        queue.empty()
        queue.lane().append(first)
    began = time.monotonic()
    for _ in range(20):
        queue.intake.update_bound()  # as each look of the engine does
        queue.lane().append(second)
    assert (time.monotonic() - began >= 0.2) is fits
    assert time.monotonic() - began < 2
    assert queue.intake.take_dropped() == {"r": 21 * 9}


@pytest.mark.parametrize("another", [False, True])
def test_a_signal_of_a_full_queue_that_was_interrupted_is_repeated_by_the_next_call(another: bool) -> None:
    """Ctrl-C interrupts the wake-up, and its handler may log: the engine does not know of the full queue yet."""
    fails = [True]
    signalled: list[int] = []

    def wake() -> None:
        if fails:
            fails.clear()
            if another:
                queue.lane().append(metrics(0, a=1))
            raise KeyboardInterrupt
        signalled.append(1)

    queue = BoundedQueue(max_pending=1, mark=1, on_full="drop", wake=wake)
    queue.lane().append(metrics(0, a=1))
    with pytest.raises(KeyboardInterrupt):
        queue.lane().append(metrics(0, a=1))
    queue.lane().append(metrics(0, a=1))
    assert signalled == [1]


def test_a_signal_of_a_full_queue_that_the_engine_has_answered_does_not_silence_later_calls() -> None:
    """A signal handler delays a caller during its wake-up; by then the engine has looked and gone to sleep."""
    queue: BoundedQueue = BoundedQueue(max_pending=1, mark=1, on_full="drop", wake=lambda: look())

    def look() -> None:
        queue.intake.take_full_lanes()
        queue.intake.signalled_full_at = -1
        queue.wakes += 1

    for record in points(3):
        queue.lane().append(record)
    assert queue.wakes == 2


@pytest.mark.parametrize("on_full", ["drop", "block"])
def test_the_creation_of_a_run_is_never_dropped(on_full: str) -> None:
    """
    Without it no entry of the run could ever be stored. It is kept with `on_full="drop"`, and after `block_timeout`.
    """
    queue = BoundedQueue(max_pending=1, on_full=on_full, block_timeout=0.0, drops_after_timeout=True)
    queue.lane().append(metrics(0, a=1))
    queue.lane("new", run_exists=False).append(run())
    queue.lane("new").append(metrics(0, a=1))
    assert queue.intake.take_dropped() == {"new": 1}
    assert queue.empty() == flat([metrics(0, a=1), run()])


def test_the_engines_own_thread_is_never_kept_waiting() -> None:
    """It would wait for itself when it logs, e.g. in a token's callable or a logging handler."""
    queue = BoundedQueue(max_pending=1, is_engine_thread=lambda: True)
    for record in points(5):
        queue.lane().append(record)
    assert queue.counts()["pending"] == 5


def test_a_call_raises_at_once_where_nothing_drains_the_queue() -> None:
    """A client that does not stream would wait for a flush that it cannot begin."""
    queue = BoundedQueue(max_pending=1, drains=lambda: False, mark=1, drops_after_timeout=True)
    queue.lane().append(metrics(0, a=1))
    with pytest.raises(QueueFullError, match="nothing drains the queue"):
        queue.lane().append(metrics(0, a=1))


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_a_call_waits_for_room(pool: ThreadPoolExecutor) -> None:
    """Its record is queued as soon as there is room."""
    queue = BoundedQueue(max_pending=10)
    for record in points(10):
        queue.lane().append(record)
    late = pool.submit(queue.lane().append, metrics(10, loss=10))
    wait_until(is_waiting(queue))
    assert not late.done()
    assert queue.empty() == flat(points(10))
    late.result(A_LONG_WHILE)
    assert queue.empty() == flat(points(1, 10))


def test_a_large_record_waits_until_all_of_it_fits(pool: ThreadPoolExecutor) -> None:
    """Room for a part of it is not enough."""
    queue = BoundedQueue(max_pending=30)
    for record in points(30):
        queue.lane().append(record)
    late = pool.submit(queue.lane().append, metrics(30, **{f"m{n}": n for n in range(15)}))
    wait_until(is_waiting(queue))
    queue.empty(most=1)
    wait_until(is_waiting(queue))
    assert not late.done()
    queue.empty(most=1)
    late.result(A_LONG_WHILE)
    assert queue.counts()["pending"] == 25


@pytest.mark.parametrize("room", [1, 3])
def test_of_several_waiting_calls_only_as_many_go_on_as_there_is_room_for(pool: ThreadPoolExecutor, room: int) -> None:
    """All waiting calls wake at once, and the bound still holds."""
    queue = BoundedQueue(max_pending=8)
    first = queue.lane("first")
    first.append(metrics(0, **{f"m{n}": n for n in range(room)}))
    for record in points(8 - room):
        queue.lane().append(record)
    late = [pool.submit(queue.lane().append, metrics(n, late=n)) for n in range(8)]
    wait_until(is_waiting(queue, 8))
    first.close_window()
    assert first.take(bounds()) is not None
    first.store()
    queue.intake.update_bound()
    wait_until(lambda: sum(each.done() for each in late) >= room)
    wait_until(is_waiting(queue, 8 - room))
    assert queue.counts()["pending"] == 8
    while not all(each.done() for each in late):
        queue.empty()
    queue.empty()
    assert queue.counts()["stored"] == 16


def test_calls_wait_for_block_timeout_once_each_time_the_queue_becomes_full() -> None:
    """Once it is used up, no call waits until there was room: a dead server costs a training one minute, not days."""
    queue = BoundedQueue(max_pending=1, block_timeout=0.3)
    queue.lane().append(metrics(0, a=1))
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(QueueFullError, match=r"no room within 0\.3 s"):
            queue.lane().append(metrics(0, a=1))
        assert time.monotonic() - began >= 0.3
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(QueueFullError):
                queue.lane().append(metrics(0, a=1))
        assert time.monotonic() - began < 10
        queue.empty()
        queue.lane().append(metrics(0, a=1))


def test_calls_that_wait_at_once_share_block_timeout(pool: ThreadPoolExecutor) -> None:
    """Ten threads wait at the same time, not one after another."""
    queue = BoundedQueue(max_pending=1, block_timeout=0.5)
    queue.lane().append(metrics(0, a=1))
    began = time.monotonic()
    late = [pool.submit(queue.lane().append, metrics(0, a=1)) for _ in range(10)]
    for each in late:
        with pytest.raises(QueueFullError):
            each.result(A_LONG_WHILE)
    assert 0.5 <= time.monotonic() - began < 4


def test_a_client_that_only_warns_drops_and_counts_entries_after_block_timeout() -> None:
    """The training goes on, and the loss is reported."""
    queue = BoundedQueue(max_pending=1, block_timeout=0.05, drops_after_timeout=True)
    for record in points(20):
        queue.lane().append(record)
    assert queue.intake.take_dropped() == {"r": 19}
    assert queue.counts()["dropped"] == 19
    queue.empty()
    queue.lane().append(metrics(20, loss=20))
    assert queue.empty() == flat(points(1, 20))


@pytest.mark.parametrize("drops_after_timeout", [False, True])
def test_a_waiting_call_raises_when_the_client_is_closed(pool: ThreadPoolExecutor, drops_after_timeout: bool) -> None:
    """It raises ClosedError at once, as every later call does."""
    open_still = [True]
    queue = BoundedQueue(
        max_pending=1, block_timeout=1_000.0, drops_after_timeout=drops_after_timeout, drains=lambda: bool(open_still)
    )
    queue.lane().append(metrics(0, a=1))
    late = pool.submit(queue.lane().append, metrics(0, a=1))
    wait_until(is_waiting(queue))
    open_still.clear()
    queue.accumulator.abandon(failed=True)
    with pytest.raises(ClosedError):
        late.result(A_LONG_WHILE)
    assert queue.counts()["accepted"] == 1


def test_a_call_that_begins_to_wait_just_after_room_was_made_goes_on(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look for room and its note of the time, the intake does not know that a call waits."""
    monkeypatch.setattr(_intake, "_RECHECK_SECONDS", 2 * A_LONG_WHILE)
    woken = threading.Event()
    queue = BoundedQueue(max_pending=10, wake=woken.set)
    for record in points(10):
        queue.lane().append(record)
    looks: list[bool] = []

    def enter(self: Intake, count: int) -> bool:
        looks.append(entered := real(self, count))
        if len(looks) == 2:  # the first look precedes the waiting, the second precedes its first pause
            queue.empty()
        return entered

    def engine() -> None:
        assert woken.wait(A_LONG_WHILE)
        wait_until(is_waiting(queue))
        queue.intake.take_full_lanes()
        queue.intake.update_bound()

    real = Intake._reserve
    monkeypatch.setattr(Intake, "_reserve", enter)
    engine_turn = pool.submit(engine)
    pool.submit(queue.lane().append, metrics(10, loss=10)).result(A_LONG_WHILE)
    engine_turn.result(A_LONG_WHILE)
    assert looks == [False, False, True]


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 3, 12)])
def test_four_threads_never_exceed_the_bound_and_nothing_is_lost_or_doubled(sizes: tuple[int, ...]) -> None:
    """Each logged entry arrives once, in its thread's order, and the bound holds."""
    threads, each, most = 4, 400, 40
    queue = BoundedQueue(max_pending=most, batch_size=20)
    over = threading.Event()
    seen: list[Any] = []
    highest = [0]

    def engine() -> None:
        while not over.is_set():
            highest[0] = max(highest[0], queue.intake.pending)
            queue.intake.take_full_lanes()
            seen.extend(queue.empty(most=2))

    def log(thread: int) -> None:
        for step, size in zip(range(each), itertools.cycle(sizes), strict=False):
            queue.lane(thread % 2).append(metrics(step, **{f"t{thread}-{n}": step for n in range(size)}))

    worker = threading.Thread(target=engine)
    worker.start()
    try:
        in_threads(log, threads)
    finally:
        over.set()
        worker.join()
    seen += queue.empty()
    assert highest[0] <= most
    for thread in range(threads):
        assert [step for _, key, _, step in seen if key == f"t{thread}-0"] == list(range(each))
    assert Counter((key, step) for _, key, _, step in seen).most_common(1)[0][1] == 1
    counts = queue.counts()
    assert counts["stored"] == counts["accepted"] == len(seen)


OPERATIONS = st.one_of(
    st.tuples(st.just("log"), st.integers(0, 2), st.integers(1, 12)),
    st.tuples(
        st.sampled_from(["status", "close", "tick", "batches", "take", "store", "reject", "back"]), st.integers(0, 2)
    ),
    st.tuples(st.sampled_from(["update_bound", "mark_asleep", "take_full_lanes"])),
)


@given(st.lists(OPERATIONS, max_size=120), st.integers(1, 30), st.sampled_from(["raise", "drop"]))
def test_in_any_order_of_steps_the_counts_are_exact_and_the_bound_holds(
    operations: list[tuple[Any, ...]], most: int, on_full: str
) -> None:
    """Whatever callers and engine do in whatever order: no entry is lost or doubled, and a run keeps its order."""
    queue = BoundedQueue(max_pending=most, on_full=on_full, batch_size=10)
    lanes = [queue.lane(n) for n in range(3)]
    logged: list[list[Record]] = [[], [], []]
    stored: list[list[Any]] = [[], [], []]
    step = 0
    for name, *given_ in operations:
        at = given_[0] if given_ else 0
        lane = lanes[at]
        if name == "log":
            step += 1
            record = metrics(step, **{f"m{n}": n for n in range(given_[1])})
            before = queue.intake.pending
            fits = before + weight(record) <= most or before == 0
            try:
                lane.append(record)
            except QueueFullError:
                assert on_full == "raise" and not fits
            else:
                if queue.intake.pending > before:
                    logged[at].append(record)
                    assert fits
                else:
                    assert on_full == "drop" and not fits
        elif name == "status":
            lane.append(status())
        elif name in ("close", "tick"):
            lane.close_window(extendable=name == "tick")
        elif name == "batches":
            lane.close_window_of_batches(10)
        elif name == "take" and lane.in_flight is None:
            lane.take(bounds(metrics=7))
        elif name == "store" and lane.in_flight is not None:
            stored[at] += [entry for entry in inside(lane.in_flight) if entry[0] == METRIC]
            lane.store()
        elif name == "reject" and lane.in_flight is not None and lane.in_flight.weight == 1:
            (lost,) = inside(lane.in_flight)
            stored[at].append(lost)
            lane.reject(RejectedError("no"))
        elif name == "back" and lane.in_flight is not None:
            lane.give_back()
        elif name in ("update_bound", "mark_asleep", "take_full_lanes"):
            getattr(queue.intake, name)()
        queue.counts()
    for at, lane in enumerate(lanes):
        if lane.in_flight is not None:
            lane.give_back()
        lane.close_window()
        while (batch := lane.take(bounds())) is not None:
            stored[at] += [entry for entry in inside(batch) if entry[0] == METRIC]
            lane.store()
        assert stored[at] == flat(logged[at])
    assert queue.intake.pending == 0


def test_an_interrupted_wake_up_is_repeated_by_the_next_call() -> None:
    """Ctrl-C may interrupt a wake-up in a notebook that goes on: otherwise no call would wake the engine again."""
    wakes: list[int] = []

    def wake() -> None:
        wakes.append(1)
        if len(wakes) == 1:
            raise KeyboardInterrupt

    intake = Intake(Ledger(), batch_size=10, wake=wake)
    lane = Lane("r", encode, intake.ledger, run_exists=True)
    intake.install(lane)
    with pytest.raises(KeyboardInterrupt):
        lane.append(metrics(0, loss=1))
    lane.append(metrics(1, loss=1))
    assert len(wakes) == 2


def test_failures_whose_texts_name_the_entry_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the failures kept in full, at most `MAX_CAUSES` causes are dropped apart."""
    monkeypatch.setattr("runqueue.queueing._report.MAX_FULL_FAILURES", 10)
    monkeypatch.setattr("runqueue.queueing._report.MAX_CAUSES", 20)
    log = FailureLog()
    for at in range(500):
        record = metrics(at, loss=1)
        log.add(Failure("r", record, 0, 1, RejectedError(f"a text of its own, for the entry {at}"), final=True))
    assert sum(count for *_, count in log.beyond_bound()) == 490
    assert len(log.counted) <= 41


@pytest.mark.parametrize("way", ["append", "push"])
def test_threads_lose_no_count(way: str) -> None:
    """This holds for `append` and for `push`."""
    queue, each = BoundedQueue(), 5_000
    lane = queue.lane()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(lambda _: [getattr(lane, way)(metrics(step, a=1)) for step in range(each)], 4)
    finally:
        sys.setswitchinterval(interval)
    assert (queue.intake.admitted, lane.inbox_entries) == (4 * each, 4 * each)
