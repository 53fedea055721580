"""
A server whose database is down: every call answers 500 INTERNAL_ERROR, for long, then all is well again.

Rules of this file: how long is counted in requests, which come fast here; nothing is slept for.
"""

from __future__ import annotations

import pytest

import runqueue
from runqueue.errors import RejectedError, UnavailableError
from runqueue.queueing import Scope
from runqueue.stores._mlflow import _without_retries
from support.answers import error
from support.mlflow_server import wait_until
from support.proxy import Fault, ScriptedServer
from support.wire_log import entries, names

LONG = 60
"""Requests."""
DOWN = Fault.answer(500, error("INTERNAL_ERROR", "(psycopg2.OperationalError) connection refused"))
CREATED = Fault.answer(200, {"run": {"info": {"run_id": "r1"}}})
RUN = "a" * 32


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.000001")


def log_everything(client: runqueue.Client) -> int:
    """To a run that is created, and to one that exists; how many entries."""
    for run in (client.create_run(experiment_id="0", tags={"own": "1"}), RUN):
        for step in range(50):
            client.log_metrics(run, {"loss": 1.0, "acc": 2.0}, step=step)
        client.log_params(run, {f"p{at}": at for at in range(10)})
        client.set_tags(run, {"t": "1"})
        client.log_inputs(run, [runqueue.Dataset("digits", digest="d")])
        client.set_terminated(run)
    return 1 + 2 * (100 + 10 + 1 + 1)


def assert_stored(server: ScriptedServer, client: runqueue.Client, count: int) -> None:
    """Everything, once the server was well; in requests that were never halved."""
    statistics = client.statistics()
    assert (statistics.stored, statistics.failed, statistics.pending) == (count, 0, 0)
    assert client.failures == ()
    well = [request for request in server.requests if request.answer in (b"{}", b'{"run": {"info": {"run_id": "r1"}}}')]
    for run in ("r1", RUN):
        mine = [request for request in well if request.method == "POST" and request.json.get("run_id") == run]
        assert names(mine) == ["log-batch", "log-inputs", "update"]
        assert [len(entries(mine[0], kind)) for kind in ("metrics", "params")] == [100, 10]


@pytest.mark.parametrize("flush_interval", [None, 0.05])
def test_everything_is_stored_once_the_database_is_back(server: ScriptedServer, flush_interval: float | None) -> None:
    """Creation, data, datasets and final status wait; no batch is bisected, and no entry fails."""
    server.fail("", DOWN, times=LONG)
    server.fail("runs/create", CREATED, times=None)
    with runqueue.Client(server.uri, flush_interval=flush_interval, retry_timeout=120) as client:
        count = log_everything(client)
        client.flush()
        assert server.count() > LONG
        assert_stored(server, client, count)


@pytest.mark.parametrize("flush_interval", [None, 0.05])
def test_entries_of_an_outage_beyond_retry_timeout_stay_queued_and_are_reported(
    server: ScriptedServer, flush_interval: float | None
) -> None:
    """Flush after flush, each entry once and not for good; then all of it is stored."""
    server.fail("", DOWN, times=None)
    with runqueue.Client(server.uri, flush_interval=flush_interval, retry_timeout=0.2, on_failure="raise") as client:
        count = log_everything(client)
        for _ in range(20):
            with pytest.raises(runqueue.FlushError, match=rf"^{count} of {count} entries were not stored") as caught:
                client.flush()
            assert not any(failure.final for failure in caught.value.failures)
        server.mend()
        server.fail("runs/create", CREATED, times=None)
        client.flush()
        assert_stored(server, client, count)


def test_a_stream_warns_once_that_the_database_is_down(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Background flushes probe the server; entries that stand alone in a batch do not fail either."""
    server.fail("", DOWN, times=None)
    with runqueue.Client(server.uri, flush_interval=0.01, retry_timeout=0.1) as client:
        client.log_param(RUN, "lone", 1)
        wait_until(lambda: bool(caplog.records), 30, "nothing was said")
        sent = server.count()
        wait_until(lambda: server.count() > sent + 3, 30, "no probes")
        server.mend()
        client.flush()
        assert client.statistics().stored == 1
    assert [record.message.count("does not take data") for record in caplog.records] == [1]


def test_a_database_that_can_only_be_read_costs_no_entry(server: ScriptedServer) -> None:
    """A full disk: every read succeeds, no write does."""
    server.fail("runs/log-batch", DOWN, times=None)
    with runqueue.Client(server.uri, retry_timeout=1) as client:
        for step in range(500):
            client.log_metric(RUN, "loss", 1.0, step)
        for _ in range(3):
            with pytest.raises(
                runqueue.FlushError, match=r"^500 of 500 entries were not stored \(500 of them"
            ) as caught:
                client.flush()
            assert not any(failure.final for failure in caught.value.failures)
        server.mend()
        client.flush()
        assert client.statistics().stored == 500


def test_a_store_that_retries_by_itself_follows_the_same_table() -> None:
    """MLflow's own client has tried often enough: one answer may be a rejection, if the store can be read."""
    written = _without_retries(UnavailableError("500", rejects_after=3, scope=Scope.ENTRY), reads=False)
    assert (written.retriable, written.rejects_after, written.scope) == (True, 1, Scope.ENTRY)
    read = _without_retries(UnavailableError("500", rejects_after=3, scope=Scope.ENTRY), reads=True)
    assert (read.retriable, read.scope) == (False, Scope.STORE)
    other = _without_retries(UnavailableError("503"), reads=False)
    assert (other.retriable, other.scope) == (False, Scope.STORE)
    assert not isinstance(written, RejectedError)
