"""The engine with arbitrary answers, callers and timing, drawn from a seed so that a failure can be repeated."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

import anyio
import pytest

from runqueue.queueing import Lane, Record
from runqueue.queueing.batches._batch import METRIC
from support.chaos import Chaos
from support.engine import Bench, Entry, bench, bounds, check_counts, flat, metrics, named, run

pytestmark = pytest.mark.anyio

LANES = 5
BATCH = 10


@pytest.mark.sample("*-?")
@pytest.mark.parametrize("seed", range(40))
async def test_whatever_happens_each_entry_is_stored_or_reported_once_and_in_order(seed: int) -> None:
    """Flushes of all runs and of one, with timeouts, cancelled, overlapping, through outages: all counts are exact."""
    chaos = Chaos(random.Random(seed))
    logged: dict[int, list[Record]] = defaultdict(list)
    failed: dict[Any, list[Entry]] = defaultdict(list)
    lanes: list[Lane] = []

    def log(b: Bench, number: int, count: int) -> None:
        for _ in range(count):
            step = len(logged[number])
            record = metrics(step, **{"bad" if chaos.random.random() < 0.05 else "good": step})
            logged[number].append(record)
            b.lane(number, record)

    async def flush(b: Bench) -> None:
        lane = chaos.random.choice([None, None, *lanes])
        timeout = chaos.random.choice([None, 0.2, 2.0, 20.0])
        with anyio.move_on_after(chaos.random.choice([1.0, 15.0, 1_000.0])):
            report = await b.flush(lane, timeout)
            for failure in report.failures:
                if failure.final:
                    failed[failure.run] += named([failure])

    async with bench(chaos, limits=bounds(metrics=BATCH), max_workers=3, timeout=10) as b:
        for number in range(LANES):
            parent = lanes[number - 1] if number % 2 else None
            lanes.append(b.lane(number, run(), run_exists=False, parent=parent))
        async with anyio.create_task_group() as tasks:
            for _ in range(25):
                for number in range(LANES):
                    log(b, number, chaos.random.randrange(12))
                tasks.start_soon(flush, b)
                await anyio.sleep(chaos.random.choice([0.0, 0.3, 4.0, 25.0]))
                check_counts(b.accumulator)
        chaos.is_calm = True
        await anyio.sleep(100)
        report = await b.flush()
        assert all(failure.final for failure in report.failures)
        for failure in report.failures:
            failed[failure.run] += named([failure])
        assert await b.flush() == type(report)(total=0)
        for number in range(LANES):
            stored = b.store.stored[number]
            assert stored[:1] == flat([run()])
            lost = set(failed[number])
            assert len(lost) == len(failed[number])
            expected = [entry for entry in flat(logged[number]) if entry not in lost]
            assert sorted(stored[1:]) == sorted(expected)
            # A rejected batch is bisected, and its parts are not always stored in order.
            places = {entry: place for place, entry in enumerate(expected)}
            assert all(abs(places[entry] - place) < BATCH for place, entry in enumerate(stored[1:]))
            assert {key for kind, key, _, _ in flat(logged[number]) if kind == METRIC and key == "bad"} <= {
                key for _, key, _, _ in lost
            }
        assert b.accumulator.counts()["pending"] == 0
