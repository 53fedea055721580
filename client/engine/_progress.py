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
"""Seconds."""
LINE_EVERY: Final = 30.0
"""Seconds between two lines, where there is no bar."""
_DRAWN_EVERY: Final = 0.2

logger = logging.getLogger("runqueue")


class Shown:
    """
    Shows a block that lasts longer than `SHOWN_AFTER`; nothing is shown any more when it ends.

    Args:
        tasks: Where what shows it runs. Most flushes end before: no task for those, and no cancelling.
        total: Entries.
        settled: How many of them are stored, or have failed, by now.
        uploaded: Of its artifacts, how many bytes are stored, and how many there are.
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
        self._scope: anyio.CancelScope | None = None  # of what shows it
        self._gone: anyio.Event
        self._later: asyncio.TimerHandle

    async def __aenter__(self) -> None:
        import asyncio

        self._later = asyncio.get_running_loop().call_later(SHOWN_AFTER, self._start)

    async def __aexit__(self, *_: object) -> None:
        self._later.cancel()
        if self._scope is not None:
            import anyio

            self._scope.cancel()
            with anyio.CancelScope(shield=True):
                await self._gone.wait()

    def _start(self) -> None:
        import anyio

        self._scope, self._gone = anyio.CancelScope(), anyio.Event()
        self._tasks.start_soon(self._show, self._scope)

    async def _show(self, scope: anyio.CancelScope) -> None:
        try:
            with scope, suppress(Exception):  # tqdm's, or the terminal's
                await _show(self._total, self._settled, self._uploaded)
        finally:
            self._gone.set()


def uploaded(flush: Flush, meter: Meter) -> Callable[[], tuple[int, int]]:
    """Of the artifacts of a flush that has begun: how many bytes are stored, and how many there are."""
    begun, total = meter.sent, 0
    for lane, goal in flush.last_windows.items():
        if lane.owner is not None:
            for each in lane.outstanding(goal, Exception()):
                total += sum(map(size_of, islice(each.record[1].values(), each.start, each.stop)))
    return lambda: (min(meter.sent - begun, total), total)


async def _show(total: int, settled: Callable[[], int], uploaded: Callable[[], tuple[int, int]]) -> None:
    """Until cancelled."""
    import anyio

    begun = time.monotonic() - SHOWN_AFTER
    if _draws():
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
    more: list[Any] = []
    try:
        while True:
            bar.update(settled() - bar.n)
            sent, all_bytes = uploaded()
            if all_bytes and not more:
                more.append(_bar(all_bytes, "uploading", unit="B", unit_scale=True))
            for each in more:
                each.total = all_bytes
                each.update(sent - each.n)
            await anyio.sleep(_DRAWN_EVERY)
    finally:
        bar.update(settled() - bar.n)
        for each in (*more, bar):
            each.close()


def _draws() -> bool:
    if "ipykernel" in sys.modules:
        return True
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # None, or closed
        return False


def _bar(total: int, what: str, **unit: Any) -> Any:
    with importing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tqdm's own, of a notebook without widgets: it draws text there
        from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        """Has no thread that watches it, as none can be started at exit, and a lock that no fork has left locked."""

        monitor_interval = 0

    Bar.set_lock(threading.RLock())
    return Bar(total=total, desc=f"runqueue: {what}", leave=False, dynamic_ncols=True, **unit)
