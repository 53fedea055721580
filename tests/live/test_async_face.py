"""The async face, on asyncio and on trio: the same methods, and the same result."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import anyio
import pytest

import runqueue
from support.mlflow_server import MlflowServer, clean_environment
from support.proxy import Fault, FaultyProxy
from support.readback import Point, Readback
from support.wire_log import assert_in_order, names, of_run

pytestmark = pytest.mark.live

BACKENDS = ["asyncio", "trio"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "async_service.py"


def run_example(backend: str, uri: str, folder: Path) -> str:
    """Run the example, and return the id of its run."""
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


def test_the_async_example_stores_the_same_on_trio_as_on_asyncio(
    mlflow_server: MlflowServer, readback: Readback, tmp_path: Path
) -> None:
    """Its run and all child runs hold the same, but for ids and times."""
    results: dict[str, Any] = {}
    known = set(readback.run_ids("0"))
    for backend in BACKENDS:
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_method_works_in_a_loop(proxy: FaultyProxy, readback: Readback, experiment_id: str, backend: str) -> None:
    """Log calls are plain calls; what waits is awaited; leaving the block flushes."""

    async def service() -> runqueue.PendingRunId:
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
        return run

    run = anyio.run(service, backend=backend)
    stored = readback.run(run.run_id)
    assert (stored.name, stored.status) == ("async", "FINISHED")
    assert stored.content.params == {"p": "1"}
    assert stored.content.tags == {"t": "x"}
    assert stored.content.metrics == {"m": [Point(1, 1, 1.0), Point(2, 2, 2.0)]}
    assert len(stored.content.inputs) == 1
    assert_in_order(of_run(proxy.requests, run.run_id)[2:])
    assert names(proxy.requests) == ["create", "log-batch", "log-batch", "log-batch", "log-inputs", "update"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_flush_does_not_block_the_loop(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, backend: str
) -> None:
    """While the server holds its answer back, the other tasks of the loop go on."""
    run_id = readback.new_run(experiment_id)
    proxy.fail("runs/log-batch", Fault.hold())

    async def work() -> None:
        for _ in range(100):
            await anyio.sleep(0.001)
        proxy.let_go()  # would never be reached in a loop that is blocked by the flush

    async def service() -> None:
        async with runqueue.AsyncClient(proxy.uri) as client, anyio.create_task_group() as tasks:
            client.log_metric(run_id, "m", 1.0)
            tasks.start_soon(work)
            await client.flush()

    anyio.run(service, backend=backend)
    assert proxy.count() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_failures_are_raised_where_they_are_awaited(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, backend: str
) -> None:
    """One FlushError, the same as in the sync face."""
    run_id = readback.new_run(experiment_id)

    async def service() -> runqueue.FlushError:
        async with runqueue.AsyncClient(proxy.uri) as client:
            client.log_metrics(run_id, {"good": 1.0, "bad*key": 2.0}, step=5, timestamp=1)
            with pytest.raises(runqueue.FlushError, match=r"^1 of 2 entries") as caught:
                await client.flush()
            return caught.value

    (failure,) = anyio.run(service, backend=backend).failures
    assert list(failure.entries) == [runqueue.Entry("metric", "bad*key", 2.0, 5, 1)]
    assert readback.content(run_id).metrics == {"good": [Point(5, 1, 1.0)]}


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_exception_inside_the_async_block_sends_nothing(
    proxy: FaultyProxy, experiment_id: str, backend: str
) -> None:
    """It leaves the block unchanged."""
    error = ZeroDivisionError("mine")

    async def service() -> None:
        async with runqueue.AsyncClient(proxy.uri) as client:
            client.create_run(experiment_id)
            raise error

    with pytest.raises(ZeroDivisionError) as caught:
        anyio.run(service, backend=backend)
    assert caught.value is error
    assert proxy.count() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cancelled_flush_leaves_the_rest_queued(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, backend: str
) -> None:
    """The task that waited goes on at once; the end of the block stores everything, once."""
    run_id = readback.new_run(experiment_id)
    proxy.fail("runs/log-batch", Fault.hold())

    async def service() -> None:
        async with runqueue.AsyncClient(proxy.uri) as client:
            for step in range(1_500):
                client.log_metrics(run_id, {"m": 1.0}, step=step, timestamp=1)
            with anyio.move_on_after(0.1) as scope:
                await client.flush()
            assert scope.cancelled_caught
            proxy.let_go()

    anyio.run(service, backend=backend)
    assert readback.content(run_id).metrics == {"m": [Point(step, 1, 1.0) for step in range(1_500)]}


def test_one_client_serves_two_loops_and_a_thread(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Nothing of it lives in the caller's loop: a second `asyncio.run` works like the first, and any thread may log."""
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
