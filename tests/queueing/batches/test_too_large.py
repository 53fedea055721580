"""A store that accepts fewer bytes a request than its documented limit."""

from __future__ import annotations

from typing import Any

import pytest

from runqueue.queueing import Accumulator, Batch, Fragments, Lane, Record, RejectedError
from runqueue.queueing.delivery._sender import Sender
from support.engine import bounds, fill, metrics

pytestmark = pytest.mark.anyio


def hundred_bytes(record: Record, memory: dict[Any, Any]) -> Fragments:
    """Encode each entry to 100 bytes, its comma included."""
    return [b"x" * 99] * len(record[1]), None


async def test_a_store_that_refuses_a_size_is_sent_no_such_batch_again() -> None:
    """One 413 sets the bound for the rest of the sender's life; nothing is lost."""
    sent: list[tuple[int, bool]] = []

    async def deliver(lane: Lane, batch: Batch) -> tuple[Record, ...]:
        sent.append((batch.size, batch.size > 40_000))
        if batch.size > 40_000:
            raise RejectedError("413", too_large=True)
        return ()

    accumulator = Accumulator(hundred_bytes)
    lane = accumulator.open("r", run_exists=True)
    fill(lane, (metrics(step, **{f"m{at}": at for at in range(10)}) for step in range(400)))
    async with Sender(accumulator, deliver, bounds=bounds(body=1_000_000)) as sender:
        assert not (await sender.flush()).failures
        assert accumulator.counts()["stored"] == 4_000
        assert [size for size, refused in sent if refused] == [100_000, 50_000, 50_000]
        assert max(size for size, refused in sent[7:]) <= 25_000
        fill(lane, (metrics(step, a=1) for step in range(1_000)))
        assert not (await sender.flush()).failures
        assert max(size for size, _ in sent[-4:]) <= 25_000


async def test_one_entry_that_is_too_large_teaches_nothing() -> None:
    """It fails alone; later batches are as large as before."""
    sizes: list[int] = []

    async def deliver(lane: Lane, batch: Batch) -> tuple[Record, ...]:
        sizes.append(batch.size)
        if batch.count == 1:
            raise RejectedError("413", too_large=True)
        return ()

    accumulator = Accumulator(hundred_bytes)
    lane = accumulator.open("r", run_exists=True)
    async with Sender(accumulator, deliver, bounds=bounds(body=1_000_000)) as sender:
        fill(lane, [metrics(0, alone=1)])
        (failure,) = (await sender.flush()).failures
        assert failure.final
        fill(lane, (metrics(step, a=1) for step in range(1_000)))
        assert not (await sender.flush()).failures
    assert sizes == [100, 100_000]


async def test_what_was_put_back_before_a_bound_came_down_fails_alone_if_it_is_larger() -> None:
    """It fits into no request any more; the lane used to loop for ever."""

    async def deliver(lane: Lane, batch: Batch) -> tuple[Record, ...]:
        if batch.size > 90:
            raise RejectedError("413", too_large=True)
        return ()

    accumulator = Accumulator(hundred_bytes)
    lane = accumulator.open("r", run_exists=True)
    fill(lane, [metrics(0, **{f"m{at}": at for at in range(5)})])
    async with Sender(accumulator, deliver, bounds=bounds(body=250)) as sender:
        report = await sender.flush()
    assert sum(failure.weight for failure in report.failures) == 5
    assert all(failure.final for failure in report.failures)
    assert accumulator.counts()["failed"] == 5
