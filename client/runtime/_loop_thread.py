"""
A daemon thread with an event loop of its own, and the way into it from any thread.

Rules of this file: `submit` never waits, not even for the start, as its caller may be another loop; `stop` never waits
either, as its caller may be a garbage collection in this very thread. Not anyio's BlockingPortal for these two reasons.
One exception: where the interpreter ends and no thread can be started, `submit` runs its call itself.

No lock: a signal handler may interrupt any line here, and wait for a call of its own to be run. So each caller does all
that its call needs: it queues the call, and then starts a thread if none runs. Of several threads one gets the token;
the others end. Who takes something from a state that others look at looks at the queue again afterwards.
"""

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

importlib.import_module("concurrent.futures.thread")  # it registers a hook, which is refused once the interpreter ends

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
        self._token = [None]  # whose thread runs has it
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._backlog: deque[_Call] = deque()  # what was submitted, and is not in the loop yet
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
        if self._thread is None:
            return "not started"
        return "running" if self._thread.is_alive() else "ended"

    @property
    def started(self) -> bool:
        return self._thread is not None or bool(self._backlog)

    def submit(self, function: Callable[..., Awaitable[T]], *args: Any) -> Future[T]:
        """
        Run a coroutine function in the loop. Cancelling the future cancels it.

        Raises:
            ClosedError: The thread was stopped.
            RuntimeError: The caller is this thread, or a worker thread of it, such as a token's callable: this thread
                waits for it, and would do so for ever.
        """
        if self.is_own_thread():
            raise RuntimeError("runqueue's own thread cannot wait for itself")
        call = _Call(function, args, self._relay)
        if not self._pass_on(call):
            self._run_inline(call)
        return call.future

    def _pass_on(self, call: _Call) -> bool:
        """Whether there is a thread for it."""
        if self._stopping:
            raise ClosedError("the client was closed meanwhile")
        self._backlog.append(call)  # before the look at the loop: who sets that looks here afterwards
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it has just been closed, and the thread looks for what is left
                # In the loop's context, not the caller's: by that anyio knows which loop it is.
                loop.call_soon_threadsafe(self._work_off, context=self._context)
        elif self._thread is None and not self._start() and self._withdraw(call):
            return False
        if self._ended.done():  # meanwhile
            self._fail_backlog(None)
        return True

    def _start(self) -> bool:
        thread = threading.Thread(target=self._run, name="runqueue", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # "can't start new thread", in the words of the Python at hand
            if not _raised_by(threading.Thread.start, error):  # by a signal handler, while `start` waited: it runs
                raise
            return False
        return True

    def _withdraw(self, call: _Call) -> bool:
        try:
            self._backlog.remove(call)
        except ValueError:  # another thread runs it
            return False
        return True

    def call_soon(
        self, function: Callable[[], object], failed: Callable[[BaseException], object] = lambda _: None
    ) -> None:
        """
        Run a function in the loop, soon; much cheaper than `submit`. Nothing after `stop`.

        Args:
            function: Its result and errors are nobody's.
            failed: Told, in any thread, why the loop could not be started.
        """
        loop = self._loop
        if loop is None:
            call = _Call(_called, (function,), self._relay)

            def over(future: Future[Any]) -> None:
                if not future.cancelled() and (error := future.exception()) is not None:
                    failed(error)

            call.future.add_done_callback(over)
            with suppress(ClosedError):  # without a thread, whoever waits for something later runs it
                self._pass_on(call)
        else:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(function, context=self._context)

    def is_own_thread(self) -> bool:
        """Whether the caller is this thread, or works for it: whoever waits for the thread there waits for ever."""
        return _within.get() is self

    def stop(self) -> Future[None]:
        """Ask the thread to end; what runs in it is cancelled. The future is done when it has nothing left to do."""
        self._stopping = True
        if self._take_token():  # there is no thread, nor will there be one
            self._end()
        elif (loop := self._loop) is not None:
            with suppress(RuntimeError):  # it is closed already
                loop.call_soon_threadsafe(self._stop.set, context=self._context)
        return self._ended

    def _end(self) -> None:
        self._ended.set_result(None)
        self._fail_backlog(None)

    def _take_token(self) -> bool:
        try:
            self._token.pop()  # atomic
        except IndexError:
            return False
        return True

    def _fail_backlog(self, error: Exception | None) -> None:
        for _ in range(len(self._backlog)):
            with suppress(IndexError):  # somebody else does the same
                self._backlog.popleft().fail(error)

    def join(self, timeout: float) -> None:
        """Wait for the end of the thread, if there is one, and until its log lines are out."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        self.flush_logs()

    def flush_logs(self) -> None:
        """Wait until the log lines of the thread are out; not for long."""
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
            self._fail_backlog(failure)  # whoever waits is told
            self._thread = None
            self._token.append(None)
            if not (self._backlog or self._stopping):
                return

    def _serve(self) -> Exception | None:
        """Run the loop until `stop`; what has ended it before, if anything: the setup, or a defect."""
        self._belong()
        try:
            self._run_loop(self._main)
        except Exception as error:
            return error
        except BaseException as error:  # a SystemExit of foreign code, such as a token's: it ends no thread of ours
            return RuntimeError(f"runqueue's thread was ended by {type(error).__name__}")
        return None

    def _belong(self) -> None:
        """Let this thread, and what works for it, be known as ours."""
        _notices.install_filters()
        _within.set(self)
        _notices.current_relay.set(self._relay)

    def _run_loop(self, main: Callable[[ExitStack], Awaitable[None]]) -> None:
        """Nobody forks until *main* closes what it is given: asyncio has locks too, while it makes its first loop."""
        with ExitStack() as starting:
            starting.enter_context(importing())
            self._preload()
            import anyio

            anyio.run(main, starting, backend="asyncio")

    def _preload(self) -> None:
        """What anyio, the loop and the sockets would import in mid-work, where a fork could take a lock along."""
        importlib.import_module("encodings.idna")
        importlib.import_module("encodings.utf_16_be")
        importlib.import_module("html")
        importlib.import_module("anyio._backends._asyncio")
        importlib.import_module("anyio.to_thread")

    def _run_inline(self, call: _Call) -> None:
        """Run one call in the caller's thread, with a loop of its own, and end everything again."""

        async def once(starting: ExitStack) -> None:
            import asyncio

            resolve_names_in_threads(asyncio.get_running_loop())
            async with self._setup():
                starting.close()
                await call.run()

        def run() -> None:
            self._belong()
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
            self._work_off()
            if not self._stopping:
                await self._stop.wait()
            tasks.cancel_scope.cancel()

    def _work_off(self) -> None:
        while self._backlog:
            try:
                call = self._backlog.popleft()
            except IndexError:  # it was withdrawn
                return
            self._spawn(call)

    def _spawn(self, call: _Call) -> None:
        try:
            self._task_pool.start(call.run)
        except RuntimeError as error:  # the task group has just ended
            call.fail(error)


def _raised_by(function: Callable[..., object], error: BaseException) -> bool:
    """Whether it was raised by this very function, or by C code that it called."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_code is getattr(function, "__code__", None)


async def _called(function: Callable[[], object]) -> None:
    function()


class _Call:
    """One coroutine function to run, and where its result goes."""

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

        if self.future.cancelled():  # before it could begin
            return
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
                try:
                    said = self.relay.in_progress()
                    if said is not None:
                        await self._heard(said)
                finally:
                    with suppress(InvalidStateError):  # cancelled meanwhile
                        self.future.set_result(result)

    async def _heard(self, said: Future[None]) -> None:
        """Until what was said meanwhile is out, or a handler has had its time: it may wait for this very call."""
        import asyncio

        import anyio

        loop, context, event = asyncio.get_running_loop(), contextvars.copy_context(), anyio.Event()

        def wake(_: Future[None]) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(event.set, context=context)

        said.add_done_callback(wake)
        with anyio.move_on_after(_notices.HANDLER_SECONDS):
            await event.wait()

    def fail(self, error: Exception | None) -> None:
        """End it, unless it has ended. None: cancelled."""
        if error is None:
            self.future.cancel()
        else:
            with suppress(InvalidStateError):
                self.future.set_exception(error)
