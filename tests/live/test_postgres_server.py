"""
A server as teams run it: two workers in front of PostgreSQL, by each driver. SQLite takes one writer at a time, so
it cannot show what happens here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

import runqueue
from support.mlflow_server import MlflowServer, wait_until
from support.postgres import DRIVERS, Postgres, shared_postgres
from support.proxy import Fault, FaultyProxy
from support.readback import Content, Point, Readback, StoredInput, content
from support.wire_log import assert_in_order, assert_within_limits, most_at_once, of_run

pytestmark = pytest.mark.live

RUNS = 8
KEYS = 10
WAIT = 20.0
"""Seconds after which what never happens is a failure."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with shared_postgres() as database:
        yield database


@pytest.fixture(scope="module", params=DRIVERS)
def server(
    postgres: Postgres, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MlflowServer]:
    """One server for all tests of this file and each driver."""
    with MlflowServer(
        tmp_path_factory.mktemp("postgres-server"),
        backend_uri=postgres.uri("mlflow", request.param),
        workers=2,
        # MLflow's log-inputs takes two connections: one worker that gets all eight requests shall not run out of them.
        environment={"MLFLOW_SQLALCHEMYSTORE_POOL_SIZE": str(2 * RUNS)},
    ) as server:
        yield server


@pytest.fixture
def reader(server: MlflowServer) -> Iterator[Readback]:
    with Readback(server.uri) as reader:
        yield reader


@pytest.fixture
def experiment(reader: Readback, request: pytest.FixtureRequest) -> str:
    """The id of an experiment that no other test uses."""
    return reader.new_experiment(request.node.name)


@pytest.fixture
def faulty_proxy(server: MlflowServer) -> Iterator[FaultyProxy]:
    """Counts, and on demand fails, requests to the server."""
    with FaultyProxy(server.uri) as proxy:
        yield proxy


def log_a_run(client: runqueue.Client, run: runqueue.PendingRunId, seed: int, entries: int) -> Content:
    """Log so many params, tags and metric points, and 5 datasets; return what must be stored."""
    rng = random.Random(seed)
    params = {f"p/{at}": f"{seed} {rng.random()}" for at in range(entries)}
    tags = {f"t.{at}": f"välue {seed} {at} \N{SNOWMAN}" for at in range(entries)}
    metrics: dict[str, list[Point]] = {f"m {at}": [] for at in range(KEYS)}
    client.log_params(run, params)
    client.set_tags(run, tags)
    for step in range(entries // KEYS):
        values = {key: rng.gauss(0, 10.0 ** rng.randint(-200, 200)) for key in metrics}
        client.log_metrics(run, values, step=step, timestamp=seed * entries + step)
        for key, value in values.items():
            metrics[key].append(Point(step, seed * entries + step, value))
    # Two of them are every run's: the server makes one row of each.
    names = ["shared 0", "shared 1", *(f"own {seed} {at}" for at in range(3))]
    client.log_inputs(run, [runqueue.Dataset(name, "1", tags={"mlflow.data.context": "train"}) for name in names])
    context = (("mlflow.data.context", "train"),)
    return content(
        params=params,
        tags=tags,
        metrics=metrics,
        inputs=[StoredInput(name, "1", "local", tags=context) for name in names],
    )


@pytest.mark.parametrize("server", DRIVERS[:1], indirect=True)  # one will do: it takes the server most of a minute
def test_eight_runs_at_once_read_back_exactly(
    faulty_proxy: FaultyProxy, reader: Readback, experiment: str, caplog: pytest.LogCaptureFixture, whole: bool
) -> None:
    """
    8 runs of 5,000 params, 5,000 tags, 5,000 metric points and 5 datasets each, by the default 8 workers.

    Without `--whole`, 500 of each.
    """
    entries = 5_000 if whole else 500
    # Without progress lines, which appear on a slow machine.
    with runqueue.Client(faulty_proxy.uri, progress=False) as client:
        runs = [client.create_run(experiment, run_name=f"run {seed}") for seed in range(RUNS)]
        expected = [log_a_run(client, run, seed, entries) for seed, run in enumerate(runs)]
        for run in runs:
            client.set_terminated(run, end_time=99)
        client.flush()
        statistics = client.statistics()
    assert statistics.stored == statistics.accepted == RUNS * (1 + 3 * entries + 5)
    assert caplog.text == ""
    assert_within_limits(faulty_proxy.requests)
    assert 1 < most_at_once(faulty_proxy.requests) <= 8
    assert sorted(reader.run_ids(experiment, view="ALL")) == sorted(str(run.run_id) for run in runs)
    for seed, (run, logged) in enumerate(zip(runs, expected, strict=True)):
        stored = reader.run(run.run_id)
        assert stored.content == logged
        assert (stored.name, stored.status, stored.end_time) == (f"run {seed}", "FINISHED", 99)
        assert_in_order(of_run(faulty_proxy.requests, run.run_id))


@pytest.mark.sample("psycopg2")
def test_runs_that_share_a_new_dataset_collide_and_all_get_it(
    faulty_proxy: FaultyProxy, reader: Readback, experiment: str, postgres: Postgres
) -> None:
    """
    All eight requests try to insert the dataset. The server answers seven of them 400 with its database's error.
    Repeated, they find the row.
    """
    with runqueue.Client(faulty_proxy.uri, retry_timeout=WAIT) as client:
        runs = [client.create_run(experiment) for _ in range(RUNS)]
        client.flush()
        for run in runs:
            client.log_inputs(run, [runqueue.Dataset("shared", "1")])
        with postgres.connect("mlflow") as other, other.transaction():
            other.execute("LOCK TABLE datasets IN SHARE ROW EXCLUSIVE MODE")  # to be read, and not written
            flush = client.flush(synchronous=False)
            wait_until(lambda: waiting_for_locks(postgres) == RUNS, WAIT, "they do not all come to insert")
        flush.await_completion(WAIT)
        assert client.statistics().failed == 0
    inputs = faulty_proxy.to("runs/log-inputs")
    assert sorted(request.status or 0 for request in inputs) == [200] * RUNS + [400] * (RUNS - 1)
    assert all(b".UniqueViolation)" in request.answer for request in inputs if request.status == 400)
    assert [reader.content(run.run_id).inputs for run in runs] == [[StoredInput("shared", "1", "local")]] * RUNS


def waiting_for_locks(postgres: Postgres) -> int:
    """Return how many sessions wait for a lock."""
    ((count,),) = postgres.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
    assert isinstance(count, int)
    return count


BAD_PARAMS = {"name": ("bad*key", "new"), "conflict": ("kept", "new"), "value": ("nul", "a\0b")}
"""PostgreSQL alone refuses the last one, as its text cannot hold NUL. The error differs with the driver."""


@pytest.mark.sample("psycopg2-*")
@pytest.mark.parametrize("kind", BAD_PARAMS)
def test_one_bad_entry_among_a_thousand_fails_alone(
    faulty_proxy: FaultyProxy, reader: Readback, experiment: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """900 points and 100 params fill one batch: 999 are stored, the bad one is reported."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.01")
    run_id = reader.new_run(experiment, {"kept": "old"})
    bad, value = BAD_PARAMS[kind]
    params = {f"p{at}": "new" for at in range(99)}
    with runqueue.Client(faulty_proxy.uri, retry_timeout=WAIT) as client:
        for step in range(900):
            client.log_metric(run_id, "m", step / 7, step=step, timestamp=step)
        client.log_params(run_id, dict(list(params.items())[:50]) | {bad: value})
        client.log_params(run_id, dict(list(params.items())[50:]))
        with pytest.raises(runqueue.FlushError, match=r"^1 of 1,000 entries") as caught:
            client.flush()
    (failure,) = caught.value.failures
    assert (failure.run_id, failure.operation, failure.final) == (run_id, "log_params", True)
    assert failure.entries == (runqueue.Entry("param", bad, value),)
    assert reader.content(run_id) == content(
        params=params | {"kept": "old"}, metrics={"m": [Point(step, step, step / 7) for step in range(900)]}
    )


@pytest.mark.sample("psycopg2-*")
@pytest.mark.parametrize(
    "fault", [Fault.cut_after_commit(), Fault.cut_in_body(), Fault.answer_after_commit(504)], ids=["cut", "body", "504"]
)
def test_a_lost_answer_to_create_run_leaves_exactly_one_run(
    faulty_proxy: FaultyProxy, reader: Readback, experiment: str, fault: Fault
) -> None:
    """Also where the other worker answers the search: the workers share only the database."""
    faulty_proxy.fail("runs/create", fault, times=RUNS)
    with runqueue.Client(faulty_proxy.uri, retry_timeout=WAIT) as client:
        runs = [client.create_run(experiment, run_name=f"run {at}") for at in range(RUNS)]
        for at, run in enumerate(runs):
            client.log_metric(run, "m", float(at), timestamp=1)
            client.set_terminated(run)
    assert faulty_proxy.count("runs/create") == RUNS
    assert sorted(reader.run_ids(experiment, view="ALL")) == sorted(str(run.run_id) for run in runs)
    for at, run in enumerate(runs):
        stored = reader.run(run.run_id)
        assert (stored.name, stored.status) == (f"run {at}", "FINISHED")
        assert stored.content.metrics == {"m": [Point(0, 1, float(at))]}
