"""Which of MLflow's entities can be queued, and which log calls queue them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from runqueue.settings._plain_uri import plain_uri
from runqueue.settings._tracking_uri import resolve_tracking_uri
from support.mlflow_server import clean_environment

entities: Any = importlib.import_module("mlflow.entities")
module: Any = importlib.import_module("runqueue.integrations.mlflow._entities")


def metric(key: Any = "m", value: Any = 1.0, timestamp: Any = 1, step: Any = 0, **more: Any) -> Any:
    return SimpleNamespace(
        **dict.fromkeys(("model_id", "dataset_name", "dataset_digest"))
        | {"key": key, "value": value, "timestamp": timestamp, "step": step}
        | more
    )


@pytest.mark.parametrize(
    "given",
    [
        metric(),
        metric(value=2),
        metric(value=float("nan")),
        metric(value=float("-inf")),
        metric(key="a/b c.d-e_f:g", step=-3),
        metric(model_id="m-1", dataset_name="d", dataset_digest="1"),
    ],
)
def test_a_metric_that_mlflow_takes_can_be_queued(given: Any) -> None:
    """Special values, negative steps, models and datasets included."""
    assert module.can_queue_metrics([given])


@pytest.mark.parametrize(
    "given",
    [
        metric(key="a//b"),
        metric(key="k" * 251),
        metric(key=""),
        metric(key=None),
        metric(value="1"),
        metric(value=None),
        metric(value=True),
        metric(timestamp=-1),
        metric(timestamp=1.5),
        metric(timestamp=2**63),
        metric(step=0.5),
        metric(step=None),
        metric(dataset_name="d"),
        metric(model_id=""),
        SimpleNamespace(key="m"),
    ],
)
def test_a_metric_that_mlflow_refuses_or_changes_cannot_be_queued(given: Any) -> None:
    """MLflow's own store then answers for the whole batch, the good metric included."""
    assert not module.can_queue_metrics([metric(), given])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([entities.Param("p", "v" * 6_000), entities.Param("q", "")], True),
        ([entities.Param("p", "v" * 6_001)], False),
        ([entities.Param("p", "1"), entities.Param("p", "1")], False),
        ([entities.Param("p//q", "1")], False),
        ([entities.Param("p", 1)], False),
        ([entities.Param("p", "\ud800")], False),
    ],
)
def test_params_can_be_queued_if_the_client_stores_them_unchanged(given: Any, expected: bool) -> None:
    """A value above MLflow's limit cannot: a client would cut it."""
    assert module.can_queue_params(given) is expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([entities.RunTag("t", "v" * 8_000), entities.RunTag("t", "again")], True),
        ([entities.RunTag("t", "v" * 8_001)], False),
        ([entities.RunTag("t" * 251, "1")], False),
        ([entities.RunTag("t", None)], False),
    ],
)
def test_tags_can_be_queued_if_the_client_stores_them_unchanged(given: Any, expected: bool) -> None:
    """A value above MLflow's limit cannot: a client would cut it."""
    assert module.can_queue_tags(given) is expected


def test_metrics_of_one_step_and_time_share_a_call_unless_a_key_repeats() -> None:
    """The order of the metrics is kept, and every point of a repeated key."""
    given = [
        metric("a", 1.0),
        metric("b", 2.0),
        metric("a", 3.0),
        metric("c", 4.0, step=1),
        metric("c", 5.0, step=1, model_id="m"),
        metric("d", 6.0, step=1, dataset_name="n", dataset_digest="g"),
        metric("a", 7.0),
    ]
    assert [(each.values, each.step, each.model_id, each.dataset) for each in module.metric_calls(given)] == [
        ({"a": 1.0, "b": 2.0}, 0, None, None),
        ({"a": 3.0}, 0, None, None),
        ({"c": 4.0}, 1, None, None),
        ({"c": 5.0}, 1, "m", None),
        ({"d": 6.0}, 1, None, ("n", "g")),
        ({"a": 7.0}, 0, None, None),
    ]
    assert list(module.metric_calls([])) == []


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("runqueue+http://host:5000", "http://host:5000"),
        ("runqueue+sqlite:///a.db", "sqlite:///a.db"),
        ("runqueue+postgresql+psycopg2://h/d", "postgresql+psycopg2://h/d"),
        ("runqueue+databricks", "databricks"),
        ("runqueue+databricks://", "databricks"),
        ("runqueue+databricks://profile", "databricks://profile"),
        ("http://runqueue+host", "http://runqueue+host"),
        ("", ""),
    ],
)
def test_a_uri_with_the_prefix_means_the_plain_one(given: str, plain: str) -> None:
    """Also for `runqueue.Client`, which queues anyway."""
    assert plain_uri(given) == plain
    assert resolve_tracking_uri(given) == plain


def test_the_integration_is_imported_without_mlflow_and_without_the_client() -> None:
    """`dir` lists the public names; an unknown name raises AttributeError."""
    script = """
import sys
import runqueue.integrations.mlflow as integration
assert {"enable", "disable"} <= set(dir(integration))
assert not {"mlflow", "runqueue._public"} & set(sys.modules)
try:
    integration.no_such_name
except AttributeError as error:
    assert "no_such_name" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
