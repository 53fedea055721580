"""
`AsyncClient` with a real server, tested as its users test it: on asyncio with pytest-asyncio, on trio with anyio's
plugin.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import pytest_asyncio

import runqueue
from support.mlflow_server import MlflowServer, clean_environment
from support.proxy import Fault, FaultyProxy
from support.readback import Point, Readback
from support.wire_log import assert_in_order, names, of_run

pytestmark = pytest.mark.live

EXAMPLE = Path(__file__).parents[2] / "examples" / "async_service.py"


class AsyncClientTests:
    """The cases for both event loops."""

    async def test_every_method_stores_what_it_is_given(
        self, proxy: FaultyProxy, readback: Readback, experiment_id: str
    ) -> None:
        """Log calls are plain calls; methods that wait are awaited; leaving the block flushes."""
        async with runqueue.AsyncClient(proxy.uri) as client:
            run = client.create_run(experiment_id, run_name="async")
            client.log_params(run, {"p": 1})
            client.log_metric(run, "m", 1.0, step=1, timestamp=1)
            await client.flush()
            assert run.run_id is not None
            client.log_metrics(run, {"m": 2.0}, step=2, timestamp=2)
            operations = await client.flush(synchronous=False)
            await operations
            assert operations.done
            client.set_tag(run, "t", "x")
            client.log_inputs(run, [runqueue.Dataset("d", "1")])
            client.set_terminated(run)
        with pytest.raises(runqueue.ClosedError):
            client.log_param(run, "p", 1)
        stored = readback.run(run.run_id)
        assert (stored.name, stored.status) == ("async", "FINISHED")
        assert stored.content.params == {"p": "1"}
        assert stored.content.tags == {"t": "x"}
        assert stored.content.metrics == {"m": [Point(1, 1, 1.0), Point(2, 2, 2.0)]}
        assert len(stored.content.inputs) == 1
        assert_in_order(of_run(proxy.requests, run.run_id)[2:])
        assert names(proxy.requests) == ["create", "log-batch", "log-batch", "log-batch", "log-inputs", "update"]

    async def test_an_experiment_can_be_given_by_name(
        self, client: runqueue.AsyncClient, readback: Readback, request: pytest.FixtureRequest
    ) -> None:
        """The experiment is looked up, or made, in the background."""
        name = f"{request.node.name} & ü/?#%+ {uuid.uuid4().hex}"
        run = client.create_run(experiment_name=name)
        await client.flush()
        assert readback.run(run.run_id).experiment_id == readback.experiment_id(name)

    async def test_a_flush_does_not_block_the_event_loop(
        self, client: runqueue.AsyncClient, proxy: FaultyProxy, readback: Readback, experiment_id: str
    ) -> None:
        """While the server withholds its answer, other tasks of the loop run."""
        run_id = readback.new_run(experiment_id)
        proxy.fail("runs/log-batch", Fault.hold())

        async def work() -> None:
            for _ in range(100):
                await anyio.sleep(0.001)
            proxy.let_go()  # never reached if the flush blocks the loop

        async with anyio.create_task_group() as tasks:
            client.log_metric(run_id, "m", 1.0)
            tasks.start_soon(work)
            await client.flush()
        assert proxy.count() == 1

    async def test_a_flush_raises_its_failures_where_it_is_awaited(
        self, client: runqueue.AsyncClient, readback: Readback, experiment_id: str
    ) -> None:
        """One FlushError, the same as that of a `Client`."""
        run_id = readback.new_run(experiment_id)
        client.log_metrics(run_id, {"good": 1.0, "bad*key": 2.0}, step=5, timestamp=1)
        with pytest.raises(runqueue.FlushError, match=r"^1 of 2 entries") as caught:
            await client.flush()
        (failure,) = caught.value.failures
        assert list(failure.entries) == [runqueue.Entry("metric", "bad*key", 2.0, 5, 1)]
        assert readback.content(run_id).metrics == {"good": [Point(5, 1, 1.0)]}

    async def test_a_block_that_raises_sends_nothing(self, proxy: FaultyProxy, experiment_id: str) -> None:
        """The exception leaves the block unchanged."""
        error = ZeroDivisionError("mine")
        with pytest.raises(ZeroDivisionError) as caught:
            async with runqueue.AsyncClient(proxy.uri) as client:
                client.create_run(experiment_id)
                raise error
        assert caught.value is error
        assert proxy.count() == 0

    async def test_a_cancelled_flush_leaves_the_rest_queued(
        self, proxy: FaultyProxy, readback: Readback, experiment_id: str
    ) -> None:
        """The task that has waited goes on at once; the end of the block stores every point, once."""
        run_id = readback.new_run(experiment_id)
        proxy.fail("runs/log-batch", Fault.hold())
        async with runqueue.AsyncClient(proxy.uri) as client:
            for step in range(1_500):
                client.log_metrics(run_id, {"m": 1.0}, step=step, timestamp=1)
            with anyio.move_on_after(0.1) as scope:
                await client.flush()
            assert scope.cancelled_caught
            proxy.let_go()
        assert readback.content(run_id).metrics == {"m": [Point(step, 1, 1.0) for step in range(1_500)]}


@pytest.mark.asyncio
class TestOnAsyncio(AsyncClientTests):
    """With pytest-asyncio."""

    @pytest_asyncio.fixture
    async def client(self, proxy: FaultyProxy) -> AsyncIterator[runqueue.AsyncClient]:
        async with runqueue.AsyncClient(proxy.uri) as client:
            yield client


@pytest.mark.anyio
class TestOnTrio(AsyncClientTests):
    """With anyio's plugin."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "trio"

    @pytest.fixture
    async def client(self, proxy: FaultyProxy) -> AsyncIterator[runqueue.AsyncClient]:
        async with runqueue.AsyncClient(proxy.uri) as client:
            yield client


# -- several event loops: plain functions, as no plugin runs a test in more than one ----------------------------------


def test_one_client_serves_two_loops_and_a_thread(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """No part of it lives in the caller's loop: a second `asyncio.run` works like the first, and any thread may log."""
    client = runqueue.AsyncClient(proxy.uri)
    run = client.create_run(experiment_id)

    async def log(step: int) -> None:
        client.log_metric(run, "m", float(step), step=step, timestamp=1)
        await client.flush()

    asyncio.run(log(0))
    asyncio.run(log(1))
    thread = threading.Thread(target=client.log_metric, args=(run, "m", 2.0, 2, 1))
    thread.start()
    thread.join()
    anyio.run(log, 3, backend="trio")
    asyncio.run(client.close())
    assert readback.content(run.run_id).metrics == {"m": [Point(step, 1, float(step)) for step in range(4)]}


# -- the example -----------------------------------------------------------------------------------------------------


def run_example(backend: str, uri: str, folder: Path) -> str:
    """Run the example; return the id of its run."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--backend", backend, "--tracking-uri", uri],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=folder,
        env=clean_environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()[-1]


@pytest.mark.whole
def test_the_async_example_stores_the_same_on_trio_as_on_asyncio(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path
) -> None:
    """Its run and all child runs, ids and times aside."""
    results: dict[str, Any] = {}
    known = set(readback.run_ids("0"))
    for backend in ("asyncio", "trio"):
        run_id = run_example(backend, mlflow_server.uri, tmp_path)
        new = set(readback.run_ids("0")) - known
        known |= new
        assert run_id in new
        results[backend] = sorted(
            (
                stored.name,
                stored.status,
                stored.tags.get("mlflow.parentRunId", "") == run_id,
                sorted(stored.content.params.items()),
                sorted(stored.content.tags.items()),
                [
                    (key, [(point.step, point.value) for point in points])
                    for key, points in sorted(stored.content.metrics.items())
                ],
            )
            for stored in map(readback.run, new)
        )
    assert results["trio"] == results["asyncio"]
    assert len(results["trio"]) > 1
    assert any(metrics for *_, metrics in results["trio"])
