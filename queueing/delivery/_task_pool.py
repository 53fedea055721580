"""A pool of tasks that are used again: handing work to a waiting task costs a tenth of starting a new one."""

# Rules of this file: work that was accepted is started, even if the task is cancelled in the meantime. It is cancelled
# at its first wait then, as in a new task.

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import anyio
from anyio.abc import TaskGroup

Work: TypeAlias = Callable[[], Awaitable[object]]

MOST_WAITING: Final = 32
"""Tasks that wait for work, at most. Further tasks end after their work."""


class _Worker:
    """A task that waits for work."""

    __slots__ = ("wake_event", "work")

    def __init__(self) -> None:
        self.wake_event = anyio.Event()
        self.work: Work | None = None


class TaskPool:
    """
    Runs work in tasks of a task group.

    Args:
        tasks: The task group. The tasks are cancelled with it, and an exception that work raises is raised there.
    """

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._waiting: list[_Worker] = []

    def start(self, work: Work) -> None:
        """
        Start the work at the loop's next turn. Returns at once.

        Raises:
            RuntimeError: The task group has ended.
        """
        if self._waiting:
            worker = self._waiting.pop()
            worker.work = work
            worker.wake_event.set()
        else:
            self._tasks.start_soon(self._serve, work, name="runqueue work")

    async def _serve(self, work: Work) -> None:
        await work()
        del work  # A waiting task must not keep finished work alive.
        while len(self._waiting) < MOST_WAITING:
            worker = _Worker()
            self._waiting.append(worker)
            try:
                await worker.wake_event.wait()
            finally:
                if worker.work is None:
                    self._waiting.remove(worker)
                else:
                    await worker.work()
