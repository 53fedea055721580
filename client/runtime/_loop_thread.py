"""
A daemon thread with an event loop, and the ways into the loop from any other thread: `submit` and `call_soon`.
"""

# Rules of this file: `submit` never waits, not even for the thread's start, as its caller may be another loop. `stop`
# never waits either, as its caller may be a garbage collection in this very thread. anyio's BlockingPortal waits in
# both places. The exception: once the interpreter ends and no thread can be started, `submit` runs its call in the
# caller's thread.
#
# No locks: a signal handler may interrupt any line here, and wait for a call of its own. So each caller does everything
# that its call needs: it appends the call to the backlog, and then starts a thread if none runs. Of several threads
# that were started, the one that takes the token serves the loop, and the others end. After every change of a state
# that other threads read, the thread that has made it looks at the backlog again.

from __future__ import annotations

import contextvars
import importlib
import threading
import traceback
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractAsyncContextManager, ExitStack, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from runqueue.queueing import ClosedError
from runqueue.runtime import _notices
from runqueue.runtime._fork import importing
from runqueue.runtime._waiting import resolve_names_in_threads

if TYPE_CHECKING:
    import asyncio

    import anyio

    from runqueue.queueing.delivery._task_pool import TaskPool

T = TypeVar("T")

importlib.import_module(
    "concurrent.futures.thread"
)  # it registers a hook, which is not possible any more once the interpreter ends

_current: contextvars.ContextVar[LoopThread | None] = contextvars.ContextVar("runqueue_loop_thread", default=None)
"""The thread in which, or for which, this code runs. A context variable, as those follow a task into worker threads."""


class LoopThread:
    """
    A thread with an asyncio loop. The first call starts it.

    Args:
        setup: Returns a context manager that is entered in the loop before the first call, and left after the last one.
            If it fails, the calls that wait for it fail with its error, and the next call tries again.
    """

    def __init__(self, setup: Callable[[], AbstractAsyncContextManager[Any]]) -> None:
        self._setup = setup
        self._token = [None]  # the thread that serves the loop has taken it
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._backlog: deque[_Call] = deque()  # calls that are not in the loop yet
        self._stopping = False
        self._ended: Future[None] = Future()
        self._relay = _notices.LogRelay()
        self._context: contextvars.Context
        self._stop: anyio.Event
        self._task_pool: TaskPool

    def __repr__(self) -> str:
        return f"<LoopThread {self.state}>"

    @property
    def state(self) -> str:
        """For `repr`: "not started", "running" or "ended"."""
        if self._thread is None:
            return "not started"
        return "running" if self._thread.is_alive() else "ended"

    @property
    def started(self) -> bool:
        """Whether the thread runs, or a call waits for its start."""
        return self._thread is not None or bool(self._backlog)

    def submit(self, function: Callable[..., Awaitable[T]], *args: Any) -> Future[T]:
        """
        Run a coroutine function in the loop.

        Args:
            function: The coroutine function.
            args: Its arguments.

        Returns:
            A future of its result. Cancelling the future cancels the call.

        Raises:
            ClosedError: The thread was stopped.
            RuntimeError: The caller is this thread, or a worker thread of it, such as the callable of a token. It would
                wait for itself for ever.
        """
        if self.is_own_thread():
            raise RuntimeError("runqueue's own thread cannot wait for itself")
        call = _Call(function, args, self._relay)
        if not self._enqueue(call):
            self._run_inline(call)
        return call.future

    def _enqueue(self, call: _Call) -> bool:
        """Append a call to the backlog, and make sure that it is run. False: no thread can be started for it."""
        if self._stopping:
            raise ClosedError("the client was closed meanwhile")
        self._backlog.append(call)  # before `_loop` is read: the thread that sets it reads the backlog afterwards
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # the loop has just been closed; the thread looks at the backlog afterwards
                # In the loop's context, not in the caller's: anyio finds its loop by the context.
                loop.call_soon_threadsafe(self._start_backlog, context=self._context)
        elif self._thread is None and not self._start() and self._withdraw(call):
            return False
        if self._ended.done():  # the thread has ended meanwhile
            self._fail_backlog(None)
        return True

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, name="runqueue", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # "can't start new thread"; its wording depends on the version of Python
            if not _raised_by(threading.Thread.start, error):  # a signal handler has raised it, and the thread runs
                raise
            return False
        return True

    def _withdraw(self, call: _Call) -> bool:
        try:
            self._backlog.remove(call)
        except ValueError:  # another thread has taken it
            return False
        return True

    def call_soon(
        self, function: Callable[[], object], failed: Callable[[BaseException], object] = lambda _: None
    ) -> None:
        """
        Run a function in the loop, at much less cost than by `submit`. Does nothing after `stop`.

        Args:
            function: The function; its result is discarded.
            failed: Called, in any thread, with the error for which the loop could not be started.
        """
        loop = self._loop
        if loop is None:
            call = _Call(_called, (function,), self._relay)

            def over(future: Future[Any]) -> None:
                if not future.cancelled() and (error := future.exception()) is not None:
                    failed(error)

            call.future.add_done_callback(over)
            with suppress(ClosedError):  # if no thread can be started, a later `submit` does the work
                self._enqueue(call)
        else:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, context=self._context)

    def is_own_thread(self) -> bool:
        """Whether the caller is this thread, or a worker of it. Waiting for the thread there would never end."""
        return _current.get() is self

    def stop(self) -> Future[None]:
        """
        Ask the thread to end; the calls in it are cancelled. The future is done when the thread has nothing left to do.
        """
        self._stopping = True
        if self._take_token():  # no thread serves the loop, and none will
            self._end()
        elif (loop := self._loop) is not None:
            with suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(self._stop.set, context=self._context)
        return self._ended

    def _end(self) -> None:
        self._ended.set_result(None)
        self._fail_backlog(None)

    def _take_token(self) -> bool:
        try:
            self._token.pop()  # atomic: one thread gets it
        except IndexError:
            return False
        return True

    def _fail_backlog(self, error: Exception | None) -> None:
        for _ in range(len(self._backlog)):
            with suppress(IndexError):  # another thread does the same
                self._backlog.popleft().fail(error)

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, if there is one, and until its log records were handled."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        self.flush_logs()

    def flush_logs(self) -> None:
        """Wait until the log records of the thread were handled; not for long."""
        if not self.is_own_thread():
            self._relay.flush()

    # -- in the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._take_token():
            self._thread = threading.current_thread()
            failure = self._serve()
            self._loop = None
            if self._stopping:
                self._end()
                return
            self._fail_backlog(failure)
            self._thread = None
            self._token.append(None)
            if not (self._backlog or self._stopping):
                return

    def _serve(self) -> Exception | None:
        """Run the loop until `stop`. Returns the error that has ended it before: of the setup, or a defect."""
        self._mark_context()
        try:
            self._run_loop(self._main)
        except Exception as error:
            return error
        except (
            BaseException
        ) as error:  # e.g. a SystemExit in the callable of a token; it must not end this thread silently
            return RuntimeError(f"runqueue's thread was ended by {type(error).__name__}")
        return None

    def _mark_context(self) -> None:
        """Let code that runs in this thread, and in workers for it, find this object and its relay."""
        _notices.install_filters()
        _current.set(self)
        _notices.current_relay.set(self._relay)

    def _run_loop(self, main: Callable[[ExitStack], Awaitable[None]]) -> None:
        """Run a coroutine function in a new loop. No fork happens before it closes its argument, once the loop runs."""
        with ExitStack() as starting:
            starting.enter_context(importing())
            self._preload()
            import anyio

            anyio.run(main, starting, backend="asyncio")

    def _preload(self) -> None:
        """Import what anyio, the loop and sockets would import later, when a fork could happen in the middle of it."""
        importlib.import_module("encodings.idna")
        importlib.import_module("encodings.utf_16_be")
        importlib.import_module("html")
        importlib.import_module("anyio._backends._asyncio")
        importlib.import_module("anyio.to_thread")

    def _run_inline(self, call: _Call) -> None:
        """Run one call in the caller's thread, in a loop and a setup of its own."""

        async def once(starting: ExitStack) -> None:
            import asyncio

            resolve_names_in_threads(asyncio.get_running_loop())
            async with self._setup():
                starting.close()
                await call.run()

        def run() -> None:
            self._mark_context()
            try:
                self._run_loop(once)
            except Exception as error:
                call.fail(error)
            finally:
                call.fail(None)

        contextvars.copy_context().run(run)

    async def _main(self, starting: ExitStack) -> None:
        import asyncio

        import anyio

        from runqueue.queueing.delivery._task_pool import TaskPool

        resolve_names_in_threads(asyncio.get_running_loop())
        async with self._setup(), anyio.create_task_group() as tasks:
            starting.close()
            self._task_pool = TaskPool(tasks)
            self._stop = anyio.Event()
            self._context = contextvars.copy_context()
            self._loop = asyncio.get_running_loop()
            self._start_backlog()
            if not self._stopping:
                await self._stop.wait()
            tasks.cancel_scope.cancel()

    def _start_backlog(self) -> None:
        while self._backlog:
            try:
                call = self._backlog.popleft()
            except IndexError:  # the last call was withdrawn
                return
            self._spawn(call)

    def _spawn(self, call: _Call) -> None:
        try:
            self._task_pool.start(call.run)
        except RuntimeError as error:  # the task group has just ended
            call.fail(error)


def _raised_by(function: Callable[..., object], error: BaseException) -> bool:
    """Whether an error was raised by this very function, or by C code that it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code is getattr(function, "__code__", None)


async def _called(function: Callable[[], object]) -> None:
    function()


class _Call:
    """A coroutine function to run, and the future of its result."""

    __slots__ = ("args", "function", "future", "relay")

    def __init__(
        self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...], relay: _notices.LogRelay
    ) -> None:
        self.function = function
        self.args = args
        self.relay = relay
        self.future: Future[Any] = Future()

    async def run(self) -> None:
        import asyncio

        import anyio

        if self.future.cancelled():  # before it began
            return
        loop, context = asyncio.get_running_loop(), contextvars.copy_context()
        with anyio.CancelScope() as scope:

            def cancelled(future: Future[Any]) -> None:
                if future.cancelled():
                    with suppress(RuntimeError):  # the loop is closed, and has cancelled everything
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
                try:
                    handling = self.relay.in_progress()
                    if handling is not None:
                        await self._wait_for_handlers(handling)
                finally:
                    with suppress(InvalidStateError):  # it was cancelled meanwhile
                        self.future.set_result(result)

    async def _wait_for_handlers(self, handling: Future[None]) -> None:
        """
        Wait until the handlers of log records were called; not for long, as a handler may wait for this very call.
        """
        import asyncio

        import anyio

        loop, context, event = asyncio.get_running_loop(), contextvars.copy_context(), anyio.Event()

        def wake(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(event.set, context=context)

        handling.add_done_callback(wake)
        with anyio.move_on_after(_notices.HANDLER_SECONDS):
            await event.wait()

    def fail(self, error: Exception | None) -> None:
        """Complete the future with an error, unless it is done. None: cancel it."""
        if error is None:
            self.future.cancel()
        else:
            with suppress(InvalidStateError):
                self.future.set_exception(error)
