"""The placeholder of a run: one object for each token in a process, resolved once the run exists."""

from __future__ import annotations

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref

import pytest

import runqueue
from runqueue import PendingRunId
from support.proxy import Fault, ScriptedServer
from support.threads import in_threads


def created(run_id: str) -> Fault:
    """The answer to create-run."""
    return Fault.answer(200, {"run": {"info": {"run_id": run_id}}})


# -- the value -------------------------------------------------------------------------------------------------------


def test_two_placeholders_are_two_runs() -> None:
    """Each is equal to itself alone."""
    one, other = PendingRunId(), PendingRunId()
    assert one != other
    assert len({one, other, one}) == 2
    assert one._token != other._token


def test_its_repr_tells_its_state() -> None:
    """A part of its token, and the real id once there is one."""
    run = PendingRunId()
    assert repr(run) == f"<PendingRunId {run._token[:8]} pending>"
    run._resolve("abc")
    assert repr(run) == f"<PendingRunId {run._token[:8]} abc>"


def test_its_hash_stays_when_it_is_resolved() -> None:
    """It may be a key of a dict before the run exists."""
    run = PendingRunId()
    known = {run: 1}
    run._resolve("abc")
    assert known[run] == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_of_it_is_the_same_object_in_this_process(protocol: int) -> None:
    """So a copy learns the real id together with the original."""
    run = PendingRunId()
    copied = pickle.loads(pickle.dumps(run, protocol))
    assert copied is run
    assert copy.copy(run) is run and copy.deepcopy({"run": [run]})["run"][0] is run
    run._resolve("abc")
    assert pickle.loads(pickle.dumps(run, protocol)).run_id == "abc"


def test_an_old_pickle_does_not_make_a_resolved_run_pending_again() -> None:
    """A resolved placeholder keeps its id."""
    run = PendingRunId()
    old = pickle.dumps(run)
    run._resolve("abc")
    assert pickle.loads(old).run_id == "abc"


def test_copies_of_another_process_are_one_object() -> None:
    """Where the original does not live, the first copy takes its place."""
    run = PendingRunId()
    run._resolve("abc")
    script = (
        "import pickle, sys\n"
        "data = sys.stdin.buffer.read()\n"
        "one, two = pickle.loads(data), pickle.loads(data)\n"
        "assert one is two and {one: 1}[two] == 1\n"
        "print(one.run_id, one._token)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(run), capture_output=True, check=True, timeout=60
    )
    assert done.stdout.decode().split() == ["abc", run._token]


def test_copies_made_by_many_threads_are_one_object() -> None:
    """Also at the same moment."""
    run = PendingRunId()
    data = pickle.dumps(run)
    del run
    gc.collect()
    found: list[PendingRunId] = []
    lock = threading.Lock()

    def load(_: int) -> None:
        copied = [pickle.loads(data) for _ in range(100)]
        with lock:
            found.extend(copied)

    in_threads(load, 8)
    assert len(set(map(id, found))) == 1


def test_it_is_not_kept_alive() -> None:
    """Processes that make millions of runs must not remember each."""
    run = PendingRunId()
    reference = weakref.ref(run)
    del run
    gc.collect()
    assert reference() is None


# -- in clients ------------------------------------------------------------------------------------------------------


def test_it_is_pending_until_a_flush_has_created_the_run(client: runqueue.Client, server: ScriptedServer) -> None:
    """`create_run` itself sends nothing."""
    server.fail("runs/create", created("r1"))
    run = client.create_run("0")
    assert run.run_id is None and server.count() == 0
    client.flush()
    assert run.run_id == "r1"


def test_it_is_of_use_after_every_flush(client: runqueue.Client, server: ScriptedServer) -> None:
    """The run is created once, and both of its names mean one lane."""
    server.fail("runs/create", created("r1"))
    run = client.create_run("0")
    for step in range(3):
        client.log_metric(run, "m", 1.0, step)
        client.flush()
        client.log_metric(str(run.run_id), "m", 2.0, step)
        client.flush(run_id=run)
    assert server.count("runs/create") == 1
    bodies = [request.json for request in server.to("runs/log-batch")]
    assert {body["run_id"] for body in bodies} == {"r1"}
    assert [point["value"] for body in bodies for point in body["metrics"]] == [1.0, 2.0] * 3


def test_another_client_takes_it_by_either_name(client: runqueue.Client, server: ScriptedServer) -> None:
    """Once the run exists; before, that client searches for it, see test_pickle.py."""
    server.fail("runs/create", created("r1"))
    run = client.create_run("0")
    with runqueue.Client(server.uri) as second:
        client.flush()
        second.log_metric(run, "m", 1.0)
        second.log_metric("r1", "m", 2.0)
        second.flush()
    (request,) = server.to("runs/log-batch")
    assert [point["value"] for point in request.json["metrics"]] == [1.0, 2.0]


def test_a_copy_of_it_logs_to_the_same_run(client: runqueue.Client, server: ScriptedServer) -> None:
    """Sent through a queue of another thread, say."""
    server.fail("runs/create", created("r1"))
    run = client.create_run("0")
    client.log_metric(pickle.loads(pickle.dumps(run)), "m", 1.0)
    client.flush()
    assert server.to("runs/log-batch")[0].json["run_id"] == "r1"


# -- parents ---------------------------------------------------------------------------------------------------------


def parent_tag(body: dict[str, list[dict[str, str]]]) -> str | None:
    """The parent that a create-run names."""
    return {tag["key"]: tag["value"] for tag in body["tags"]}.get("mlflow.parentRunId")


def test_a_child_waits_for_its_parent(client: runqueue.Client, server: ScriptedServer) -> None:
    """Through several generations; each names the real id of the one before."""
    for name in ("grandparent", "parent", "child"):
        server.fail("runs/create", created(name))
    grandparent = client.create_run("0")
    parent = client.create_run("0", parent_run_id=grandparent)
    child = client.create_run("0", parent_run_id=parent)
    client.flush()
    assert (grandparent.run_id, parent.run_id, child.run_id) == ("grandparent", "parent", "child")
    assert [parent_tag(request.json) for request in server.to("runs/create")] == [None, "grandparent", "parent"]


def test_a_parent_may_be_a_real_id(client: runqueue.Client, server: ScriptedServer) -> None:
    """The child waits for nothing."""
    server.fail("runs/create", created("child"))
    client.create_run("0", parent_run_id="p" * 32)
    client.flush()
    assert parent_tag(server.to("runs/create")[0].json) == "p" * 32


def test_flushing_a_child_creates_its_parents_and_sends_nothing_else(
    client: runqueue.Client, server: ScriptedServer
) -> None:
    """Other entries of the parent wait for their own flush."""
    server.fail("runs/create", created("parent"))
    server.fail("runs/create", created("child"))
    parent = client.create_run("0")
    client.log_metric(parent, "of the parent", 1.0)
    child = client.create_run("0", parent_run_id=parent)
    client.log_metric(child, "of the child", 1.0)
    client.flush(run_id=child)
    assert (parent.run_id, child.run_id) == ("parent", "child")
    assert [request.json["run_id"] for request in server.to("runs/log-batch")] == ["child"]
    assert client.statistics().pending == 1
    client.flush()
    assert client.statistics().pending == 0


def test_a_child_of_a_run_that_cannot_be_created_stays_queued(client: runqueue.Client, server: ScriptedServer) -> None:
    """Parent and child are reported, each with its entries; the next flush sends both."""
    server.fail("runs/create", Fault.answer(404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}))
    server.fail("runs/create", created("parent"))
    server.fail("runs/create", created("child"))
    parent = client.create_run("77")
    child = client.create_run("0", parent_run_id=parent)
    client.log_metrics(child, {"a": 1.0, "b": 2.0})
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    assert {(failure.run_id, failure.operation, failure.count) for failure in caught.value.failures} == {
        (parent, "create_run", 1),
        (child, "create_run", 1),
        (child, "log_metrics", 2),
    }
    assert not any(failure.final for failure in caught.value.failures)
    assert client.statistics().pending == 4
    client.flush()
    assert (parent.run_id, child.run_id) == ("parent", "child")
    assert client.statistics().stored == 4
