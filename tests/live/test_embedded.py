"""
The embedded default: MLflow's own stores in worker threads, with the guarantees and the errors of a server.

Everything is read back by MLflow's own client.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import runqueue
from support.embedded import NOLOAD, mlflow_client, only, read, run_ids, run_script
from support.proxy import FaultyProxy
from support.readback import Content, Point, Readback, StoredInput, content
from support.threads import in_threads

pytestmark = [pytest.mark.live, NOLOAD]

TOGETHER = """
import runqueue
with runqueue.Client() as client:
    run = client.create_run(experiment_name="shared")
    client.log_metric(run, "m", 1.0, timestamp=1)
"""
MAX_DOUBLE = 1.7976931348623157e308


# -- what is stored --------------------------------------------------------------------------------------------------


def test_without_any_uri_a_script_logs_to_a_database_in_its_folder(first_use: Path) -> None:
    """As with mlflow itself. mlflow is imported by the first flush, httpx never."""
    facts = json.loads((first_use / "facts.json").read_text())
    assert (facts["early"], facts["late"]) == ([], ["mlflow"])
    uri = f"sqlite:///{first_use / 'mlflow.db'}"
    parent, child = (read(uri, run_id) for run_id in facts["runs"])
    experiment = mlflow_client(uri).get_experiment_by_name("first use")
    assert experiment is not None
    assert sorted(run_ids(uri, experiment.experiment_id)) == sorted(facts["runs"])
    assert parent[1] == content(tags={"t": "1"})
    assert parent[0].info.run_name == "parent"
    assert child[0].data.tags["mlflow.parentRunId"] == facts["runs"][0]
    assert child[1] == content(metrics={"m": [Point(3, 4, 1.5)], "nan": [Point(3, 4, -1.0)]})
    assert child[0].info.status == "FINISHED"


def log_everything(client: runqueue.Client | runqueue.AsyncClient) -> list[runqueue.PendingRunId]:
    """Log a parent and a child run with all kinds of entries."""
    parent = client.create_run("0", run_name="pärent", start_time=5, tags={"own": "ü" * 300})
    child = client.create_run("0", parent_run_id=parent, tags={f"many {at}": str(at) for at in range(150)})
    client.log_params(child, {f"p/{at}": f"{at} \N{SNOWMAN}" for at in range(250)} | {"none": None, "list": [1]})
    client.set_tags(child, {"riding": "x", "a b.c": "line\nbreak"})
    for step in range(1_250):
        client.log_metrics(child, {"loss": step / 7, "negative": -step}, step=step - 5, timestamp=step)
    odd = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "tiny": 5e-324}
    client.log_metrics(child, odd, step=2**62, timestamp=9)
    schema, profile = '{"mlflow_colspec": []}', '{"num_rows": 3}'
    inputs = [
        runqueue.Dataset("iris", "abc", "local", '{"uri": "/x"}', schema, profile, {"mlflow.data.context": "train"}),
        runqueue.Dataset("iris", "def"),
    ]
    client.log_inputs(child, inputs)
    client.set_terminated(child, "FAILED", end_time=77)
    return [parent, child]


def assert_everything_is_stored(uri: str, runs: list[runqueue.PendingRunId]) -> None:
    """Assert that MLflow reads back all that `log_everything` has logged."""
    parent, child = runs
    assert sorted(run_ids(uri)) == sorted([str(parent.run_id), str(child.run_id)])
    run, held = read(uri, parent.run_id)
    assert (run.info.run_name, run.info.start_time, run.info.status) == ("pärent", 5, "RUNNING")
    assert held == content(tags={"own": "ü" * 300})
    run, held = read(uri, child.run_id)
    assert (run.info.status, run.info.end_time) == ("FAILED", 77)
    assert run.data.tags["mlflow.parentRunId"] == parent.run_id
    largest = math.inf if uri.startswith("file:") else MAX_DOUBLE
    odd = {"nan": -1.0, "inf": largest, "-inf": -largest, "tiny": 5e-324}
    assert held == content(
        params={f"p/{at}": f"{at} \N{SNOWMAN}" for at in range(250)} | {"none": "None", "list": "[1]"},
        tags={f"many {at}": str(at) for at in range(150)} | {"riding": "x", "a b.c": "line\nbreak"},
        metrics={
            "loss": [Point(step - 5, step, step / 7) for step in range(1_250)],
            "negative": [Point(step - 5, step, float(-step)) for step in range(1_250)],
        }
        | {key: [Point(2**62, 9, value)] for key, value in odd.items()},
        inputs=[
            StoredInput(
                "iris",
                "abc",
                "local",
                '{"uri": "/x"}',
                '{"mlflow_colspec": []}',
                '{"num_rows": 3}',
                (("mlflow.data.context", "train"),),
            ),
            StoredInput("iris", "def", "local"),
        ],
    )


@pytest.fixture
def default_uri(embedded_uri: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store that a client without arguments finds: on SQLite with no setting at all."""
    if embedded_uri.startswith("file:"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", embedded_uri)
    return embedded_uri


def test_everything_reads_back_point_by_point(default_uri: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Names, parents, params, tags, histories, datasets, status."""
    with runqueue.Client() as client:
        runs = log_everything(client)
    assert capfd.readouterr().out == ""
    assert_everything_is_stored(default_uri, runs)


class AsyncClientTests:
    """The same case for both event loops."""

    async def test_everything_reads_back_point_by_point(
        self, default_uri: str, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """Names, parents, params, tags, histories, datasets, status."""
        async with runqueue.AsyncClient() as client:
            runs = log_everything(client)
            await client.flush()
        assert capfd.readouterr().out == ""
        assert_everything_is_stored(default_uri, runs)


@pytest.mark.asyncio
class TestOnAsyncio(AsyncClientTests):
    """With pytest-asyncio."""


@pytest.mark.anyio
class TestOnTrio(AsyncClientTests):
    """With anyio's plugin."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "trio"


def test_eight_runs_side_by_side_never_find_the_store_locked(
    embedded_uri: str, caplog: pytest.LogCaptureFixture
) -> None:
    """8 runs of 2,000 points, logged by threads that flush at any time: no retry, and no warning."""
    with runqueue.Client(embedded_uri) as client:
        runs = [client.create_run(experiment_name="sweep") for _ in range(8)]

        def work(thread: int) -> None:
            for step in range(1_000):
                client.log_metrics(runs[thread], {"a": float(step), "b": float(thread)}, step=step, timestamp=step)
                if step == 500:
                    client.flush()

        in_threads(work, 8)
        client.flush()
        assert client.statistics().retried == 0
    assert caplog.text == ""
    for thread, run in enumerate(runs):
        assert read(embedded_uri, run.run_id)[1].metrics == {
            "a": [Point(step, step, float(step)) for step in range(1_000)],
            "b": [Point(step, step, float(thread)) for step in range(1_000)],
        }


@only("sqlite")
def test_processes_that_use_one_new_database_at_the_same_time_all_store_their_runs(
    embedded_uri: str, tmp_path: Path
) -> None:
    """The first use creates the tables, which MLflow cannot do twice at the same time."""
    folder = tmp_path / "new"
    folder.mkdir()
    failed: list[str] = []

    def work(_: int) -> None:
        done = run_script(TOGETHER, folder)
        if done.returncode != 0 or done.stdout:
            failed.append(done.stdout + done.stderr[-1_500:])

    in_threads(work, 3)
    assert failed == []
    database = f"sqlite:///{folder / 'mlflow.db'}"
    experiment = mlflow_client(database).get_experiment_by_name("shared")
    assert experiment is not None
    found = run_ids(database, experiment.experiment_id)
    assert [read(database, run_id)[1].metrics for run_id in found] == [{"m": [Point(0, 1, 1.0)]}] * 3


# -- what is refused -------------------------------------------------------------------------------------------------

Refused = set[tuple[object, ...]]


def log_invalid_entries(client: runqueue.Client) -> tuple[str | None, Refused]:
    """Log invalid entries among valid ones; return the run, and the failures of this run and of others."""
    run = client.create_run("0")
    client.log_param(run, "kept", "old")
    client.flush()
    client.create_run("987654321")
    client.log_param("f" * 32, "p", "1")
    client.log_params(run, {f"p{at}": "new" for at in range(50)} | {"kept": "new", "bad*param": "1"})
    client.set_tags(run, {"t": "1", "bad*tag": "1"})
    for step in range(100):
        client.log_metrics(run, {"good": step, "bad*metric": step}, step=step, timestamp=step)
    client.log_inputs(run, [runqueue.Dataset("long", "d" * 100), runqueue.Dataset("good", "1")])
    client.set_terminated(run)
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    return run.run_id, {
        (failure.operation, entry.kind, entry.key, entry.step, type(failure.error), failure.final)
        for failure in caught.value.failures
        for entry in failure.entries
    }


def test_an_invalid_entry_fails_alone_and_is_reported_as_over_rest(
    embedded_uri: str, proxy: FaultyProxy, readback: Readback
) -> None:
    """The same entries have the same errors as over REST; all others are stored."""
    reported: list[Refused] = []
    stored: list[Content] = []
    statuses: list[str] = []
    for where in (embedded_uri, proxy.uri):
        client = runqueue.Client(where, retry_timeout=60)
        run_id, refused = log_invalid_entries(client)
        reported.append(refused)
        with pytest.raises(runqueue.FlushError):  # the run without an experiment is queued to the end
            client.close()
        if where == embedded_uri:
            run, held = read(embedded_uri, run_id)
            statuses.append(run.info.status)
        else:
            statuses.append(readback.run(run_id).status)
            held = readback.content(run_id)
        stored.append(held)
    if embedded_uri.startswith("file:"):  # files have no columns, and so no lengths
        long = ("log_inputs", "dataset", "long", None, runqueue.RejectedError, True)
        reported[1].discard(long)
        stored[0].inputs[:] = [each for each in stored[0].inputs if each.name != "long"]
    assert reported[0] == reported[1]
    assert stored[0] == stored[1]
    assert statuses == ["FINISHED"] * 2
    assert stored[0].params == {f"p{at}": "new" for at in range(50)} | {"kept": "old"}
    assert stored[0].metrics == {"good": [Point(step, step, float(step)) for step in range(100)]}


def test_an_unknown_experiment_keeps_everything_queued(embedded_uri: str) -> None:
    """Other runs are stored. The failure names the run and counts its entries, which stay queued."""
    client = runqueue.Client(embedded_uri)
    lost = client.create_run("987654321")
    client.log_metrics(lost, {"a": 1.0, "b": 2.0})
    client.set_terminated(lost)
    fine = client.create_run("0")
    for _ in range(2):
        with pytest.raises(runqueue.FlushError, match=r"^3 of \d entries .*3 of them are still queued") as caught:
            client.flush()
        assert {(failure.run_id, failure.final) for failure in caught.value.failures} == {(lost, False)}
        assert {type(failure.error) for failure in caught.value.failures} == {runqueue.NotFoundError}
        assert client.statistics().pending == 3
    assert run_ids(embedded_uri) == [fine.run_id]
    with pytest.raises(runqueue.FlushError):
        client.close()


def test_a_deleted_experiment_is_a_clear_failure(embedded_uri: str) -> None:
    """Given by name or by id. Once it is restored, everything is stored."""
    reader = mlflow_client(embedded_uri)
    experiment_id = reader.create_experiment("gone")
    reader.delete_experiment(experiment_id)
    with runqueue.Client(embedded_uri, retry_timeout=1) as client:
        runs = [client.create_run(experiment_id), client.create_run(experiment_name="gone")]
        with pytest.raises(runqueue.FlushError, match=r"(?s)^2 of 2 entries .*is deleted; restore it") as caught:
            client.flush()
        assert not any(failure.final for failure in caught.value.failures)
        reader.restore_experiment(experiment_id)
        client.flush()
    assert sorted(run_ids(embedded_uri, experiment_id)) == sorted(str(run.run_id) for run in runs)


def test_an_exception_inside_the_block_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a database is created."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ZeroDivisionError), runqueue.Client() as client:
        client.create_run("0")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
