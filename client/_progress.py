"""
Shows how far a flush is that lasts: a bar on a terminal or in a notebook, a line in the log elsewhere.

Rules of this file: a flush that ends soon shows nothing; the bar is gone when the flush is over; a terminal that cannot
be written to stops no flush.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from runqueue._fork import importing

if TYPE_CHECKING:
    from anyio.abc import TaskGroup

SHOWN_AFTER: Final = 2.0
"""Seconds."""
LINE_EVERY: Final = 30.0
"""Seconds between two lines, where there is no bar."""
_DRAWN_EVERY: Final = 0.2

logger = logging.getLogger("runqueue")


@asynccontextmanager
async def shown(tasks: TaskGroup, total: int, settled: Callable[[], int]) -> AsyncGenerator[None, None]:
    """
    Shows a block that lasts longer than `SHOWN_AFTER`; nothing is shown any more when it ends.

    Args:
        tasks: Where what shows it runs. Most flushes end before: no task for those, and no cancelling.
        total: Entries.
        settled: How many of them are stored, or have failed, by now.
    """
    import asyncio

    import anyio

    scope, gone = anyio.CancelScope(), anyio.Event()
    started = False

    async def show() -> None:
        try:
            with scope, suppress(Exception):  # tqdm's, or the terminal's
                await _show(total, settled)
        finally:
            gone.set()

    def start() -> None:
        nonlocal started
        started = True
        tasks.start_soon(show)

    later = asyncio.get_running_loop().call_later(SHOWN_AFTER, start)
    try:
        yield
    finally:
        later.cancel()
        if started:
            scope.cancel()
            with anyio.CancelScope(shield=True):
                await gone.wait()


async def _show(total: int, settled: Callable[[], int]) -> None:
    """Until cancelled."""
    import anyio

    begun = time.monotonic() - SHOWN_AFTER
    if _draws():
        await _draw(total, settled)
    while True:
        await anyio.sleep(LINE_EVERY - (time.monotonic() - begun) % LINE_EVERY)
        logger.warning("still flushing after %.0f s: %d of %d entries", time.monotonic() - begun, settled(), total)


async def _draw(total: int, settled: Callable[[], int]) -> None:
    import anyio

    bar = _bar(total)
    try:
        while True:
            bar.update(settled() - bar.n)
            await anyio.sleep(_DRAWN_EVERY)
    finally:
        bar.update(settled() - bar.n)
        bar.close()


def _draws() -> bool:
    if "ipykernel" in sys.modules:
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None, or closed
        return False


def _bar(total: int) -> Any:
    with importing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm's own, of a notebook without widgets: it draws text there
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Has no thread that watches it, as none can be started at exit, and a lock that no fork has left locked."""

        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar(total=total, desc="runqueue: flushing", unit=" entries", leave=False, dynamic_ncols=True)
