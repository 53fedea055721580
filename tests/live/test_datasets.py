"""Datasets of `mlflow.data`, logged by plain MLflow and by runqueue: the same is stored, and stored once."""

# Rules of this file: what is expected is what MLflow's own fluent API has stored, never what we think it should be.
# Everything is read back by MLflow's own client.

from __future__ import annotations

import importlib
import json
import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

import runqueue
from support.embedded import NOLOAD, mlflow_client, read
from support.mlflow_server import MlflowServer
from support.readback import StoredInput

# MLflow's own: its calls of pandas, and its advice on columns of integers.
OF_PANDAS = pytest.mark.filterwarnings("ignore:Starting with pandas version")
OF_INTEGERS = pytest.mark.filterwarnings("ignore:Hint. Inferred schema contains integer column")

pytestmark = [pytest.mark.live, NOLOAD, OF_PANDAS, OF_INTEGERS]

mlflow_data: Any = mlflow.data
pd: Any = importlib.import_module("pandas")  # no types
datasets: Any = importlib.import_module("datasets")

CONTEXTS = ["training", None, "test"]
TAGS_LIST: list[dict[str, str] | None] = [{"split": "0.8", "ü": "\N{SNOWMAN} of a long winter"}, None, {"fold": "3"}]


def numpy_features() -> Any:
    return mlflow_data.from_numpy(np.arange(12.0).reshape(4, 3), name="features alone")


def numpy_with_targets() -> Any:
    features = {"image": np.zeros((5, 2, 2), dtype=np.uint8), "text": np.array(list("abcde"))}
    return mlflow_data.from_numpy(features, targets=np.arange(5), source="https://example.org/digits.npz")


def pandas_frame() -> Any:
    frame = pd.DataFrame({"a": [1, 2, 3], "b": [0.5, float("nan"), 1e300], "c": ["x", "ü", "\N{SNOWMAN}"]})
    return mlflow_data.from_pandas(frame, targets="a", name="mixed columns")


def pandas_of_a_file() -> Any:
    days = pd.date_range("2026-01-01", periods=4, tz="UTC")
    frame = pd.DataFrame({"day": days, "open": [True, False, True, True]})
    return mlflow_data.from_pandas(frame, source="s3://bucket/days.csv", predictions="open")


def wide_frame() -> Any:
    """A frame whose schema alone fills a third of a request."""
    frame = pd.DataFrame(np.zeros((2, 6_000)), columns=[f"a rather long column name {at:05}" for at in range(6_000)])
    return mlflow_data.from_pandas(frame, name="wide")


def hugging_face() -> Any:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 0]})
    return mlflow_data.from_huggingface(rows, targets="label", name="reviews")


def hugging_face_of_a_hub() -> Any:
    rows = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    return mlflow_data.from_huggingface(rows, path="rotten_tomatoes", revision="main")


def meta() -> Any:
    from mlflow.types import ColSpec, DataType, Schema

    source = mlflow_data.http_dataset_source.HTTPDatasetSource("https://example.org/reviews.tar.gz")
    schema = Schema([ColSpec(DataType.string, "text"), ColSpec(DataType.integer, "label")])
    return mlflow_data.meta_dataset.MetaDataset(source, name="by its address", schema=schema)


def meta_without_a_schema() -> Any:
    source = mlflow_data.http_dataset_source.HTTPDatasetSource("https://example.org/reviews.tar.gz")
    return mlflow_data.meta_dataset.MetaDataset(source)


def of_polars() -> Any:
    import polars

    return mlflow_data.from_polars(polars.DataFrame({"a": [1, 2], "b": ["x", None]}), targets="a", name="polars")


MAKERS: list[Callable[[], Any]] = [
    numpy_features,
    numpy_with_targets,
    pandas_frame,
    pandas_of_a_file,
    wide_frame,
    hugging_face,
    hugging_face_of_a_hub,
    meta,
    meta_without_a_schema,
    of_polars,
]


@pytest.fixture(scope="module", params=["rest", "sqlite", "file"])
def uri(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A store of each kind, set as MLflow's tracking URI."""
    folder = tmp_path_factory.mktemp("datasets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.chdir(folder)
        if request.param == "rest":
            server: MlflowServer = request.getfixturevalue("mlflow_server")
            made = server.uri
        elif request.param == "file":
            made = f"file:{folder / 'files'}"
        else:
            first_use: Path = request.getfixturevalue("first_use")
            (folder / "mlflow.db").write_bytes((first_use / "mlflow.db").read_bytes())
            made = f"sqlite:///{folder / 'mlflow.db'}"
        mlflow.set_tracking_uri(made)
        try:
            yield made
        finally:
            mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # which unsets it, and its variable


@pytest.fixture
def experiment_id(uri: str) -> str:
    experiment_id: str = mlflow_client(uri).create_experiment(f"datasets {uuid.uuid4().hex}")
    return experiment_id


def by_mlflow(experiment_id: str, log: Callable[[], None]) -> str:
    """Log by MLflow's fluent API; return the run's id."""
    with mlflow.start_run(experiment_id=experiment_id) as run:
        log()
    run_id: str = run.info.run_id
    return run_id


def by_runqueue(uri: str, experiment_id: str, log: Callable[[runqueue.Run], None]) -> str | None:
    with runqueue.Client(uri) as client, client.start_run(experiment_id=experiment_id) as run:
        log(run)
    return run.run_id


def stored_inputs(uri: str, run_id: str | None) -> list[StoredInput]:
    return read(uri, run_id)[1].inputs


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__.replace("_", " "))
def test_a_dataset_is_stored_as_mlflow_stores_it(uri: str, experiment_id: str, make: Callable[[], Any]) -> None:
    """Name, digest, source and its type, schema, profile, tags; with and without a context and tags."""
    dataset = make()
    tags = {"split": "0.8"}
    for context, more in (("training", tags), (None, None)):

        def plainly(context: str | None = context, more: dict[str, str] | None = more) -> None:
            mlflow.log_input(dataset, context=context, tags=more)

        def queued(run: runqueue.Run, context: str | None = context, more: dict[str, str] | None = more) -> None:
            run.log_input(dataset, context=context, tags=more)

        expected = stored_inputs(uri, by_mlflow(experiment_id, plainly))
        assert stored_inputs(uri, by_runqueue(uri, experiment_id, queued)) == expected
        (one,) = expected
        assert (one.name, one.digest) == (dataset.name, dataset.digest)
        assert one.tags == ((("mlflow.data.context", "training"), ("split", "0.8")) if context else ())


def test_the_same_data_made_anew_has_the_same_digest(uri: str, experiment_id: str) -> None:
    """Equal data that runqueue and MLflow log is one dataset."""
    one = stored_inputs(uri, by_mlflow(experiment_id, lambda: mlflow.log_input(pandas_frame())))
    two = stored_inputs(uri, by_runqueue(uri, experiment_id, lambda run: run.log_input(pandas_frame())))
    assert one == two


def test_several_datasets_in_one_call_are_stored_as_mlflow_stores_them(uri: str, experiment_id: str) -> None:
    """With contexts and tags as lists, as `mlflow.log_inputs` takes them, and as entities that hold them."""
    from mlflow.entities import DatasetInput, InputTag

    given = [numpy_features(), pandas_frame(), hugging_face()]
    run_id = by_mlflow(
        experiment_id,
        lambda: mlflow.log_inputs(given, contexts=CONTEXTS, tags_list=TAGS_LIST),
    )
    expected = stored_inputs(uri, run_id)
    assert len(expected) == 3 and len({each.tags for each in expected}) == 3
    entities = [
        DatasetInput(
            dataset._to_mlflow_entity(),
            [InputTag(key, value) for key, value in ({"mlflow.data.context": context} | (tags or {})).items() if value],
        )
        for dataset, context, tags in zip(given, CONTEXTS, TAGS_LIST, strict=True)
    ]

    def by_lists(run: runqueue.Run) -> None:
        run.log_inputs(given, contexts=CONTEXTS, tags_list=TAGS_LIST)

    def by_entities(run: runqueue.Run) -> None:
        run.log_inputs(entities)

    for log in (by_lists, by_entities):
        assert stored_inputs(uri, by_runqueue(uri, experiment_id, log)) == expected


@pytest.mark.sample("rest", "sqlite")
def test_datasets_that_fill_several_requests_are_all_stored(uri: str, experiment_id: str) -> None:
    """Each has a schema of a third of a megabyte."""
    given = [wide_frame() for _ in range(5)]
    for at, dataset in enumerate(given):
        dataset._digest = f"wide{at}"
    assert sum(len(dataset.to_dict()["schema"]) for dataset in given) > 1_500_000

    def plainly() -> None:
        for each in given:
            mlflow.log_input(each, context="training")

    run_id = by_mlflow(experiment_id, plainly)
    queued = by_runqueue(uri, experiment_id, lambda run: run.log_inputs(given, contexts=["training"] * len(given)))
    assert stored_inputs(uri, queued) == stored_inputs(uri, run_id)


def test_a_dataset_that_runqueue_and_mlflow_log_is_stored_once(mlflow_server: MlflowServer) -> None:
    """One row in the server's table of datasets serves two runs; a run that gets it twice has one input."""
    mlflow.set_tracking_uri(mlflow_server.uri)
    try:
        experiment_id = mlflow_client(mlflow_server.uri).create_experiment(f"both ways {uuid.uuid4().hex}")
        dataset = pandas_frame()
        plain = by_mlflow(experiment_id, lambda: mlflow.log_input(dataset, context="training"))
    finally:
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # which unsets it, and its variable
    expected = stored_inputs(mlflow_server.uri, plain)
    with runqueue.Client(mlflow_server.uri) as client:
        client.log_input(plain, dataset, context="training")
        with client.start_run(experiment_id=experiment_id) as run:
            run.log_input(dataset, context="training")
            run.log_input(dataset, context="training")
    assert stored_inputs(mlflow_server.uri, plain) == expected
    assert stored_inputs(mlflow_server.uri, run.run_id) == expected

    with closing(sqlite3.connect(mlflow_server.folder / "mlflow.db")) as database:
        rows = database.execute(
            "SELECT dataset_uuid, digest, dataset_schema FROM datasets WHERE experiment_id = ?", (experiment_id,)
        ).fetchall()
        ((dataset_id, digest, schema),) = rows
        inputs = database.execute(
            "SELECT destination_id FROM inputs WHERE source_type = 'DATASET' AND source_id = ?", (dataset_id,)
        ).fetchall()
    assert digest == dataset.digest and json.loads(schema) == json.loads(dataset.to_dict()["schema"])
    assert sorted(run_id for (run_id,) in inputs) == sorted([plain, str(run.run_id)])


def test_a_metric_can_refer_to_a_dataset_of_mlflow(mlflow_server: MlflowServer) -> None:
    """The point holds its name and digest, as with `mlflow.log_metric(dataset=...)`."""
    dataset = pandas_frame()
    with runqueue.Client(mlflow_server.uri) as client, client.start_run(experiment_id="0") as run:
        run.log_input(dataset, context="test")
        run.log_metrics({"accuracy": 0.5}, step=3, dataset=dataset)
    (metric,) = mlflow_client(mlflow_server.uri).get_metric_history(run.run_id, "accuracy")
    assert (metric.value, metric.step) == (0.5, 3)
    assert [each.digest for each in stored_inputs(mlflow_server.uri, run.run_id)] == [dataset.digest]
