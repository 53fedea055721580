"""Lost answers, outages and late commits: nothing is lost or stored twice, and what is still queued is reported."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

import runqueue
from support.answers import error
from support.proxy import Fault, FaultyProxy
from support.readback import Point, Readback
from support.wire_log import assert_in_order, names, of_run

pytestmark = pytest.mark.live

RETRYING = 20.0
"""Seconds of `retry_timeout` where it must not be spent: three back-offs take at most 3.5."""


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize(
    "fault", [Fault.cut_after_commit(), Fault.cut_in_body(), Fault.answer_after_commit(500)], ids=["cut", "body", "500"]
)
def test_a_lost_answer_to_create_run_leaves_exactly_one_run(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, fault: Fault, times: int
) -> None:
    """The server has created the run, but several answers in a row are lost: the run is searched for and used."""
    proxy.fail("runs/create", fault, times=times)
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        run = client.create_run(experiment_id, run_name="once")
        client.log_metric(run, "m", 1.0, timestamp=1)
        client.set_terminated(run)
    assert readback.run_ids(experiment_id, view="ALL") == [run.run_id]
    stored = readback.run(run.run_id)
    assert (stored.name, stored.status, stored.content.metrics) == ("once", "FINISHED", {"m": [Point(0, 1, 1.0)]})


def test_a_run_is_found_although_the_search_for_it_fails_as_well(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Until the search is answered, no other run is created."""
    proxy.fail("runs/create", Fault.cut_after_commit())
    proxy.fail("runs/search", Fault.cut_after_commit())
    proxy.fail("runs/search", Fault.answer(503))
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        run = client.create_run(experiment_id, tags={"t": "1"})
        client.set_tag(run, "u", "2")
    assert readback.run_ids(experiment_id, view="ALL") == [run.run_id]
    assert readback.content(run.run_id).tags == {"t": "1", "u": "2"}
    assert proxy.count("runs/create") == 1


def test_a_create_run_that_was_never_carried_out_is_sent_again(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """The connection broke before the server got the request: the search finds nothing, so the run is created."""
    proxy.fail("runs/create", Fault.cut_before_commit(), times=2)
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        run = client.create_run(experiment_id)
    assert readback.run_ids(experiment_id, view="ALL") == [run.run_id]
    assert proxy.count("runs/create") == 3


def test_a_slow_servers_late_commit_is_deleted_at_the_end_of_the_flush(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first create-run is answered 504 and carried out after the second: one run is left, with a log of it."""
    proxy.fail("runs/create", Fault.late_commit_before("runs/update"))
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        run = client.create_run(experiment_id)
        client.log_metric(run, "m", 1.0, timestamp=1)
        client.set_terminated(run)
    assert proxy.count("runs/create") == 2
    assert readback.run_ids(experiment_id) == [run.run_id]
    everything = readback.run_ids(experiment_id, view="ALL")
    assert len(everything) == 2
    (surplus,) = set(everything) - {run.run_id}
    assert surplus in caplog.text
    assert readback.content(run.run_id).metrics == {"m": [Point(0, 1, 1.0)]}


def test_a_commit_that_comes_only_before_the_next_flush_is_found_by_that_one(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """A flush goes on searching for surplus runs of the flush before."""
    proxy.fail("runs/create", Fault.late_commit_before("nothing that is ever sent"))
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        run = client.create_run(experiment_id)
        client.flush()
        assert len(readback.run_ids(experiment_id, view="ALL")) == 1
        proxy.commit_held()
        assert len(readback.run_ids(experiment_id)) == 2
        client.log_metric(run, "m", 1.0)
        client.flush()
        assert readback.run_ids(experiment_id) == [run.run_id]


@pytest.mark.parametrize(
    ("fault", "retried"),
    [
        (Fault.cut_after_commit(), 1),  # a cut connection is replaced at once, once a request, which is no retry
        (Fault.cut_in_body(), 3),
        (Fault.answer_after_commit(502), 3),
    ],
    ids=["cut", "body", "502"],
)
def test_a_lost_answer_to_log_batch_stores_each_point_once(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, fault: Fault, retried: int
) -> None:
    """The answer is lost three times after the server has stored the batch; no point is there twice."""
    proxy.fail("runs/log-batch", fault, times=3)
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        run = client.create_run(experiment_id)
        for step in range(2_500):
            client.log_metrics(run, {"m": step / 7}, step=step, timestamp=step)
        client.set_terminated(run)
        client.flush()
        assert client.statistics().retried == retried
    assert readback.content(run.run_id).metrics == {"m": [Point(step, step, step / 7) for step in range(2_500)]}
    bodies = [request.body for request in proxy.to("runs/log-batch")]
    assert bodies[0] == bodies[1] == bodies[2] == bodies[3]
    assert len(bodies) == 6


def test_a_lost_answer_to_inputs_and_to_termination_changes_nothing(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Both requests are sent again, without an effect."""
    proxy.fail("runs/log-inputs", Fault.cut_after_commit())
    proxy.fail("runs/update", Fault.cut_after_commit())
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        run = client.create_run(experiment_id)
        client.log_inputs(run, [runqueue.Dataset("d", "1")])
        client.set_terminated(run, end_time=99)
    assert names(proxy.requests) == ["create", "log-inputs", "log-inputs", "update", "update"]
    stored = readback.run(run.run_id)
    assert (len(stored.content.inputs), stored.status, stored.end_time) == (1, "FINISHED", 99)


def test_a_server_that_is_down_too_long_and_then_up_gets_everything_once(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """
    The first flush ends in time and reports everything as still queued. The second stores everything, once, in order.
    """
    proxy.stop_listening()
    with runqueue.Client(proxy.uri, retry_timeout=1.0, request_timeout=5) as client:
        runs = [client.create_run(experiment_id) for _ in range(3)]
        for at, run in enumerate(runs):
            for step in range(150):
                client.log_metrics(run, dict.fromkeys("abcdefghij", 1.0), step=step, timestamp=1)
            client.log_inputs(run, [runqueue.Dataset(f"of run {at}", "1")])
            client.set_terminated(run)
        began = time.monotonic()
        with pytest.raises(runqueue.FlushError, match=r"^4,506 of 4,506 entries") as caught:
            client.flush()
        assert 0.9 <= time.monotonic() - began < 4
        assert {failure.run_id for failure in caught.value.failures} == set(runs)
        assert not any(failure.final for failure in caught.value.failures)
        assert all(isinstance(failure.error, runqueue.StoreError) for failure in caught.value.failures)
        statistics = client.statistics()
        assert (statistics.pending, statistics.stored, statistics.failed) == (4_506, 0, 0)
        proxy.listen_again()
        client.flush()
        assert client.statistics().stored == 4_506
    assert sorted(readback.run_ids(experiment_id, view="ALL")) == sorted(str(run.run_id) for run in runs)
    for run in runs:
        requests = of_run(proxy.requests, run.run_id)
        assert names(requests) == ["create", "log-batch", "log-batch", "log-inputs", "update"]
        assert_in_order(requests)
        stored = readback.run(run.run_id)
        assert stored.status == "FINISHED"
        assert stored.content.metrics == {key: [Point(step, 1, 1.0) for step in range(150)] for key in "abcdefghij"}


def test_a_server_that_goes_down_in_the_middle_gets_the_rest_later(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """What was stored before the outage is neither reported nor sent again."""
    proxy.fail("runs/log-batch", Fault.passed(), times=3)
    proxy.fail("runs/log-batch", Fault.cut_before_commit(), times=None)
    with runqueue.Client(proxy.uri, retry_timeout=0.5, request_timeout=5) as client:
        run = client.create_run(experiment_id)
        for step in range(6_000):
            client.log_metrics(run, {"m": float(step)}, step=step, timestamp=1)
        client.set_terminated(run)
        with pytest.raises(runqueue.FlushError, match=r"^3,000 of 6,001 entries") as caught:
            client.flush()
        entries = [
            entry.step for failure in caught.value.failures for entry in failure.entries if entry.kind == "metric"
        ]
        assert entries == list(range(3_000, 6_000))
        assert not any(failure.final for failure in caught.value.failures)
        proxy.mend()
        before = proxy.count()
        client.flush()
        assert names(proxy.requests[before:]) == ["log-batch", "log-batch", "log-batch", "update"]
    stored = readback.run(run.run_id)
    assert stored.status == "FINISHED"
    assert stored.content.metrics == {"m": [Point(step, 1, float(step)) for step in range(6_000)]}


def test_what_close_cannot_send_is_final(proxy: FaultyProxy, experiment_id: str) -> None:
    """No flush follows the end of the block: every entry is reported as failed for good."""
    proxy.stop_listening()
    with (
        pytest.raises(runqueue.FlushError, match=r"^2 of 2 entries") as caught,
        runqueue.Client(proxy.uri, retry_timeout=0.2) as client,
    ):
        client.log_metric(client.create_run(experiment_id), "m", 1.0)
    assert all(failure.final for failure in caught.value.failures)
    statistics = client.statistics()
    assert (statistics.accepted, statistics.failed, statistics.pending) == (2, 2, 0)


def test_while_a_server_is_down_a_later_flush_sends_one_probe(proxy: FaultyProxy, experiment_id: str) -> None:
    """After `retry_timeout`, a flush of ten waiting runs costs the server one request."""
    proxy.fail("", Fault.answer(503), times=None)
    with (
        pytest.raises(runqueue.FlushError),
        runqueue.Client(proxy.uri, retry_timeout=0.3) as client,
    ):
        for _ in range(10):
            client.create_run(experiment_id)
        with pytest.raises(runqueue.FlushError):
            client.flush()
        before = proxy.count()
        with pytest.raises(runqueue.FlushError, match=r"^10 of 10 entries"):
            client.flush()
        assert proxy.count() == before + 1


@pytest.mark.parametrize(
    ("status", "headers"), [(503, {}), (429, {"Retry-After": "1"})], ids=["503", "429 with Retry-After"]
)
def test_a_busy_server_is_asked_again(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, status: int, headers: dict[str, str]
) -> None:
    """
    It answers 503, or 429 with `Retry-After: 1`, twice. No request is sent within that second; all is stored once.
    """
    proxy.fail("runs/log-batch", Fault.answer(status, error("TEMPORARILY_UNAVAILABLE"), headers), times=2)
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        client.log_metrics(run_id, {"m": 1.0}, step=1, timestamp=1)
    assert [request.status for request in proxy.requests] == [status, status, 200]
    for refused, repeated in pairwise(proxy.requests):
        assert refused.answered_at is not None
        assert repeated.read_at - refused.answered_at >= float(headers.get("Retry-After", 0))
    assert readback.content(run_id).metrics == {"m": [Point(1, 1, 1.0)]}


def test_other_runs_wait_as_well_when_the_server_asks_to(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """`Retry-After` concerns the whole server: no request of any run is sent within that second."""
    proxy.fail("", Fault.answer(429, b"", {"Retry-After": "1"}))
    runs = [readback.new_run(experiment_id) for _ in range(4)]
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING, max_workers=1) as client:
        for run_id in runs:
            client.log_metric(run_id, "m", 1.0, timestamp=1)
    assert sorted(str(request.status) for request in proxy.requests) == ["200"] * 4 + ["429"]
    answered = proxy.requests[0].answered_at
    assert answered is not None
    assert proxy.requests[1].read_at - answered >= 1.0


def test_a_retry_after_beyond_retry_timeout_ends_the_flush_at_once(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """With `Retry-After: 3600` the flush does not wait; the next flush sends one request."""
    proxy.fail("runs/log-batch", Fault.answer(503, b"", {"Retry-After": "3600"}))
    run_id = readback.new_run(experiment_id)
    client = runqueue.Client(proxy.uri, retry_timeout=RETRYING)
    client.log_metric(run_id, "m", 1.0)
    began = time.monotonic()
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    assert [failure.final for failure in caught.value.failures] == [False]
    assert proxy.count("runs/log-batch") == 1
    client.close()
    assert proxy.count("runs/log-batch") == 2
    assert time.monotonic() - began < 5


def test_a_request_that_hangs_is_given_up_and_repeated(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """`request_timeout` is one deadline for the whole attempt."""
    proxy.fail("runs/log-batch", Fault.delayed(60))
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri, request_timeout=0.5, retry_timeout=RETRYING) as client:
        client.log_metric(run_id, "m", 1.0, timestamp=1)
        began = time.monotonic()
        client.flush()
        assert 0.5 <= time.monotonic() - began < 10
    assert proxy.count("runs/log-batch") == 2
    assert readback.content(run_id).metrics == {"m": [Point(0, 1, 1.0)]}


def test_a_flush_with_a_timeout_leaves_the_rest_queued(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """It ends at its timeout and reports what is still queued; the next flush stores that, once."""
    proxy.fail("runs/log-batch", Fault.hold())
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        for step in range(1_500):
            client.log_metrics(run_id, {"m": float(step)}, step=step, timestamp=1)
        began = time.monotonic()
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush(timeout=0.2)
        assert time.monotonic() - began < 5
        proxy.let_go()
        assert not any(failure.final for failure in caught.value.failures)
        client.flush()
    assert proxy.count("runs/log-batch") == 2
    assert readback.content(run_id).metrics == {"m": [Point(step, 1, float(step)) for step in range(1_500)]}


def test_a_race_inside_the_server_over_a_shared_dataset_costs_nothing(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Runs that log one dataset at the same time violate a UNIQUE constraint inside MLflow: the request is repeated."""
    text = "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest"
    proxy.fail("runs/log-inputs", Fault.answer(400, error("BAD_REQUEST", text)))
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri, retry_timeout=RETRYING) as client:
        client.log_inputs(run_id, [runqueue.Dataset("d", "1")])
    assert [request.status for request in proxy.requests] == [400, 200]
    assert len(readback.content(run_id).inputs) == 1
