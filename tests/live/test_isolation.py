"""An entry that the server rejects costs only itself, and a run that fails never touches another."""

from __future__ import annotations

from typing import Any, Literal

import pytest

import runqueue
from support.mlflow_server import MlflowServer
from support.proxy import FaultyProxy
from support.readback import Content, Point, Readback, content
from support.wire_log import assert_in_order, entries, names, of_run

pytestmark = pytest.mark.live

Kind = Literal["conflict", "metric", "param", "tag"]
KINDS: tuple[Kind, ...] = ("conflict", "metric", "param", "tag")
PLACES = {"first": 0, "middle": 0.5, "last": 1}
BAD = "bad*key"  # an asterisk is in no name that MLflow takes


def entry_of(error: runqueue.FlushError) -> tuple[runqueue.OperationFailure, runqueue.Entry]:
    """Return the only failure, and its only entry."""
    (failure,) = error.failures
    (entry,) = failure.entries
    return failure, entry


@pytest.mark.sample("*-middle", "conflict-*")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_entry_in_a_full_batch_fails_alone(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, kind: Kind, place: str
) -> None:
    """Of 1,000 entries that fill one batch, 999 are stored and the bad one is reported, in at most 21 requests."""
    run_id = readback.new_run(experiment_id, {"kept": "old"})
    points = [(f"m{at % 9}", at) for at in range(1_000 if kind == "metric" else 900)]
    params = [f"p{at}" for at in range(100 if kind in ("conflict", "param") else 0)]
    tags = [f"t{at}" for at in range(100 if kind == "tag" else 0)]
    if kind == "metric":
        points[int(PLACES[place] * 999)] = (BAD, 7_777)
        expected = ("log_metrics", runqueue.Entry("metric", BAD, 0.5, 7_777, 9))
    elif kind == "tag":
        tags[int(PLACES[place] * 99)] = BAD
        expected = ("set_tags", runqueue.Entry("tag", BAD, "new"))
    else:
        key = params[int(PLACES[place] * 99)] = "kept" if kind == "conflict" else BAD
        expected = ("log_params", runqueue.Entry("param", key, "new"))
    with runqueue.Client(proxy.uri) as client:
        for key, step in points:
            client.log_metric(run_id, key, 0.5, step, 9)
        client.log_params(run_id, dict.fromkeys(params, "new"))
        client.set_tags(run_id, dict.fromkeys(tags, "new"))
        with pytest.raises(runqueue.FlushError, match=r"^1 of 1,000 entries") as caught:
            client.flush()
    assert proxy.count("runs/log-batch") == proxy.count() <= 21
    failure, entry = entry_of(caught.value)
    assert (failure.operation, entry) == expected
    assert (failure.run_id, failure.final) == (run_id, True)
    assert isinstance(failure.error, runqueue.RejectedError)
    assert client.failures == caught.value.failures
    assert f"Failed to perform one or more operations on the run with ID {run_id}" in str(caught.value)
    metrics: dict[str, list[Point]] = {}
    for key, step in points:
        if key != BAD:
            metrics.setdefault(key, []).append(Point(step, 9, 0.5))
    assert readback.content(run_id) == content(
        params={key: "new" for key in params if key != BAD} | {"kept": "old"},
        tags={key: "new" for key in tags if key != BAD},
        metrics=metrics,
    )


@pytest.mark.sample("*-middle")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["conflict", "param", "tag"])
def test_one_bad_entry_among_ten_batches_fails_alone(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, kind: Kind, place: str
) -> None:
    """With 1,000 params or tags, which need 10 requests anyway."""
    run_id = readback.new_run(experiment_id, {"kept": "old"})
    bad = "kept" if kind == "conflict" else BAD
    keys = [f"k{at}" for at in range(1_000)]
    keys[int(PLACES[place] * 999)] = bad
    with runqueue.Client(proxy.uri) as client:
        log = client.set_tags if kind == "tag" else client.log_params
        log(run_id, dict.fromkeys(keys, "new"))
        with pytest.raises(runqueue.FlushError, match=r"^1 of 1,000 entries") as caught:
            client.flush()
    assert entry_of(caught.value)[1].key == bad
    good = {key: "new" for key in keys if key != bad}
    stored = readback.content(run_id)
    assert stored.params == {"kept": "old"} | ({} if kind == "tag" else good)
    assert stored.tags == (good if kind == "tag" else {})
    assert proxy.count("runs/log-batch") <= 21


def test_a_refused_metric_name_is_not_sent_again_for_its_run(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """
    A bad key beside a good one at 5,000 steps: all good points are stored, all bad ones reported, in at most 40
    requests.
    """
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        for step in range(5_000):
            client.log_metrics(run, {"good": step / 3, BAD: float(step)}, step=step, timestamp=step)
        client.set_terminated(run)
        with pytest.raises(runqueue.FlushError, match=r"^5,000 of 10,001 entries") as caught:
            client.flush()
    assert proxy.count() <= 40
    reported = [entry for failure in caught.value.failures for entry in failure.entries]
    assert sorted(entry.step for entry in reported) == list(range(5_000))
    assert all(entry == runqueue.Entry("metric", BAD, float(entry.step), entry.step, entry.step) for entry in reported)
    assert {(failure.run_id, failure.operation, failure.final) for failure in caught.value.failures} == {
        (run.run_id, "log_metrics", True)
    }
    alone = [
        at
        for at, request in enumerate(proxy.to("runs/log-batch"))
        if [point["key"] for point in entries(request, "metrics")] == [BAD]
    ]
    assert len(alone) == 1, "refused alone once, and then never sent again"
    later = proxy.to("runs/log-batch")[alone[0] + 1 :]
    assert all(point["key"] == "good" for request in later for point in entries(request, "metrics"))
    stored = readback.run(run.run_id)
    assert stored.status == "FINISHED"
    assert stored.content.metrics == {"good": [Point(step, step, step / 3) for step in range(5_000)]}


def test_a_name_refused_for_one_run_is_tried_for_another(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """The refused names of a run are remembered over its later flushes, and do not concern other runs."""
    with runqueue.Client(proxy.uri) as client:
        runs = [readback.new_run(experiment_id) for _ in range(2)]
        for run_id in runs:
            client.log_metrics(run_id, {BAD: 1.0})
            with pytest.raises(runqueue.FlushError):
                client.flush()
        assert proxy.count() == 2
        client.log_metrics(runs[0], {BAD: 2.0})
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
        assert proxy.count() == 2
    assert entry_of(caught.value)[1].value == 2.0


def test_one_run_of_eight_with_an_unknown_experiment_fails_alone(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Seven runs are complete. The failure of the eighth has all its entries, which stay queued until the end."""
    with pytest.raises(runqueue.FlushError) as at_the_end, runqueue.Client(proxy.uri) as client:
        runs = [client.create_run("987654321" if at == 4 else experiment_id) for at in range(8)]
        for run in runs:
            client.log_params(run, {"a": 1, "b": 2})
            client.log_metrics(run, {"m": 1.0, "n": 2.0, "o": 3.0}, timestamp=1)
            client.set_tags(run, {"t": "1"})
            client.set_terminated(run)
        with pytest.raises(runqueue.FlushError, match=r"^7 of 56 entries") as caught:
            client.flush()
        assert client.statistics().pending == 7
    assert runs[4].run_id is None
    for error, final in ((caught.value, False), (at_the_end.value, True)):
        assert {failure.run_id for failure in error.failures} == {runs[4]}
        assert {failure.final for failure in error.failures} == {final}
        counts = {failure.operation: failure.count for failure in error.failures}
        assert counts == {"create_run": 1, "log_params": 2, "log_metrics": 3, "set_tags": 1, "set_terminated": 0}
        assert "987654321" in str(error)
    for at, run in enumerate(runs):
        if at != 4:
            stored = readback.run(run.run_id)
            assert stored.status == "FINISHED"
            assert stored.content == content(
                params={"a": "1", "b": "2"},
                tags={"t": "1"},
                metrics={key: [Point(0, 1, value)] for key, value in (("m", 1.0), ("n", 2.0), ("o", 3.0))},
            )


def test_a_child_of_a_run_that_cannot_be_created_stays_queued(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """It is reported with its parent, and none of its entries is sent."""
    with pytest.raises(runqueue.FlushError), runqueue.Client(proxy.uri) as client:
        parent = client.create_run("987654321")
        child = client.create_run(experiment_id, parent_run_id=parent)
        client.log_metric(child, "m", 1.0)
        with pytest.raises(runqueue.FlushError, match=r"^3 of 3 entries") as caught:
            client.flush()
    assert {failure.run_id for failure in caught.value.failures} == {parent, child}
    assert not any(failure.final for failure in caught.value.failures)
    assert readback.run_ids(experiment_id) == []


@pytest.mark.parametrize("state", ["unknown", "deleted"])
def test_a_run_that_does_not_exist_fails_as_a_whole_without_bisection(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, state: str
) -> None:
    """After one request all its entries are reported; another run is stored."""
    gone, fine = "0" * 32, readback.new_run(experiment_id)
    if state == "deleted":
        gone = readback.new_run(experiment_id)
        readback.post("runs/delete", {"run_id": gone})
    with runqueue.Client(proxy.uri) as client:
        for run_id in (gone, fine):
            client.log_metrics(run_id, {f"m{at}": 1.0 for at in range(500)}, timestamp=1)
        with pytest.raises(runqueue.FlushError, match=r"^500 of 1,000 entries") as caught:
            client.flush()
    assert {failure.run_id for failure in caught.value.failures} == {gone}
    assert len(of_run(proxy.requests, gone)) == 1
    assert len(readback.content(fine).metrics) == 500


def test_the_final_status_is_sent_although_data_was_rejected(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Inputs and final status follow the batch with the bad entry, in order."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        client.log_metrics(run, {"good": 1.0, BAD: 1.0}, timestamp=1)
        client.log_inputs(run, [runqueue.Dataset("d", "1")])
        client.set_terminated(run, "KILLED")
        with pytest.raises(runqueue.FlushError):
            client.flush()
    assert_in_order(proxy.requests)
    assert names(proxy.requests) == ["create", *["log-batch"] * 3, "log-inputs", "update"]
    stored = readback.run(run.run_id)
    assert (stored.status, stored.content.metrics) == ("KILLED", {"good": [Point(0, 1, 1.0)]})
    assert len(stored.content.inputs) == 1


UNFIT: dict[str, Any] = {
    "text": "0.5",
    "bytes": b"1",
    "none": None,
    "too large": 10**400,
    "complex": 1j,
}


def test_entries_that_cannot_be_sent_fail_alone_and_without_a_request(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """The server could not parse them. Each is reported with run, key and step; all others are stored."""
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        client.log_metrics(run_id, {"before": 1.0, **UNFIT, "after": 2.0}, step=4, timestamp=1)
        client.log_metrics(run_id, {"a": 1.0}, step=1.5)  # type: ignore[arg-type]
        client.log_metrics(run_id, {"a": 1.0}, step=2**63)
        client.log_metrics(run_id, {"a": 7.0}, step=5.0, timestamp=1)  # type: ignore[arg-type]
        client.log_params(run_id, {"lone \ud800": "1", "p": "lone \ud800", "fine": "1"})
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
    assert proxy.count() == 1
    failed = [(failure, entry) for failure in caught.value.failures for entry in failure.entries]
    assert {(entry.kind, entry.key) for _, entry in failed} == {
        *(("metric", key) for key in (*UNFIT, "a")),
        ("param", "lone \ud800"),
        ("param", "p"),
    }
    assert {entry.step for _, entry in failed if entry.key == "a"} == {1.5, 2**63}
    assert {entry.step for _, entry in failed if entry.key in UNFIT} == {4}
    assert all(failure.run_id == run_id and failure.final for failure, _ in failed)
    assert readback.content(run_id) == content(
        params={"fine": "1"},
        metrics={"before": [Point(4, 1, 1.0)], "after": [Point(4, 1, 2.0)], "a": [Point(5, 1, 7.0)]},
    )


def test_a_file_backed_servers_500_for_a_conflict_fails_that_entry_alone(
    file_store_server: MlflowServer,
) -> None:
    """After three answers of INTERNAL_ERROR a batch counts as rejected, and is bisected; the rest is stored."""
    with Readback(file_store_server.uri) as readback, FaultyProxy(file_store_server.uri) as proxy:
        run_id = readback.new_run(readback.new_experiment(), {"kept": "old"})
        params = {f"p{at}": "1" for at in range(8)} | {"kept": "new"}
        with runqueue.Client(proxy.uri, retry_timeout=60) as client:
            client.log_params(run_id, params)
            client.set_terminated(run_id)
            with pytest.raises(runqueue.FlushError, match=r"^1 of 9 entries") as caught:
                client.flush()
        failure, entry = entry_of(caught.value)
        assert (failure.run_id, failure.final, entry) == (run_id, True, runqueue.Entry("param", "kept", "new"))
        stored: Content = readback.content(run_id)
        assert stored.params == params | {"kept": "old"}
        assert readback.run(run_id).status == "FINISHED"
        bodies = [request.body for request in proxy.to("runs/log-batch")]
        assert max(map(bodies.count, bodies)) == 3, "no batch is tried a fourth time"
