"""Tags that collide with those of create-run: copied from another run, or set twice before the flush."""

from __future__ import annotations

import pytest

import runqueue
from support.proxy import FaultyProxy
from support.readback import Readback

pytestmark = pytest.mark.live


def test_all_tags_of_another_run_can_be_copied(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """Also its parent and the tag that identifies its creation: the new run has its own."""
    with runqueue.Client(proxy.uri) as client:
        parent = client.create_run(experiment_id)
        first = client.create_run(experiment_id, tags={"kept": "1"}, parent_run_id=parent)
        client.flush()
        old = readback.run(first.run_id).tags
        other = client.create_run(experiment_id, tags=old, parent_run_id=parent)
        client.log_metric(other, "m", 1.0)
    new = readback.run(other.run_id).tags
    assert new["kept"] == "1" and new["mlflow.parentRunId"] == parent.run_id
    assert new["runqueue.create_id"] == other._token != old["runqueue.create_id"]
    assert proxy.count("runs/create") == 3


def test_a_parent_that_contradicts_the_tag_is_refused_at_once(proxy: FaultyProxy) -> None:
    """The call cannot mean both parents."""
    with (
        runqueue.Client(proxy.uri) as client,
        pytest.raises(runqueue.ConfigError, match=r"contradicts the tag mlflow\.parentRunId"),
    ):
        client.create_run("0", tags={"mlflow.parentRunId": "a"}, parent_run_id="b")


def test_a_tag_that_is_set_again_before_the_flush_costs_no_refused_request(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """create-run has each key once; the later value follows, and stays."""
    with runqueue.Client(proxy.uri) as client:
        run = client.create_run(experiment_id, tags={"phase": "begun"})
        client.set_tag(run, "phase", "trained")
    assert readback.run(run.run_id).tags["phase"] == "trained"
    assert [request.status for request in proxy.requests] == [200, 200]


def test_the_text_of_a_failure_of_many_causes_is_bounded(proxy: FaultyProxy) -> None:
    """It names the first hundred causes, and how many more there are."""
    client = runqueue.Client(proxy.uri)
    for at in range(5_000):
        client.log_metric("r", "m", f"text {at}", at)
    with pytest.raises(runqueue.FlushError) as caught:
        client.close()
    text = str(caught.value)
    assert text.startswith("5,000 of 5,000 entries were not stored")
    assert len(text.splitlines()) == 1 + 1 + 100 + 1 and "4,900 more causes" in text
    assert sum(len(failure.entries) for failure in caught.value.failures) == 5_000
