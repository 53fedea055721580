"""
Work that blocks, away from the engine's loop.

Rule of this file: in a worker thread; where none can be started any more, because the interpreter ends, inline: then
the loop has nothing else to do, and whoever waits for it has a deadline of its own. Never twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

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


def resolve_by(loop: AbstractEventLoop) -> None:
    """
    Let the loop look names up by `in_thread`. Its own executor takes no work once the interpreter ends; and the end
    of the interpreter waits for its threads, whatever a resolver that hangs takes.
    """

    async def getaddrinfo(
        host: Any, port: Any, *, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
    ) -> Any:
        import socket

        return await in_thread(socket.getaddrinfo, host, port, family, type, proto, flags)

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign]
