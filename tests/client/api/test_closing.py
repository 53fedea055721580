"""`close` beside `close`: in other threads and tasks it waits for the first, inside of the first it waits for nothing."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

import runqueue
from runqueue import FlushError
from runqueue.api._closing import Closing
from support.answers import error
from support.mlflow_server import wait_until
from support.process import Process
from support.proxy import Fault, ScriptedServer

RUN = "a" * 32
PATIENCE = 20.0


def leave_block(client: runqueue.Client) -> None:
    with client:
        pass


def raise_in_block(client: runqueue.Client) -> None:
    with pytest.raises(ValueError), client:
        raise ValueError


SECONDS: dict[str, Callable[[runqueue.Client], None]] = {
    "close": lambda client: client.close(),
    "the end of a block": leave_block,
    "a block that raises": raise_in_block,
}


@pytest.mark.parametrize("flush_interval", [None, 60])
@pytest.mark.parametrize("second", SECONDS.values(), ids=SECONDS)
def test_a_second_close_in_another_thread_waits_for_the_first(
    server: ScriptedServer,
    gate: threading.Event,
    second: Callable[[runqueue.Client], None],
    flush_interval: float | None,
) -> None:
    """It returns when everything is stored, and makes no request of its own."""
    client = runqueue.Client(server.uri, flush_interval=flush_interval)
    client.log_metric(RUN, "m", 1.0)
    stored: list[int] = []

    def work(close: Callable[[runqueue.Client], None]) -> None:
        close(client)
        stored.append(client.statistics().stored)

    threads = [threading.Thread(target=work, args=(runqueue.Client.close,))]
    threads[0].start()
    wait_until(lambda: server.count() == 1, PATIENCE, "no request")
    threads += [threading.Thread(target=work, args=(second,)) for _ in range(3)]
    for thread in threads[1:]:
        thread.start()
    threads[1].join(0.2)
    assert stored == [] and all(thread.is_alive() for thread in threads)
    gate.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert stored == [1, 1, 1, 1]
    assert server.count() == 1


def test_many_threads_close_at_once_and_one_does_it(server: ScriptedServer) -> None:
    """Whichever is the first."""
    for _ in range(20):
        client = runqueue.Client(server.uri)
        client.log_metric(RUN, "m", 1.0)
        barrier, stored = threading.Barrier(4), list[int]()

        def work(
            client: runqueue.Client = client, barrier: threading.Barrier = barrier, stored: list[int] = stored
        ) -> None:
            barrier.wait(PATIENCE)
            client.close()
            stored.append(client.statistics().stored)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert stored == [1, 1, 1, 1]
    assert server.count() == 20


def test_the_timeout_of_a_second_close_bounds_its_wait(server: ScriptedServer, gate: threading.Event) -> None:
    """The first one goes on."""
    client = runqueue.Client(server.uri)
    client.log_metric(RUN, "m", 1.0)
    first = threading.Thread(target=client.close)
    first.start()
    wait_until(lambda: server.count() == 1, PATIENCE, "no request")
    begun = time.monotonic()
    client.close(timeout=0.1)
    assert 0.1 <= time.monotonic() - begun < 10
    assert first.is_alive()
    gate.set()
    first.join(PATIENCE)
    assert client.statistics().stored == 1


def test_the_failures_are_raised_by_the_first_close_alone(server: ScriptedServer, gate: threading.Event) -> None:
    """Each failure is reported once. The second call returns when the first one has raised."""
    server.fail("", Fault.answer(400, error("INVALID_PARAMETER_VALUE")), times=None)
    client = runqueue.Client(server.uri)
    client.log_metric(RUN, "m", 1.0)
    raised: list[str] = []

    def close() -> None:
        try:
            client.close()
        except FlushError as failure:
            raised.append(type(failure).__name__)

    first = threading.Thread(target=close)
    first.start()
    wait_until(lambda: server.count() >= 1, PATIENCE, "no request")
    second = threading.Thread(target=close)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    first.join(PATIENCE)
    second.join(PATIENCE)
    assert raised == ["FlushError"]


class ClosingWhenCollected:
    def __init__(self, client: runqueue.Client) -> None:
        self.client = client
        self.itself = self  # so that the garbage collection finds it, and not the last reference

    def __del__(self) -> None:
        self.client.close()


def close_in_handler(client: runqueue.Client) -> None:
    before = signal.signal(signal.SIGUSR1, lambda number, frame: client.close())
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def close_in_collection(client: runqueue.Client) -> None:
    ClosingWhenCollected(client)
    gc.collect()


NESTED = {"a signal handler": close_in_handler, "a garbage collection": close_in_collection}


@pytest.mark.parametrize("moment", ["begin", "flush", "stop", "late"])
@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
def test_a_close_inside_of_a_close_of_the_same_thread_does_not_wait_for_it(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, nested: Callable[[runqueue.Client], None], moment: str
) -> None:
    """It comes before or after the call counts as begun, in the flush, or at the end; all is stored once."""
    client = runqueue.Client(server.uri)
    client.log_metric(RUN, "m", 1.0)
    owner, name = {
        "begin": (client._closing, "begin"),
        "flush": (client._engine, "flush"),
        "stop": (client._engine, "stop"),
        "late": (client._engine.late, "warn_of_lost"),
    }[moment]
    function = getattr(owner, name)
    calls: list[None] = []

    def interrupted(*args: object, **kwargs: object) -> object:
        if not calls:
            calls.append(None)
            nested(client)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    client.close()
    assert calls and client.statistics().stored == 1
    assert server.count() == 1


def test_a_child_that_is_forked_during_a_close_does_not_wait_for_it(server: ScriptedServer) -> None:
    """The thread that closes the client runs in the parent only."""
    server.fail("", Fault.hold(), times=1)
    script = f"""
client = runqueue.Client(URI)
client.log_metric("{RUN}", "m", 1.0)
thread = threading.Thread(target=client.close)
thread.start()
while client.statistics().requests == 0:
    time.sleep(0.01)
assert ended(child(client.close)) == 0
say("child")
"""
    with Process(script, server.uri) as process:
        process.expect("child")
        server.let_go()
        done = process.end()
    assert (done.code, done.err) == (0, "")
    assert server.count() == 1


def test_its_repr_tells_the_state() -> None:
    """Not begun, under way, ended."""
    closing = Closing()
    assert repr(closing) == "<Closing not begun>"
    assert closing.begin() and not closing.begin()
    with closing:
        assert repr(closing) == "<Closing under way>"
    assert repr(closing) == "<Closing ended>"


async def a_request(server: ScriptedServer) -> None:
    await anyio.to_thread.run_sync(wait_until, lambda: server.count() == 1, PATIENCE, "no request")


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
class TestAsyncClient:
    """The same in coroutines."""

    pytestmark = pytest.mark.anyio

    async def test_a_second_close_in_another_task_waits_for_the_first(
        self, server: ScriptedServer, gate: threading.Event
    ) -> None:
        """The loop goes on meanwhile."""
        client = runqueue.AsyncClient(server.uri)
        client.log_metric(RUN, "m", 1.0)
        stored: list[int] = []

        async def close() -> None:
            await client.close()
            stored.append(client.statistics().stored)

        async def leave_block() -> None:
            async with client:
                pass
            stored.append(client.statistics().stored)

        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(close)
                await a_request(server)
                tasks.start_soon(close)
                tasks.start_soon(leave_block)
                await anyio.sleep(0.1)
                assert stored == []
                await client.close(timeout=0.05)
                assert stored == []
                gate.set()
        assert stored == [1, 1, 1]
        assert server.count() == 1

    async def test_a_second_close_in_another_thread_waits_for_the_first(
        self, server: ScriptedServer, gate: threading.Event, anyio_backend: str
    ) -> None:
        """The loop of another thread."""
        client = runqueue.AsyncClient(server.uri)
        client.log_metric(RUN, "m", 1.0)
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.close)
                await a_request(server)
                thread = threading.Thread(target=anyio.run, args=(client.close,), kwargs={"backend": anyio_backend})
                thread.start()
                await anyio.sleep(0.1)
                assert thread.is_alive()
                gate.set()
            await anyio.to_thread.run_sync(thread.join, PATIENCE)
        assert not thread.is_alive()

    async def test_a_close_that_is_cancelled_lets_the_others_return(
        self, server: ScriptedServer, gate: threading.Event
    ) -> None:
        """What it has not sent is lost, and warned of."""
        client = runqueue.AsyncClient(server.uri)
        client.log_metric(RUN, "m", 1.0)
        with anyio.fail_after(PATIENCE):
            async with anyio.create_task_group() as tasks:
                scope = anyio.CancelScope()

                async def close() -> None:
                    with scope:
                        await client.close()

                tasks.start_soon(close)
                await a_request(server)
                tasks.start_soon(client.close)
                await anyio.sleep(0.05)
                scope.cancel()
        assert client.statistics().pending == 0
