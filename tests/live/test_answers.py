"""Answers are checked: only MLflow's own answers count, and no request goes to another server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

import runqueue
from support import memory_probe
from support.answers import LOGIN_PAGE, error, gzip_bomb
from support.mlflow_server import clean_environment
from support.proxy import Fault, FaultyProxy, ScriptedServer
from support.readback import Point, Readback
from support.wire_log import names

pytestmark = pytest.mark.live

TRANSPORTS: tuple[Literal["auto", "httpx"], ...] = ("auto", "httpx")
LOG_BATCH = "/api/2.0/mlflow/runs/log-batch"

NOT_MLFLOW = {
    "a login page": (Fault.answer(200, LOGIN_PAGE), "200.*(html|sign in)"),
    "an empty body": (Fault.answer(200), "200.*empty"),
    "cut JSON": (Fault.answer(200, b'{"run_in', {"Content-Type": "application/json"}), "200.*run_in"),
    "a list": (Fault.answer(200, b"[]", {"Content-Type": "application/json"}), "200"),
    "null": (Fault.answer(200, b"null", {"Content-Type": "application/json"}), "200"),
    "an error with 200": (Fault.answer(200, error("RESOURCE_EXHAUSTED", "all full")), "RESOURCE_EXHAUSTED.*all full"),
    "204": (Fault.answer(204), "204"),
    "206": (Fault.answer(206, {}, {"Content-Range": "bytes 0-1/9"}), "206"),
    "a redirect to nowhere": (Fault.answer(302), "302"),
    "400 that is not MLflow's": (Fault.answer(400, "<h1>Bad Request</h1>"), "400.*Bad Request"),
}


@pytest.fixture
def other_origin() -> Iterator[ScriptedServer]:
    """A server of another origin that answers every request with success."""
    with ScriptedServer() as server:
        yield server


def log_and_fail(proxy: FaultyProxy, readback: Readback, run_id: str) -> str:
    """Log two points and the end of a run; assert that a flush reports the points as not stored, with the reason."""
    with runqueue.Client(proxy.uri, retry_timeout=0.2, token="secret-token") as client:
        client.log_metrics(run_id, {"m": 1.0, "n": 2.0})
        client.set_terminated(run_id)
        with pytest.raises(runqueue.FlushError, match=r"^2 of 2 entries") as caught:
            client.flush()
        assert (client.statistics().failed, client.statistics().pending) == (2, 0)
    (failure,) = caught.value.failures
    assert (failure.run_id, failure.operation, failure.final) == (run_id, "log_metrics", True)
    assert {(entry.key, entry.value) for entry in failure.entries} == {("m", 1.0), ("n", 2.0)}
    assert isinstance(failure.error, runqueue.UnexpectedAnswerError)
    assert "secret-token" not in str(caught.value)
    assert names(proxy.requests) == ["log-batch", "update"], "neither repeated nor halved; the run is ended"
    stored = readback.run(run_id)
    assert (stored.status, stored.content.metrics) == ("FINISHED", {})
    return str(failure.error)


@pytest.mark.parametrize("case", NOT_MLFLOW)
def test_an_answer_that_is_not_mlflows_stores_nothing_and_is_named(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, case: str
) -> None:
    """The failure describes the answer. The request is neither retried nor bisected."""
    fault, named = NOT_MLFLOW[case]
    proxy.fail("runs/log-batch", fault)
    text = log_and_fail(proxy, readback, readback.new_run(experiment_id))
    assert re.search(named, text, re.IGNORECASE | re.DOTALL)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_nothing_goes_to_another_origin(
    proxy: FaultyProxy,
    readback: Readback,
    experiment_id: str,
    other_origin: ScriptedServer,
    status: int,
    transport: Literal["auto", "httpx"],
) -> None:
    """A redirect to another server is not followed; the failure names that server."""
    proxy.fail("runs/log-batch", Fault.answer(status, b"", {"Location": other_origin.uri + LOG_BATCH}))
    text = log_and_fail(proxy, readback, readback.new_run(experiment_id))
    assert str(status) in text
    assert str(other_origin.port) in text
    assert other_origin.count() == 0


@pytest.mark.parametrize("status", [301, 302, 303])
def test_a_redirect_that_would_turn_post_into_get_is_a_failure(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, status: int
) -> None:
    """Also within the origin: the server would answer a GET, and store nothing."""
    proxy.fail("runs/log-batch", Fault.answer(status, b"", {"Location": proxy.uri + LOG_BATCH}))
    assert str(status) in log_and_fail(proxy, readback, readback.new_run(experiment_id))


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_within_the_origin_that_keeps_the_method_is_followed(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, status: int
) -> None:
    """The same body is sent to the new path."""
    proxy.fail("runs/log-batch", Fault.answer(status, b"", {"Location": LOG_BATCH}))
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        client.log_metric(run_id, "m", 1.0, timestamp=1)
    assert [request.status for request in proxy.requests] == [status, 200]
    assert readback.content(run_id).metrics == {"m": [Point(0, 1, 1.0)]}


@pytest.mark.parametrize("committed", [False, True], ids=["not created", "created"])
@pytest.mark.parametrize("case", ["a login page", "an empty body", "cut JSON", "204", "an error with 200"])
def test_entries_stay_queued_when_create_run_gets_a_foreign_answer(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, case: str, committed: bool
) -> None:
    """Whether the server has created the run or not, the next flush stores everything in one run."""
    fault, _ = NOT_MLFLOW[case]
    assert fault.reply is not None
    proxy.fail("runs/create", Fault(reply=fault.reply, forwards=committed))
    with runqueue.Client(proxy.uri, retry_timeout=0.2) as client:
        run = client.create_run(experiment_id)
        client.log_metric(run, "m", 1.0, timestamp=1)
        client.set_terminated(run)
        with pytest.raises(runqueue.FlushError, match=r"^2 of 2 entries") as caught:
            client.flush()
        assert not any(failure.final for failure in caught.value.failures)
        assert run.run_id is None
        client.flush()
    assert readback.run_ids(experiment_id, view="ALL") == [run.run_id]
    stored = readback.run(run.run_id)
    assert (stored.status, stored.content.metrics) == ("FINISHED", {"m": [Point(0, 1, 1.0)]})


def test_credentials_that_are_refused_end_the_flush_at_once(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """
    A 401 is answered once with fresh credentials. If they are refused too, everything stays queued; no token is shown.
    """
    proxy.fail("", Fault.answer(401, error("UNAUTHENTICATED")), times=2)
    fresh = iter(["first-secret", "second-secret", "third-secret"])
    with runqueue.Client(proxy.uri, token=lambda: next(fresh), retry_timeout=60) as client:
        run = client.create_run(experiment_id)
        client.log_metric(run, "m", 1.0, timestamp=1)
        with pytest.raises(runqueue.FlushError, match=r"^2 of 2 entries") as caught:
            client.flush()
        assert all(isinstance(failure.error, runqueue.AuthError) for failure in caught.value.failures)
        assert not any(failure.final for failure in caught.value.failures)
        assert "secret" not in str(caught.value)
        assert [request.headers["authorization"] for request in proxy.requests] == [
            "Bearer first-secret",
            "Bearer second-secret",
        ]
        client.flush()
    assert readback.content(run.run_id).metrics == {"m": [Point(0, 1, 1.0)]}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_answer_of_400_mb_in_400_kb_fails_as_too_large_and_costs_no_memory(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, transport: str
) -> None:
    """Measured in a process that has sent other requests before: it grows by less than 20 MB."""
    run_id = readback.new_run(experiment_id)
    proxy.fail("runs/log-batch", Fault.passed())
    proxy.fail("runs/log-batch", Fault(reply=gzip_bomb(), forwards=False))
    probe = subprocess.run(
        [sys.executable, str(Path(memory_probe.__file__)), proxy.uri, run_id, transport],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=clean_environment(),
    )
    assert probe.returncode == 0, probe.stderr
    measured = json.loads(probe.stdout)
    assert measured["grown_bytes"] < 20_000_000
    assert measured["final"] is True
    assert re.search("too large", measured["error"])
    assert proxy.count("runs/log-batch") == 2
    assert list(readback.content(run_id).metrics) == ["before"]
