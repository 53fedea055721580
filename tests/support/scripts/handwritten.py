"""A loop written by hand: nested runs, datasets, artifacts, a logged model, reads in between, threads."""

# mypy: ignore-errors
import os
import tempfile
import threading

import mlflow
import numpy as np
import pandas as pd
from mlflow.entities import Metric, Param, RunTag
from sklearn.linear_model import LinearRegression

frame = pd.DataFrame({"x": [1.0, 2.0, 3.0], "y": [2.0, 4.0, 6.0]})
client = mlflow.MlflowClient()

with mlflow.start_run(run_name="parent", description="by hand", tags={"from": "start"}) as parent:
    parent_id = parent.info.run_id
    mlflow.log_params({"lr": 0.1, "depth": 3, "empty": "", "long": "p" * 6_000})
    assert mlflow.log_param("one", 1) == 1
    mlflow.set_tags({"team": "vision", "note": "n" * 8_000, "unicode": "Größe 大"})
    data = mlflow.data.from_pandas(frame, name="numbers", targets="y")
    mlflow.log_input(data, context="training", tags={"split": "all"})
    mlflow.log_input(mlflow.data.from_numpy(np.arange(6.0), name="plain"))
    for step in range(40):
        mlflow.log_metric("loss", 1 / (step + 1), step=step)
        mlflow.log_metrics({"acc": step / 40, "a/b c.d-e": -float(step)}, step=step)
    mlflow.log_metric("odd", float("nan"))
    mlflow.log_metric("odd", float("inf"), step=1)
    mlflow.log_metric("odd", float("-inf"), step=2)
    mlflow.log_metric("same", 1.0, step=3, timestamp=1_700_000_000_000)
    mlflow.log_metric("same", 2.0, step=3, timestamp=1_700_000_000_000)
    mlflow.log_metric("numpy", np.float32(0.5))
    mlflow.log_metric("on data", 0.25, dataset=data)

    for number in range(2):
        with mlflow.start_run(run_name=f"child {number}", nested=True) as child:
            mlflow.log_param("number", number)
            mlflow.log_metrics({"score": number + 0.5}, step=1)
            mlflow.set_tag("phase", "first")
            mlflow.set_tag("phase", "last")
            mlflow.set_tag("gone", "soon")
            mlflow.delete_tag("gone")
            found = mlflow.get_run(child.info.run_id).data
            assert found.tags["phase"] == "last" and "gone" not in found.tags
            assert found.metrics["score"] == number + 0.5
        mlflow.set_tag(f"after {number}", number)

    try:
        with mlflow.start_run(run_name="fails", nested=True):
            mlflow.log_metric("before", 1)
            raise ZeroDivisionError
    except ZeroDivisionError:
        mlflow.log_metric("failures", 1)

    # What MLflow refuses at the call, it refuses there.
    for wrong in (
        lambda: mlflow.log_param("lr", 0.2),
        lambda: mlflow.log_metric("a//b", 1),
        lambda: mlflow.log_metric("m" * 251, 1),
        lambda: mlflow.set_tag("t" * 251, 1),
        lambda: mlflow.log_params({"": 1}),
        lambda: mlflow.log_metric("text", "one"),
        lambda: client.log_batch(parent_id, params=[Param("twice", "1"), Param("twice", "2")]),
    ):
        try:
            wrong()
        except (mlflow.MlflowException, TypeError) as error:
            print("REFUSED", getattr(error, "message", error))
        else:
            print("TAKEN")

    history = client.get_metric_history(parent_id, "loss")
    assert [point.step for point in history] == list(range(40))
    assert len(mlflow.search_runs(filter_string=f"tags.mlflow.parentRunId = '{parent_id}' and metrics.score > 1")) == 1

    mlflow.log_text("hello", "notes/hello.txt")
    mlflow.log_dict({"a": [1, 2]}, "notes/a.json")
    mlflow.log_table({"q": ["a", "b"], "n": [1, 2]}, "table.json")
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "deep.txt"), "w") as file:
            file.write("deep")
        mlflow.log_artifacts(folder, "folder")
        mlflow.log_artifact(os.path.join(folder, "deep.txt"))
    assert mlflow.artifacts.load_text(f"runs:/{parent_id}/notes/hello.txt") == "hello"

    model = LinearRegression().fit(frame[["x"]], frame["y"])
    info = mlflow.sklearn.log_model(model, name="line", pip_requirements=[], params={"kind": "linear"}, step=2)
    mlflow.log_metric("of model", 0.75, model_id=info.model_id, dataset=data)
    assert "of model" in {metric.key for metric in mlflow.get_logged_model(info.model_id).metrics or []}
    assert abs(mlflow.sklearn.load_model(info.model_uri).predict(pd.DataFrame({"x": [4.0]}))[0] - 8) < 1e-9
    version = mlflow.register_model(info.model_uri, f"model of {os.environ['MLFLOW_EXPERIMENT_NAME']}")
    assert client.get_model_version(version.name, version.version).run_id == parent_id

    operations = mlflow.log_metric("later", 1.0, synchronous=False)
    assert operations is not None
    operations.wait()
    mlflow.log_params({"asked": "later"}, synchronous=False)
    mlflow.set_tags({"asked": "later"}, synchronous=False)
    mlflow.log_metrics(metrics={"later too": 1.0}, step=7, synchronous=False)
    mlflow.flush_async_logging()

    def work(worker: int) -> None:
        for step in range(20):
            mlflow.log_metric(f"worker {worker}", step, step=step, run_id=parent_id)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

# The calls of Lightning's MLFlowLogger and of transformers' MLflowCallback, which come with gigabytes of their own.
experiment = client.get_experiment_by_name(os.environ["MLFLOW_EXPERIMENT_NAME"])
assert experiment is not None
run = client.create_run(experiment.experiment_id, tags={"mlflow.runName": "by client"})
assert client.get_run(run.info.run_id).info.status == "RUNNING"
client.log_batch(run_id=run.info.run_id, params=[Param(f"param {number}", str(number)) for number in range(150)])
for step in range(5):
    points = [Metric(key=f"m{number}", value=step, timestamp=1_000 + step, step=step) for number in range(3)]
    client.log_batch(run_id=run.info.run_id, metrics=points, synchronous=False)
    client.log_batch(run_id=run.info.run_id, metrics=points, tags=[RunTag("step", str(step))])
client.log_metric(run.info.run_id, "epoch", 1, step=4)
client.log_param(run.info.run_id, "from", "client")
client.set_tag(run.info.run_id, "mlflow.note.content", "a note")
client.update_run(run.info.run_id, name="renamed")
client.log_artifact(run.info.run_id, __file__, "code")
client.set_terminated(run.info.run_id, "KILLED")

doomed = client.create_run(experiment.experiment_id, run_name="deleted")
client.log_metric(doomed.info.run_id, "m", 1)
client.delete_run(doomed.info.run_id)
client.restore_run(doomed.info.run_id)
client.log_metric(doomed.info.run_id, "m", 2, step=1)
client.set_terminated(doomed.info.run_id)

mlflow.start_run(run_name="left open")
mlflow.log_metric("open", 1)
mlflow.set_tag("left", "open")
