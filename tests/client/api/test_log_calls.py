"""The log calls: a bad call raises at once, an empty one does nothing, and none waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import runqueue
from runqueue import CallTypeError, ClosedError, ConfigError
from support.proxy import Fault, ScriptedServer
from support.threads import in_threads
from support.wire_log import entries, names

RUN = "a" * 32
CREATED = Fault.answer(200, {"run": {"info": {"run_id": "r1"}}})

Call = Callable[[Any], object]

CALLS: dict[str, Call] = {
    "create_run": lambda client: client.create_run("0"),
    "set_terminated": lambda client: client.set_terminated(RUN),
    "log_metrics": lambda client: client.log_metrics(RUN, {"m": 1.0}),
    "log_metric": lambda client: client.log_metric(RUN, "m", 1.0),
    "log_params": lambda client: client.log_params(RUN, {"p": 1}),
    "log_param": lambda client: client.log_param(RUN, "p", 1),
    "set_tags": lambda client: client.set_tags(RUN, {"t": 1}),
    "set_tag": lambda client: client.set_tag(RUN, "t", 1),
    "log_inputs": lambda client: client.log_inputs(RUN, [runqueue.Dataset("n", "d")]),
}


class MlflowDataset:
    """Like an `mlflow.data` dataset or entity of one: a name and a digest."""

    name, digest = "iris", "abc"


# -- bad calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda c: c.log_metrics(RUN, [("a", 1)]), CallTypeError, "metrics takes a mapping, not list"),
        (lambda c: c.log_metrics(RUN, None), CallTypeError, "metrics takes a mapping, not NoneType"),
        (lambda c: c.log_metrics(RUN, "m"), CallTypeError, "metrics takes a mapping, not str"),
        (lambda c: c.log_metrics(RUN, 1.0), CallTypeError, "metrics takes a mapping, not float"),
        (lambda c: c.log_params(RUN, [("a", 1)]), CallTypeError, "params takes a mapping, not list"),
        (lambda c: c.log_params(RUN, None), CallTypeError, "params takes a mapping, not NoneType"),
        (lambda c: c.set_tags(RUN, "t"), CallTypeError, "tags takes a mapping, not str"),
        (lambda c: c.create_run("0", tags=["t"]), CallTypeError, "tags takes a mapping, not list"),
        (lambda c: c.log_inputs(RUN, 5), CallTypeError, "datasets takes a list"),
        (lambda c: c.log_inputs(RUN, "iris"), CallTypeError, "datasets takes a list"),
        (lambda c: c.log_inputs(RUN, {"a": 1}), CallTypeError, "datasets takes a list"),
        (lambda c: c.log_inputs(RUN, runqueue.Dataset("n", "d")), CallTypeError, "datasets takes a list"),
        (lambda c: c.log_metrics(RUN, {"m": 1}, dataset="iris"), CallTypeError, "dataset takes a dataset"),
        (lambda c: c.log_metric(RUN, [], 1.0), CallTypeError, "key"),
        (lambda c: c.log_param(RUN, {}, 1.0), CallTypeError, "key"),
        (lambda c: c.set_tag(RUN, [], 1.0), CallTypeError, "key"),
        (lambda c: c.log_metrics(None, {"m": 1}), CallTypeError, "run_id takes a run id"),
        (lambda c: c.log_metrics(7, {"m": 1}), CallTypeError, "run_id takes a run id"),
        (lambda c: c.log_metric([], "m", 1), CallTypeError, "run_id takes a run id"),
        (lambda c: c.log_params(b"abc", {"m": 1}), CallTypeError, "run_id takes a run id"),
        (lambda c: c.log_metrics("", {"m": 1}), ConfigError, "run_id=''"),
        (lambda c: c.log_metrics("a/b", {"m": 1}), ConfigError, "run_id='a/b'"),
        (lambda c: c.set_tags("../x", {"m": 1}), ConfigError, "run_id='../x'"),
        (lambda c: c.set_tags("a" * 257, {"m": 1}), ConfigError, "run_id="),
        (lambda c: c.set_tags("abc\n", {"m": 1}), ConfigError, "run_id="),
        (lambda c: c.set_terminated(RUN, "DONE"), ConfigError, "status='DONE': one of RUNNING"),
        (lambda c: c.set_terminated(RUN, "finished"), ConfigError, "status='finished'"),
        (lambda c: c.set_terminated(RUN, ""), ConfigError, "status=''"),
        (lambda c: c.set_terminated(RUN, 3), CallTypeError, "status takes text"),
        (lambda c: c.set_terminated(RUN, end_time=1.5), CallTypeError, "end_time 1.5"),
        (lambda c: c.set_terminated(RUN, end_time="now"), CallTypeError, "end_time 'now'"),
        (lambda c: c.set_terminated(RUN, end_time=-1), ConfigError, "end_time=-1"),
        (lambda c: c.set_terminated(RUN, end_time=2**63), ConfigError, "end_time="),
        (lambda c: c.set_terminated(RUN, end_time=10**5000), ConfigError, "end_time"),
        (lambda c: c.create_run(), ConfigError, "exactly one of experiment_id= and experiment_name="),
        (lambda c: c.create_run("0", experiment_name="n"), ConfigError, "exactly one of"),
        (lambda c: c.create_run(""), ConfigError, "must not be empty"),
        (lambda c: c.create_run(experiment_name=""), ConfigError, "must not be empty"),
        (lambda c: c.create_run(1.5), CallTypeError, "experiment_id takes text"),
        (lambda c: c.create_run(True), CallTypeError, "experiment_id takes text"),
        (lambda c: c.create_run("\ud800"), ConfigError, "experiment_id"),
        (lambda c: c.create_run("0", run_name=5), CallTypeError, "run_name takes text"),
        (lambda c: c.create_run("0", run_name="\udfff"), ConfigError, "run_name"),
        (lambda c: c.create_run("0", tags={"mlflow.runName": "a"}, run_name="b"), ConfigError, "contradicts"),
        (lambda c: c.create_run("0", start_time="x"), CallTypeError, "start_time 'x'"),
        (lambda c: c.create_run("0", start_time=-1), ConfigError, "start_time=-1"),
        (lambda c: c.create_run("0", parent_run_id=5), CallTypeError, "run_id takes a run id"),
        (lambda c: c.flush(run_id=5), CallTypeError, "run_id takes a run id"),
        (lambda c: c.flush(run_id="no such run!"), ConfigError, "run_id="),
        (lambda c: c.flush(timeout="5"), CallTypeError, "timeout"),
        (lambda c: c.flush(timeout=-1), ConfigError, "timeout"),
        (lambda c: c.flush(timeout=float("nan")), ConfigError, "timeout"),
    ],
)
def test_a_bad_call_raises_at_once(
    client: runqueue.Client, server: ScriptedServer, call: Call, kind: type[Exception], words: str
) -> None:
    """The error names the bad argument; nothing is queued and nothing is sent."""
    with pytest.raises(kind) as caught:
        call(client)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 500
    assert isinstance(caught.value, TypeError) is (kind is CallTypeError)
    assert client.statistics().accepted == 0 and server.count() == 0


@pytest.mark.parametrize("name", CALLS)
def test_every_call_on_a_closed_client_raises(client: runqueue.Client, server: ScriptedServer, name: str) -> None:
    """Also for runs that the client has logged to, and for every kind of call."""
    server.fail("runs/create", CREATED)
    run = client.create_run("0")
    client.log_metric(RUN, "m", 1.0)
    client.close()
    before = server.count()
    with pytest.raises(ClosedError):
        CALLS[name](client)
    for again in (
        lambda: client.log_metrics(run, {"m": 1.0}),
        lambda: client.log_metric(run, "m", 1.0),
        lambda: client.flush(),
        lambda: client.flush(synchronous=False),
        lambda: client.flush(run_id=run),
    ):
        with pytest.raises(ClosedError):
            again()
    client.close()
    assert server.count() == before
    assert client.statistics().accepted == 2 and client.failures == ()


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.log_metrics(RUN, {}),
        lambda c: c.log_params(RUN, {}),
        lambda c: c.set_tags(RUN, {}),
        lambda c: c.log_inputs(RUN, None),
        lambda c: c.log_inputs(RUN, []),
        lambda c: c.log_inputs(RUN, iter(())),
        lambda c: c.flush(),
        lambda c: c.flush(synchronous=False),
        lambda c: c.flush(run_id=RUN),
    ],
)
def test_an_empty_argument_does_nothing(client: runqueue.Client, server: ScriptedServer, call: Call) -> None:
    """No entry, no request, and not even a thread."""
    threads = threading.active_count()
    call(client)
    assert threading.active_count() == threads
    client.close()
    assert server.count() == 0
    assert client.statistics().accepted == 0


def test_a_single_mlflow_input_in_place_of_a_list_raises_at_once(client: runqueue.Client) -> None:
    """mlflow's entities can be iterated over: their fields are no datasets."""
    from mlflow.entities import Dataset, DatasetInput

    with pytest.raises(CallTypeError, match="datasets takes a list"):
        client.log_inputs(RUN, DatasetInput(Dataset("n", "d", "local", "s"), []))
    with pytest.raises(CallTypeError, match="datasets takes a list"):
        client.log_inputs(RUN, Dataset("n", "d", "local", "s"))


# -- good calls ------------------------------------------------------------------------------------------------------


def test_no_call_sends_anything(client: runqueue.Client, server: ScriptedServer) -> None:
    """Nor does it start a thread: the first flush does."""
    threads = threading.active_count()
    for call in CALLS.values():
        call(client)
    assert server.count() == 0 and threading.active_count() == threads
    assert client.statistics().pending == 8


def test_everything_of_a_run_is_sent_in_its_order(client: runqueue.Client, server: ScriptedServer) -> None:
    """Create, data, inputs, final status, in whatever order they were called; the last status counts."""
    server.fail("runs/create", CREATED)
    run = client.create_run(0, run_name="demo", tags={"own": 1}, start_time=5)  # type: ignore[arg-type]
    client.set_terminated(run, "KILLED", end_time=6)
    client.set_terminated(run, end_time=7)
    client.log_inputs(run, [runqueue.Dataset("n", "d")])
    client.set_tags(run, {"rides": True})
    client.log_params(run, {"p": None})
    client.log_metrics(run, {"m": 1}, 3, MlflowDataset(), "m-1", timestamp=4)
    client.flush()
    assert names(server.requests) == ["create", "log-batch", "log-inputs", "update"]
    create, data, _, update = (request.json for request in server.requests)
    assert (create["experiment_id"], create["run_name"], create["start_time"]) == ("0", "demo", 5)
    tags = {tag["key"]: tag["value"] for tag in create["tags"]}
    assert tags == {"own": "1", "rides": "True", "runqueue.create_id": run._token}
    assert data == {
        "run_id": "r1",
        "metrics": [
            {
                "key": "m",
                "value": 1.0,
                "timestamp": 4,
                "step": 3,
                "model_id": "m-1",
                "dataset_name": "iris",
                "dataset_digest": "abc",
            }
        ],
        "params": [{"key": "p", "value": "None"}],
    }
    assert update == {"run_id": "r1", "status": "FINISHED", "end_time": 7}


@pytest.mark.parametrize("status", ["RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED", None])
def test_every_status_of_mlflow_is_taken(client: runqueue.Client, server: ScriptedServer, status: str | None) -> None:
    """None is FINISHED, now."""
    client.set_terminated(RUN, status)
    client.flush()
    (request,) = server.requests
    assert request.json["status"] == (status or "FINISHED")
    assert request.json["end_time"] > 1_600_000_000_000


@pytest.mark.parametrize("run_id", ["0", "a_b-c", "a" * 256, "ABC"])
def test_any_id_that_mlflow_takes_is_a_run_id(client: runqueue.Client, server: ScriptedServer, run_id: str) -> None:
    """By MLflow's own rule."""
    from mlflow.utils.validation import _validate_run_id

    _validate_run_id(run_id)  # type: ignore[no-untyped-call]
    client.log_metric(run_id, "m", 1.0)
    client.flush()
    assert server.requests[0].json["run_id"] == run_id


def test_datasets_of_mlflow_are_taken_as_they_are(client: runqueue.Client, server: ScriptedServer) -> None:
    """A DatasetInput, a dataset of `mlflow.data`, our own; what is none of them fails alone."""
    import numpy as np
    from mlflow.data.numpy_dataset import from_numpy
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data = from_numpy(np.zeros((2, 3)), name="zeros")
    entity = Dataset("n", "d", "local", "s", "{}", None)
    client.log_inputs(
        RUN,
        [
            DatasetInput(entity, [InputTag("mlflow.data.context", "train")]),
            data,
            runqueue.Dataset("o", "e", "s3", "u", profile="p"),
            "no dataset",
        ],
    )
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    ((entry,),) = (failure.entries for failure in caught.value.failures)
    assert entry.kind == "dataset" and "no dataset" in str(caught.value.failures[0].error)
    (request,) = server.to("runs/log-inputs")
    first, second, third = entries(request, "datasets")
    assert first["dataset"] == {"name": "n", "digest": "d", "source_type": "local", "source": "s", "schema": "{}"}
    assert first["tags"] == [{"key": "mlflow.data.context", "value": "train"}]
    expected = data._to_mlflow_entity()
    for name in ("name", "digest", "source_type", "source", "schema", "profile"):
        assert second["dataset"][name] == getattr(expected, name)
    assert (third["dataset"]["source_type"], third["dataset"]["profile"]) == ("s3", "p")


def test_many_threads_may_log_at_once(client: runqueue.Client, server: ScriptedServer) -> None:
    """To one run and to new ones, while another thread flushes."""

    def work(thread: int) -> None:
        for step in range(500):
            client.log_metrics(RUN, {f"m{thread}": float(step), "shared": 1.0}, step=step)
            client.log_metric(f"run{thread}{step % 7}", "m", 1.0)
            if thread == 0 and step % 100 == 0:
                client.flush()

    in_threads(work, 4)
    client.flush()
    points = [
        (request.json["run_id"], point["key"], point["step"])
        for request in server.to("runs/log-batch")
        for point in entries(request, "metrics")
    ]
    assert len(points) == 4 * 500 * 3
    assert len({point for point in points if point[0] == RUN and point[1] != "shared"}) == 2_000
    statistics = client.statistics()
    assert statistics.stored == statistics.accepted == 6_000


def test_tags_of_a_new_run_beyond_its_bounds_go_by_log_batch(client: runqueue.Client, server: ScriptedServer) -> None:
    """create-run takes 250,000 bytes and 1,000 tags, and no key that the server would not check there."""
    server.fail("runs/create", CREATED)
    run = client.create_run("0", tags={f"t{at}": "\N{SNOWMAN}" * 500 for at in range(200)})
    client.set_tags(run, {"bad$key": "1", "long": "x" * 9_000, **{f"u{at}": "v" for at in range(1_500)}})
    client.flush()
    (create,) = server.to("runs/create")
    carried = create.json["tags"]
    assert len(carried) <= 1_000
    assert len(create.body.decode().encode("ascii", "backslashreplace")) <= 251_000
    later = [tag for request in server.to("runs/log-batch") for tag in entries(request, "tags")]
    keys = [tag["key"] for tag in carried + later]
    assert len(keys) == len(set(keys)) == 200 + 1_502 + 1
    assert {"bad$key", "long"} <= {tag["key"] for tag in later}
    assert len(carried) > 30


class Growing:
    """A number that changes, and whose sum with floats is none."""

    def __init__(self) -> None:
        self.value = 1.0

    def __float__(self) -> float:
        return self.value


def test_a_number_that_may_change_is_found_behind_floats_too(server: ScriptedServer) -> None:
    """Both ways in which a call recognises plain numbers find it."""
    growing, array = Growing(), np.array(2.0)
    with runqueue.Client(server.uri) as client:
        client.log_metrics(RUN, {"a": 1.0, "b": growing, "c": 3})
        client.log_metrics(RUN, {"a": 1.0, "b": array, "c": 3})
        client.log_metrics(RUN, {"a": np.float64(1), "b": array, "c": Decimal(3)})
        client.log_metrics(RUN, {"a": 1.0, "b": Fraction(5, 2), "c": True})
        growing.value = 9.0
        array[...] = 9.0
    (request,) = server.to("runs/log-batch")
    assert [point["value"] for point in entries(request, "metrics") if point["key"] == "b"] == [1.0, 2.0, 2.0, 2.5]
