"""Tasks of a pool are used again, and work behaves in them as in a new task."""

from __future__ import annotations

import gc
import sys
import weakref
from functools import partial

import anyio
import pytest
from anyio import wait_all_tasks_blocked
from anyio.abc import TaskGroup
from anyio.lowlevel import checkpoint

from runqueue.queueing.delivery._task_pool import MOST_WAITING, TaskPool

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

pytestmark = pytest.mark.anyio


async def pool_of(tasks: TaskGroup, waiting: int) -> TaskPool:
    """A pool with this many waiting tasks."""
    pool = TaskPool(tasks)
    for _ in range(waiting):
        pool.start(checkpoint)
    await wait_all_tasks_blocked()
    return pool


@pytest.mark.parametrize("anyio_backend", ["asyncio"])  # trio has no order
async def test_work_is_started_in_order_by_waiting_and_by_new_tasks() -> None:
    """Waiting tasks take work first, new tasks come behind them."""
    begun: list[int] = []

    async def work(number: int) -> None:
        begun.append(number)
        await checkpoint()

    async with anyio.create_task_group() as tasks:
        pool = TaskPool(tasks)
        for numbers in (range(3), range(3, 8)):
            for number in numbers:
                pool.start(partial(work, number))
            assert begun == list(range(numbers.start))
            await wait_all_tasks_blocked()
            assert begun == list(range(numbers.stop))
        tasks.cancel_scope.cancel()


async def test_work_that_follows_work_is_done_by_the_same_task() -> None:
    """Reusing the task is what saves time."""
    by: list[int] = []

    async def work() -> None:
        by.append(anyio.get_current_task().id)

    async with anyio.create_task_group() as tasks:
        pool = TaskPool(tasks)
        for _ in range(5):
            pool.start(work)
            await wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert len(by) == 5
    assert len(set(by)) == 1


async def test_after_a_burst_a_bounded_number_of_tasks_stays() -> None:
    """The other tasks end."""
    async with anyio.create_task_group() as tasks:
        pool = TaskPool(tasks)
        for _ in range(MOST_WAITING + 20):
            pool.start(lambda: anyio.sleep(1))
        await anyio.sleep(2)
        assert len(pool._waiting) == MOST_WAITING
        tasks.cancel_scope.cancel()
    assert pool._waiting == []


async def test_a_task_that_waits_keeps_nothing_of_what_it_has_done() -> None:
    """A run that has ended is released, for example."""

    class Kept:
        async def work(self) -> None: ...

    async with anyio.create_task_group() as tasks:
        pool = TaskPool(tasks)
        for _ in range(2):
            kept = Kept()
            seen = weakref.ref(kept)
            pool.start(kept.work)
            del kept
            await wait_all_tasks_blocked()
            gc.collect()
            assert seen() is None
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("waiting", [0, 1])
async def test_what_work_raises_is_raised_by_the_task_group(waiting: int) -> None:
    """This holds for tasks that have waited, too."""

    async def fail() -> None:
        raise LookupError("of the work")

    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks:
            (await pool_of(tasks, waiting)).start(fail)
    assert [type(error) for error in caught.value.exceptions] == [LookupError]


@pytest.mark.parametrize("waiting", [0, 1])
async def test_work_that_is_given_before_the_end_is_begun_and_cancelled_at_its_first_wait(waiting: int) -> None:
    """Work that never began could not report its cancellation to its caller."""
    seen: list[str] = []

    async def work() -> None:
        seen.append("begun")
        try:
            await anyio.sleep(1)
        finally:
            seen.append("cancelled")

    async with anyio.create_task_group() as tasks:
        (await pool_of(tasks, waiting)).start(work)
        tasks.cancel_scope.cancel()
    assert seen == ["begun", "cancelled"]


async def test_after_the_end_of_the_task_group_nothing_is_begun() -> None:
    """The pool refuses work, as the group itself does."""
    async with anyio.create_task_group() as tasks:
        pool = await pool_of(tasks, 1)
        tasks.cancel_scope.cancel()
    with pytest.raises(RuntimeError):
        pool.start(checkpoint)
