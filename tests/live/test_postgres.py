"""PostgreSQL when things go wrong: drivers, passwords, servers that stop, transactions that conflict."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import BAD_REQUEST
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

import runqueue
from support.embedded import NOLOAD, mlflow_client, mlflow_store, read
from support.mlflow_server import free_port, wait_until
from support.postgres import DRIVERS, PASSWORD, PASSWORD_ROLE, Postgres, shared_postgres
from support.readback import Point

pytestmark = [pytest.mark.live, NOLOAD]

WAIT = 20.0
"""Seconds after which what never happens is a failure."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with shared_postgres() as server:
        yield server


@pytest.fixture
def uri(postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)  # where MLflow would put artifacts
    uri = postgres.uri("mlflow", "psycopg2")
    yield uri
    mlflow_store(uri).engine.dispose()


def failing(uri: str, **settings: Any) -> tuple[runqueue.FlushError, str]:
    """Log one point to a URI that cannot store it; return the flush's failure, and all text that a user may see."""
    client = runqueue.Client(uri, **settings)
    client.log_metric("a" * 32, "m", 1.0)
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    assert client.statistics().pending == 1
    seen = f"{caught.value} {caught.value.failures!r} {client!r}"
    with pytest.raises(runqueue.FlushError) as closed:
        client.close()
    return caught.value, f"{seen} {closed.value}"


def cause(error: runqueue.FlushError) -> runqueue.StoreError:
    (failure,) = error.failures
    assert not failure.final
    assert isinstance(failure.error, runqueue.StoreError)
    return failure.error


# -- what cannot be opened -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", [None, *DRIVERS])
def test_each_driver_stores_what_is_logged(postgres: Postgres, uri: str, driver: str | None) -> None:
    """Also the default driver that SQLAlchemy chooses where the URI names none."""
    chosen = postgres.uri("mlflow", driver)
    with runqueue.Client(chosen) as client:
        run = client.create_run("0")
        client.log_metric(run, "m", 1.0, timestamp=1)
    assert read(uri, run.run_id)[1].metrics == {"m": [Point(0, 1, 1.0)]}
    mlflow_store(chosen).engine.dispose()


@pytest.mark.parametrize(("driver", "package"), [("psycopg2", "psycopg2-binary"), ("psycopg", "psycopg[binary]")])
def test_a_driver_that_is_missing_names_what_to_install(
    driver: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not tried again, and everything stays queued."""
    monkeypatch.setitem(sys.modules, driver, None)
    error, seen = failing(f"postgresql+{driver}://user:{PASSWORD}@127.0.0.1:1/db", retry_timeout=WAIT)
    assert f"pip install '{package}'" in str(error)
    assert not cause(error).retriable
    assert PASSWORD not in seen


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_database_that_cannot_be_reached_is_not_retried_by_mlflow(
    driver: str, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow's own loop would take 100 s and log each attempt; runqueue alone retries."""
    caplog.set_level(logging.DEBUG)
    begun = time.monotonic()
    uri = f"postgresql+{driver}://user:{PASSWORD}@127.0.0.1:{free_port()}/db"
    error, seen = failing(uri, retry_timeout=1)
    assert time.monotonic() - begun < WAIT
    assert isinstance(cause(error), runqueue.UnavailableError)
    assert cause(error).retriable
    assert PASSWORD not in seen + caplog.text
    assert "SQLAlchemy engine could not be created" not in caplog.text


@pytest.mark.parametrize("driver", DRIVERS)
@pytest.mark.parametrize(
    "user", [f"{PASSWORD_ROLE}:wr0ng-h0rse", "nobody_at_all:wr0ng-h0rse"], ids=["password", "role"]
)
def test_credentials_that_are_refused_end_the_flush_at_once(postgres: Postgres, user: str, driver: str) -> None:
    """As after a 401. Neither the password nor the user is shown."""
    error, seen = failing(postgres.uri("mlflow", driver, user), retry_timeout=WAIT)
    assert isinstance(cause(error), runqueue.AuthError)
    assert "wr0ng-h0rse" not in seen
    assert user.partition(":")[0] not in seen


def test_a_database_that_does_not_exist_is_not_tried_again(postgres: Postgres) -> None:
    """Waiting would not make it exist."""
    error, _ = failing(postgres.uri("nosuch", "psycopg"), retry_timeout=WAIT)
    assert not cause(error).retriable
    assert "does not exist" in str(error)


def test_a_file_that_is_no_database_is_not_tried_again(tmp_path: Path) -> None:
    """MLflow itself would open it ten times."""
    file = tmp_path / "x.db"
    file.write_bytes(b"no database" * 1_000)
    error, _ = failing(f"sqlite:///{file}", retry_timeout=WAIT)
    assert not cause(error).retriable
    assert "not a database" in str(error)


# -- what goes wrong on the way --------------------------------------------------------------------------------------


def test_a_server_that_is_restarted_costs_nothing(postgres: Postgres, uri: str) -> None:
    """Entries that are logged meanwhile are stored once the server is back."""
    with runqueue.Client(uri, retry_timeout=WAIT) as client:
        run = client.create_run("0")
        client.log_metric(run, "m", 0.0, step=0, timestamp=0)
        client.flush()
        postgres.stop()
        try:
            client.log_metric(run, "m", 1.0, step=1, timestamp=1)
            flush = client.flush(synchronous=False)
            wait_until(lambda: client.statistics().retried > 0, WAIT, "nothing was retried")
        finally:
            postgres.start()
        flush.await_completion(WAIT)
    assert read(uri, run.run_id)[1].metrics == {"m": [Point(0, 0, 0.0), Point(1, 1, 1.0)]}


@pytest.mark.parametrize("driver", DRIVERS)
def test_connections_that_are_cut_in_the_middle_cost_nothing(postgres: Postgres, uri: str, driver: str) -> None:
    """Again and again while eight runs are written: every point and every run is stored once."""
    target = postgres.uri("mlflow", driver)
    over = threading.Event()

    def cut() -> None:
        with postgres.connect() as connection:
            while not over.wait(0.1):
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'mlflow'")

    cutter = threading.Thread(target=cut)
    with runqueue.Client(target, retry_timeout=60) as client:
        runs = [client.create_run(experiment_name=f"cut {driver}") for _ in range(8)]
        for step in range(500):
            for run in runs:
                client.log_metrics(run, {"a": float(step), "b": 1.0}, step=step, timestamp=step)
        flush = client.flush(synchronous=False)
        cutter.start()
        try:
            wait_until(lambda: flush.done or client.statistics().retried > 3, WAIT, "neither done nor retried")
        finally:
            over.set()
            cutter.join()
        flush.await_completion(WAIT)
    experiment = mlflow_client(uri).get_experiment_by_name(f"cut {driver}")
    found = mlflow_client(uri).search_runs([experiment.experiment_id])
    assert sorted(run.info.run_id for run in found) == sorted(str(run.run_id) for run in runs)
    for run in runs:
        assert read(uri, run.run_id)[1].metrics == {
            "a": [Point(step, step, float(step)) for step in range(500)],
            "b": [Point(step, step, 1.0) for step in range(500)],
        }
    mlflow_store(target).engine.dispose()


@pytest.mark.parametrize("driver", DRIVERS)
def test_a_dead_lock_is_tried_again(postgres: Postgres, uri: str, driver: str) -> None:
    """A real deadlock that PostgreSQL resolves by ending the client's transaction."""
    target = postgres.uri("mlflow", driver)
    with runqueue.Client(target, retry_timeout=WAIT) as client, postgres.connect("mlflow") as other:
        run = client.create_run("0")
        client.flush()
        other.execute("SET deadlock_timeout = '60s'")  # so that it is the other side that looks, after 1 s
        with other.transaction():
            other.execute("LOCK TABLE latest_metrics IN ACCESS EXCLUSIVE MODE")
            client.log_metric(run, "m", 1.0, step=1, timestamp=1)
            flush = client.flush(synchronous=False)
            wait_until(lambda: bool(waiting(postgres)), WAIT, "no transaction waits for the lock")
            other.execute("LOCK TABLE metrics IN ACCESS EXCLUSIVE MODE")
        flush.await_completion(WAIT)
    assert b"deadlock detected" in (postgres.folder / "server.log").read_bytes()
    assert read(uri, run.run_id)[1].metrics == {"m": [Point(1, 1, 1.0)]}
    mlflow_store(target).engine.dispose()


def test_a_transaction_that_could_not_be_serialised_is_tried_again(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever error MLflow turns it into: no entry is at fault."""
    store = mlflow_store(uri)
    log_batch = store.log_batch
    causes: list[Exception] = [
        DBAPIError("INSERT", (), psycopg.errors.SerializationFailure("could not serialize access")),
        DBAPIError("INSERT", (), psycopg.InterfaceError("the connection is closed"), connection_invalidated=True),
        PoolTimeout("QueuePool limit of size 5 overflow 10 reached"),
    ]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if causes:
            raise MlflowException("refused", BAD_REQUEST) from causes.pop()
        return log_batch(*args, **kwargs)

    monkeypatch.setattr(store, "log_batch", failing)
    with runqueue.Client(uri, retry_timeout=WAIT) as client:
        run = client.create_run("0")
        client.log_metrics(run, {"m": 1.0, "n": 2.0}, timestamp=1)
        client.flush()
        assert (client.statistics().retried, client.statistics().requests) == (3, 5)
    assert set(read(uri, run.run_id)[1].metrics) == {"m", "n"}


def waiting(postgres: Postgres) -> list[Any]:
    return postgres.execute("SELECT pid FROM pg_locks WHERE NOT granted")
