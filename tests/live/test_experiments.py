"""`create_run(experiment_name=...)`: the experiment is looked up or created, once for all runs."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

import runqueue
from support.answers import LOGIN_PAGE, error
from support.mlflow_server import clean_environment
from support.proxy import Fault, FaultyProxy
from support.readback import Point, Readback
from support.threads import in_threads
from support.wire_log import names

pytestmark = pytest.mark.live

LOOK_UP = "experiments/get-by-name"
MAKE = "experiments/create"

TOGETHER = """
import sys
import runqueue
client = runqueue.Client(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
with client:
    run = client.create_run(experiment_name=sys.argv[2], run_name=sys.argv[3])
    client.log_metric(run, "m", float(sys.argv[3]), step=1, timestamp=1)
print(run.run_id)
"""
"""A process that creates a run at a signal, at the same time as others."""


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name of an experiment that does not exist yet, with characters that a URL has to escape."""
    return f"{request.node.name} & ü/?#%+ {uuid.uuid4().hex}"


def experiments(readback: Readback) -> dict[str, str]:
    """Return the ids of all experiments by name, deleted ones included."""
    found: dict[str, str] = {}
    token = ""
    while True:
        body = {"max_results": 1_000, "view_type": "ALL"} | ({"page_token": token} if token else {})
        page: dict[str, Any] = readback.post("experiments/search", body)
        found |= {each["name"]: each["experiment_id"] for each in page.get("experiments", [])}
        token = page.get("next_page_token", "")
        if not token:
            return found


def test_an_experiment_that_is_missing_is_created(proxy: FaultyProxy, readback: Readback, name: str) -> None:
    """It is looked up, created, and then used."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_name=name)
    assert readback.run(run.run_id).experiment_id == experiments(readback)[name]
    assert names(proxy.requests) == ["get-by-name", "create", "create"]


def test_an_experiment_that_is_there_is_used(proxy: FaultyProxy, readback: Readback, name: str) -> None:
    """A second client looks it up again."""
    experiment_id = str(readback.post(MAKE, {"name": name})["experiment_id"])
    for _ in range(2):
        with runqueue.Client(proxy.uri) as client:
            run = client.create_run(experiment_name=name)
        assert readback.run(run.run_id).experiment_id == experiment_id
    assert proxy.count(MAKE) == 0
    assert len(readback.run_ids(experiment_id)) == 2


def test_many_runs_of_one_client_cost_one_look_up(proxy: FaultyProxy, readback: Readback, name: str) -> None:
    """Whether they are created side by side, in several flushes, or by several threads."""
    with runqueue.Client(proxy.uri) as client:
        runs = [client.create_run(experiment_name=name) for _ in range(20)]
        client.flush()

        def work(_: int) -> None:
            runs.append(client.create_run(experiment_name=name))
            client.flush()

        in_threads(work, 4)
    assert (proxy.count(LOOK_UP), proxy.count(MAKE), proxy.count("runs/create")) == (1, 1, 24)
    experiment_id = experiments(readback)[name]
    assert sorted(readback.run_ids(experiment_id)) == sorted(str(run.run_id) for run in runs)


def test_each_name_leads_to_its_own_experiment(proxy: FaultyProxy, readback: Readback, name: str) -> None:
    """Names that differ in case, in blanks, or by a prefix are different names."""
    wanted = [name, name.upper(), f"{name} ", name[:-1]]
    with runqueue.Client(proxy.uri) as client:
        runs = [client.create_run(experiment_name=each) for each in wanted]
    by_name = experiments(readback)
    assert [readback.run(run.run_id).experiment_id for run in runs] == [by_name[each] for each in wanted]
    assert len({by_name[each] for each in wanted}) == 4


# -- what may go wrong -----------------------------------------------------------------------------------------------


def log_something(client: runqueue.Client, run: runqueue.PendingRunId) -> None:
    """Log four entries and a final status: five entries with the run itself."""
    client.log_params(run, {"p": 1})
    client.set_tags(run, {"t": 1})
    client.log_metrics(run, {"m": 1.0, "n": 2.0}, step=1, timestamp=1)
    client.set_terminated(run)


def test_a_deleted_experiment_is_a_clear_failure_and_keeps_everything_queued(
    proxy: FaultyProxy, readback: Readback, name: str
) -> None:
    """No other experiment is used instead; once it is restored, the next flush stores all of it."""
    experiment_id = str(readback.post(MAKE, {"name": name})["experiment_id"])
    readback.post("experiments/delete", {"experiment_id": experiment_id})
    before = experiments(readback)
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_name=name)
        log_something(client, run)
        for _ in range(2):
            with pytest.raises(runqueue.FlushError, match=r"(?s)^5 of 5 entries .* is deleted; restore it") as caught:
                client.flush()
            assert not any(failure.final for failure in caught.value.failures)
            assert name in str(caught.value)
            assert client.statistics().pending == 5
        assert (proxy.count(MAKE), proxy.count("runs/create")) == (0, 0)
        readback.post("experiments/restore", {"experiment_id": experiment_id})
        client.flush()
    stored = readback.run(run.run_id)
    assert (stored.experiment_id, stored.status) == (experiment_id, "FINISHED")
    assert stored.content.metrics == {"m": [Point(1, 1, 1.0)], "n": [Point(1, 1, 2.0)]}
    assert experiments(readback) == before


def test_an_experiment_that_is_deleted_between_two_runs_keeps_the_second_queued(
    proxy: FaultyProxy, readback: Readback, name: str
) -> None:
    """
    The client has cached its id. The first run is not affected, and the second waits until the experiment is restored.
    """
    with runqueue.Client(proxy.uri) as client:
        client.create_run(experiment_name=name)
        client.flush()
        experiment_id = experiments(readback)[name]
        readback.post("experiments/delete", {"experiment_id": experiment_id})
        run = client.create_run(experiment_name=name)
        log_something(client, run)
        with pytest.raises(runqueue.FlushError, match=r"^5 of 5 entries .*5 of them are still queued"):
            client.flush()
        readback.post("experiments/restore", {"experiment_id": experiment_id})
        client.flush()
    assert readback.run(run.run_id).experiment_id == experiment_id


def test_a_name_that_the_server_refuses_keeps_the_run_queued_and_harms_no_other(
    proxy: FaultyProxy, readback: Readback, name: str, experiment_id: str
) -> None:
    """With a name of 600 characters. The failure has the server's message; another run of the client is stored."""
    client = runqueue.Client(proxy.uri)
    refused = client.create_run(experiment_name="x" * 600)
    client.set_tag(refused, "t", "1")
    stored = client.create_run(experiment_id)
    with pytest.raises(runqueue.FlushError, match=r"(?s)^2 of 3 entries .*500 char") as caught:
        client.flush()
    assert {(failure.run_id, failure.final) for failure in caught.value.failures} == {(refused, False)}
    assert readback.run_ids(experiment_id) == [stored.run_id]
    with pytest.raises(runqueue.FlushError):
        client.close()


def test_losing_the_race_to_create_it_leads_to_the_same_experiment(
    proxy: FaultyProxy, readback: Readback, name: str
) -> None:
    """It does not exist at the look-up, but another client creates it first: it is looked up again."""
    experiment_id = str(readback.post(MAKE, {"name": name})["experiment_id"])
    proxy.fail(LOOK_UP, Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST", "no such experiment")))
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_name=name)
    assert [request.status for request in proxy.requests] == [404, 400, 200, 200]
    assert names(proxy.requests) == ["get-by-name", "create", "get-by-name", "create"]
    assert readback.run(run.run_id).experiment_id == experiment_id


@pytest.mark.parametrize(
    "fault", [Fault.cut_after_commit(), Fault.answer_after_commit(500), Fault.cut_in_body()], ids=["cut", "500", "body"]
)
def test_a_lost_answer_to_its_creation_leaves_one_experiment(
    proxy: FaultyProxy, readback: Readback, name: str, fault: Fault
) -> None:
    """It is looked up again, and found."""
    proxy.fail(MAKE, fault)
    with runqueue.Client(proxy.uri, retry_timeout=20) as client:
        run = client.create_run(experiment_name=name)
    assert proxy.count(MAKE) == 1
    assert readback.run(run.run_id).experiment_id == experiments(readback)[name]


@pytest.mark.parametrize(
    "fault",
    [
        Fault.answer(404, "<h1>Not Found</h1>"),
        Fault.answer(200, LOGIN_PAGE),
        Fault.answer(200, {}),
        Fault.answer(200, {"experiment": {}}),
        Fault.answer(403, error("PERMISSION_DENIED")),
        Fault.answer(503),
    ],
    ids=["a proxy's 404", "login page", "empty", "without an id", "403", "503"],
)
def test_a_look_up_that_is_not_answered_by_mlflow_creates_nothing(
    proxy: FaultyProxy, readback: Readback, name: str, fault: Fault
) -> None:
    """Only MLflow's own answer can say that there is no such experiment. Until it comes, everything stays queued."""
    proxy.fail(LOOK_UP, fault)
    with runqueue.Client(proxy.uri, retry_timeout=0) as client:
        run = client.create_run(experiment_name=name)
        log_something(client, run)
        with pytest.raises(runqueue.FlushError, match=r"^5 of 5 entries .*5 of them are still queued"):
            client.flush()
        assert proxy.count() == proxy.count(LOOK_UP)
        assert name not in experiments(readback)
        client.flush()
    assert readback.run(run.run_id).status == "FINISHED"


@pytest.mark.parametrize("answer", [{}, {"experiment_id": ""}, LOGIN_PAGE], ids=["empty", "no id", "login page"])
def test_a_creation_that_is_not_answered_with_an_id_is_looked_up_again(
    proxy: FaultyProxy, readback: Readback, name: str, answer: Any
) -> None:
    """No run is created in another experiment."""
    proxy.fail(MAKE, Fault.answer_after_commit(200, answer))
    with runqueue.Client(proxy.uri, retry_timeout=0) as client:
        run = client.create_run(experiment_name=name)
        with pytest.raises(runqueue.FlushError, match=r"^1 of 1 entries"):
            client.flush()
        assert proxy.count("runs/create") == 0
        client.flush()
    assert proxy.count(MAKE) == 1
    assert readback.run(run.run_id).experiment_id == experiments(readback)[name]


def test_eight_processes_with_one_name_make_one_experiment(
    proxy: FaultyProxy, readback: Readback, name: str, tmp_path: Path
) -> None:
    """All at once: there is exactly one experiment, with eight runs."""
    script = tmp_path / "together.py"
    script.write_text(TOGETHER)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), proxy.uri, name, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=clean_environment(),
        )
        for number in range(8)
    ]
    try:
        for process in processes:
            assert process.stdout is not None and process.stdin is not None
            assert process.stdout.readline() == "ready\n"
        results = []
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in processes:
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, errors) == (0, "")
            results.append(output.strip())
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    experiment_id = experiments(readback)[name]
    assert sorted(readback.run_ids(experiment_id, view="ALL")) == sorted(results)
    for number, run_id in enumerate(results):
        assert readback.content(run_id).metrics == {"m": [Point(1, 1, float(number))]}
    assert sum(request.status == 200 for request in proxy.to(MAKE)) == 1
