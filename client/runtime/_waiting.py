"""
Waits inside of an event loop that do not block it: for a blocking function, and for the result of another thread.

    run it elsewhere    `in_thread`: a blocking function, in a worker thread of the engine's loop
    wait for it         `wait_for`: a future that another thread completes, on asyncio or trio
"""

# Rules of this file: no task and no thread of ours in the user's loop; the only thing that crosses is one wake-up. A
# blocking function runs once: in a worker thread, or inline where no thread can be started because the interpreter
# ends. Inline is fine then: the loop has nothing else to do, and each caller has a deadline of its own.

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

    import anyio

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any, limiter: anyio.CapacityLimiter | None = None) -> T:
    """
    Run a blocking function in a worker thread.

    Args:
        function: Cancelling ends the wait for it, not the function.
        args: Its arguments.
        limiter: Bounds the threads that run at once. None: anyio's own.

    Returns:
        What the function returns; what it raises is raised.
    """
    import anyio.to_thread

    begun = False

    def work() -> T:
        nonlocal begun
        begun = True
        return function(*args)

    try:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except RuntimeError:  # "can't start new thread"; its wording depends on the version of Python
        if begun:
            raise
    return function(*args)


def resolve_names_in_threads(loop: AbstractEventLoop) -> None:
    """
    Let an asyncio loop look host names up by `in_thread`.

    The loop's own executor accepts no work once the interpreter ends, and the interpreter would wait for its threads,
    however long a resolver hangs.
    """

    async def getaddrinfo(
        host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        import socket

        return await in_thread(socket.getaddrinfo, host, port, family, type, proto, flags)

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]


async def wait_for(future: Future[T], *, cancel: bool = True) -> T:
    """
    Wait for a future that another thread completes, on asyncio or trio.

    Args:
        future: Completed by any thread.
        cancel: Whether cancelling the wait cancels the future.

    Returns:
        The future's result; its exception is raised.
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
    """A function that any thread may call to run `callback` in the current loop."""
    import sniffio

    if sniffio.current_async_library() == "trio":
        import trio.lowlevel

        token = trio.lowlevel.current_trio_token()

        def wake_trio() -> None:
            with suppress(trio.RunFinishedError):  # the loop has ended, and with it the task that waited
                token.run_sync_soon(callback)

        return wake_trio

    import asyncio

    loop = asyncio.get_running_loop()

    def wake_asyncio() -> None:
        try:
            loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop has ended
            if not loop.is_closed():
                raise

    return wake_asyncio
