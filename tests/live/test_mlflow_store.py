"""MLflow's client over the queued store, in one process, on a real server: what is queued, read and reported."""

from __future__ import annotations

import importlib
import logging
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from runqueue import ConfigError, QueueFullError
from runqueue.integrations.mlflow import disable, enable
from support.embedded import NOLOAD
from support.mlflow_server import MlflowServer, wait_until
from support.proxy import Fault, FaultyProxy
from support.readback import Readback

pytestmark = [pytest.mark.live, pytest.mark.filterwarnings("ignore::FutureWarning")]

mlflow: Any = importlib.import_module("mlflow")
entities: Any = importlib.import_module("mlflow.entities")
utils: Any = importlib.import_module("mlflow.tracking._tracking_service.utils")
REGISTRY = utils._tracking_store_registry
BOTH = ("runs/log-metric", "runs/log-parameter", "runs/set-tag")


@pytest.fixture(autouse=True)
def no_background_flush(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The background flushes are an hour apart, so each request follows from a call. At the end MLflow is unpatched."""
    monkeypatch.setenv("RUNQUEUE_FLUSH_INTERVAL", "3600")
    yield
    disable()
    assert "get_store" not in vars(REGISTRY) and "get_raw" not in vars(utils.MLFLOW_TRACKING_URI)


@pytest.fixture
def client(proxy: FaultyProxy) -> Any:
    """MLflow's own client of a server whose requests are counted."""
    return mlflow.MlflowClient(proxy.uri)


@pytest.fixture
def run_id(client: Any, experiment_id: str) -> str:
    return str(client.create_run(experiment_id).info.run_id)


def store_of(client: Any) -> Any:
    return client._tracking_client.store


# -- on and off ------------------------------------------------------------------------------------------------------


def test_a_client_that_exists_already_is_queued_inside_the_block(client: Any, run_id: str, proxy: FaultyProxy) -> None:
    """Its calls before and after the block are sent at once."""
    client.log_metric(run_id, "a", 1)
    assert proxy.count("runs/log-metric") == 1
    with enable():
        for step in range(10):
            client.log_metric(run_id, "b", step, step=step)
        assert proxy.count("runs/log-metric") == 1 and proxy.count("runs/log-batch") == 0
    assert proxy.count("runs/log-batch") == 1
    client.log_metric(run_id, "c", 1)
    assert proxy.count("runs/log-metric") == 2


def test_the_end_of_a_block_leaves_mlflow_as_it_was(client: Any) -> None:
    """Every attribute of the objects that are patched."""
    before = (dict(vars(REGISTRY)), dict(vars(utils.MLFLOW_TRACKING_URI)), store_of(client))
    with enable():
        assert type(store_of(client)).__name__ == "QueuedStore"
    after = (dict(vars(REGISTRY)), dict(vars(utils.MLFLOW_TRACKING_URI)), store_of(client))
    assert before == after
    assert type(store_of(client)).__name__ == "RestStore"


def test_blocks_may_be_nested_and_calls_repeated(client: Any) -> None:
    """The outermost block counts. A call of `enable` without a block stays in force after a block inside of it."""

    def queued() -> bool:
        return type(store_of(client)).__name__ == "QueuedStore"

    with enable():
        with enable():
            assert queued()
        assert queued()
    assert not queued()
    enable()
    enable()
    with enable():
        assert queued()
    assert queued()
    with enable():
        disable()
        assert not queued()
    assert not queued()
    disable()
    assert not queued()


def test_blocks_of_two_threads_may_overlap(client: Any) -> None:
    """The end of the first does not end the other."""
    first, second = enable(), enable()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert type(store_of(client)).__name__ == "QueuedStore"
    second.__exit__(None, None, None)
    assert type(store_of(client)).__name__ == "RestStore"


@pytest.mark.parametrize(("variable", "value"), [("RUNQUEUE_FLUSH_INTERVAL", "often"), ("RUNQUEUE_STRICT", "maybe")])
def test_a_bad_variable_is_refused_by_enable(variable: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable, and nothing is patched."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=variable):
        enable()
    assert "get_store" not in vars(REGISTRY)


# -- in front of MLflow's store --------------------------------------------------------------------------------------


def test_the_queued_store_behaves_as_an_instance_of_mlflows_store(client: Any) -> None:
    """For `isinstance`, and for every attribute, method and property."""
    rest = importlib.import_module("mlflow.store.tracking.rest_store")
    abstract = importlib.import_module("mlflow.store.tracking.abstract_store")
    plain = store_of(client)
    with enable():
        store = store_of(client)
        assert isinstance(store, rest.RestStore) and isinstance(store, abstract.AbstractStore)
        assert store.get_host_creds is plain.get_host_creds
        assert set(dir(plain)) <= set(dir(store))
        assert store.supports_workspaces is plain.supports_workspaces is False
        for name in dir(plain):
            if not name.startswith("__"):
                getattr(store, name)
        with pytest.raises(AttributeError, match="no_such_thing"):
            store.no_such_thing  # noqa: B018
        store.of_a_user = 1
        assert plain.of_a_user == 1
        del store.of_a_user
        assert not hasattr(plain, "of_a_user")
        assert repr(store).startswith(f"<QueuedStore {client.tracking_uri} <Queue of <Client ")


def test_an_unknown_method_flushes_the_run_that_its_arguments_name(
    client: Any, run_id: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its signature shows the position of the run id. It is called on the plain store."""
    rest = importlib.import_module("mlflow.store.tracking.rest_store")
    seen: list[Any] = []
    monkeypatch.setattr(
        rest.RestStore, "count_points", lambda self, key, run_id: seen.append((self, key, run_id)), raising=False
    )
    plain = store_of(client)
    with enable():
        client.log_metric(run_id, "a", 1)
        store_of(client).count_points("a", run_id)
        assert proxy.count("runs/log-batch") == 1
        client.log_metric(run_id, "a", 2)
        store_of(client).count_points("a", run_id="another")
        assert proxy.count("runs/log-batch") == 1
    assert seen == [(plain, "a", run_id), (plain, "a", "another")]


# -- reading what was written ----------------------------------------------------------------------------------------


def test_reads_flush_the_run_they_read_and_no_other(
    client: Any, run_id: str, experiment_id: str, proxy: FaultyProxy
) -> None:
    """A search, which may show any run, flushes all."""
    with enable():
        other = client.create_run(experiment_id).info.run_id
        client.log_metric(run_id, "a", 1)
        client.log_metric(other, "a", 2)
        assert client.get_run(run_id).data.metrics == {"a": 1}
        assert proxy.count("runs/log-batch") == 1
        assert [point.value for point in client.get_metric_history(other, "a")] == [2]
        assert proxy.count("runs/log-batch") == 2
        client.get_run(run_id)
        assert proxy.count("runs/log-batch") == 2
        client.log_param(run_id, "p", 1)
        client.set_tag(other, "t", 2)
        found = {run.info.run_id: run for run in client.search_runs([experiment_id])}
        assert found[run_id].data.params == {"p": "1"} and found[other].data.tags["t"] == "2"
        assert not any(map(proxy.count, BOTH))


def test_deletions_follow_the_data_that_was_logged_before(client: Any, run_id: str, readback: Readback) -> None:
    """A deleted tag is gone. A deleted run has its data, and takes more once it is restored."""
    with enable():
        client.set_tag(run_id, "t", 1)
        client.delete_tag(run_id, "t")
        client.set_tag(run_id, "u", 1)
        client.delete_run(run_id)
        assert readback.run(run_id).lifecycle_stage == "deleted"
        client.restore_run(run_id)
        client.log_metric(run_id, "m", 1)
        client.set_terminated(run_id)
    content = readback.content(run_id)
    assert content.tags == {"u": "1"} and set(content.metrics) == {"m"}


def test_a_thread_reads_its_own_writes_while_others_write_to_the_same_run(client: Any, run_id: str) -> None:
    """In whatever order the flushes of the threads end."""
    wrong: list[str] = []

    def work(name: str) -> None:
        for step in range(15):
            client.log_metric(run_id, name, step, step=step)
            found = len(client.get_metric_history(run_id, name))
            if found != step + 1:
                wrong.append(f"{name}: {found} of {step + 1}")

    with enable():
        threads = [threading.Thread(target=work, args=(f"of {number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_an_asynchronous_call_returns_mlflows_run_operations(client: Any, run_id: str, readback: Readback) -> None:
    """Waiting for them waits until all entries of the call are stored."""
    with enable():
        operations = client.log_batch(
            run_id,
            metrics=[entities.Metric("m", 1.0, 1, step) for step in range(1_500)],
            params=[entities.Param(f"p{number}", "1") for number in range(150)],
            synchronous=False,
        )
        assert type(operations).__module__ == "mlflow.utils.async_logging.run_operations"
        operations.wait()
        content = readback.content(run_id)
        assert len(content.metrics["m"]) == 1_500 and len(content.params) == 150


# -- the end of a run ------------------------------------------------------------------------------------------------


def test_the_end_of_a_run_returns_when_all_is_stored(client: Any, run_id: str, readback: Readback) -> None:
    """The data is sent first, then the status."""
    with enable():
        for step in range(2_500):
            client.log_metric(run_id, "m", step, step=step)
        client.set_terminated(run_id, "FAILED", end_time=1_800_000_000_000)
        stored = readback.run(run_id)
        assert stored.status == "FAILED" and stored.end_time == 1_800_000_000_000
        assert [point.step for point in stored.content.metrics["m"]] == list(range(2_500))


def test_entries_that_the_server_refuses_are_reported_at_the_end_of_the_run(
    client: Any, experiment_id: str, readback: Readback, caplog: pytest.LogCaptureFixture
) -> None:
    """One warning with counts. The run ends as usual, with all valid entries."""
    run_id = readback.new_run(experiment_id, {"p": "theirs", "q": "theirs"})
    with caplog.at_level(logging.WARNING, "runqueue"), enable():
        client.log_param(run_id, "p", "ours")
        client.log_batch(run_id, params=[entities.Param("q", "ours"), entities.Param("r", "ours")])
        client.log_metric(run_id, "m", 1)
        client.get_run(run_id)  # this flush finds the failures; a read does not report them
        client.set_terminated(run_id)
    text = f"2 entries of run {run_id} were not stored:"
    (record,) = [record for record in caplog.records if record.getMessage().startswith(text)]
    assert "param 'p'" in record.getMessage() and "Changing param values is not allowed" in record.getMessage()
    stored = readback.run(run_id)
    assert stored.status == "FINISHED"
    assert stored.content.params == {"p": "theirs", "q": "theirs", "r": "ours"} and "m" in stored.content.metrics


def test_strict_mode_raises_the_report_at_the_end_of_the_run(
    client: Any, experiment_id: str, readback: Readback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MLflow's exception, after the status was stored. A second end does not report it again."""
    monkeypatch.setenv("RUNQUEUE_STRICT", "1")
    run_id = readback.new_run(experiment_id, {"p": "theirs"})
    with enable():
        client.log_param(run_id, "p", "ours")
        with pytest.raises(mlflow.MlflowException, match="1 entries of run"):
            client.set_terminated(run_id)
        assert readback.run(run_id).status == "FINISHED"
        client.set_terminated(run_id)


def test_waiting_for_an_asynchronous_call_raises_its_failures(
    client: Any, experiment_id: str, readback: Readback
) -> None:
    """As MLflow's own futures do."""
    run_id = readback.new_run(experiment_id, {"p": "theirs"})
    with enable():
        good = client.log_param(run_id, "q", "ours", synchronous=False)
        good.wait()
        bad = client.log_param(run_id, "p", "ours", synchronous=False)
        with pytest.raises(mlflow.MlflowException, match="Changing param values is not allowed"):
            bad.wait()


def test_failures_of_an_open_run_are_reported_at_the_end_of_the_block(
    client: Any, experiment_id: str, readback: Readback, caplog: pytest.LogCaptureFixture
) -> None:
    """A warning with counts."""
    run_id = readback.new_run(experiment_id, {"p": "theirs"})
    with caplog.at_level(logging.WARNING, "runqueue"), enable():
        client.log_param(run_id, "p", "ours")
    assert any(
        record.getMessage().startswith(f"1 entries of run {run_id} were not stored:") for record in caplog.records
    )


def test_a_run_that_ends_in_an_outage_is_sent_after_it(
    client: Any,
    run_id: str,
    proxy: FaultyProxy,
    readback: Readback,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """
    The end of the run warns and does not raise. After the outage the data is sent, then the status with its end time.
    """
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "runqueue"), enable():
        proxy.fail("runs/log-batch", Fault.answer(503), times=None)
        client.log_metric(run_id, "m", 1)
        store = store_of(client)
        assert store.update_run_info(run_id, entities.RunStatus.FINISHED, 1_800_000_000_000, None) is None
        assert any("are still queued" in record.getMessage() for record in caplog.records)
        assert readback.run(run_id).status == "RUNNING"
        proxy.mend()
        client.get_run(run_id)
        stored = readback.run(run_id)
        assert stored.status == "FINISHED" and stored.end_time == 1_800_000_000_000
        assert "m" in stored.content.metrics


def test_ended_runs_leave_no_state_behind(client: Any, experiment_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a service with a run for each request: neither the engine nor the queue grows."""
    monkeypatch.setenv("RUNQUEUE_FLUSH_INTERVAL", "0.05")
    with enable():
        for _ in range(30):
            run_id = client.create_run(experiment_id).info.run_id
            client.log_metric(run_id, "m", 1)
            client.log_param(run_id, "p", 1)
            client.set_terminated(run_id)
        queue = store_of(client)._queue
        lanes = queue.client._engine.accumulator
        wait_until(lambda: len(lanes.all()) <= 1, 20, "the lanes of ended runs are kept")
        kept = (
            queue._last_tokens,
            queue._flushed_tokens,
            queue._logged_params,
            queue._failures,
            queue.client._engine.own_runs,
        )
        assert all(len(each) == 0 for each in kept), kept


# -- what cannot be queued ---------------------------------------------------------------------------------------------


def test_entries_that_do_not_fit_into_a_full_queue_go_to_the_plain_store(
    client: Any, run_id: str, readback: Readback, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is flushed first; when the call returns, everything is stored."""

    def full(*_: object, **__: object) -> None:
        raise QueueFullError("no room")

    with enable():
        monkeypatch.setattr(store_of(client)._queue.client, "log_metrics", full)
        client.log_batch(run_id, metrics=[entities.Metric("m", 1.0, 1, 0)], tags=[entities.RunTag("t", "1")])
        content = readback.content(run_id)
        assert content.tags == {"t": "1"} and set(content.metrics) == {"m"}


@pytest.mark.parametrize("bad", ["no/run", "", "r" * 300])
def test_an_invalid_run_id_is_refused_at_the_call(bad: str, client: Any) -> None:
    """The error is MLflow's own."""
    with pytest.raises(mlflow.MlflowException) as plainly:
        client.log_metric(bad, "m", 1)
    with enable():
        with pytest.raises(mlflow.MlflowException) as caught:
            client.log_metric(bad, "m", 1)
        assert str(caught.value) == str(plainly.value)
        client.search_runs(["0"])


# -- several stores --------------------------------------------------------------------------------------------------


def test_two_tracking_uris_at_once_are_two_queues(
    client: Any, run_id: str, mlflow_server: MlflowServer, experiment_id: str, proxy: FaultyProxy
) -> None:
    """A read from one store does not flush the other."""
    other = mlflow.MlflowClient(mlflow_server.uri)
    with enable():
        theirs = other.create_run(experiment_id).info.run_id
        client.log_metric(run_id, "m", 1)
        other.log_metric(theirs, "m", 2)
        assert other.get_run(theirs).data.metrics == {"m": 2}
        assert proxy.count("runs/log-batch") == 0
        assert client.get_run(run_id).data.metrics == {"m": 1}


def test_two_spellings_of_a_server_are_one_queue(client: Any, run_id: str) -> None:
    """An entry that is logged by one client is read by the other."""
    other = mlflow.MlflowClient(client.tracking_uri + "/")
    with enable():
        client.log_metric(run_id, "m", 1)
        assert other.get_run(run_id).data.metrics == {"m": 1}


@NOLOAD
def test_the_queue_of_a_database_sends_to_the_plain_store(
    tmp_path: Any, first_use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not into the queue once more."""
    shutil.copy(first_use / "mlflow.db", tmp_path)
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with enable():
        run_id = client.create_run("0").info.run_id
        for step in range(50):
            client.log_metric(run_id, "m", step, step=step)
        client.log_param(run_id, "p", 1)
        assert len(client.get_metric_history(run_id, "m")) == 50
        client.set_terminated(run_id)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params == {"p": "1"}
