"""`Run`: its calls, its block, and the status that the end of the block gives the run."""

from __future__ import annotations

import asyncio

import pytest

import runqueue
from runqueue import ClosedError, ConfigError
from runqueue.api._run import Run
from support.answers import error
from support.process import run as run_script
from support.proxy import Fault, ScriptedServer
from support.wire_log import entries, names


def created(run_id: str) -> Fault:
    return Fault.answer(200, {"run": {"info": {"run_id": run_id}}})


def statuses(server: ScriptedServer) -> dict[str, str]:
    """The final status of each run."""
    return {request.json["run_id"]: request.json["status"] for request in server.to("runs/update")}


def test_its_calls_are_the_clients(client: runqueue.Client, server: ScriptedServer) -> None:
    """Without the run id; the block ends the run, and waits for nothing."""
    server.fail("runs/create", created("r1"))
    with client.start_run(experiment_id="0", run_name="demo", tags={"t": 1}) as run:
        run.log_metrics({"a": 1.0}, step=1, timestamp=5)
        run.log_metric("b", 2.0, step=2, timestamp=6)
        run.log_params({"p": 1})
        run.log_param("q", 2)
        run.set_tags({"u v": 1})
        run.set_tag("w", 2)
        run.log_inputs([runqueue.Dataset("n", "d")])
        assert run.run_id is None and isinstance(run.id, runqueue.PendingRunId)
    assert server.count() == 0
    client.flush()
    assert run.run_id == "r1"
    assert names(server.requests) == ["create", "log-batch", "log-inputs", "update"]
    create, batch = server.requests[:2]
    assert create.json["run_name"] == "demo"
    assert {"t", "u v", "w"} <= {tag["key"] for request in (create, batch) for tag in request.json.get("tags", [])}
    assert [(point["key"], point["step"], point["timestamp"]) for point in entries(batch, "metrics")] == [
        ("a", 1, 5),
        ("b", 2, 6),
    ]
    assert sorted(param["key"] for param in entries(batch, "params")) == ["p", "q"]
    assert statuses(server) == {"r1": "FINISHED"}


class Surprise(BaseException):
    """Not even an Exception."""


ENDS = {
    "sys.exit()": (SystemExit(), "FINISHED"),
    "sys.exit(0)": (SystemExit(0), "FINISHED"),
    "sys.exit(1)": (SystemExit(1), "FAILED"),
    "sys.exit(text)": (SystemExit("text"), "FAILED"),
    "an exception": (ValueError("mine"), "FAILED"),
    "no Exception": (Surprise(), "FAILED"),
    "KeyboardInterrupt": (KeyboardInterrupt(), "KILLED"),
    "cancelled": (asyncio.CancelledError(), "KILLED"),
}


@pytest.mark.parametrize(("mine", "status"), ENDS.values(), ids=ENDS)
def test_the_end_of_the_block_is_the_end_of_the_run(
    client: runqueue.Client, server: ScriptedServer, mine: BaseException, status: str
) -> None:
    """The exception decides the status, and leaves the block unchanged."""
    server.fail("runs/create", created("r1"))
    with pytest.raises(type(mine)) as caught, client.start_run(experiment_id="0"):
        raise mine
    assert caught.value is mine and mine.__context__ is None
    client.flush()
    assert statuses(server) == {"r1": status}


def test_runs_may_be_nested(client: runqueue.Client, server: ScriptedServer) -> None:
    """In the experiment of the outer one, or another; by a handle, an id or a placeholder."""
    for name in ("outer", "inner", "third", "fourth"):
        server.fail("runs/create", created(name))
    with client.start_run(experiment_id="7") as outer, outer.start_run(run_name="inner") as inner:
        inner.log_metric("m", 1.0)
        client.start_run(experiment_id="8", parent=outer.id)
        client.start_run(experiment_id="9", parent="real")
    client.flush()
    parents = {
        request.json["experiment_id"] + str(request.json.get("run_name")): tag["value"]
        for request in server.to("runs/create")
        for tag in request.json["tags"]
        if tag["key"] == "mlflow.parentRunId"
    }
    ids = {request.json["experiment_id"]: index for index, request in enumerate(server.to("runs/create"))}
    assert set(ids) == {"7", "8", "9"}
    assert set(parents) == {"7inner", "8None", "9None"}
    assert parents["9None"] == "real" and parents["7inner"] == parents["8None"] == outer.run_id


def test_a_run_needs_an_experiment(client: runqueue.Client) -> None:
    """Of its own or of its parent's handle."""
    with pytest.raises(ConfigError):
        client.start_run()
    with pytest.raises(ConfigError):
        client.start_run(parent="real")
    with pytest.raises(ConfigError):
        client.start_run(experiment_id="0", experiment_name="e")


def test_a_run_that_was_ended_inside_is_not_ended_again(client: runqueue.Client, server: ScriptedServer) -> None:
    """The status that `set_terminated` has set stays, however the block ends."""
    server.fail("runs/create", created("r1"))
    with pytest.raises(ValueError), client.start_run(experiment_id="0") as run:
        run.set_terminated("KILLED")
        raise ValueError
    with run:
        pass
    client.flush()
    assert [request.json["status"] for request in server.to("runs/update")] == ["KILLED"]


def test_attaching_does_not_end_the_run(
    client: runqueue.Client, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by an id nor by the environment; `set_terminated` still does."""
    monkeypatch.setenv("MLFLOW_RUN_ID", "of-env")
    for run in (client.attach("by-id"), client.run_from_env(), client.attach(client.attach("by-handle"))):
        with pytest.raises(ValueError), run:
            run.log_metric("m", 1.0)
            raise ValueError
    client.flush()
    assert sorted(request.json["run_id"] for request in server.requests) == ["by-handle", "by-id", "of-env"]
    assert statuses(server) == {}
    run.set_terminated()
    client.flush()
    assert statuses(server) == {"by-handle": "FINISHED"}


def test_an_invalid_run_is_refused(client: runqueue.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the call; the error names what is missing."""
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with pytest.raises(ConfigError, match="MLFLOW_RUN_ID"):
        client.run_from_env()
    for bad in ("", None, 5):
        with pytest.raises(ConfigError, match="attach"):
            client.attach(bad)  # type: ignore[arg-type]


def test_after_an_exception_only_the_status_of_runs_that_exist_is_sent(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Without streaming nothing else is sent; a warning counts the other entries and runs."""
    server.fail("runs/create", created("r1"))
    mine = ValueError("mine")
    client = runqueue.Client(server.uri)
    with pytest.raises(ValueError) as caught, client, client.start_run(experiment_id="0") as run:
        client.flush()
        client.start_run(experiment_id="0").log_metric("never", 1.0)
        run.log_metrics({"a": 1.0, "b": 2.0})
        raise mine
    assert caught.value is mine and mine.__context__ is None
    assert names(server.requests) == ["create", "update"]
    assert statuses(server) == {"r1": "FAILED"}
    (text,) = [record.getMessage() for record in caplog.records if record.name == "runqueue"]
    assert "4 queued entries were not sent" in text
    now = client.statistics()
    assert (now.stored, now.dropped, now.pending) == (1, 4, 0)


def test_a_status_that_cannot_be_sent_after_an_exception_is_warned_of(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as no entry, but a warning names it, and the block waits for it no longer than `exit_timeout`."""
    server.fail("runs/create", created("r1"))
    server.fail("runs/update", Fault.answer(503), times=None)
    client = runqueue.Client(server.uri, exit_timeout=0.5)
    with pytest.raises(ValueError), client, client.start_run(experiment_id="0"):
        client.flush()
        raise ValueError
    assert "the final status of 1 runs was not stored" in caplog.text
    caplog.clear()
    server.mend()
    server.fail("runs/create", created("r2"))
    server.fail("runs/update", Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST")))
    with pytest.raises(ValueError), runqueue.Client(server.uri) as client, client.start_run(experiment_id="0"):
        client.flush()
        raise ValueError
    assert "the final status of 1 runs was not stored" in caplog.text and "made up by the test" in caplog.text


LAST_STATUS = """
def work(open_clients):
    client = runqueue.CLIENT(URI, exit_timeout=20)
    open_clients.append(client)
    with client.start_run(experiment_id="0") as run, client.start_run(experiment_id="0") as child:
        child.log_metric("m", 1.0)
        FLUSH
        run.log_metric("m", 2.0)
        client.start_run(experiment_id="0").log_metric("never", 1.0)
        raise ValueError("mine")
"""
OPEN_CLIENTS = {
    "at the end of the script": ("work([threading])", 1),
    "kept by a caught exception": ("kept = []\ntry: work(kept)\nexcept ValueError: pass", 0),
    "collected at once": ("try: work([])\nexcept ValueError: pass", 0),
}


@pytest.mark.parametrize("client", ["Client", "AsyncClient"])
@pytest.mark.parametrize(("last", "code"), OPEN_CLIENTS.values(), ids=OPEN_CLIENTS)
def test_a_client_that_is_never_closed_sends_the_status_of_a_run_that_exists(
    server: ScriptedServer, last: str, code: int, client: str
) -> None:
    """The client has no block of its own; it ends with the script, or is collected. Nothing else is sent."""
    server.fail("runs/create", created("r1"), times=1)
    server.fail("runs/create", created("r2"), times=1)
    server.fail("runs/update", Fault.delayed(0.3), times=None)
    flush = "client.flush()" if client == "Client" else "import asyncio; asyncio.run(client.flush())"
    done = run_script(LAST_STATUS.replace("CLIENT", client).replace("FLUSH", flush) + last, server.uri)
    assert names(server.requests) == ["create", "create", "log-batch", "update", "update"]
    assert statuses(server) == {"r1": "FAILED", "r2": "FAILED"}
    assert done.code == code
    assert done.err.count("was never closed: 3 entries were not sent") == 1, done.err


def test_a_status_that_was_sent_after_the_exception_is_not_sent_again(server: ScriptedServer) -> None:
    """The program has caught the exception and flushed."""
    script = "client = runqueue.Client(URI)\ntry:\n    with client.start_run(experiment_id='0'): raise ValueError\n"
    server.fail("runs/create", created("r1"))
    done = run_script(script + "except ValueError: client.flush()\n", server.uri)
    assert names(server.requests) == ["create", "update"]
    assert (done.code, done.err) == (0, "")


def test_a_store_that_does_not_answer_keeps_the_end_waiting_no_longer_than_the_bound(server: ScriptedServer) -> None:
    """One warning names the run."""
    script = """
client = runqueue.Client(URI, exit_timeout=0.5)
with client.start_run(experiment_id="0"):
    client.flush()
    raise ValueError
"""
    server.fail("runs/create", created("r1"))
    server.fail("runs/update", Fault.hold(), times=None)
    done = run_script(script, server.uri)
    server.let_go()
    assert done.code == 1
    assert done.err.count("the final status of 1 runs was not stored") == 1, done.err


def test_a_streaming_block_that_raises_sends_everything(server: ScriptedServer) -> None:
    """As best it can, the status last."""
    server.fail("runs/create", created("r1"))
    with (
        pytest.raises(ValueError),
        runqueue.Client(server.uri, flush_interval=60) as client,
        client.start_run(experiment_id="0") as run,
    ):
        run.log_metric("m", 1.0)
        raise ValueError
    assert names(server.requests) == ["create", "log-batch", "update"]
    assert statuses(server) == {"r1": "FAILED"}


def test_a_client_that_is_closed_inside_of_the_block_is_no_error(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """The block's own exception is raised; a warning says that the status was not queued."""
    mine = ValueError("mine")
    client = runqueue.Client(server.uri)
    with pytest.raises(ValueError) as caught, client.start_run(experiment_id="0") as run:
        client._engine.accumulator.abandon(failed=False)
        client.close()
        with pytest.raises(ClosedError):
            run.log_metric("m", 1.0)
        raise mine
    assert caught.value is mine
    assert "final status FAILED" in caplog.text


def test_its_repr_names_the_run(client: runqueue.Client, server: ScriptedServer) -> None:
    """And that of a client says whether it streams."""
    assert repr(client.attach("r1")) == "<Run r1>"
    run = client.start_run(experiment_id="0")
    assert repr(run) == f"<Run {run.id!r}>" and isinstance(run, Run)
    streaming = runqueue.Client(server.uri, flush_interval=60)
    assert f"<Client {server.uri} open streaming pending=0" in repr(streaming)
    streaming.close()
    assert f"<Client {server.uri} closed streaming pending=0" in repr(streaming)


def test_the_logger_is_quiet_by_default(server: ScriptedServer) -> None:
    """A run without failures prints nothing to stdout or stderr."""
    script = """
with runqueue.Client(URI, flush_interval=60) as client, client.start_run(experiment_id="0") as run:
    run.log_metric("m", 1.0)
"""
    server.fail("runs/create", created("r1"))
    done = run_script(script, server.uri)
    assert (done.code, done.out, done.err) == (0, "", "")
