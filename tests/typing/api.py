"""
Uses the public interface as users do. mypy and pyright check this file; it is never run.

Every call here has to pass a strict check by the names of `runqueue` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import runqueue
from runqueue.errors import FlushError, Scope, StoreError

VERSION: str = runqueue.__version__


def settings(token: runqueue.Token, transport: runqueue.Transport, on_full: runqueue.OnFull) -> None:
    on_failure: runqueue.OnFailure = "warn"
    client = runqueue.Client(
        Path("mlruns"),
        max_workers=4,
        limits=runqueue.Limits(metrics=200, bytes=100_000),
        request_timeout=10.0,
        retry_timeout=60,
        token=token,
        headers={"X-Team": "vision"},
        transport=transport,
        flush_interval=2.0,
        max_pending=10_000,
        on_full=on_full,
        block_timeout=1.5,
        on_failure=on_failure,
        exit_timeout=5.0,
        handle_signals=False,
        progress=False,
        proxies=False,
    )
    uri: str = client.tracking_uri
    runqueue.Client(uri, token=lambda: "fresh", transport="httpx", on_full="drop").close(timeout=1.0)


def script() -> None:
    with runqueue.Client("http://127.0.0.1:5000", flush_interval=2.0) as client:
        run: runqueue.PendingRunId = client.create_run(
            "0", start_time=0, tags={"team": "vision", "seed": 1}, run_name="demo", parent_run_id="abc"
        )
        logs(client, run)
        logs(client, "0123abcd")
        with client.start_run(experiment_name="nightly", parent=run) as parent, parent.start_run() as child:
            handle(child)
        attached: runqueue.Run = client.attach(run)
        run_id: runqueue.RunId = attached.id
        real_id: str | None = run.run_id or client.run_from_env().run_id
        client.set_terminated(run_id, "FINISHED", end_time=0)
        operations: runqueue.RunOperations = client.flush(False, run_id=real_id or run, timeout=1.0)
        operations.await_completion(timeout=1.0)
        operations.cancel()
        done: bool = operations.done
        report: runqueue.FlushReport | None = operations.report
        assert done and report is not None and report.stored == report.total and not report.failures


def logs(client: runqueue.Client | runqueue.AsyncClient, run: runqueue.RunId) -> None:
    client.log_metrics(run, {"loss": 0.7, "acc": 1}, step=1, timestamp=0, model_id="m-1", dataset=None)
    client.log_metric(run, "loss", 0.7, step=1, timestamp=0)
    client.log_params(run, {"lr": 3e-4, "layers": 12, "name": "net", "path": Path("data")})
    client.log_param(run, "lr", 3e-4)
    client.set_tags(run, {"phase": "warm-up"})
    client.set_tag(run, "phase", 1)
    dataset = runqueue.Dataset("digits", "4f1e0c", source_type="s3", source="s3://b/k", tags={"split": "0.8"})
    client.log_inputs(run, [dataset], contexts=["training"], tags_list=[{"rows": 100}])
    client.log_input(run, dataset, context="training", tags={"rows": 100})
    client.log_artifact(run, Path("model.pt"), "models")
    client.log_artifacts(run, "plots")
    client.log_text(run, "text", "notes.txt")
    client.log_dict(run, {"a": [1, 2]}, "data.yaml")
    client.log_figure(run, object(), "figure.png", save_kwargs={"dpi": 100})
    client.log_image(run, object(), key="samples", step=1, timestamp=0)


def handle(run: runqueue.Run) -> None:
    run.log_metrics({"loss": 0.7}, step=1)
    run.log_metric("loss", 0.7, step=1)
    run.log_params({"lr": 3e-4})
    run.log_param("lr", 3e-4)
    run.set_tags({"phase": "warm-up"})
    run.set_tag("phase", "warm-up")
    run.log_input(runqueue.Dataset("digits", "4f1e0c"), context="training")
    run.log_artifact("model.pt")
    run.log_artifacts("plots", "plots")
    run.log_text("text", "notes.txt")
    run.log_dict({"a": 1}, "data.json")
    run.log_figure(object(), "figure.png")
    run.log_image(object(), "image.png")
    run.set_terminated("FAILED", end_time=0)


async def coroutine() -> None:
    async with runqueue.AsyncClient(flush_interval=2.0) as client, client.start_run("0") as run:
        run.log_metric("loss", 0.7)
        logs(client, run.id)
        operations: runqueue.RunOperations = await client.flush(synchronous=False)
        await operations
        await client.drain()
        await client.close(timeout=5.0)


def outcome(client: runqueue.Client) -> Sequence[runqueue.Entry]:
    counts: runqueue.Statistics = client.statistics()
    accepted: int = counts.accepted + counts.pending + counts.in_flight + counts.stored + counts.failed + counts.dropped
    traffic: tuple[int, int, int, int] = (counts.cut, counts.retried, counts.requests, counts.bytes_sent)
    assert accepted or traffic
    try:
        client.flush()
    except FlushError as error:
        failures: tuple[runqueue.OperationFailure, ...] = error.failures
        for failure in failures:
            run_id: Any = failure.run_id
            cause: Exception = failure.error
            if isinstance(cause, StoreError) and cause.retriable and cause.scope is not Scope.ENTRY:
                retry_after: float | None = cause.retry_after
                text: str = f"{run_id}: {failure.operation}, {failure.summary()}, {retry_after}"
                assert failure.count > 0 and not failure.final, text
        entry: runqueue.Entry = failures[0].entries[0]
        kind: runqueue.EntryKind = entry.kind
        fields: tuple[Any, ...] = (kind, entry.key, entry.value, entry.step, entry.timestamp)
        assert fields
        return failures[0].entries
    except runqueue.QueueFullError as error:
        raise runqueue.RunqueueError("no room") from error
    return client.failures[0].entries
