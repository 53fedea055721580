"""`QueueingClient` in place of the client of MLflow's autologging: what it stores, raises and leaves behind."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from traceback import walk_tb
from typing import Any

import pytest
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag
from mlflow.exceptions import MlflowException
from mlflow.utils.async_logging.run_operations import get_combined_run_operations
from mlflow.utils.autologging_utils.client import MlflowAutologgingQueueingClient

import runqueue
from runqueue.integrations.mlflow import PendingRunId, QueueingClient, RunOperations
from support.mlflow_server import MlflowServer, wait_until
from support.process import Process
from support.proxy import Fault, FaultyProxy
from support.readback import Point, Readback, StoredRun, content

pytestmark = pytest.mark.live

FAILED = "Failed to perform one or more operations on the run with ID"
SEVERAL = "The following failures occurred while performing one or more logging operations"


def dataset(name: str) -> Any:
    kinds: Any = (MetaDataset, HTTPDatasetSource)
    return kinds[0](source=kinds[1](f"http://example.org/{name}"), name=name)


def engine_threads() -> int:
    return sum(thread.name == "runqueue" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """A client that is no longer referenced ends its thread."""
    before = engine_threads()
    yield
    gc.collect()
    wait_until(lambda: engine_threads() <= before, 20, "a thread of the engine is left")


# -- the same as MLflow's own ----------------------------------------------------------------------------------------


def log_everything(client: Any, experiment_id: str) -> None:
    """Log to a new run by each kind of call."""
    read = dataset("read")
    run = client.create_run(experiment_id, start_time=5, tags={"a": "b", "t" * 300: 1, "c": None})
    client.log_params(run, {f"p{at}": f"v{at}" for at in range(201)})
    client.log_params(run, {"k" * 255: "v" * 6_005, "k" * 300: "w" * 6_050, "none": None, "list": [1, {"a": 2.5}]})
    client.set_tags(run, {f"t{at}": at for at in range(201)} | {"x" * 251: "y" * 8_001})
    client.log_metrics(run, {f"m{at}": at for at in range(5)} | {"n" * 260: 1, "n" * 270: 2})
    for step in range(2_001):
        client.log_metrics(run, {"stepped": step / 3}, step=step, dataset=read)
    entity = read._to_mlflow_entity()
    client.log_inputs(run, [DatasetInput(entity, [InputTag("mlflow.data.context", "train")])])
    client.log_inputs(run, None)
    client.log_inputs(run, [])
    client.set_terminated(run, status="KILLED", end_time=6)
    client.flush()


def without_times(run: StoredRun) -> tuple[Any, ...]:
    """Return the content of a run without the times of its points."""
    metrics = {key: [(point.step, point.value) for point in points] for key, points in run.content.metrics.items()}
    own = run.content
    return (run.status, run.start_time, run.end_time, own.params, own.tags, own.inputs, metrics)


def test_it_stores_what_mlflows_own_client_stores(mlflow_server: MlflowServer, readback: Readback) -> None:
    """
    By every kind of call, with more than one batch of each, keys and values that are cut, and keys that are equal then.
    """
    found = []
    for kind in (MlflowAutologgingQueueingClient, QueueingClient):
        experiment_id = readback.new_experiment()
        log_everything(kind(mlflow_server.uri), experiment_id)
        (run_id,) = readback.run_ids(experiment_id)
        found.append(without_times(readback.run(run_id)))
    theirs, ours = found
    assert ours == theirs
    status, start, end, params, tags, inputs, metrics = ours
    assert (status, start, end, len(params), len(metrics), len(inputs)) == ("KILLED", 5, 6, 204, 7, 1)
    assert params["k" * 247 + "..."] == "w" * 5_997 + "...", "the last of a call stays"
    assert tags["c"] == "None"


def test_it_differs_from_mlflows_client_where_documented(
    mlflow_server: MlflowServer, readback: Readback, experiment_id: str
) -> None:
    """`run_name` is sent, a placeholder stays valid after a flush, and a bad entry fails alone."""
    client = QueueingClient(mlflow_server.uri)
    run = client.create_run(experiment_id, run_name="named")
    assert isinstance(run, PendingRunId) and isinstance(run, runqueue.PendingRunId)
    client.log_params(run, {"p": 1})
    client.flush()
    client.log_params(run, {"p": 2, "q": 3})
    client.log_metrics(run, {"m": 1.5})
    with pytest.raises(MlflowException, match=f"{FAILED} {run.run_id}\\..*'p'.*another value") as caught:
        client.flush()
    assert str(caught.value).startswith(SEVERAL)
    assert isinstance(caught.value.__cause__, runqueue.FlushError)
    (failure,) = caught.value.__cause__.failures
    assert [(entry.key, entry.value) for entry in failure.entries] == [("p", 2)]
    stored = readback.run(run.run_id)
    assert (stored.name, stored.content.params) == ("named", {"p": "1", "q": "3"})
    assert [point.value for point in stored.content.metrics["m"]] == [1.5]


# -- flushes ---------------------------------------------------------------------------------------------------------


def test_nothing_is_sent_nor_started_before_a_flush(proxy: FaultyProxy, experiment_id: str) -> None:
    """A flush with an empty queue, or a second flush, sends nothing."""
    before = engine_threads()
    client = QueueingClient(proxy.uri)
    client.flush()
    run = client.create_run(experiment_id)
    client.log_params(run, {"a": "b"})
    assert engine_threads() == before and not proxy.requests
    client.flush()
    sent = len(proxy.requests)
    assert sent >= 2
    client.flush()
    client.flush(synchronous=False).await_completion()
    assert len(proxy.requests) == sent


def test_an_asynchronous_flush_returns_at_once(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Nothing is stored when it returns, and everything after waiting for it."""
    run_id = readback.new_run(experiment_id)
    proxy.fail("runs/log-batch", Fault.hold())
    client = QueueingClient(proxy.uri)
    client.log_params(run_id, {"a": "b"})
    operations = client.flush(synchronous=False)
    assert readback.content(run_id).params == {}
    proxy.let_go()
    operations.await_completion()
    assert readback.content(run_id).params == {"a": "b"}


def test_a_flush_under_way_ends_although_its_client_is_dropped(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Autologging drops clients and their operations. The flush ends all the same, and the engine after it."""
    run_id = readback.new_run(experiment_id)
    proxy.fail("runs/log-batch", Fault.hold())
    client = QueueingClient(proxy.uri)
    client.log_params(run_id, {"a": "b"})
    client.flush(synchronous=False)
    del client
    gc.collect()
    proxy.let_go()
    wait_until(lambda: readback.content(run_id).params == {"a": "b"}, 20, "nothing was stored")


@pytest.mark.parametrize("of_mlflow", [True, False])
def test_the_futures_of_several_flushes_can_be_combined(
    of_mlflow: bool, mlflow_server: MlflowServer, readback: Readback, experiment_id: str
) -> None:
    """As MLflow combines them; each failure is named."""
    run_ids = [readback.new_run(experiment_id, params={"p": "1"}) for _ in range(3)]
    parts = []
    for run_id, value in zip(run_ids, "213", strict=True):
        client = QueueingClient(mlflow_server.uri)
        client.log_params(run_id, {"p": value})
        parts.append(client.flush(synchronous=False))
    futures = [future for part in parts for future in part._operation_futures]
    with pytest.raises(MlflowException, match="The following failures occurred") as caught:
        if of_mlflow:
            combined: Any = get_combined_run_operations(parts)  # type: ignore[arg-type]
            combined.wait()
        else:
            RunOperations(futures).await_completion()
    text = str(caught.value)
    assert [run_id in text for run_id in run_ids] == [True, False, True]
    parts[1].await_completion()
    for part in (parts[0], parts[0], parts[2]):
        with pytest.raises(MlflowException, match=FAILED):
            part.await_completion()


# -- failures --------------------------------------------------------------------------------------------------------


def test_a_run_is_ended_although_its_data_fails(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """The error names the run and the cause, as MLflow's own does."""
    answer = {"error_code": "INVALID_PARAMETER_VALUE", "message": "Batch logging failed!"}
    proxy.fail("runs/log-batch", Fault.answer(400, answer), times=None)
    client = QueueingClient(proxy.uri)
    run = client.create_run(experiment_id)
    client.log_metrics(run, {"a": 1})
    client.set_terminated(run, status="KILLED")
    with pytest.raises(MlflowException) as caught:
        client.flush()
    stored = readback.run(run.run_id)
    assert (stored.status, stored.content.metrics) == ("KILLED", {})
    assert f"{FAILED} {run.run_id}" in str(caught.value)
    assert "Batch logging failed!" in str(caught.value)


def test_a_run_that_cannot_be_created_does_not_concern_the_others(
    mlflow_server: MlflowServer, readback: Readback, experiment_id: str
) -> None:
    """Its failure has the server's message; the other run of the flush is complete."""
    client = QueueingClient(mlflow_server.uri)
    bad, good = client.create_run("987654321"), client.create_run(experiment_id)
    for run in (bad, good):
        client.log_params(run, {"a": "b"})
    with pytest.raises(MlflowException, match="No Experiment with id=987654321"):
        client.flush()
    assert readback.content(good.run_id).params == {"a": "b"}
    assert bad.run_id is None
    with pytest.raises(RuntimeError), client:  # what is queued for it is given up
        raise RuntimeError


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.create_run(None),
        lambda client: client.log_params("0" * 32, None),
        lambda client: client.log_metrics("0" * 32, "loss"),
        lambda client: client.set_tags("no run id!", {"a": "b"}),
        lambda client: client.log_inputs("0" * 32, 7),
        lambda client: client.set_terminated("0" * 32, "DONE"),
    ],
)
def test_an_invalid_call_raises_an_mlflow_exception(call: Callable[[Any], None], mlflow_server: MlflowServer) -> None:
    """At once, with the error code INVALID_PARAMETER_VALUE."""
    client = QueueingClient(mlflow_server.uri)
    with pytest.raises(MlflowException) as caught:
        call(client)
    assert caught.value.error_code == "INVALID_PARAMETER_VALUE"


# -- the block -------------------------------------------------------------------------------------------------------


def test_the_end_of_a_block_flushes(mlflow_server: MlflowServer, readback: Readback, experiment_id: str) -> None:
    """So does the end of a second block of the same client. Between the blocks it can be flushed."""
    client = QueueingClient(mlflow_server.uri)
    with client as entered:
        assert entered is client
        run = client.create_run(experiment_id)
        client.log_params(run, {"a": "b"})
        client.log_metrics(run, {"c": 1})
        client.set_tags(run, {"d": "e"})
    assert run.run_id is not None
    client.log_params(run, {"f": "g"})
    client.flush()
    with client:
        client.log_params(run, {"h": "i"})
    stored = readback.content(run.run_id)
    assert stored.params == {"a": "b", "f": "g", "h": "i"}
    assert (stored.tags, [point.value for point in stored.metrics["c"]]) == ({"d": "e"}, [1.0])


def test_the_end_of_a_block_raises_failures(
    mlflow_server: MlflowServer, readback: Readback, experiment_id: str
) -> None:
    """As an MlflowException."""
    run_id = readback.new_run(experiment_id, params={"a": "1"})
    with pytest.raises(MlflowException, match=f"{FAILED} {run_id}"), QueueingClient(mlflow_server.uri) as client:
        client.log_params(run_id, {"a": "2"})


def test_an_exception_in_a_block_sends_nothing_and_is_never_hidden(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Except that a flush under way ends first."""
    run_id, other = readback.new_run(experiment_id), readback.new_run(experiment_id)
    proxy.fail("runs/log-batch", Fault.delayed(0.3))
    error = RuntimeError("of the block")
    with pytest.raises(RuntimeError) as caught, QueueingClient(proxy.uri) as client:
        client.log_params(other, {"a": "b"})
        client.flush(synchronous=False)
        client.log_params(run_id, {"a": "b"})
        client.log_metrics(run_id, {"c": 1})
        client.set_tags(run_id, {"d": "e"})
        raise error
    assert caught.value is error
    assert readback.content(run_id) == content()
    assert readback.content(other).params == {"a": "b"}


# -- threads, copies, ends -------------------------------------------------------------------------------------------


def test_threads_log_at_once(mlflow_server: MlflowServer, readback: Readback, experiment_id: str) -> None:
    """To one client and run, while others flush: every point is stored."""
    run_id = readback.new_run(experiment_id)
    client = QueueingClient(mlflow_server.uri)

    def log(number: int) -> None:
        for step in range(500):
            client.log_metrics(run_id, {f"m{number}": float(step)}, step=step)
            if step % 100 == number:
                client.flush(synchronous=bool(number % 2))

    threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.flush()
    for number in range(4):
        points = readback.history(run_id, f"m{number}")
        assert [(point.step, point.value) for point in points] == [(step, float(step)) for step in range(500)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda client: pickle.loads(pickle.dumps(client))])
def test_a_copy_has_nothing_queued(
    copied: Callable[[Any], Any], mlflow_server: MlflowServer, readback: Readback, experiment_id: str
) -> None:
    """The original client sends what is queued, once. Trainers are copied with their callbacks."""
    client = QueueingClient(mlflow_server.uri)
    run = client.create_run(experiment_id)
    client.log_metrics(run, {"m": 1.0})
    other = copied(client)
    assert type(other) is QueueingClient
    other.flush()
    assert run.run_id is None
    client.flush()
    other.log_metrics(run, {"m": 2.0}, step=1)
    other.flush()
    (run_id,) = readback.run_ids(experiment_id)
    assert [point.value for point in readback.history(run_id, "m")] == [1.0, 2.0]


ENDS = """
from runqueue.integrations.mlflow import QueueingClient

def log(uri, run_id):
    client = QueueingClient(uri)
    client.log_params(run_id, {"a": "b"})
    client.flush(synchronous=False)

def main():
    if sys.argv[3] == "script":
        log(URI, sys.argv[2])
    elif sys.argv[3] == "thread":
        threading.Thread(target=log, args=(URI, sys.argv[2])).start()
    else:
        import multiprocessing
        worker = multiprocessing.get_context("fork").Process(target=log, args=(URI, sys.argv[2]))
        worker.start()
        worker.join()
main()
"""


@pytest.mark.parametrize("whose", ["script", "thread", "worker"])
def test_the_end_of_a_process_waits_for_a_flush_under_way(
    whose: str, proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """As with MLflow's client, whose threads are waited for."""
    run_id = readback.new_run(experiment_id)
    proxy.fail("runs/log-batch", Fault.delayed(1.0))
    with Process(ENDS, proxy.uri, run_id, whose) as process:
        ended = process.end()
    assert (ended.code, ended.err) == (0, "")
    assert readback.content(run_id).params == {"a": "b"}


LEFT = """
from runqueue.integrations.mlflow import QueueingClient, _run_operations
_run_operations.BackgroundFlush.exit_timeout = 0.5
client = QueueingClient(URI)
client.log_params("0" * 32, {"a": "b"})
client.flush(synchronous=False)
"""


def test_the_end_of_a_process_waits_for_exit_timeout_at_most(proxy: FaultyProxy) -> None:
    """Then one line says how many entries are lost."""
    proxy.fail("runs/log-batch", Fault.hold(), times=None)
    with Process(LEFT, proxy.uri) as process:
        ended = process.end()
    assert ended.code == 0
    assert ended.err.splitlines() == ["1 entries were not sent: the time was over"]


def test_a_client_that_is_dropped_without_a_flush_warns_of_its_entries(
    proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a fit that has raised: nothing is sent."""
    client = QueueingClient(proxy.uri)
    client.log_params("0" * 32, {"a": "b", "c": "d"})
    del client
    gc.collect()
    assert "2 entries were not sent" in caplog.text
    assert not proxy.requests


# -- where it logs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["given", "prefixed", "of mlflow"])
def test_the_tracking_uri_is_found_as_mlflow_finds_it(
    how: str, proxy: FaultyProxy, readback: Readback, experiment_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A given URI, one with the prefix, or none."""
    given = {"given": proxy.uri, "prefixed": f"runqueue+{proxy.uri}", "of mlflow": None}[how]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri if given is None else "http://127.0.0.1:9")
    run_id = readback.new_run(experiment_id)
    with QueueingClient(given) as client:
        # The client keeps the URI that it was made with.
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
        client.log_metrics(run_id, {"m": 2.5})
    assert [Point(point.step, 0, point.value) for point in readback.history(run_id, "m")] == [Point(0, 0, 2.5)]
    assert proxy.count("runs/log-batch") == 1


def test_an_unknown_uri_is_refused_without_showing_its_password() -> None:
    """By an MlflowException. Neither its text nor the locals of its frames hold the password."""
    with pytest.raises(MlflowException, match="no store is known") as caught:
        QueueingClient("nosuch://user:hush@127.0.0.1")
    frames = [frame for frame, _ in walk_tb(caught.value.__traceback__) if "runqueue" in frame.f_code.co_filename]
    assert len(frames) >= 2
    assert "hush" not in str(caught.value) + repr([frame.f_locals for frame in frames])
    assert "hush" not in repr(QueueingClient("http://user:hush@127.0.0.1"))
