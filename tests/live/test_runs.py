"""Runs and their content: parents, names, tags, special values, and placeholders that stay valid."""

from __future__ import annotations

import math
import pickle

import pytest

import runqueue
from support.proxy import FaultyProxy
from support.readback import Point, Readback, content
from support.wire_log import assert_in_order, entries, names, of_run

pytestmark = pytest.mark.live

MAX_DOUBLE = 1.7976931348623157e308


def test_a_run_has_its_name_its_start_and_all_of_its_tags_from_the_beginning(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """`run_name`, `start_time` and 1,100 tags: create-run has as many tags as fit, further requests the rest."""
    tags = {f"tag {at}": f"ü{at}" for at in range(1_100)}
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id, start_time=1_234, tags=tags, run_name="nämed \N{SNOWMAN}")
    stored = readback.run(run.run_id)
    assert (stored.name, stored.start_time, stored.status) == ("nämed \N{SNOWMAN}", 1_234, "RUNNING")
    assert stored.tags["mlflow.runName"] == "nämed \N{SNOWMAN}"
    assert stored.content.tags == tags
    assert names(proxy.requests)[0] == "create"
    assert proxy.count("runs/create") == 1
    assert len(entries(proxy.requests[0], "tags")) <= 1_000


def test_children_wait_for_a_parent_that_is_still_queued(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """`parent_run_id` takes a pending id, over generations, and a real one."""
    with runqueue.Client(proxy.uri) as client:
        parent = client.create_run(experiment_id, run_name="parent")
        children = [client.create_run(experiment_id, parent_run_id=parent) for _ in range(3)]
        grandchild = client.create_run(experiment_id, parent_run_id=children[2])
        client.log_metric(grandchild, "m", 1.0, timestamp=1)
        client.flush()
        assert parent.run_id is not None
        late = client.create_run(experiment_id, parent_run_id=parent.run_id)
        later = client.create_run(experiment_id, parent_run_id=parent)
    for child in (*children, late, later):
        assert readback.run(child.run_id).tags["mlflow.parentRunId"] == parent.run_id
    assert readback.run(grandchild.run_id).tags["mlflow.parentRunId"] == children[2].run_id
    assert readback.content(grandchild.run_id).metrics == {"m": [Point(0, 1, 1.0)]}
    creates = proxy.to("runs/create")
    assert len(creates) == 7
    answered = of_run(creates, parent.run_id)[0].answered_at
    assert answered is not None
    assert all(answered <= request.read_at for request in creates[1:])


def test_a_placeholder_stays_valid_after_every_flush(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """It is resolved in place, also in a pickled copy, and then serves another client."""
    with runqueue.Client(proxy.uri) as client, runqueue.Client(proxy.uri) as other:
        run = client.create_run(experiment_id)
        copy = pickle.loads(pickle.dumps(run))
        assert run.run_id is None
        assert "pending" in repr(run)
        for step in range(3):
            client.log_metric(run, "m", float(step), step=step, timestamp=step)
            client.flush()
        assert run.run_id is not None
        assert run.run_id in repr(run)
        assert copy == run and hash(copy) == hash(run) and copy.run_id == run.run_id
        client.log_metric(run.run_id, "m", 3.0, step=3, timestamp=3)
        client.flush(run_id=copy)
        other.log_metric(run, "m", 4.0, step=4, timestamp=4)
    assert readback.content(run.run_id).metrics == {"m": [Point(step, step, float(step)) for step in range(5)]}
    assert proxy.count("runs/create") == 1


def test_flush_of_one_run_leaves_the_others_queued(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """`flush(run_id=...)` sends only that run, after the creation of its parent."""
    with runqueue.Client(proxy.uri) as client:
        parent = client.create_run(experiment_id)
        client.log_param(parent, "p", 1)
        child = client.create_run(experiment_id, parent_run_id=parent)
        client.log_param(child, "p", 2)
        client.create_run(experiment_id)
        client.flush(run_id=child)
        assert len(readback.run_ids(experiment_id)) == 2
        assert readback.content(parent.run_id).params == {}
        assert readback.content(child.run_id).params == {"p": "2"}
        assert client.statistics().pending == 2
    assert len(readback.run_ids(experiment_id)) == 3
    assert readback.content(parent.run_id).params == {"p": "1"}


def test_flush_after_flush_keeps_the_order(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Entries that are logged after a final status are sent after it, in order."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        client.set_terminated(run, "FAILED")
        client.log_metric(run, "m", 1.0, timestamp=1)
        client.flush()
        client.set_tag(run, "t", "late")
        client.log_inputs(run, [runqueue.Dataset("d", "1")])
        client.set_terminated(run)
    assert names(proxy.requests) == ["create", "log-batch", "update", "log-batch", "log-inputs", "update"]
    assert_in_order(proxy.requests[:3])
    assert_in_order(proxy.requests[3:])
    assert readback.run(run.run_id).status == "FINISHED"


def test_a_background_flush_can_be_waited_for(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """`flush(synchronous=False)` returns operations at once; they are done when everything is stored."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        client.log_param(run, "p", 1)
        operations = client.flush(synchronous=False)
        operations.await_completion(timeout=20)
        assert operations.done
        assert operations.report is not None and operations.report.failures == ()
        assert readback.content(run.run_id).params == {"p": "1"}


def test_nan_and_the_infinities_are_stored_as_such(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """The server returns the infinities as the largest doubles; all other values are stored, too."""
    values = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "tiny": 5e-324, "zero": -0.0, "after": 1.0}
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        client.log_metrics(run_id, values, step=-3, timestamp=7)
        client.log_metrics(run_id, {"big step": True}, step=2**63 - 1, timestamp=0)
    stored = readback.content(run_id).metrics
    assert math.isnan(stored.pop("nan")[0].value)
    assert stored == {
        "inf": [Point(-3, 7, MAX_DOUBLE)],
        "-inf": [Point(-3, 7, -MAX_DOUBLE)],
        "tiny": [Point(-3, 7, 5e-324)],
        "zero": [Point(-3, 7, 0.0)],
        "after": [Point(-3, 7, 1.0)],
        "big step": [Point(2**63 - 1, 0, 1.0)],
    }


def test_text_of_every_kind_comes_back_unchanged(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Keys and values with unicode, quotes, control characters and emoji, of the types that people log."""
    odd = 'quote " back\\slash\nline\ttab \x01 \N{SNOWMAN} \U0001f600 日本語'
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        client.log_params(
            run_id, {"odd": odd, "ключ": "ü", "none": None, "bool": True, "float": 1e-5, "list": [1, "a"]}
        )
        client.set_tags(run_id, {"odd": odd, "a/b.c-d e:f": 1})
        client.log_metrics(run_id, {"ключ/日本": 1}, timestamp=1)
    assert readback.content(run_id) == content(
        params={"odd": odd, "ключ": "ü", "none": "None", "bool": "True", "float": "1e-05", "list": "[1, 'a']"},
        tags={"odd": odd, "a/b.c-d e:f": "1"},
        metrics={"ключ/日本": [Point(0, 1, 1.0)]},
    )


def test_a_dict_that_changes_after_the_call_changes_nothing(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """The client sends what was in the dict at the call."""
    run_id = readback.new_run(experiment_id)
    metrics, params, tags = {"m": 1.0}, {"p": "1"}, {"t": "1"}
    with runqueue.Client(proxy.uri) as client:
        client.log_metrics(run_id, metrics, timestamp=1)
        client.log_params(run_id, params)
        client.set_tags(run_id, tags)
        for each in (metrics, params, tags):
            each.clear()
    assert readback.content(run_id) == content(params={"p": "1"}, tags={"t": "1"}, metrics={"m": [Point(0, 1, 1.0)]})


def test_the_last_value_of_a_tag_stays(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Whether it is set before the run exists, in one flush or in several; MLflow's own tags, too."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id, tags={"t": "created", "u": "created"}, run_name="first name")
        for value in range(300):
            client.set_tag(run, "t", value)
        client.set_tag(run, "mlflow.note.content", "a note")
        client.flush()
        assert readback.content(run.run_id).tags == {"t": "299", "u": "created"}
        for value in range(150):
            client.set_tags(run, {"t": f"later {value}", f"k{value}": "1"})
        client.set_tag(run, "mlflow.runName", "second name")
    stored = readback.run(run.run_id)
    assert stored.content.tags == {"t": "later 149", "u": "created"} | {f"k{value}": "1" for value in range(150)}
    assert stored.tags["mlflow.note.content"] == "a note"
    assert stored.name == "second name"


def test_a_param_is_written_once(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """An equal repetition is accepted, in one flush or in several. Another value is refused, alone."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id)
        client.log_params(run, {"p": 1, "q": 1})
        client.log_params(run, {"p": 1, "r": 1})
        client.flush()
        client.log_param(run, "p", "1")
        client.flush()
        client.log_params(run, {"p": 2, "s": 1})
        client.log_params(run, {"t": 1})
        client.log_params(run, {"t": 2, "u": 1})
        with pytest.raises(runqueue.FlushError, match=r"^2 of 5 entries") as caught:
            client.flush()
    refused = {(entry.key, entry.value) for failure in caught.value.failures for entry in failure.entries}
    assert {(key, str(value)) for key, value in refused} == {("p", "2"), ("t", "2")}
    assert readback.content(run.run_id).params == dict.fromkeys("pqrstu", "1")


def test_one_metric_may_have_many_points_at_one_step(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """MLflow stores equal points once; all others are kept."""
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        for value in (1.0, 2.0, 2.0, 3.0):
            client.log_metric(run_id, "m", value, step=1, timestamp=1)
        client.log_metric(run_id, "m", 1.0, step=1, timestamp=2)
    points = [Point(1, 1, 1.0), Point(1, 1, 2.0), Point(1, 1, 3.0), Point(1, 2, 1.0)]
    assert readback.content(run_id).metrics == {"m": points}


def test_values_beyond_the_servers_lengths_are_cut_and_counted(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """Params are cut to 6,000 characters and tags to 8,000, in MLflow's form."""
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        client.log_params(run_id, {"p": "ü" * 7_000})
        client.set_tags(run_id, {"t": "x" * 9_000})
        client.log_metrics(run_id, {"k" * 300: 1.0}, timestamp=1)
        client.flush()
        assert client.statistics().cut == 3
    assert readback.content(run_id) == content(
        params={"p": "ü" * 5_997 + "..."},
        tags={"t": "x" * 7_997 + "..."},
        metrics={"k" * 247 + "...": [Point(0, 1, 1.0)]},
    )


def test_an_experiment_is_found_or_created_by_name(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """`experiment_name=` leads to one experiment, however many runs are created in it."""
    name = f"named after {experiment_id}"
    with runqueue.Client(proxy.uri) as client:
        runs = [client.create_run(experiment_name=name) for _ in range(3)]
        client.flush()
        again = client.create_run(experiment_name=name)
    experiments = {readback.run(run.run_id).experiment_id for run in (*runs, again)}
    assert len(experiments) == 1
    assert len(readback.run_ids(experiments.pop())) == 4
