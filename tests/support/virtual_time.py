"""An asyncio loop whose clock jumps to the next timer as soon as there is nothing else to do."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any

DEADLOCK_SECONDS = 5.0
"""Real ones: a loop with neither timers nor events waits so long for another thread, then gives up."""


class _JumpingSelector(selectors.DefaultSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, Any]]:
        events = super().select(DEADLOCK_SECONDS if timeout is None else 0)
        if not events and timeout is None:
            raise RuntimeError("the loop waits for ever")
        if not events and timeout is not None:
            self.now += max(0.0, timeout)
        return events


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now
