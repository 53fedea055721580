"""Any thread may log while the engine closes windows."""

from __future__ import annotations

import threading

import pytest

from runqueue.queueing import Accumulator, Lane
from support.engine import bounds, encode, fill, inside, metrics
from support.threads import in_threads

THREADS = 4
EACH = 5_000


@pytest.mark.parametrize("lanes", [1, 3])
def test_nothing_is_lost_and_each_thread_keeps_its_order(lanes: int) -> None:
    """20,000 records of four threads are sent while they come; each arrives once, in its thread's order."""
    accumulator = Accumulator(encode)
    over = threading.Event()
    seen: dict[str, list[tuple[str, int]]] = {f"r{n}": [] for n in range(lanes)}

    def log(thread: int) -> None:
        for step in range(EACH):
            lane = accumulator.open(f"r{step % lanes}", run_exists=True)
            fill(lane, [metrics(step, **{f"t{thread}": step})])

    def send(lane: Lane) -> None:
        lane.close_window()
        while (batch := lane.take(bounds())) is not None:
            seen[str(lane.run)] += [(key, step) for _, key, _, step in inside(batch)]
            lane.store()

    def engine() -> None:
        while not over.is_set():
            for lane in accumulator.all():
                send(lane)

    worker = threading.Thread(target=engine)
    worker.start()
    try:
        in_threads(log, THREADS)
    finally:
        over.set()
        worker.join()
    for lane in accumulator.all():
        send(lane)
    for number in range(lanes):
        for thread in range(THREADS):
            steps = [step for key, step in seen[f"r{number}"] if key == f"t{thread}"]
            assert steps == list(range(number, EACH, lanes))
    assert accumulator.counts()["stored"] == accumulator.counts()["accepted"] == THREADS * EACH


def test_counts_never_lose_or_double_an_entry_while_threads_log() -> None:
    """The number of accepted entries only grows, and never beyond the number of logged ones."""
    accumulator = Accumulator(encode)
    lane = accumulator.open("r", run_exists=True)
    over = threading.Event()
    wrong: list[str] = []

    def read() -> None:
        last = 0
        while not over.is_set():
            counts = accumulator.counts()
            if not last <= counts["accepted"] <= THREADS * EACH or min(counts.values()) < 0:
                wrong.append(f"{counts} after {last}")
            last = counts["accepted"]
            repr(lane), repr(accumulator)

    def log(thread: int) -> None:
        for step in range(EACH):
            fill(lane, [metrics(step, loss=step)])
            if thread == 0 and step % 10 == 0:
                lane.close_window()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        in_threads(log, THREADS)
    finally:
        over.set()
        reader.join()
    assert not wrong[:3]
    assert accumulator.counts()["accepted"] == THREADS * EACH


def test_a_lane_is_opened_once_by_many_threads() -> None:
    """Two lanes of one run would break the order of its requests."""
    for _ in range(50):
        accumulator = Accumulator(encode)
        found: list[Lane] = []
        in_threads(lambda _, a=accumulator, f=found: f.append(a.open("r", run_exists=True)), 4)  # type: ignore[misc]
        assert len(set(found)) == 1 and len(accumulator.all()) == 1
