"""
The bound on what is pending, and the bell: what a log call does when it crosses one of the two marks.

Rules of this file: no loop; where a call waits, another thread plays the engine, and nothing is waited for by time but
what is a time itself.
"""

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
"""Seconds that a wait gets which must end by itself."""


class Gatehouse:
    """An accumulator behind an intake, and what rang."""

    def __init__(self, **settings: Any) -> None:
        self.rings = 0
        self.accumulator = Accumulator(
            encode, lambda ledger: Intake(ledger, **{"wake": self.wake, "drains": lambda: True} | settings)
        )
        assert self.accumulator.intake is not None
        self.intake = self.accumulator.intake
        self.intake.update_bound()

    def wake(self) -> None:
        self.rings += 1

    def lane(self, run: object = "r", *, run_exists: bool = True) -> Lane:
        return self.accumulator.open(run, run_exists=run_exists)

    def empty(self, most: float = math.inf) -> list[Any]:
        """Do what the engine does: store so many batches of ten."""
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


def is_waiting(house: Gatehouse, count: int = 1) -> Callable[[], bool]:
    return lambda: len(house.intake._room._waiters) >= count  # type: ignore[attr-defined]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + A_LONG_WHILE
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.001)  # between two looks at the condition


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that wait."""
    with ThreadPoolExecutor(16) as pool:
        yield pool


# -- the bell --------------------------------------------------------------------------------------------------------


def test_the_first_call_rings_and_the_next_ones_do_not() -> None:
    """One bell wakes the engine; until it has answered there is nothing more to say."""
    house = Gatehouse(mark=-1)
    house.intake.mark_asleep()
    for record in points(50):
        house.lane().append(record)
    assert house.rings == 1
    assert house.intake.take_full_lanes() == []
    house.intake.update_bound()
    for record in points(50):
        house.lane().append(record)
    assert house.rings == 1
    assert house.counts()["pending"] == 100


def test_after_a_lull_the_next_call_rings_again() -> None:
    """Whatever it brings: a final status counts no entry, and is worth a bell."""
    house = Gatehouse()
    for rings, record in enumerate([metrics(0, a=1), status(), params(p=1)], start=1):
        house.intake.mark_asleep()
        house.lane().append(record)
        assert house.rings == rings
        house.intake.take_full_lanes()
        house.empty()


def test_the_bell_is_rung_when_the_record_is_there() -> None:
    """Rung before, an engine that looks at once finds nothing, and may go to sleep over it."""
    found: list[int] = []
    house: Gatehouse = Gatehouse(wake=lambda: found.append(len(house.lane().inbox)))
    house.intake.mark_asleep()
    house.lane().append(metrics(0, a=1))
    assert found == [1]


def test_the_bell_is_rung_for_what_had_to_wait(pool: ThreadPoolExecutor) -> None:
    """The engine may have emptied everything and gone to sleep between the room and the record."""
    found: list[int] = []
    house: Gatehouse = Gatehouse(max_pending=10, wake=lambda: found.append(len(house.lane().inbox)))
    for record in points(10):
        house.lane().append(record)
    late = pool.submit(house.lane().append, metrics(10, loss=10))
    wait_until(is_waiting(house))
    house.intake.take_full_lanes()
    found.clear()
    house.intake.mark_asleep()
    house.empty()
    late.result(A_LONG_WHILE)
    assert found == [1]


def test_a_lane_with_a_full_batch_rings_once_and_is_named() -> None:
    """Not each of the records that follow it."""
    house = Gatehouse(batch_size=10)
    for record in points(9):
        house.lane("full").append(record)
        house.lane("other").append(record)
    assert house.rings == 0
    for record in points(20, 9):
        house.lane("full").append(record)
    assert house.rings == 1
    assert house.intake.take_full_lanes() == [house.lane("full")]


def test_a_client_without_a_stream_rings_for_nothing() -> None:
    """There is nobody to hear it."""
    house = Gatehouse(drains=lambda: False, mark=math.inf)
    for record in points(5_000):
        house.lane().append(record)
    assert house.rings == 0


# -- the bound -------------------------------------------------------------------------------------------------------


def test_at_the_bound_a_call_raises_and_its_record_is_not_taken() -> None:
    """All of it or nothing, and the text says how much is pending."""
    house = Gatehouse(max_pending=10, on_full="raise")
    for record in points(9):
        house.lane().append(record)
    with pytest.raises(QueueFullError, match=r"^9 of at most 10 entries are pending; 2 more do not fit"):
        house.lane().append(metrics(9, a=1, b=2))
    house.lane().append(metrics(9, a=1))
    assert (house.counts()["accepted"], house.counts()["pending"]) == (10, 10)


def test_what_is_in_flight_counts_as_pending() -> None:
    """Only what is settled makes room."""
    house = Gatehouse(max_pending=10, on_full="raise")
    lane = house.lane()
    for record in points(10):
        lane.append(record)
    lane.close_window()
    assert lane.take(bounds()) is not None
    house.intake.update_bound()
    with pytest.raises(QueueFullError):
        lane.append(metrics(10, a=1))
    lane.store()
    house.intake.update_bound()
    lane.append(metrics(10, a=1))


@pytest.mark.parametrize("ends", ["stored", "failed", "shed"])
def test_whatever_settles_an_entry_makes_room(ends: str) -> None:
    """Also what was refused for good, and what was given up."""
    house = Gatehouse(max_pending=10, on_full="raise")
    lane = house.lane(run_exists=ends != "shed")
    if ends == "shed":
        lane.append(run())
    for record in points(10 - house.intake.pending):
        lane.append(record)
    if ends == "shed":
        assert lane.keep_only(RUN) == 9
    else:
        lane.close_window()
        assert lane.take(bounds(metrics=10)) is not None
        if ends == "stored":
            lane.store()
        else:
            while lane.reject(RejectedError("no")) and lane.take(bounds()):
                pass
    house.intake.update_bound()
    assert house.intake.pending == (1 if ends == "shed" else 0)
    lane.append(metrics(0, **{f"m{n}": n for n in range(9)}))
    house.counts()


def test_a_record_larger_than_the_bound_passes_when_nothing_else_is_there() -> None:
    """It would never fit; nothing follows it until it is settled."""
    house = Gatehouse(max_pending=10, on_full="raise")
    large = metrics(0, **{f"m{n}": n for n in range(25)})
    house.lane().append(metrics(0, a=1))
    with pytest.raises(QueueFullError):
        house.lane().append(large)
    house.empty()
    house.lane().append(large)
    for record in (metrics(0, a=1), large):
        with pytest.raises(QueueFullError):
            house.lane().append(record)
    assert len(house.empty()) == 25
    house.lane().append(large)


def test_a_final_status_always_passes() -> None:
    """It counts as no entry; a run that is over must not stay open for want of room."""
    house = Gatehouse(max_pending=1, on_full="raise")
    house.lane().append(metrics(0, a=1))
    house.lane().append(status())
    assert house.empty() == flat([metrics(0, a=1), status()])


def test_what_belongs_to_a_record_that_was_taken_is_taken_too() -> None:
    """One call that makes two records is let in or kept out by the first."""
    house = Gatehouse(max_pending=1, on_full="raise")
    house.lane().append(metrics(0, a=1))
    house.lane().push(metrics(0, b=1))
    assert house.counts()["pending"] == 2


def test_what_belongs_to_a_record_rings_too() -> None:
    """It may be all that a call makes: the creation of a run that another process is to make known."""
    house = Gatehouse()
    house.intake.mark_asleep()
    house.lane().push(metrics(0, a=1))
    assert house.rings == 1


def test_a_call_learns_whether_its_record_was_dropped() -> None:
    """What belongs to it is not to be taken then."""
    house = Gatehouse(max_pending=1, on_full="drop")
    assert [bool(house.lane().append(record)) for record in points(3)] == [False, True, True]


def test_what_is_dropped_is_counted_by_run_and_told_once() -> None:
    """In the ledger as accepted and dropped at once."""
    house = Gatehouse(max_pending=10, on_full="drop")
    for step in range(8):
        house.lane("a").append(metrics(step, x=1, y=2))
        house.lane("b").append(metrics(step, x=1))
    counts = house.counts()
    assert (counts["accepted"], counts["pending"], counts["dropped"]) == (24, 10, 14)
    told = house.intake.take_dropped()
    assert sum(told.values()) == 14 and set(told) == {"a", "b"}
    assert house.intake.take_dropped() == {}


@pytest.mark.parametrize("settings", [{"on_full": "drop"}, {"block_timeout": 0.0, "drops_after_timeout": True}])
def test_calls_that_find_no_room_ring_once_until_something_has_changed(settings: dict[str, Any]) -> None:
    """Beside a dead server each step of a training would wake the engine, and wait for it to give the interpreter back."""
    house = Gatehouse(max_pending=10, mark=10, **settings)
    for rings in (1, 2):
        for record in points(1_000):
            house.lane().append(record)
            house.intake.take_full_lanes()
        assert house.rings == rings
        house.empty()  # there was room, and it is full again
    for record in points(10):
        house.lane().append(record)
    house.lane().append(metrics(0, a=1))
    assert house.rings == 3
    house.intake.take_full_lanes()
    house.intake.mark_asleep()  # the engine has ended with a full queue: only a ring begins it anew
    house.lane().append(metrics(0, a=1))
    assert house.rings == 4


def test_what_is_let_in_beyond_the_bound_does_not_ring_either() -> None:
    """Beside a dead server a service still makes a run for each request, and ends it."""
    house = Gatehouse(max_pending=10, mark=10, on_full="drop")
    for record in points(11):
        house.lane().append(record)
    house.intake.take_full_lanes()
    rings = house.rings
    for n in range(100):
        house.lane(n, run_exists=False).append(run())
        house.lane(n).push(status())
        house.intake.take_full_lanes()
    assert house.rings == rings
    house.intake.mark_asleep()
    house.lane("late", run_exists=False).append(run())
    assert house.rings == rings + 1


@pytest.mark.parametrize("fits", [False, True])
def test_room_for_less_than_a_record_is_no_end_of_the_budget_of_waiting(fits: bool) -> None:
    """Nine of ten pending, and nothing moves: each further step of a training would wait a minute anew."""
    house = Gatehouse(max_pending=10, block_timeout=0.2, drops_after_timeout=True)
    first, second = (metrics(step, **{f"m{n}": n for n in range(9)}) for step in range(2))
    house.lane().append(first)
    house.lane().append(second)
    if fits:
        house.empty()
        house.lane().append(first)
    began = time.monotonic()
    for _ in range(20):
        house.intake.update_bound()  # as every turn of the engine does
        house.lane().append(second)
    assert (time.monotonic() - began >= 0.2) is fits
    assert time.monotonic() - began < 2
    assert house.intake.take_dropped() == {"r": 21 * 9}


@pytest.mark.parametrize("another", [False, True])
def test_a_complaint_that_was_interrupted_is_made_by_the_next_call(another: bool) -> None:
    """Ctrl-C in the bell, whose handler may log: the engine has not heard of it."""
    fails = [True]
    signalled: list[int] = []

    def wake() -> None:
        if fails:
            fails.clear()
            if another:
                house.lane().append(metrics(0, a=1))
            raise KeyboardInterrupt
        signalled.append(1)

    house = Gatehouse(max_pending=1, mark=1, on_full="drop", wake=wake)
    house.lane().append(metrics(0, a=1))
    with pytest.raises(KeyboardInterrupt):
        house.lane().append(metrics(0, a=1))
    house.lane().append(metrics(0, a=1))
    assert signalled == [1]


def test_a_complaint_that_the_engine_has_dealt_with_already_holds_nobody_back() -> None:
    """A caller is held up in its bell, by a signal's handler; the engine has looked long since, and fallen asleep."""
    house: Gatehouse = Gatehouse(max_pending=1, mark=1, on_full="drop", wake=lambda: look())

    def look() -> None:
        house.intake.take_full_lanes()
        house.intake.signalled_full_at = -1
        house.rings += 1

    for record in points(3):
        house.lane().append(record)
    assert house.rings == 2


@pytest.mark.parametrize("on_full", ["drop", "block"])
def test_the_creation_of_a_run_is_never_dropped(on_full: str) -> None:
    """Without it nothing of the run could ever be stored: neither by choice nor when the time to wait is over."""
    house = Gatehouse(max_pending=1, on_full=on_full, block_timeout=0.0, drops_after_timeout=True)
    house.lane().append(metrics(0, a=1))
    house.lane("new", run_exists=False).append(run())
    house.lane("new").append(metrics(0, a=1))
    assert house.intake.take_dropped() == {"new": 1}
    assert house.empty() == flat([metrics(0, a=1), run()])


def test_the_engines_own_thread_is_never_kept_waiting() -> None:
    """It would wait for itself: a token's callable, a log handler."""
    house = Gatehouse(max_pending=1, is_engine_thread=lambda: True)
    for record in points(5):
        house.lane().append(record)
    assert house.counts()["pending"] == 5


def test_where_nothing_drains_the_queue_a_call_raises_at_once() -> None:
    """A client that does not stream would wait for its own flush."""
    house = Gatehouse(max_pending=1, drains=lambda: False, mark=1, drops_after_timeout=True)
    house.lane().append(metrics(0, a=1))
    with pytest.raises(QueueFullError, match="nothing drains the queue"):
        house.lane().append(metrics(0, a=1))


# -- waiting ---------------------------------------------------------------------------------------------------------


def test_a_call_waits_for_room(pool: ThreadPoolExecutor) -> None:
    """And comes in as soon as there is some."""
    house = Gatehouse(max_pending=10)
    for record in points(10):
        house.lane().append(record)
    late = pool.submit(house.lane().append, metrics(10, loss=10))
    wait_until(is_waiting(house))
    assert not late.done()
    assert house.empty() == flat(points(10))
    late.result(A_LONG_WHILE)
    assert house.empty() == flat(points(1, 10))


def test_a_large_record_waits_until_all_of_it_fits(pool: ThreadPoolExecutor) -> None:
    """Room for some of it is none."""
    house = Gatehouse(max_pending=30)
    for record in points(30):
        house.lane().append(record)
    late = pool.submit(house.lane().append, metrics(30, **{f"m{n}": n for n in range(15)}))
    wait_until(is_waiting(house))
    house.empty(most=1)
    wait_until(is_waiting(house))
    assert not late.done()
    house.empty(most=1)
    late.result(A_LONG_WHILE)
    assert house.counts()["pending"] == 25


@pytest.mark.parametrize("room", [1, 3])
def test_room_for_some_lets_in_no_more_of_those_that_wait(pool: ThreadPoolExecutor, room: int) -> None:
    """All wake at once; the bound holds all the same."""
    house = Gatehouse(max_pending=8)
    first = house.lane("first")
    first.append(metrics(0, **{f"m{n}": n for n in range(room)}))
    for record in points(8 - room):
        house.lane().append(record)
    late = [pool.submit(house.lane().append, metrics(n, late=n)) for n in range(8)]
    wait_until(is_waiting(house, 8))
    first.close_window()
    assert first.take(bounds()) is not None
    first.store()
    house.intake.update_bound()
    wait_until(lambda: sum(each.done() for each in late) >= room)
    wait_until(is_waiting(house, 8 - room))
    assert house.counts()["pending"] == 8
    while not all(each.done() for each in late):
        house.empty()
    house.empty()
    assert house.counts()["stored"] == 16


def test_there_is_one_budget_of_waiting_for_each_time_the_queue_is_full() -> None:
    """When it is spent, no call waits again until there was room: a dead server costs a training one minute, not days."""
    house = Gatehouse(max_pending=1, block_timeout=0.3)
    house.lane().append(metrics(0, a=1))
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(QueueFullError, match=r"no room within 0\.3 s"):
            house.lane().append(metrics(0, a=1))
        assert time.monotonic() - began >= 0.3
        began = time.monotonic()
        for _ in range(100):
            with pytest.raises(QueueFullError):
                house.lane().append(metrics(0, a=1))
        assert time.monotonic() - began < 10
        house.empty()
        house.lane().append(metrics(0, a=1))


def test_calls_that_wait_together_share_the_budget(pool: ThreadPoolExecutor) -> None:
    """Ten threads are held up by it once, not one after the other."""
    house = Gatehouse(max_pending=1, block_timeout=0.5)
    house.lane().append(metrics(0, a=1))
    began = time.monotonic()
    late = [pool.submit(house.lane().append, metrics(0, a=1)) for _ in range(10)]
    for each in late:
        with pytest.raises(QueueFullError):
            each.result(A_LONG_WHILE)
    assert 0.5 <= time.monotonic() - began < 4


def test_a_lenient_client_drops_and_counts_when_the_budget_is_spent() -> None:
    """A training goes on; what is lost is said."""
    house = Gatehouse(max_pending=1, block_timeout=0.05, drops_after_timeout=True)
    for record in points(20):
        house.lane().append(record)
    assert house.intake.take_dropped() == {"r": 19}
    assert house.counts()["dropped"] == 19
    house.empty()
    house.lane().append(metrics(20, loss=20))
    assert house.empty() == flat(points(1, 20))


@pytest.mark.parametrize("drops_after_timeout", [False, True])
def test_a_call_that_waits_is_told_when_the_client_is_closed(
    pool: ThreadPoolExecutor, drops_after_timeout: bool
) -> None:
    """At once, and as every later call is."""
    open_still = [True]
    house = Gatehouse(
        max_pending=1, block_timeout=1_000.0, drops_after_timeout=drops_after_timeout, drains=lambda: bool(open_still)
    )
    house.lane().append(metrics(0, a=1))
    late = pool.submit(house.lane().append, metrics(0, a=1))
    wait_until(is_waiting(house))
    open_still.clear()
    house.accumulator.abandon(failed=True)
    with pytest.raises(ClosedError):
        late.result(A_LONG_WHILE)
    assert house.counts()["accepted"] == 1


def test_room_that_is_made_before_a_call_has_begun_to_wait_is_told_when_it_does(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look for room and its note of the time nobody is known to wait."""
    monkeypatch.setattr(_intake, "_RECHECK_SECONDS", 2 * A_LONG_WHILE)
    rang = threading.Event()
    house = Gatehouse(max_pending=10, wake=rang.set)
    for record in points(10):
        house.lane().append(record)
    looks: list[bool] = []

    def enter(self: Intake, count: int) -> bool:
        looks.append(entered := real(self, count))
        if len(looks) == 2:  # the first is at the door, the second before the wait
            house.empty()
        return entered

    def engine() -> None:
        assert rang.wait(A_LONG_WHILE)
        wait_until(is_waiting(house))
        house.intake.take_full_lanes()
        house.intake.update_bound()

    real = Intake._reserve
    monkeypatch.setattr(Intake, "_reserve", enter)
    seqlock = pool.submit(engine)
    pool.submit(house.lane().append, metrics(10, loss=10)).result(A_LONG_WHILE)
    seqlock.result(A_LONG_WHILE)
    assert looks == [False, False, True]


# -- threads ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1,), (7,), (1, 3, 12)])
def test_four_threads_never_exceed_the_bound_and_nothing_is_lost_or_doubled(sizes: tuple[int, ...]) -> None:
    """However they collide: all that is logged arrives once, in each thread's order, within the bound."""
    threads, each, most = 4, 400, 40
    house = Gatehouse(max_pending=most, batch_size=20)
    over = threading.Event()
    seen: list[Any] = []
    highest = [0]

    def engine() -> None:
        while not over.is_set():
            highest[0] = max(highest[0], house.intake.pending)
            house.intake.take_full_lanes()
            seen.extend(house.empty(most=2))

    def log(thread: int) -> None:
        for step, size in zip(range(each), itertools.cycle(sizes), strict=False):
            house.lane(thread % 2).append(metrics(step, **{f"t{thread}-{n}": step for n in range(size)}))

    worker = threading.Thread(target=engine)
    worker.start()
    try:
        in_threads(log, threads)
    finally:
        over.set()
        worker.join()
    seen += house.empty()
    assert highest[0] <= most
    for thread in range(threads):
        assert [step for _, key, _, step in seen if key == f"t{thread}-0"] == list(range(each))
    assert Counter((key, step) for _, key, _, step in seen).most_common(1)[0][1] == 1
    counts = house.counts()
    assert counts["stored"] == counts["accepted"] == len(seen)


OPERATIONS = st.one_of(
    st.tuples(st.just("log"), st.integers(0, 2), st.integers(1, 12)),
    st.tuples(
        st.sampled_from(["status", "close", "tick", "batches", "take", "store", "reject", "back"]), st.integers(0, 2)
    ),
    st.tuples(st.sampled_from(["update_bound", "mark_asleep", "take_full_lanes"])),
)


@given(st.lists(OPERATIONS, max_size=120), st.integers(1, 30), st.sampled_from(["raise", "drop"]))
def test_whatever_happens_the_books_are_exact_and_the_bound_holds(
    operations: list[tuple[Any, ...]], most: int, on_full: str
) -> None:
    """Any order of what callers and the engine may do: counts, order of a run, and nothing lost or doubled."""
    house = Gatehouse(max_pending=most, on_full=on_full, batch_size=10)
    lanes = [house.lane(n) for n in range(3)]
    logged: list[list[Record]] = [[], [], []]
    stored: list[list[Any]] = [[], [], []]
    step = 0
    for name, *given_ in operations:
        at = given_[0] if given_ else 0
        lane = lanes[at]
        if name == "log":
            step += 1
            record = metrics(step, **{f"m{n}": n for n in range(given_[1])})
            before = house.intake.pending
            fits = before + weight(record) <= most or before == 0
            try:
                lane.append(record)
            except QueueFullError:
                assert on_full == "raise" and not fits
            else:
                if house.intake.pending > before:
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
            getattr(house.intake, name)()
        house.counts()
    for at, lane in enumerate(lanes):
        if lane.in_flight is not None:
            lane.give_back()
        lane.close_window()
        while (batch := lane.take(bounds())) is not None:
            stored[at] += [entry for entry in inside(batch) if entry[0] == METRIC]
            lane.store()
        assert stored[at] == flat(logged[at])
    assert house.intake.pending == 0


def test_a_bell_that_is_interrupted_can_be_rung_again() -> None:
    """Ctrl-C in the middle of it, in a notebook that goes on: else nobody would ever ring again."""
    rings: list[int] = []

    def wake() -> None:
        rings.append(1)
        if len(rings) == 1:
            raise KeyboardInterrupt

    intake = Intake(Ledger(), batch_size=10, wake=wake)
    lane = Lane("r", encode, intake.ledger, run_exists=True)
    intake.install(lane)
    with pytest.raises(KeyboardInterrupt):
        lane.append(metrics(0, loss=1))
    lane.append(metrics(1, loss=1))
    assert len(rings) == 2


def test_failures_whose_texts_name_the_entry_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond those kept in full, so many causes are told apart and no more."""
    monkeypatch.setattr("runqueue.queueing._report.MAX_FULL_FAILURES", 10)
    monkeypatch.setattr("runqueue.queueing._report.MAX_CAUSES", 20)
    log = FailureLog()
    for at in range(500):
        record = metrics(at, loss=1)
        log.add(Failure("r", record, 0, 1, RejectedError(f"a text of its own, for the entry {at}"), final=True))
    assert sum(count for *_, count in log.rest()) == 490
    assert len(log.counted) <= 41


@pytest.mark.parametrize("way", ["append", "push"])
def test_threads_lose_no_count_between_its_reading_and_its_writing(way: str) -> None:
    """Whichever way a record takes."""
    house, each = Gatehouse(), 5_000
    lane = house.lane()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        in_threads(lambda _: [getattr(lane, way)(metrics(step, a=1)) for step in range(each)], 4)
    finally:
        sys.setswitchinterval(interval)
    assert (house.intake.admitted, lane.inbox_entries) == (4 * each, 4 * each)
