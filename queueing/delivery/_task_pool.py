"""A pool of tasks that are used again: handing work to a waiting task costs a tenth of starting a new one."""

# Rules of this file: work that was accepted is started, even if the task is cancelled in the meantime. It is cancelled at
# its first wait then, as in a new task.

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import anyio
from anyio.abc import TaskGroup

Work: TypeAlias = Callable[[], Awaitable[object]]

KEPT: Final = 32
"""Tasks that wait for work, at most. Further tasks end after their work."""


class _Hand:
    """A task that waits for work."""

    __slots__ = ("bell", "work")

    def __init__(self) -> None:
        self.bell = anyio.Event()
        self.work: Work | None = None


class Crew:
    """
    Runs work in tasks of a task group.

    Args:
        tasks: The task group. The tasks are cancelled with it, and an exception that work raises is raised there.
    """

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._waiting: list[_Hand] = []

    def start(self, work: Work) -> None:
        """
        Start the work at the loop's next turn. Returns at once.

        Raises:
            RuntimeError: The task group has ended.
        """
        if self._waiting:
            hand = self._waiting.pop()
            hand.work = work
            hand.bell.set()
        else:
            self._tasks.start_soon(self._serve, work, name="runqueue work")

    async def _serve(self, work: Work) -> None:
        await work()
        del work  # A waiting task must not keep finished work alive.
        while len(self._waiting) < KEPT:
            hand = _Hand()
            self._waiting.append(hand)
            try:
                await hand.bell.wait()
            finally:
                if hand.work is None:
                    self._waiting.remove(hand)
                else:
                    await hand.work()
