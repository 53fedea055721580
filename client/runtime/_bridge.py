"""
Lets a coroutine of the user's loop wait for the engine's thread.

Rules of this file: no task and no thread of ours in the user's loop; the only thing that crosses is one wake-up.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def wait_for(future: Future[T], *, cancel: bool = True) -> T:
    """
    The result of the future, on asyncio or trio.

    Args:
        future: Of the engine.
        cancel: Whether cancelling the wait cancels the future.

    Raises:
        Exception: What the future holds.
    """
    import anyio

    if not future.done():
        event = anyio.Event()
        wake = _waker(event.set)
        future.add_done_callback(lambda _: wake())
        try:
            await event.wait()
        except BaseException:
            if cancel:
                future.cancel()
            raise
    return future.result()


def _waker(callback: Callable[[], Any]) -> Callable[[], None]:
    """A function for any thread that calls `callback` in the loop that runs here."""
    import sniffio

    if sniffio.current_async_library() == "trio":
        import trio.lowlevel

        token = trio.lowlevel.current_trio_token()

        def wake_trio() -> None:
            with suppress(trio.RunFinishedError):  # its loop is gone, and with it whoever waited
                token.run_sync_soon(callback)

        return wake_trio

    import asyncio

    loop = asyncio.get_running_loop()

    def wake_asyncio() -> None:
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:  # as above
            if not loop.is_closed():
                raise

    return wake_asyncio
