"""The embedded default when things go wrong: stores that cannot be opened, calls that hang, answers that are lost."""

from __future__ import annotations

import importlib.util
import math
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import orjson
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from sqlalchemy.exc import OperationalError

import runqueue
from runqueue.errors import ConfigError
from runqueue.stores import _mlflow_calls
from runqueue.stores._mlflow import MlflowStore
from runqueue.stores._protocol import LOG_BATCH, Traffic
from support.embedded import NOLOAD, mlflow_store, only, read, run_ids
from support.readback import Point

pytestmark = [pytest.mark.live, NOLOAD]

WAIT = 20.0
"""Seconds after which a test that waits for ever fails."""


# -- what cannot be opened -------------------------------------------------------------------------------------------

REAL_RUN = "a" * 32


def fill(client: runqueue.Client) -> None:
    """Log 201 entries: a run that is still to be created, 100 points for it, and 100 points for a run that exists."""
    for run in (client.create_run("0"), REAL_RUN):
        for step in range(100):
            client.log_metric(run, "m", float(step), step=step)


def assert_cannot_be_opened(client: runqueue.Client, message: str) -> None:
    """Assert that a flush reports the reason after one call for each run, and that everything stays queued."""
    fill(client)
    with pytest.raises(runqueue.FlushError, match=f"(?s)^201 of 201 entries .*{message}") as caught:
        client.flush()
    statistics = client.statistics()
    with pytest.raises(runqueue.FlushError):
        client.close()
    assert statistics.requests <= 2
    assert not any(failure.final for failure in caught.value.failures)
    assert statistics.pending == 201


@pytest.mark.parametrize("form", ["{}", "file:{}", "file://{}"])
@pytest.mark.parametrize("switch", [None, "false", "yes"])
def test_the_file_store_without_its_switch_is_refused_by_the_constructor(
    form: str, switch: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow would refuse it later. The check creates nothing."""
    if switch is not None:
        monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", switch)
    with pytest.raises(ConfigError, match="MLFLOW_ALLOW_FILE_STORE"):
        runqueue.Client(form.format(tmp_path / "files"))
    assert not list(tmp_path.iterdir())


def test_a_database_driver_that_is_missing_is_a_clear_error(tmp_path: Path) -> None:
    """It names the module; the password is not shown."""
    client = runqueue.Client("mysql://user:secret@127.0.0.1:1/db", retry_timeout=WAIT)
    assert_cannot_be_opened(client, "MySQLdb")
    assert "secret" not in repr(client)


def test_a_dialect_that_does_not_exist_is_not_tried_again(tmp_path: Path) -> None:
    """Waiting would not make it exist."""
    client = runqueue.Client(f"sqlite+nosuch:///{tmp_path / 'x.db'}", retry_timeout=3)
    assert_cannot_be_opened(client, "nosuch")


@pytest.mark.parametrize("face", [runqueue.Client, runqueue.AsyncClient])
@pytest.mark.parametrize("missing", ["mlflow", "sqlalchemy"])
def test_without_the_extra_the_default_is_refused_by_the_constructor(
    face: type[runqueue.Client | runqueue.AsyncClient], missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says what to install. A server's URI needs no extra."""
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == missing else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(runqueue.ConfigError, match=rf"pip install 'runqueue\[mlflow\]' \(not installed: {missing}\)"):
        face()
    face("http://127.0.0.1:1")
    assert list(tmp_path.iterdir()) == []


# -- calls under way -------------------------------------------------------------------------------------------------


class Held:
    """A method of MLflow's store that does its work and then waits until it is released."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.begun, self.free = threading.Event(), threading.Event()
        self.calls = 0
        self._method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        result = self._method(*args, **kwargs)
        self.begun.set()
        assert self.free.wait(WAIT)
        return result


@pytest.mark.parametrize("method", ["create_run", "log_batch"])
def test_a_flush_that_times_out_does_not_repeat_the_call_under_way(
    embedded_uri: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call goes on in its thread. The next flush takes its outcome, and sends only the rest."""
    store = mlflow_store(embedded_uri)
    held = Held(getattr(store, method))
    monkeypatch.setattr(store, method, held)
    with runqueue.Client(embedded_uri) as client:
        run = client.create_run("0")
        for step in range(1_500):
            client.log_metric(run, "m", float(step), step=step, timestamp=1)
        flush = client.flush(synchronous=False, timeout=0.5)
        assert held.begun.wait(WAIT)
        with pytest.raises(runqueue.FlushError, match="still queued"):
            flush.await_completion(WAIT)
        assert held.calls == 1
        held.free.set()
        client.flush()
        assert held.calls == {"create_run": 1, "log_batch": 2}[method]
    assert run_ids(embedded_uri) == [run.run_id]
    assert read(embedded_uri, run.run_id)[1].metrics == {"m": [Point(step, 1, float(step)) for step in range(1_500)]}


@only("sqlite")
def test_a_cancelled_call_blocks_the_next_one_until_it_returns(
    embedded_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a store takes one call at a time, and a thread cannot be cancelled."""
    begun, overtaken, free = threading.Event(), threading.Event(), threading.Event()
    order: list[str] = []

    def call(_: object, data: dict[str, str]) -> dict[str, str]:
        order.append(f"{data['name']} begins")
        if data["name"] == "first":
            begun.set()
            assert free.wait(WAIT)
        else:
            overtaken.set()
        order.append(f"{data['name']} ends")
        return {}

    async def main() -> None:
        store = MlflowStore(embedded_uri, Traffic())
        async with anyio.create_task_group() as tasks:
            first = anyio.CancelScope()

            async def abandoned() -> None:
                with first:
                    await store.call(LOG_BATCH, orjson.dumps({"name": "first"}))

            tasks.start_soon(abandoned)
            await anyio.to_thread.run_sync(begun.wait, WAIT)
            first.cancel()
            tasks.start_soon(store.call, LOG_BATCH, orjson.dumps({"name": "second"}))
            # Time for a wrong second call to begin. A right one waits for `free`, which is set afterwards.
            await anyio.to_thread.run_sync(overtaken.wait, 0.2)
            free.set()

    monkeypatch.setitem(_mlflow_calls.CALLS, LOG_BATCH, call)
    anyio.run(main)
    assert order == ["first begins", "first ends", "second begins", "second ends"]


def test_a_run_whose_creation_was_not_answered_is_found_again(
    embedded_uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The store has committed and then failed, twice: there is one run. The search for it can read NaN metrics."""
    store = mlflow_store(embedded_uri)
    create, failures = store.create_run, iter(range(2))

    def failing(**kwargs: Any) -> Any:
        run = create(**kwargs)
        if next(failures, None) is not None:
            raise MlflowException("gone away", TEMPORARILY_UNAVAILABLE)
        return run

    monkeypatch.setattr(store, "create_run", failing)
    with runqueue.Client(embedded_uri, retry_timeout=WAIT) as client:
        runs = [client.create_run("0", tags={"t": "1"}) for _ in range(2)]
        for run in runs:
            client.log_metrics(run, {"nan": math.nan, "inf": math.inf}, timestamp=1)
        client.flush()
        client.log_metric(runs[0], "m", 1.0, timestamp=1)
    assert caplog.text == ""
    assert sorted(run_ids(embedded_uri)) == sorted(str(run.run_id) for run in runs)
    assert set(read(embedded_uri, runs[0].run_id)[1].metrics) == {"nan", "inf", "m"}


@only("sqlite")
def test_a_locked_database_is_tried_again(embedded_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether MLflow or the database reports the lock (SQLite after 20 s). Everything is stored once."""
    store = mlflow_store(embedded_uri)
    log_batch = store.log_batch
    locked: list[Exception] = [
        OperationalError("INSERT", (), sqlite3.OperationalError("database is locked")),
        MlflowException("(sqlite3.OperationalError) database is locked", TEMPORARILY_UNAVAILABLE),
    ]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if locked:
            raise locked.pop()
        return log_batch(*args, **kwargs)

    monkeypatch.setattr(store, "log_batch", failing)
    with runqueue.Client(embedded_uri, retry_timeout=WAIT) as client:
        run = client.create_run("0")
        client.log_metrics(run, {"m": 1.0, "n": 2.0}, timestamp=1)
        client.flush()
        assert (client.statistics().retried, client.statistics().stored) == (2, 3)
    assert read(embedded_uri, run.run_id)[1].metrics == {"m": [Point(0, 1, 1.0)], "n": [Point(0, 1, 2.0)]}
