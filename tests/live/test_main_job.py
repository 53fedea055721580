"""The main job: all that is logged reads back exactly, and was sent in the fewest requests, in order."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest

import runqueue
from support.proxy import FaultyProxy
from support.readback import Content, Point, Readback, StoredInput, content
from support.threads import in_threads
from support.wire_log import assert_in_order, assert_within_limits, entries, most_at_once, names, of_run

pytestmark = pytest.mark.live

KEYS = 10


def log_a_run(client: runqueue.Client, run: runqueue.PendingRunId, seed: int) -> Content:
    """Log 250 params, 120 tags, 5,000 metric points and 3 datasets; return what must be stored."""
    rng = random.Random(seed)
    params = {f"p/{at}": f"{seed} {rng.random()}" for at in range(250)}
    tags = {f"t.{at}": f"välue {seed} {at} \N{SNOWMAN}" for at in range(120)}
    metrics: dict[str, list[Point]] = {f"m {at}": [] for at in range(KEYS)}
    client.log_params(run, dict(list(params.items())[:150]))
    for step in range(5_000 // KEYS):
        values = {key: rng.gauss(0, 10.0 ** rng.randint(-200, 200)) for key in metrics}
        timestamp = 1_700_000_000_000 + seed * 1_000_000 + step
        client.log_metrics(run, values, step=step, timestamp=timestamp)
        for key, value in values.items():
            metrics[key].append(Point(step, timestamp, value))
    client.log_params(run, dict(list(params.items())[150:]))
    client.set_tags(run, tags)
    inputs = [
        runqueue.Dataset(
            f"data {at}", f"{seed}-{at}", "local", f'{{"uri": "/{at}"}}', tags={"mlflow.data.context": "train"}
        )
        for at in range(3)
    ]
    client.log_inputs(run, inputs)
    stored = [
        StoredInput(each.name, each.digest, "local", each.source, tags=tuple(each.tags.items())) for each in inputs
    ]
    return content(params=params, tags=tags, metrics=metrics, inputs=stored)


def test_eight_runs_read_back_exactly_in_nine_requests_each(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """8 runs of 250 params, 120 tags, 5,000 metrics and 3 datasets, all named by placeholders."""
    with runqueue.Client(proxy.uri, max_workers=3) as client:
        runs = [client.create_run(experiment_id, run_name=f"run {seed}", tags={"first": "1"}) for seed in range(8)]
        expected = [log_a_run(client, run, seed) for seed, run in enumerate(runs)]
        for run in runs:
            client.set_terminated(run, "FINISHED", end_time=1_800_000_000_000)
        assert proxy.count() == 0, "nothing is sent before a flush"
        client.flush()
        statistics = client.statistics()
        assert statistics.stored == statistics.accepted == 8 * (1 + 250 + 120 + 5_000 + 3)
        assert (statistics.pending, statistics.in_flight, statistics.failed, statistics.dropped) == (0, 0, 0, 0)
        assert statistics.requests == proxy.count()
        assert statistics.bytes_sent == sum(request.size for request in proxy.requests)
    assert_within_limits(proxy.requests)
    assert most_at_once(proxy.requests) <= 3
    assert sorted(readback.run_ids(experiment_id)) == sorted(str(run.run_id) for run in runs)
    for seed, (run, logged) in enumerate(zip(runs, expected, strict=True)):
        stored = readback.run(run.run_id)
        logged.tags["first"] = "1"
        assert stored.content == logged
        assert (stored.name, stored.status, stored.end_time) == (f"run {seed}", "FINISHED", 1_800_000_000_000)
        requests = of_run(proxy.requests, run.run_id)
        assert_in_order(requests)
        assert names(requests) == ["create", *["log-batch"] * 6, "log-inputs", "update"]


def test_runs_that_share_their_datasets_all_get_them(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """8 runs of a sweep log the same datasets at the same time, for which MLflow's own inserts collide now and then."""
    with runqueue.Client(proxy.uri) as client:
        runs = [client.create_run(experiment_id) for _ in range(8)]
        for run in runs:
            client.log_inputs(run, [runqueue.Dataset("shared", "1")])
    assert [readback.content(run.run_id).inputs for run in runs] == [[StoredInput("shared", "1", "local")]] * 8


def test_five_full_metric_batches_cost_seven_requests(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Tags that are queued before the run exists are sent with create-run, and one request ends the run."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        client.set_tags(run, {f"t{at}": "x" for at in range(50)})
        for step in range(500):
            client.log_metrics(run, {f"m{at}": step + at for at in range(10)}, step=step)
        client.set_terminated(run)
    assert names(proxy.requests) == ["create", *["log-batch"] * 5, "update"]
    assert [len(entries(request, "metrics")) for request in proxy.to("runs/log-batch")] == [1_000] * 5
    stored = readback.run(run.run_id)
    assert stored.status == "FINISHED"
    assert len(stored.content.tags) == 50
    assert sum(map(len, stored.content.metrics.values())) == 5_000


def test_a_servers_own_limit_of_200_metrics_is_kept(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """With limits of 200 metrics a batch, no request has more, all but the last are full, and everything is stored."""
    with runqueue.Client(proxy.uri, limits=runqueue.Limits(metrics=200)) as client:
        run = client.create_run(experiment_id)
        for step in range(1_050):
            client.log_metrics(run, {"loss": 1 / (step + 1)}, step=step, timestamp=step)
    batches = proxy.to("runs/log-batch")
    assert_within_limits(batches, metrics=200)
    assert len(batches) == 6
    assert readback.content(run.run_id).metrics == {
        "loss": [Point(step, step, 1 / (step + 1)) for step in range(1_050)]
    }


def test_every_limit_may_be_set(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Lower limits for params, tags, entities and datasets are kept, too."""
    limits = runqueue.Limits(metrics=30, params=7, tags=5, entities=35, datasets=2)
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri, limits=limits) as client:
        client.log_metrics(run_id, {f"m{at}": at for at in range(100)}, timestamp=1)
        client.log_params(run_id, {f"p{at}": at for at in range(40)})
        client.set_tags(run_id, {f"t{at}": at for at in range(20)})
        client.log_inputs(run_id, [runqueue.Dataset(f"d{at}", "1") for at in range(5)])
    assert_within_limits(proxy.requests, metrics=30, params=7, tags=5, entities=35)
    assert [len(entries(request, "datasets")) for request in proxy.to("runs/log-inputs")] == [2, 2, 1]
    assert proxy.count("runs/log-batch") == 6, "40 params at 7 a batch need 6 batches; the rest fits into them"
    assert readback.content(run_id) == content(
        params={f"p{at}": str(at) for at in range(40)},
        tags={f"t{at}": str(at) for at in range(20)},
        metrics={f"m{at}": [Point(0, 1, float(at))] for at in range(100)},
        inputs=[StoredInput(f"d{at}", "1", "local") for at in range(5)],
    )


def test_long_values_never_make_a_body_above_the_limit_of_bytes(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Where bytes bind and not counts, no body exceeds 1,000,000 bytes, and no two neighbours would fit into one."""
    tags = {f"t{at}": "\N{SNOWMAN}" * 8_000 for at in range(90)}
    params = {f"p{at}": f"{at}" + "ü" * 5_000 for at in range(90)}
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        client.set_tags(run_id, tags)
        client.log_params(run_id, params)
    batches = proxy.to("runs/log-batch")
    assert_within_limits(batches)
    for one, other in pairwise(batches):
        assert one.size + other.size > 1_000_000
    assert readback.content(run_id) == content(params=params, tags=tags)


def test_four_threads_log_100_000_points_to_one_run(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, whole: bool
) -> None:
    """
    All 100,000 points are stored, in the 100 batches that they need; each thread's points in its order.

    Without `--whole`, 20,000 in 20 batches.
    """
    steps = 2_500 if whole else 500
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)

        def work(thread: int) -> None:
            for step in range(steps):
                values = {f"m{at}": float(thread * steps + step) for at in range(10)}
                client.log_metrics(run, values, step=thread * steps + step, timestamp=step)

        in_threads(work, 4)
    batches = proxy.to("runs/log-batch")
    assert len(batches) == 4 * steps * 10 // 1_000
    sent = [point["step"] for batch in batches for point in entries(batch, "metrics") if point["key"] == "m3"]
    for thread in range(4):
        mine = range(thread * steps, (thread + 1) * steps)
        assert [step for step in sent if step in mine] == list(mine)
    points = [Point(step, step % steps, float(step)) for step in range(4 * steps)]
    assert readback.content(run.run_id).metrics == {f"m{at}": points for at in range(10)}


def test_threads_log_while_others_flush(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Threads create runs, log and flush at any time: nothing is lost or stored twice."""
    with runqueue.Client(proxy.uri) as client:
        runs: list[runqueue.PendingRunId] = []

        def work(thread: int) -> None:
            run = client.create_run(experiment_id, run_name=f"thread {thread}")
            runs.append(run)
            for step in range(300):
                client.log_metrics(run, {"own": float(step)}, step=step, timestamp=thread)
                if step % 100 == 99:
                    client.flush()

        in_threads(work, 4)
    assert len(readback.run_ids(experiment_id)) == 4
    for run in runs:
        stored = readback.run(run.run_id)
        thread = int(stored.name.split()[1])
        assert stored.content.metrics == {"own": [Point(step, thread, float(step)) for step in range(300)]}


def test_a_flush_ends_under_a_busy_producer(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """It sends what was queued when it began, however much is logged meanwhile. The end of the block sends the rest."""
    logged = 0
    stop = threading.Event()
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)

        def produce() -> None:
            nonlocal logged
            while not stop.wait(0.0001):
                client.log_metric(run, "m", float(logged), step=logged, timestamp=1)
                logged += 1

        producer = threading.Thread(target=produce)
        producer.start()
        try:
            for _ in range(3):
                client.flush(timeout=20)
        finally:
            stop.set()
            producer.join()
    assert readback.content(run.run_id).metrics == {"m": [Point(step, 1, float(step)) for step in range(logged)]}


def test_an_exception_inside_the_block_sends_nothing(proxy: FaultyProxy, experiment_id: str) -> None:
    """The exception leaves the block unchanged, and the server gets no request."""
    error = ZeroDivisionError("mine")
    with pytest.raises(ZeroDivisionError) as caught, runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        client.log_metrics(run, {"loss": 1.0})
        raise error
    assert caught.value is error
    assert (error.__cause__, error.__context__) == (None, None)
    assert proxy.count() == 0
    assert (client.statistics().dropped, client.statistics().pending) == (2, 0)
    with pytest.raises(runqueue.ClosedError):
        client.log_metrics(run, {"loss": 1.0})


@pytest.mark.parametrize("code", [None, 0])
def test_a_clean_exit_inside_the_block_sends_everything(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, code: int | None
) -> None:
    """After `sys.exit()` and `sys.exit(0)`."""
    with pytest.raises(SystemExit) as caught, runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        client.log_param(run, "p", 1)
        raise SystemExit(code)
    assert caught.value.code == code
    assert readback.content(run.run_id).params == {"p": "1"}
