"""One contract for every store: a server, SQLite, PostgreSQL by both of its drivers, files."""

# Rules of this file: no test looks which store it has. What a store cannot do is said in `DIFFERENCES`, and nowhere
# else. Everything is read back by MLflow's own client.

from __future__ import annotations

import math
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest

import runqueue
from support.embedded import NOLOAD, mlflow_client, mlflow_store, read, run_ids
from support.mlflow_server import MlflowServer
from support.postgres import DRIVERS, Postgres, shared_postgres
from support.readback import Point, StoredInput, content
from support.threads import in_threads

pytestmark = [pytest.mark.live, NOLOAD]

STORES = ("rest", "sqlite", *(f"postgresql+{driver}" for driver in DRIVERS), "file")
RETRY_TIMEOUT = 30.0
"""Seconds; a test in which something is retried for ever fails after them."""


@attrs.frozen(kw_only=True)
class Differences:
    """What a test may expect of a store. The defaults hold for databases, with or without a server."""

    largest: float = 1.7976931348623157e308
    """What an infinite value reads back as."""
    copies: int = 1
    """Of a point that is logged twice."""
    nests: bool = True
    """Whether a key may be the beginning of another's path."""
    here: bool = True
    """Whether the store is in this process, and can be made to fail."""
    bounded: bool = True
    """Whether a dataset's digest has a greatest length."""


DIFFERENCES = {
    "rest": Differences(here=False),
    "file": Differences(largest=math.inf, copies=2, nests=False, bounded=False),
}
HERE = [kind for kind in STORES if DIFFERENCES.get(kind, Differences()).here]


@attrs.frozen(kw_only=True)
class StoreUnderTest:
    """A store, and an experiment in it that no other test uses."""

    uri: str
    experiment_id: str
    differs: Differences

    def client(self) -> runqueue.Client:
        return runqueue.Client(self.uri, retry_timeout=RETRY_TIMEOUT)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with shared_postgres() as server:
        yield server


@pytest.fixture(scope="module", params=STORES)
def store_uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One store of each kind, for all tests of this file."""
    kind: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        folder = tmp_path_factory.mktemp("store")
        patch.chdir(folder)  # where MLflow would put artifacts
        if kind == "rest":
            server: MlflowServer = request.getfixturevalue("mlflow_server")
            yield server.uri
        elif kind == "file":
            yield f"file:{folder / 'files'}"
        elif kind == "sqlite":
            yield _copied(request.getfixturevalue("first_use"), folder)
        else:
            uri = request.getfixturevalue("postgres").uri("mlflow", kind.partition("+")[2])
            yield uri
            mlflow_store(uri).engine.dispose()


def _copied(first_use: Path, folder: Path) -> str:
    (folder / "mlflow.db").write_bytes((first_use / "mlflow.db").read_bytes())  # the tables take MLflow three seconds
    return f"sqlite:///{folder / 'mlflow.db'}"


@pytest.fixture
def store(store_uri: str, request: pytest.FixtureRequest) -> StoreUnderTest:
    experiment_id = mlflow_client(store_uri).create_experiment(f"contract {uuid.uuid4().hex}")
    kind = request.node.callspec.params["store_uri"]
    return StoreUnderTest(uri=store_uri, experiment_id=experiment_id, differs=DIFFERENCES.get(kind, Differences()))


Refused = set[tuple[object, ...]]


def refused(error: runqueue.FlushError) -> Refused:
    return {
        (failure.operation, entry.key, type(failure.error), failure.final)
        for failure in error.failures
        for entry in failure.entries
    }


# -- what is stored --------------------------------------------------------------------------------------------------


def test_everything_reads_back(store: StoreUnderTest, caplog: pytest.LogCaptureFixture) -> None:
    """Names, parent, params, tags, histories, NaN and infinities, datasets, status."""
    data = runqueue.Dataset("iris", "abc", "local", "{}", '{"s": 1}', '{"p": 2}', {"mlflow.data.context": "train"})
    with store.client() as client:
        parent = client.create_run(store.experiment_id, run_name="pärent", start_time=5)
        child = client.create_run(store.experiment_id, parent_run_id=parent, tags={"t": "1"})
        client.log_params(child, {f"p/{at}": f"{at} \N{SNOWMAN}" for at in range(250)})
        client.set_tags(child, {f"many {at}": "ü\n" for at in range(150)})
        for step in range(1_250):
            client.log_metrics(child, {"a": step / 7, "b/c": -step}, step=step - 5, timestamp=step)
        client.log_metrics(child, {"nan": math.nan, "up": math.inf, "down": -math.inf}, step=2**62, timestamp=9)
        client.log_inputs(child, [data, runqueue.Dataset("iris", "def")])
        client.set_terminated(child, "FAILED", end_time=77)
    assert caplog.text == ""
    run, held = read(store.uri, parent.run_id)
    assert (run.info.run_name, run.info.start_time, run.info.status) == ("pärent", 5, "RUNNING")
    assert held == content()
    run, held = read(store.uri, child.run_id)
    assert (run.info.status, run.info.end_time) == ("FAILED", 77)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    largest = store.differs.largest
    context = (("mlflow.data.context", "train"),)
    assert held == content(
        params={f"p/{at}": f"{at} \N{SNOWMAN}" for at in range(250)},
        tags={f"many {at}": "ü\n" for at in range(150)} | {"t": "1"},
        metrics={
            "a": [Point(step - 5, step, step / 7) for step in range(1_250)],
            "b/c": [Point(step - 5, step, float(-step)) for step in range(1_250)],
            "nan": [Point(2**62, 9, -1.0)],
            "up": [Point(2**62, 9, largest)],
            "down": [Point(2**62, 9, -largest)],
        },
        inputs=[
            StoredInput("iris", "abc", "local", "{}", '{"s": 1}', '{"p": 2}', context),
            StoredInput("iris", "def", "local"),
        ],
    )
    assert sorted(run_ids(store.uri, store.experiment_id)) == sorted([str(parent.run_id), str(child.run_id)])


@pytest.mark.sample("sqlite")
def test_eight_runs_of_5_000_points_do_not_disturb_each_other(
    store: StoreUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    """From eight threads that flush at any time, all with the same dataset: no failure, no warning, every point."""
    with store.client() as client:
        runs = [client.create_run(store.experiment_id) for _ in range(8)]

        def work(thread: int) -> None:
            client.log_inputs(runs[thread], [runqueue.Dataset("shared", "1")])
            for step in range(500):
                values = {f"m{at}": float(step + at) for at in range(10)}
                client.log_metrics(runs[thread], values, step=step, timestamp=step)
                if step == 250:
                    client.flush()

        in_threads(work, 8)
        client.flush()
        assert (client.statistics().failed, client.statistics().stored) == (0, 8 * 5_002)
    assert caplog.text == ""
    expected = {f"m{at}": [Point(step, step, float(step + at)) for step in range(500)] for at in range(10)}
    for run in runs:
        held = read(store.uri, run.run_id)[1]
        assert held.metrics == expected
        assert held.inputs == [StoredInput("shared", "1", "local")]


def test_two_clients_of_one_store_share_a_run(store: StoreUnderTest) -> None:
    """They take turns where the store needs it. An experiment that both name is created once."""
    name = f"shared {uuid.uuid4().hex}"
    with store.client() as one, store.client() as other:
        run = one.create_run(experiment_name=name)
        one.flush()

        def work(thread: int) -> None:
            client = (one, other)[thread]
            client.create_run(experiment_name=f"{name} too")
            for step in range(1_500):
                client.log_metric(str(run.run_id), "m", float(step), step=step, timestamp=thread)
            client.flush()

        in_threads(work, 2)
    points = [Point(step, thread, float(step)) for step in range(1_500) for thread in range(2)]
    assert read(store.uri, run.run_id)[1].metrics == {"m": points}
    experiment = mlflow_client(store.uri).get_experiment_by_name(f"{name} too")
    assert len(run_ids(store.uri, experiment.experiment_id)) == 2


def test_a_point_that_is_logged_twice_is_stored_once(store: StoreUnderTest) -> None:
    """Where the store can tell equal points."""
    with store.client() as client:
        run = client.create_run(store.experiment_id)
        for _ in range(2):
            client.log_metric(run, "m", 1.5, step=1, timestamp=2)
            client.log_param(run, "p", "1")
            client.log_inputs(run, [runqueue.Dataset("d", "1")])
            client.flush()
    held = read(store.uri, run.run_id)[1]
    assert held.metrics == {"m": [Point(1, 2, 1.5)] * store.differs.copies}
    assert (held.params, held.inputs) == ({"p": "1"}, [StoredInput("d", "1", "local")])


# -- what is refused -------------------------------------------------------------------------------------------------


def test_invalid_entries_fail_alone(store: StoreUnderTest) -> None:
    """
    Bad keys, a conflicting param, a digest that is too long: they are reported; all others are stored exactly once.
    """
    client = store.client()
    run = client.create_run(store.experiment_id)
    client.log_param(run, "kept", "old")
    client.flush()
    client.log_params(run, {f"p{at}": "new" for at in range(50)} | {"kept": "new", "bad*param": "1", "last": "1"})
    client.set_tags(run, {"t": "1", "bad*tag": "1"})
    for step in range(100):
        client.log_metrics(run, {"good": step, "bad*metric": step}, step=step, timestamp=step)
    client.log_inputs(run, [runqueue.Dataset("long", "d" * 100), runqueue.Dataset("good", "1")])
    client.set_terminated(run)
    with pytest.raises(runqueue.FlushError) as caught:
        client.close()
    faults = [
        ("log_params", "kept"),
        ("log_params", "bad*param"),
        ("set_tags", "bad*tag"),
        ("log_metrics", "bad*metric"),
    ]
    faults += [("log_inputs", "long")] * store.differs.bounded
    assert refused(caught.value) == {(*fault, runqueue.RejectedError, True) for fault in faults}
    assert client.statistics().retried == 0
    run_read, held = read(store.uri, run.run_id)
    assert run_read.info.status == "FINISHED"
    assert held.params == {f"p{at}": "new" for at in range(50)} | {"kept": "old", "last": "1"}
    assert held.tags == {"t": "1"}
    assert held.metrics == {"good": [Point(step, step, float(step)) for step in range(100)]}
    assert [each.name for each in held.inputs] == ["good"] + ["long"] * (not store.differs.bounded)


def test_keys_of_which_one_is_the_folder_of_the_other(store: StoreUnderTest) -> None:
    """Where a store cannot hold both, the second is reported. Nothing else is lost or written twice."""
    client = store.client()
    run = client.create_run(store.experiment_id)
    for step in range(20):
        client.log_metrics(run, {"a": step, "other": step}, step=step, timestamp=step)
    client.log_metrics(run, {"a/b": 1.0, "z": 2.0}, step=1, timestamp=1)
    client.set_tags(run, {"t": "1", "t/u": "2", "v": "3"})
    lost: set[tuple[str, str]] = set()
    try:
        client.close()
    except runqueue.FlushError as error:
        lost = {(str(operation), str(key)) for operation, key, *_ in refused(error)}
    assert lost == (set() if store.differs.nests else {("log_metrics", "a/b"), ("set_tags", "t/u")})
    points = [Point(step, step, float(step)) for step in range(20)]
    metrics = {"a": points, "other": points, "a/b": [Point(1, 1, 1.0)], "z": [Point(1, 1, 2.0)]}
    tags = {"t": "1", "t/u": "2", "v": "3"}
    gone = {key for _, key in lost}
    assert read(store.uri, run.run_id)[1] == content(
        metrics={key: value for key, value in metrics.items() if key not in gone},
        tags={key: value for key, value in tags.items() if key not in gone},
    )


@pytest.mark.parametrize("unknown", [True, False], ids=["unknown", "deleted"])
def test_a_run_that_is_unknown_or_deleted_fails_for_good_and_alone(store: StoreUnderTest, unknown: bool) -> None:
    """All its entries are reported at once; those of another run are stored."""
    client = store.client()
    gone, fine = "f" * 32, client.create_run(store.experiment_id)
    if not unknown:
        reader = mlflow_client(store.uri)
        gone = reader.create_run(store.experiment_id).info.run_id
        reader.delete_run(gone)
    client.log_param(gone, "p", "1")
    client.log_metrics(gone, {"a": 1.0, "b": 2.0})
    client.log_metric(fine, "m", 1.0, timestamp=1)
    with pytest.raises(runqueue.FlushError) as caught:
        client.close()
    entries = {("log_params", "p"), ("log_metrics", "a"), ("log_metrics", "b")}
    assert refused(caught.value) == {(*entry, runqueue.NotFoundError, True) for entry in entries}
    assert read(store.uri, fine.run_id)[1] == content(metrics={"m": [Point(0, 1, 1.0)]})


def test_an_unknown_experiment_keeps_everything_queued(store: StoreUnderTest) -> None:
    """Flush after flush, until the client is closed. Other runs are stored."""
    client = store.client()
    lost = client.create_run("987654321")
    client.log_metrics(lost, {"a": 1.0, "b": 2.0})
    fine = client.create_run(store.experiment_id)
    for _ in range(2):
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
        assert {kind for *_, kind, final in refused(caught.value)} == {runqueue.NotFoundError}
        assert not any(failure.final for failure in caught.value.failures)
        assert client.statistics().pending == 3
    with pytest.raises(runqueue.FlushError):
        client.close()
    assert run_ids(store.uri, store.experiment_id) == [fine.run_id]


@pytest.mark.parametrize("store_uri", HERE, indirect=True)  # a server's lost answers: see test_faults.py
def test_points_of_a_batch_that_failed_on_the_way_are_stored_once(
    store: StoreUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store writes the batch and then fails, as a disk or a network does. The repetition adds nothing."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.01")
    client = store.client()
    mlflows_store = mlflow_store(store.uri)
    log_batch, failures = mlflows_store.log_batch, [1, 2]

    def failing(*args: Any, **kwargs: Any) -> Any:
        log_batch(*args, **kwargs)
        if failures and kwargs["metrics"]:
            failures.pop()
            raise OSError("gone away")

    monkeypatch.setattr(mlflows_store, "log_batch", failing)
    run = client.create_run(store.experiment_id)
    client.log_param(run, "p", "1")
    for step in range(1_200):
        client.log_metrics(run, {"a": step, "nan": math.nan}, step=step, timestamp=1)
    client.close()
    assert failures == []
    assert read(store.uri, run.run_id)[1] == content(
        params={"p": "1"},
        metrics={
            "a": [Point(step, 1, float(step)) for step in range(1_200)],
            "nan": [Point(step, 1, -1.0) for step in range(1_200)],
        },
    )
