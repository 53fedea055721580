"""
A daemon thread with an event loop of its own, and the way into it from any thread.

Rules of this file: `submit` never waits, not even for the start, as its caller may be another loop; `stop` never waits
either, as its caller may be a garbage collection in this very thread. Not anyio's BlockingPortal for these two reasons.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from runqueue._blocking import resolve_inline_at_exit
from runqueue._fork import importing
from runqueue.queueing import ClosedError

if TYPE_CHECKING:
    import asyncio

    import anyio
    from anyio.abc import TaskGroup

T = TypeVar("T")

_within: contextvars.ContextVar[LoopThread | None] = contextvars.ContextVar("runqueue_within", default=None)
"""On behalf of which thread of ours code runs; a context variable, as those go with a task into worker threads."""


class LoopThread:
    """
    Started by the first call.

    Args:
        setup: Makes a context that is entered in the loop before any call is run, and left after the last. If it
            fails, so do the calls that wait for it; the next call tries again.
    """

    def __init__(self, setup: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._setup = setup
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._backlog: list[_Call] = []  # what was submitted before the loop ran
        self._stopping = False
        self._ended: Future[None] = Future()
        self._context: contextvars.Context
        self._stop: anyio.Event
        self._tasks: TaskGroup

    def __repr__(self) -> str:
        return f"<LoopThread {self.state}>"

    @property
    def state(self) -> str:
        if self._thread is None:
            return "not started"
        return "running" if self._thread.is_alive() else "ended"

    @property
    def started(self) -> bool:
        return self._thread is not None

    def submit(self, function: Callable[..., Awaitable[T]], *args: Any) -> Future[T]:
        """
        Run a coroutine function in the loop. Cancelling the future cancels it.

        Raises:
            ClosedError: The thread was stopped.
            RuntimeError: The caller is this thread, or a worker thread of it, such as a token's callable: this thread
                waits for it, and would do so for ever.
        """
        if self.serves():
            raise RuntimeError("runqueue's own thread cannot wait for itself")
        call = _Call(function, args)
        with self._lock:
            if self._stopping:
                raise ClosedError("the client was closed meanwhile")
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="runqueue", daemon=True)
                self._thread.start()
            if self._loop is None:
                self._backlog.append(call)
            else:
                # In the loop's context, not the caller's: by that anyio knows which loop it is.
                self._loop.call_soon_threadsafe(self._spawn, call, context=self._context)
        return call.future

    def nudge(self, function: Callable[[], object]) -> None:
        """Run a function in the loop, soon; much cheaper than `submit`, and nothing comes back. Nothing after `stop`."""
        loop = self._loop
        if loop is None:
            with suppress(ClosedError):
                self.submit(_called, function)
        else:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, context=self._context)

    def serves(self) -> bool:
        """Whether the caller is this thread, or works for it: whoever waits for the thread there waits for ever."""
        return _within.get() is self

    def stop(self) -> Future[None]:
        """Ask the thread to end; what runs in it is cancelled. The future is done when it has nothing left to do."""
        with self._lock:
            self._stopping = True
            if self._thread is None:
                if not self._ended.done():
                    self._ended.set_result(None)
            elif self._loop is not None:
                with suppress(RuntimeError):  # it is closed already
                    self._loop.call_soon_threadsafe(self._stop.set, context=self._context)
        return self._ended

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, if there is one."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with importing():
            import anyio
            import anyio._backends._asyncio  # what `anyio.run` imports later otherwise

        failure: Exception | None = None
        try:
            anyio.run(self._main, backend="asyncio")
        except Exception as error:
            failure = error  # of the setup, or a defect: whoever waits is told
        except BaseException as error:  # a SystemExit of foreign code, such as a token's: it ends no thread of ours
            failure = RuntimeError(f"runqueue's thread was ended by {type(error).__name__}")
        with self._lock:
            waiting, self._backlog = self._backlog, []
            self._loop = None
            if self._stopping:
                self._ended.set_result(None)
            else:
                self._thread = None
        for call in waiting:
            call.fail(failure)

    async def _main(self) -> None:
        import asyncio

        import anyio

        _within.set(self)
        resolve_inline_at_exit(asyncio.get_running_loop())
        async with self._setup(), anyio.create_task_group() as self._tasks:
            self._stop = anyio.Event()
            with self._lock:
                self._loop, self._context = asyncio.get_running_loop(), contextvars.copy_context()
                waiting, self._backlog = self._backlog, []
                stopping = self._stopping
            for call in waiting:
                self._spawn(call)
            if not stopping:
                await self._stop.wait()
            self._tasks.cancel_scope.cancel()

    def _spawn(self, call: _Call) -> None:
        try:
            self._tasks.start_soon(call.run)
        except RuntimeError as error:  # the task group has just ended
            call.fail(error)


async def _called(function: Callable[[], object]) -> None:
    function()


class _Call:
    """One coroutine function to run, and where its result goes."""

    __slots__ = ("args", "function", "future")

    def __init__(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = args
        self.future: Future[Any] = Future()

    async def run(self) -> None:
        import asyncio

        import anyio

        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        with anyio.CancelScope() as scope:

            def cancelled(future: Future[Any]) -> None:
                if future.cancelled():
                    with suppress(RuntimeError):  # the loop is closed: nothing is left to cancel
                        loop.call_soon_threadsafe(scope.cancel, context=context)

            self.future.add_done_callback(cancelled)
            try:
                result = await self.function(*self.args)
            except Exception as error:
                self.fail(error)
            except BaseException:
                self.future.cancel()  # the thread ends
                raise
            else:
                with suppress(InvalidStateError):  # cancelled meanwhile
                    self.future.set_result(result)

    def fail(self, error: Exception | None) -> None:
        if error is None:
            self.future.cancel()
        else:
            with suppress(InvalidStateError):
                self.future.set_exception(error)
