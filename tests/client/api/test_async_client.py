"""
`AsyncClient` in front of a server that answers by script, tested as its users test it: on asyncio with pytest-asyncio,
on trio with anyio's plugin.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import pytest_asyncio

import runqueue
from runqueue import AsyncClient, ClosedError, FlushError, QueueFullError
from runqueue.stores._resolve import make_store
from support.answers import error
from support.mlflow_server import wait_until
from support.proxy import Fault, ScriptedServer
from support.warnings_logged import dropped_by_run
from support.wire_log import entries, names

RUN = "a" * 32
SHORT_INTERVAL = 0.05
"""Seconds between two background flushes."""
LONG_INTERVAL = 3_600.0
"""Seconds: no background flush happens within a test."""
PATIENCE = 30.0
"""Seconds until a test that waits has failed."""
NOT_FOUND = Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST"))


def created(run_id: str) -> Fault:
    return Fault.answer(200, {"run": {"info": {"run_id": run_id}}})


def log(client: AsyncClient, count: int, *, run: Any = RUN, start: int = 0) -> None:
    """Log one metric for `count` steps."""
    for step in range(start, start + count):
        client.log_metric(run, "m", float(step), step)


def steps(server: ScriptedServer) -> list[int]:
    """Return the steps of the metrics that the server was sent for `RUN`, in order."""
    batches = [request for request in server.to("runs/log-batch") if request.json["run_id"] == RUN]
    return [point["step"] for request in batches for point in entries(request, "metrics")]


def unsettled(client: AsyncClient) -> int:
    now = client.statistics()
    return now.pending + now.in_flight


def engine_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "runqueue"]


class AsyncClientTests:
    """The cases for both event loops."""

    # -- methods and blocks --------------------------------------------------------------------------------------------

    async def test_log_calls_are_plain_calls_and_flush_and_close_are_awaited(self, server: ScriptedServer) -> None:
        """The requests are those of `Client`; a closed client refuses calls, and its thread has ended."""
        server.fail("runs/create", created("r1"))
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
        assert names(server.requests) == ["create", "log-batch", "log-batch", "update"]
        assert engine_threads() == []

    async def test_a_run_is_an_async_context_manager(self, server: ScriptedServer) -> None:
        """A run whose block is cancelled ends KILLED; `attach` ends no run."""
        server.fail("runs/create", created("r1"))
        server.fail("runs/create", created("r2"))
        async with AsyncClient(server.uri, flush_interval=60, max_workers=1) as client:
            async with client.start_run(experiment_id="0") as run:
                run.log_metric("m", 1.0)
            await client.flush()
            with anyio.CancelScope() as scope:
                async with client.start_run(experiment_id="0"):
                    scope.cancel()
                    await anyio.lowlevel.checkpoint()
            async with client.attach("other") as attached:
                attached.log_metric("m", 1.0)
        statuses = {request.json["run_id"]: request.json["status"] for request in server.to("runs/update")}
        assert statuses == {"r1": "FINISHED", "r2": "KILLED"}

    async def test_other_tasks_run_while_a_flush_is_awaited(self, client: AsyncClient, gate: threading.Event) -> None:
        """The flush waits for an answer that another task of the same loop allows."""
        client.log_metric(RUN, "m", 1.0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.flush)
            await anyio.wait_all_tasks_blocked()
            gate.set()
        assert client.statistics().stored == 1

    async def test_other_tasks_run_while_the_engine_starts(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The engine's thread starts with the first flush, and its imports take a while."""
        others_ran, waited = threading.Event(), list[bool]()

        def slow(*arguments: Any) -> Any:
            waited.append(others_ran.wait(5))
            return make_store(*arguments)

        monkeypatch.setattr("runqueue.engine._assembly.make_store", slow)
        async with AsyncClient(server.uri) as client:
            client.log_metric(RUN, "m", 1.0)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(client.flush)
                await anyio.lowlevel.checkpoint()
                await anyio.lowlevel.checkpoint()
                others_ran.set()
        assert waited == [True]

    @pytest.mark.parametrize("make", [lambda: ValueError("mine"), lambda: SystemExit(1), KeyboardInterrupt])
    async def test_a_block_that_raises_sends_nothing(
        self, server: ScriptedServer, caplog: pytest.LogCaptureFixture, make: Callable[[], BaseException]
    ) -> None:
        """As with `Client`; the exception leaves the block unchanged."""
        mine = make()
        with pytest.raises(type(mine)) as caught:
            async with AsyncClient(server.uri) as client:
                client.log_metric(RUN, "m", 1.0)
                raise mine
        assert caught.value is mine and mine.__context__ is None
        assert client.statistics().dropped == 1
        assert server.count() == 0
        assert "1 queued entries were not sent" in caplog.text

    async def test_a_block_raises_the_failures_of_its_flush(self, server: ScriptedServer) -> None:
        """After a clean end as a FlushError; after `SystemExit(0)` they are logged."""
        server.fail("", NOT_FOUND, times=None)
        with pytest.raises(FlushError):
            async with AsyncClient(server.uri) as client:
                client.log_metric(RUN, "m", 1.0)
        with pytest.raises(SystemExit):
            async with AsyncClient(server.uri) as client:
                client.log_metric(RUN, "m", 1.0)
                raise SystemExit(0)
        assert client.statistics().failed == 1

    # -- cancellation --------------------------------------------------------------------------------------------------

    async def test_a_cancelled_flush_leaves_the_rest_queued(
        self, client: AsyncClient, server: ScriptedServer, gate: threading.Event
    ) -> None:
        """The waiting ends at once. The next flush sends what is left, and nothing twice."""
        client.log_metric(RUN, "m", 1.0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(client.flush)
            await anyio.to_thread.run_sync(server.wait_for, lambda: len(server._requests) == 1)
            tasks.cancel_scope.cancel()
        gate.set()
        client.log_metric(RUN, "m", 2.0)
        await client.flush()
        assert client.statistics().stored == 2
        assert server.count() == 2

    async def test_a_cancelled_block_ends_the_client(self, server: ScriptedServer, gate: threading.Event) -> None:
        """The engine ends although the task is being cancelled; every entry is counted."""
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
        assert engine_threads() == []

    # -- what `flush` returns ------------------------------------------------------------------------------------------

    async def test_operations_can_be_awaited(self, server: ScriptedServer) -> None:
        """
        Also those of a `Client`: before and after the end of the flush, by several tasks; they raise its failures.
        """
        with runqueue.Client(server.uri) as client:
            client.log_metric(RUN, "m", 1.0)
            operations = client.flush(synchronous=False)
            await operations
            await operations
            server.fail("", NOT_FOUND)
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

    async def test_awaiting_the_flush_of_a_client_that_has_ended_raises_closed_error(
        self, server: ScriptedServer, gate: threading.Event
    ) -> None:
        """As `await_completion` does, and not an exception of `concurrent.futures`."""
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

    # -- back-pressure -------------------------------------------------------------------------------------------------

    async def test_a_full_queue_raises_at_once_and_drain_waits_for_room(
        self, server: ScriptedServer, gate: threading.Event
    ) -> None:
        """Also with `on_full="block"`: a log call must not block the event loop."""
        async with AsyncClient(server.uri, flush_interval=SHORT_INTERVAL, max_pending=50) as client:
            await client.drain()
            begun = time.monotonic()
            with pytest.raises(QueueFullError, match="50 of at most 50"):
                log(client, 51)
            assert time.monotonic() - begun < 5
            drained = anyio.Event()

            async def drain() -> None:
                await client.drain()
                drained.set()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(drain)
                with anyio.move_on_after(0.2):
                    await drained.wait()
                assert not drained.is_set()
                gate.set()
            for step in range(50, 500):
                if unsettled(client) >= 50:
                    await client.drain()
                log(client, 1, start=step)
            await client.flush()
            assert client.statistics().stored == 500
        assert steps(server) == list(range(500))

    async def test_drain_sends_what_fills_the_queue_exactly(self, server: ScriptedServer) -> None:
        """No call was refused, so no call has woken the engine; the next background flush is an hour away."""
        async with AsyncClient(server.uri, flush_interval=LONG_INTERVAL, max_pending=50) as client:
            log(client, 1)
            await client.flush()
            log(client, 50)
            with anyio.fail_after(PATIENCE):
                await client.drain()
            assert client.statistics().stored == 51

    async def test_a_full_queue_that_drops_raises_nothing_and_warns(
        self, server: ScriptedServer, gate: threading.Event, caplog: pytest.LogCaptureFixture
    ) -> None:
        """With `on_full="drop"`."""
        async with AsyncClient(server.uri, flush_interval=SHORT_INTERVAL, max_pending=50, on_full="drop") as client:
            log(client, 60)
            gate.set()
        assert dropped_by_run(caplog) == {RUN: 10}

    async def test_drain_ends_when_entries_of_a_run_that_cannot_be_created_are_given_up(
        self, server: ScriptedServer
    ) -> None:
        """They make room although no request has ended."""
        server.fail(
            "runs/create", Fault.answer(400, error("RESOURCE_DOES_NOT_EXIST", "no such experiment")), times=None
        )
        async with AsyncClient(server.uri, flush_interval=SHORT_INTERVAL, max_pending=20) as client:
            run = client.create_run("7")

            def is_refused() -> bool:
                return server.count() > 0 and not client.statistics().in_flight

            await anyio.to_thread.run_sync(wait_until, is_refused, PATIENCE, "the run was not refused")
            log(client, 20 - unsettled(client), run=run)
            with anyio.fail_after(PATIENCE):
                await client.drain()
            log(client, 1)
        assert steps(server) == [0]

    async def test_closing_the_client_ends_a_drain(self, server: ScriptedServer, gate: threading.Event) -> None:
        """With a ClosedError, as every call on a closed client."""
        client = AsyncClient(server.uri, flush_interval=SHORT_INTERVAL, max_pending=5)
        log(client, 5)

        async def drain() -> None:
            with pytest.raises(ClosedError):
                await client.drain()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain)
            await anyio.lowlevel.checkpoint()
            await client.close(timeout=0.1)
        gate.set()


@pytest.mark.asyncio
class TestOnAsyncio(AsyncClientTests):
    """With pytest-asyncio."""

    @pytest_asyncio.fixture
    async def client(self, server: ScriptedServer) -> AsyncIterator[AsyncClient]:
        async with AsyncClient(server.uri) as client:
            yield client

    async def test_a_cancelled_task_leaves_the_rest_of_many_requests_queued(
        self, client: AsyncClient, server: ScriptedServer
    ) -> None:
        """
        `asyncio.Task.cancel` in the middle of a flush of three requests: the next flush loses and repeats nothing.
        """
        server.fail("", Fault.hold(), times=1)
        log(client, 2_500)
        flush = asyncio.create_task(client.flush())
        await asyncio.to_thread(wait_until, lambda: server.count() == 1, PATIENCE, "no request")
        flush.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flush
        server.let_go()
        await client.flush()
        assert client.statistics().stored == 2_500
        assert steps(server) == list(range(2_500))


@pytest.mark.anyio
class TestOnTrio(AsyncClientTests):
    """With anyio's plugin."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "trio"

    @pytest.fixture
    async def client(self, server: ScriptedServer) -> AsyncIterator[AsyncClient]:
        async with AsyncClient(server.uri) as client:
            yield client


# -- several event loops: plain functions, as no plugin runs a test in more than one ----------------------------------


def test_a_client_can_be_used_in_several_event_loops(server: ScriptedServer) -> None:
    """It is made outside of any loop, and used in one after the other, of both kinds."""
    client = AsyncClient(server.uri)

    async def use() -> None:
        client.log_metric(RUN, "m", 1.0)
        await client.flush()

    asyncio.run(use())
    anyio.run(use, backend="trio")
    asyncio.run(use())
    anyio.run(client.close, backend="trio")
    assert client.statistics().stored == server.count() == 3


@pytest.mark.parametrize("flush_interval", [None, 0.01])
def test_log_calls_between_two_event_loops_are_kept(server: ScriptedServer, flush_interval: float | None) -> None:
    """Whether the client streams or not."""
    client = AsyncClient(server.uri, flush_interval=flush_interval)

    async def use(first: int) -> None:
        log(client, 5, start=first)
        await client.flush()

    asyncio.run(use(0))
    client.log_metric(RUN, "m", 1.0, 5)
    asyncio.run(use(6))
    asyncio.run(client.close())
    assert steps(server) == list(range(11))
