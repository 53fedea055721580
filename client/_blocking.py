"""
Work that blocks, away from the engine's loop.

Rule of this file: in a worker thread; where none can be started any more, because the interpreter ends, inline: then
the loop has nothing else to do, and whoever waits for it has a deadline of its own. Never twice.
"""

from __future__ import annotations

import socket
from asyncio import AbstractEventLoop
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import anyio

T = TypeVar("T")


async def in_thread(function: Callable[..., T], *args: Any, limiter: anyio.CapacityLimiter | None = None) -> T:
    """What the function returns or raises. Cancelling ends the waiting only."""
    import anyio.to_thread

    begun = False

    def work() -> T:
        nonlocal begun
        begun = True
        return function(*args)

    try:
        return await anyio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=limiter)
    except RuntimeError:  # "can't start new thread", in the words of the Python at hand
        if begun:
            raise
    return function(*args)


def resolve_inline_at_exit(loop: AbstractEventLoop) -> None:
    """Let the loop look names up in its own thread where its executor takes no work any more."""
    in_executor = loop.getaddrinfo

    async def getaddrinfo(host: Any, port: Any, **hints: int) -> Any:
        try:
            return await in_executor(host, port, **hints)
        except RuntimeError:
            return socket.getaddrinfo(host, port, **hints)

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
