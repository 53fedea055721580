"""Pickling: a client is pickled as its settings, and a placeholder names the same run in another process."""

from __future__ import annotations

import pickle

import pytest

import runqueue
from runqueue import FlushError
from support.process import run
from support.proxy import Fault, ScriptedServer
from support.wire_log import entries, names

CREATED = Fault.answer(200, {"run": {"info": {"run_id": "r1"}}})
FOUND = Fault.answer(200, {"runs": [{"info": {"run_id": "r1"}}]})
NONE_YET = Fault.answer(200, {})


# -- clients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("face", [runqueue.Client, runqueue.AsyncClient])
def test_a_pickled_client_is_its_configuration(face: type[runqueue.Client], server: ScriptedServer) -> None:
    """Every keyword, and nothing else: neither what is queued, nor a secret."""
    limits = runqueue.Limits(metrics=7)
    uri = server.uri.replace("//", "//user:pa55word@")
    client = face(
        uri,
        max_workers=3,
        limits=limits,
        flush_interval=60,
        max_pending=50,
        on_full="drop",
        exit_timeout=3,
        handle_signals=False,
        progress=False,
        token="t0ken",
        headers={"X-Key": "he4der"},
    )
    client.log_metric("r", "queued", 1.0)
    data = pickle.dumps(client)
    for secret in (b"pa55word", b"t0ken", b"he4der", b"queued"):
        assert secret not in data
    copy = pickle.loads(data)
    assert type(copy) is face and copy is not client
    ours, theirs = copy._engine.config, client._engine.config
    assert (ours.max_workers, ours.limits, ours.flush_interval, ours.max_pending) == (3, limits, 60, 50)
    assert (ours.on_full, ours.exit_timeout, ours.handle_signals, ours.progress) == ("drop", 3, False, False)
    assert ours.retry_timeout == theirs.retry_timeout and ours.token is None and ours.headers is None
    assert copy.tracking_uri == server.uri
    assert copy.statistics().accepted == 0
    client._engine.accumulator.abandon(failed=False)
    for each in (client, copy):
        each._engine.stop(failed=False)


def test_a_pickled_client_works_elsewhere(client: runqueue.Client, server: ScriptedServer) -> None:
    """In another process, where it looks for its secrets itself."""
    script = """
import pickle
client = pickle.loads(bytes.fromhex(sys.argv[2]))
client.log_metric("r1", "m", 1.0)
client.close()
"""
    done = run(script, server.uri, pickle.dumps(client).hex())
    assert (done.code, done.err) == (0, "")
    assert names(server.requests) == ["log-batch"]


def test_a_pickled_handle_does_not_end_its_run(client: runqueue.Client, server: ScriptedServer) -> None:
    """The process that has created the run ends it; the copy logs to the run by a client with the same settings."""
    server.fail("runs/create", CREATED)
    with client.start_run(experiment_id="0") as handle:
        client.flush()
        copy = pickle.loads(pickle.dumps(handle))
        with copy:
            copy.log_metric("m", 1.0)
        assert copy.id is handle.id
        copy._client.close()
    client.flush()
    assert names(server.requests) == ["create", "log-batch", "update"]


# -- placeholders ----------------------------------------------------------------------------------------------------


def test_a_resolved_placeholder_is_resolved_elsewhere(client: runqueue.Client, server: ScriptedServer) -> None:
    """No search is sent."""
    server.fail("runs/create", CREATED)
    pending = client.create_run("0")
    client.flush()
    script = """
import pickle
pending = pickle.loads(bytes.fromhex(sys.argv[2]))
assert pending.run_id == "r1"
with runqueue.Client(URI) as client:
    client.log_metric(pending, "m", 1.0)
"""
    assert run(script, server.uri, pickle.dumps(pending).hex()).code == 0
    assert names(server.requests) == ["create", "log-batch"]


@pytest.mark.parametrize("by_name", [False, True])
def test_an_unresolved_placeholder_is_searched_for_in_another_process(
    client: runqueue.Client, server: ScriptedServer, by_name: bool
) -> None:
    """By the unique tag of its create-run request, in its experiment, until the run exists; it is not created again."""
    pending = client.create_run(None if by_name else "7", experiment_name="e" if by_name else None)
    experiment = Fault.answer(200, {"experiment": {"experiment_id": "7"}})
    server.fail("experiments/get-by-name", experiment, times=None)
    server.fail("runs/search", NONE_YET, times=2)
    server.fail("runs/search", FOUND)
    script = """
import pickle
pending = pickle.loads(bytes.fromhex(sys.argv[2]))
assert pending.run_id is None
with runqueue.Client(URI) as client:
    client.log_metric(pending, "m", 1.0, 3)
    client.set_terminated(client.create_run("0", parent_run_id=pending))
    client.flush()
    assert pending.run_id == "r1"
    client.log_metric("r1", "m", 1.0, 4)
"""
    server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": "child"}}}))
    done = run(script, server.uri, pickle.dumps(pending).hex())
    assert (done.code, done.err) == (0, "")
    searches = server.to("runs/search")
    assert len(searches) == 3
    assert searches[0].json["experiment_ids"] == ["7"] and pending._token in searches[0].json["filter"]
    (created,) = server.to("runs/create")
    assert {"key": "mlflow.parentRunId", "value": "r1"} in created.json["tags"]
    points = [
        (request.json["run_id"], point["step"])
        for request in server.to("runs/log-batch")
        for point in entries(request, "metrics")
    ]
    assert points == [("r1", 3), ("r1", 4)]
    client._engine.accumulator.abandon(failed=False)


def test_a_placeholder_whose_run_is_never_created_is_an_error_after_retry_timeout(
    client: runqueue.Client, server: ScriptedServer, new_client: type[runqueue.Client]
) -> None:
    """Its entries stay queued, and other runs are stored."""
    server.fail("runs/search", NONE_YET, times=None)
    pending = client.create_run("0")
    second = new_client(server.uri, retry_timeout=0.5)
    second.log_metrics(pending, {"a": 1.0, "b": 2.0})
    second.log_metric("other", "m", 1.0)
    with pytest.raises(FlushError, match="was not created yet by the process that has made this placeholder") as caught:
        second.flush()
    assert {failure.final for failure in caught.value.failures} == {False}
    assert (second.statistics().stored, second.statistics().pending) == (1, 3)
    server.mend()
    server.fail("runs/search", FOUND)
    second.flush()
    assert second.statistics().stored == 4 and pending.run_id == "r1"
    assert server.count("runs/create") == 0


def test_another_client_of_the_same_process_waits_for_it_too(client: runqueue.Client, server: ScriptedServer) -> None:
    """The placeholder is the same object there: once it is resolved, no search is sent."""
    server.fail("runs/create", CREATED)
    server.fail("runs/search", NONE_YET, times=None)
    pending = client.create_run("0")
    with runqueue.Client(server.uri) as second:
        second.log_metric(pending, "m", 1.0)
        flush = second.flush(synchronous=False)
        while not server.count("runs/search"):
            assert not flush.done
        client.flush()
        flush.await_completion()
    assert names(server.to("runs/log-batch")) == ["log-batch"]
