"""
Tasks that outlive what they run: to begin a piece of work with one that waits for it costs a tenth of a new task.

Rule of this file: work that was given is begun, whatever is cancelled meanwhile; it is cancelled at its first wait then,
as a new task's would be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

import anyio
from anyio.abc import TaskGroup

Work: TypeAlias = Callable[[], Awaitable[object]]

KEPT: Final = 32
"""Tasks that wait, at most. The rest of a burst ends with it."""


class _Hand:
    """One task that waits."""

    __slots__ = ("bell", "work")

    def __init__(self) -> None:
        self.bell = anyio.Event()
        self.work: Work | None = None


class Crew:
    """
    Args:
        tasks: Where the tasks are; they are cancelled with it, and what work raises is raised there.
    """

    def __init__(self, tasks: TaskGroup) -> None:
        self._tasks = tasks
        self._waiting: list[_Hand] = []

    def start(self, work: Work) -> None:
        """
        Begin it at the loop's next turn, and do not wait for it.

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
        del work  # nothing that was done is kept meanwhile
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
