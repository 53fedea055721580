"""
Shows the progress of a long flush: as a bar on a terminal or in a notebook, elsewhere as lines in the log.
"""

# Rules of this file: a short flush shows nothing; the bar is removed when the flush ends; an error of the terminal
# stops no flush.

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from runqueue.artifacts._source import size_of
from runqueue.http._upload import Meter
from runqueue.runtime._fork import importing

if TYPE_CHECKING:
    import asyncio

    import anyio
    from anyio.abc import TaskGroup

    from runqueue.queueing.delivery._flush import Flush

SHOWN_AFTER: Final = 2.0
"""Seconds from the beginning of a flush to the first sign of its progress."""
LINE_EVERY: Final = 30.0
"""Seconds between two lines in the log."""
DRAWN_EVERY: Final = 0.2
"""Seconds between two updates of the bar."""

logger = logging.getLogger("runqueue")


class Shown:
    """
    An async context manager that shows its block's progress once the block has lasted for `SHOWN_AFTER`.

    Args:
        tasks: A task group. The task that shows the progress is started late: most blocks end without one.
        total: The number of entries.
        settled: Returns how many of them are stored or have failed.
        uploaded: Returns how many bytes of artifacts are stored, and how many there are.
    """

    def __init__(
        self,
        tasks: TaskGroup,
        total: int,
        settled: Callable[[], int],
        uploaded: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        self._tasks = tasks
        self._total = total
        self._settled = settled
        self._uploaded = uploaded
        self._scope: anyio.CancelScope | None = None  # of the task that shows the progress
        self._ended: anyio.Event
        self._timer: asyncio.TimerHandle

    async def __aenter__(self) -> None:
        import asyncio

        self._timer = asyncio.get_running_loop().call_later(SHOWN_AFTER, self._start)

    async def __aexit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._scope is not None:
            import anyio

            self._scope.cancel()
            with anyio.CancelScope(shield=True):
                await self._ended.wait()

    def _start(self) -> None:
        import anyio

        self._scope, self._ended = anyio.CancelScope(), anyio.Event()
        self._tasks.start_soon(self._show, self._scope)

    async def _show(self, scope: anyio.CancelScope) -> None:
        try:
            with scope, suppress(Exception):  # tqdm's, or the terminal's
                await _show(self._total, self._settled, self._uploaded)
        finally:
            self._ended.set()


def uploaded(flush: Flush, meter: Meter) -> Callable[[], tuple[int, int]]:
    """A function for `Shown.uploaded`, of the artifacts of a flush that has begun."""
    sent_before, total = meter.sent, 0
    for lane, goal in flush.last_windows.items():
        if lane.owner is not None:
            for each in lane.outstanding(goal, Exception()):
                total += sum(map(size_of, islice(each.record[1].values(), each.start, each.stop)))
    return lambda: (min(meter.sent - sent_before, total), total)


async def _show(total: int, settled: Callable[[], int], uploaded: Callable[[], tuple[int, int]]) -> None:
    """Show the progress until cancelled."""
    import anyio

    begun = time.monotonic() - SHOWN_AFTER
    if _has_display():
        await _draw(total, settled, uploaded)
    while True:
        await anyio.sleep(LINE_EVERY - (time.monotonic() - begun) % LINE_EVERY)
        sent, all_bytes = uploaded()
        bytes_too = f", {sent / 1e6:.1f} of {all_bytes / 1e6:.1f} MB of artifacts" if all_bytes else ""
        text = "still flushing after %.0f s: %d of %d entries%s"
        logger.warning(text, time.monotonic() - begun, settled(), total, bytes_too)


async def _draw(total: int, settled: Callable[[], int], uploaded: Callable[[], tuple[int, int]]) -> None:
    import anyio

    bar = _bar(total, "flushing", unit=" entries")
    upload_bars: list[Any] = []
    try:
        while True:
            bar.update(settled() - bar.n)
            sent, all_bytes = uploaded()
            if all_bytes and not upload_bars:
                upload_bars.append(_bar(all_bytes, "uploading", unit="B", unit_scale=True))
            for each in upload_bars:
                each.total = all_bytes
                each.update(sent - each.n)
            await anyio.sleep(DRAWN_EVERY)
    finally:
        bar.update(settled() - bar.n)
        for each in (*upload_bars, bar):
            each.close()


def _has_display() -> bool:
    """Whether a bar can be drawn."""
    if "ipykernel" in sys.modules:
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # stderr is None, or closed
        return False


def _bar(total: int, label: str, **unit: Any) -> Any:
    with importing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm warns of a notebook without widgets; it draws text there
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """
        A bar without a monitor thread, which cannot be started at exit, and with a lock that no fork has left locked.
        """

        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar(total=total, desc=f"runqueue: {label}", leave=False, dynamic_ncols=True, **unit)
