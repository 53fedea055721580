"""What `flush` returns, and the face for coroutines, on asyncio and on trio."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
from collections.abc import Callable

import anyio
import anyio.to_thread
import pytest

import runqueue
from runqueue import AsyncClient, ClosedError, FlushError
from support.answers import error
from support.proxy import Fault, ScriptedServer
from support.wire_log import names

RUN = "a" * 32
BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


# -- RunOperations ---------------------------------------------------------------------------------------------------


def test_an_asynchronous_flush_returns_at_once(client: runqueue.Client, gate: threading.Event) -> None:
    """It is under way, then over; its report says what was stored."""
    client.log_metrics(RUN, {"a": 1.0, "b": 2.0})
    operations = client.flush(synchronous=False)
    assert not operations.done and operations.report is None
    assert repr(operations) == "<RunOperations under way>"
    with pytest.raises(TimeoutError):
        operations.await_completion(timeout=0.01)
    gate.set()
    operations.await_completion()
    operations.await_completion(timeout=5)
    assert operations.done and operations.report is not None
    assert (operations.report.total, operations.report.stored, operations.report.failures) == (2, 2, ())
    assert repr(operations) == "<RunOperations done, 2 of 2 stored>"


def test_a_synchronous_flush_returns_what_is_over(client: runqueue.Client) -> None:
    """Also where there was nothing to send."""
    assert client.flush().done
    assert repr(client.flush()) == "<RunOperations done, 0 of 0 stored>"


def test_an_asynchronous_flush_raises_when_it_is_waited_for(
    client: runqueue.Client, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Each time, and it is logged, as nobody may ever wait."""
    server.fail("", Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST")))
    client.log_metrics(RUN, {"a": 1.0, "b": 2.0})
    operations = client.flush(synchronous=False)
    for _ in range(2):
        with pytest.raises(FlushError):
            operations.await_completion(timeout=10)
    assert operations.report is not None and operations.report.stored == 0
    assert repr(operations) == "<RunOperations done, 0 of 2 stored>"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "2 of 2" in record.getMessage()


def test_two_flushes_report_what_each_began_with(
    client: runqueue.Client, server: ScriptedServer, gate: threading.Event
) -> None:
    """The second one's entries are not the first one's business."""
    client.log_metric(RUN, "a", 1.0)
    first = client.flush(synchronous=False)
    server.wait_for(lambda: len(server._requests) == 1)
    client.log_metrics(RUN, {"b": 1.0, "c": 1.0})
    gate.set()
    client.flush()
    first.await_completion()
    assert first.report is not None and first.report.total == 1
    assert client.statistics().stored == 3


def test_a_flush_ends_although_others_go_on_logging(client: runqueue.Client, gate: threading.Event) -> None:
    """What comes after its beginning does not keep it."""
    client.log_metric(RUN, "m", 1.0)
    operations = client.flush(synchronous=False)
    stop = threading.Event()

    def produce() -> None:
        while not stop.is_set():
            client.log_metric(RUN, "m", 1.0)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        gate.set()
        operations.await_completion(timeout=20)
    finally:
        stop.set()
        thread.join()


def test_waiting_for_a_flush_of_a_client_that_is_gone_says_so(client: runqueue.Client, gate: threading.Event) -> None:
    """The block ended by an exception while a flush was under way."""
    client.log_metric(RUN, "m", 1.0)
    operations = client.flush(synchronous=False)
    client.__exit__(KeyError, KeyError(), None)
    with pytest.raises((ClosedError, FlushError)):
        operations.await_completion(timeout=10)
    assert operations.done
    assert "under way" not in repr(operations)


def test_a_flush_begins_when_it_is_called(client: runqueue.Client, gate: threading.Event) -> None:
    """What is logged after the call belongs to the next flush, however late the engine's thread takes it up."""
    client.log_metric(RUN, "start the thread", 1.0)
    gate.set()
    client.flush()
    for _ in range(20):
        client.log_metric(RUN, "a", 1.0)
        operations = client.flush(synchronous=False)
        client.log_metrics(RUN, {"b": 1.0, "c": 1.0})
        operations.await_completion()
        assert operations.report is not None and operations.report.total == 1
        client.flush()


@BACKENDS
def test_awaiting_a_flush_of_a_client_that_is_gone_says_so(
    server: ScriptedServer, gate: threading.Event, backend: str
) -> None:
    """As `await_completion` does, and not by an error of some library."""

    async def main() -> None:
        raised: list[BaseException] = []
        client = AsyncClient(server.uri)
        client.log_metric(RUN, "m", 1.0)
        operations = await client.flush(synchronous=False)

        async def wait() -> None:
            with pytest.raises((ClosedError, concurrent.futures.CancelledError)) as caught:
                await operations
            raised.append(caught.value)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            with pytest.raises(KeyError):
                async with client:
                    raise KeyError
        assert [type(each) for each in raised] == [ClosedError]

    anyio.run(main, backend=backend)


@BACKENDS
def test_operations_can_be_awaited(client: runqueue.Client, server: ScriptedServer, backend: str) -> None:
    """In any loop, before and after the end, by several tasks at once; they raise as `await_completion` does."""

    async def main() -> None:
        client.log_metric(RUN, "m", 1.0)
        operations = client.flush(synchronous=False)
        await operations
        await operations
        server.fail("", Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST")))
        client.log_metric(RUN, "m", 1.0)
        failing = client.flush(synchronous=False)
        raised: list[FlushError] = []

        async def wait() -> None:
            try:
                await failing
            except FlushError as caught:
                raised.append(caught)

        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(wait)
        assert len(raised) == 3

    anyio.run(main, backend=backend)


# -- AsyncClient -----------------------------------------------------------------------------------------------------


@BACKENDS
def test_the_async_face_does_what_the_other_does(server: ScriptedServer, backend: str) -> None:
    """Log calls are plain calls; flush and close are awaited."""
    server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": "r1"}}}))

    async def main() -> None:
        async with AsyncClient(server.uri) as client:
            run = client.create_run("0")
            client.log_metric(run, "m", 1.0)
            assert server.count() == 0
            operations = await client.flush()
            assert operations.done and run.run_id == "r1"
            client.log_params(run, {"p": 1})
            later = await client.flush(synchronous=False)
            await later
            assert repr(client).startswith(f"<AsyncClient {server.uri} open ")
            client.set_terminated(run)
        with pytest.raises(ClosedError):
            client.log_metric(run, "m", 1.0)
        with pytest.raises(ClosedError):
            await client.flush()
        await client.close()
        assert client.statistics().stored == 3

    anyio.run(main, backend=backend)
    assert names(server.requests) == ["create", "log-batch", "log-batch", "update"]
    assert not [thread for thread in threading.enumerate() if thread.name == "runqueue"]


@BACKENDS
def test_a_wait_does_not_stop_the_callers_loop(server: ScriptedServer, gate: threading.Event, backend: str) -> None:
    """Other tasks run while a flush and a close are awaited."""

    async def main() -> None:
        async with AsyncClient(server.uri) as client:
            client.log_metric(RUN, "m", 1.0)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.flush)
                await anyio.wait_all_tasks_blocked()
                gate.set()
        assert client.statistics().stored == 1

    anyio.run(main, backend=backend)


@BACKENDS
def test_cancelling_a_flush_leaves_the_rest_queued(server: ScriptedServer, gate: threading.Event, backend: str) -> None:
    """It ends at once, and the next one sends what is left, once."""

    async def main() -> None:
        async with AsyncClient(server.uri) as client:
            client.log_metric(RUN, "m", 1.0)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.flush)
                await anyio.to_thread.run_sync(server.wait_for, lambda: len(server._requests) == 1)
                tasks.cancel_scope.cancel()
            gate.set()
            client.log_metric(RUN, "m", 2.0)
            await client.flush()
            assert client.statistics().stored == 2

    anyio.run(main, backend=backend)
    assert server.count() == 2


@BACKENDS
def test_cancelling_a_block_ends_it(server: ScriptedServer, gate: threading.Event, backend: str) -> None:
    """The engine ends although the task is being cancelled; nothing hangs, nothing is hidden."""

    async def main() -> None:
        client = AsyncClient(server.uri)
        with anyio.move_on_after(0.05) as scope:
            async with client:
                client.log_metric(RUN, "m", 1.0)
                await client.flush()
        assert scope.cancelled_caught
        now = client.statistics()
        assert now.accepted == now.pending + now.in_flight + now.stored + now.failed + now.dropped == 1
        assert now.pending == now.in_flight == 0
        with pytest.raises(ClosedError):
            client.log_metric(RUN, "m", 1.0)

    anyio.run(main, backend=backend)
    assert not [thread for thread in threading.enumerate() if thread.name == "runqueue"]


@BACKENDS
@pytest.mark.parametrize("make", [lambda: ValueError("mine"), lambda: SystemExit(1), KeyboardInterrupt])
def test_an_async_block_that_raises_sends_nothing(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, backend: str, make: Callable[[], BaseException]
) -> None:
    """As the other face; the exception is the very one."""
    mine = make()

    async def main() -> None:
        with pytest.raises(type(mine)) as caught:
            async with AsyncClient(server.uri) as client:
                client.log_metric(RUN, "m", 1.0)
                raise mine
        assert caught.value is mine and mine.__context__ is None
        assert client.statistics().dropped == 1

    anyio.run(main, backend=backend)
    assert server.count() == 0
    assert "1 queued entries were not sent" in caplog.text


@BACKENDS
def test_an_async_block_raises_what_was_not_stored(server: ScriptedServer, backend: str) -> None:
    """At a clean end as a FlushError; at a `SystemExit(0)` it is logged."""
    server.fail("", Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST")), times=None)

    async def main() -> None:
        with pytest.raises(FlushError):
            async with AsyncClient(server.uri) as client:
                client.log_metric(RUN, "m", 1.0)
        with pytest.raises(SystemExit):
            async with AsyncClient(server.uri) as client:
                client.log_metric(RUN, "m", 1.0)
                raise SystemExit(0)
        assert client.statistics().failed == 1

    anyio.run(main, backend=backend)


def test_one_async_client_may_be_used_in_several_loops(server: ScriptedServer) -> None:
    """Made outside of any; used in one after the other, of both kinds."""
    client = AsyncClient(server.uri)

    async def main() -> None:
        client.log_metric(RUN, "m", 1.0)
        await client.flush()

    asyncio.run(main())
    anyio.run(main, backend="trio")
    asyncio.run(main())

    async def end() -> None:
        await client.close()

    anyio.run(end, backend="trio")
    assert client.statistics().stored == server.count() == 3


def test_a_flush_that_somebody_waits_for_keeps_its_client(server: ScriptedServer, gate: threading.Event) -> None:
    """A function may return the flush and drop the client; what is dropped ends its flushes otherwise."""

    def begun() -> runqueue.RunOperations:
        client = runqueue.Client(server.uri)
        client.log_metric(RUN, "m", 1.0)
        return client.flush(synchronous=False)

    operations = begun()
    gc.collect()
    gate.set()
    operations.await_completion(timeout=10)
    assert operations.report is not None and operations.report.stored == 1
