"""
Train a small classifier on scikit-learn's handwritten digits, and log every step of it with runqueue.

    python examples/train.py

No server is needed: like mlflow itself, runqueue logs to `sqlite:///mlflow.db` in the working folder unless
`--tracking-uri` or MLFLOW_TRACKING_URI names another store. The log calls in the loop only queue; leaving the `with`
block sends everything.
"""

import argparse
import re
import shlex
import sys

import mlflow
import numpy as np
from mlflow.data.numpy_dataset import from_numpy
from sklearn.datasets import load_digits
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import runqueue

BATCH_SIZE = 32
HIDDEN_UNITS = 32
LEARNING_RATE = 1e-3


def train(tracking_uri: str | None, epochs: int, seed: int) -> str | None:
    """
    Train for some epochs, log to a new run, and print what was logged.

    Returns:
        The id of the run.

    Raises:
        runqueue.RunqueueError: Something could not be logged; a `FlushError` names each entry that is not stored.
    """
    images, labels = load_digits(return_X_y=True)
    images = images / 16.0  # a pixel is a count from 0 to 16
    train_x, valid_x, train_y, valid_y = train_test_split(images, labels, test_size=0.2, random_state=seed)
    dataset = from_numpy(train_x, targets=train_y, name="digits", source="https://archive.ics.uci.edu/dataset/80")
    model = MLPClassifier((HIDDEN_UNITS,), learning_rate_init=LEARNING_RATE, random_state=seed)
    rng = np.random.default_rng(seed)
    params = {
        "model": "MLPClassifier",
        "hidden_units": HIDDEN_UNITS,
        "learning_rate": LEARNING_RATE,
        "batch_size": BATCH_SIZE,
        "epochs": epochs,
        "seed": seed,
    }

    with runqueue.Client(tracking_uri) as client:
        run = client.create_run(experiment_id="0", run_name="digits", tags={"example": "train.py"})
        client.log_params(run, params)
        client.log_inputs(run, [dataset])

        step = 0
        for epoch in range(1, epochs + 1):
            order = rng.permutation(len(train_x))
            for start in range(0, len(order), BATCH_SIZE):
                rows = order[start : start + BATCH_SIZE]
                model.partial_fit(train_x[rows], train_y[rows], classes=range(10))
                step += 1
                accuracy = model.score(train_x[rows], train_y[rows])
                client.log_metrics(run, {"train_loss": model.loss_, "train_accuracy": accuracy}, step=step)
            valid_loss = log_loss(valid_y, model.predict_proba(valid_x))
            valid_accuracy = model.score(valid_x, valid_y)
            client.log_metrics(run, {"valid_loss": valid_loss, "valid_accuracy": valid_accuracy}, step=step)
            print(f"epoch {epoch:2}  loss {valid_loss:.3f}  accuracy {valid_accuracy:.3f}")

        client.set_tags(run, {"phase": "trained"})
        client.set_terminated(run, "FINISHED")

    points = 2 * step + 2 * epochs
    print(f"\nLogged {points:,} metric points, {len(params)} params, 2 tags and 1 dataset to run {run.run_id}:")
    print(client.statistics())
    return run.run_id


def how_to_look(tracking_uri: str, run_id: str | None) -> str:
    """Say how to open the run in MLflow's user interface."""
    page = f"/#/experiments/0/runs/{run_id}"
    shown = re.sub("//[^/@]*@", "//***@", tracking_uri)  # a terminal must not show a password
    if tracking_uri.startswith(("http://", "https://")):
        return f"Look at it: {shown.rstrip('/')}{page}"
    if tracking_uri.startswith("databricks"):
        return "Look at it in your Databricks workspace."
    return f"Look at it: mlflow ui --backend-store-uri {shlex.quote(shown)}\nand open  : http://127.0.0.1:5000{page}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small classifier and log every step of it.")
    parser.add_argument("--tracking-uri", help="where to log (default: as mlflow itself would resolve it)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        run_id = train(options.tracking_uri, options.epochs, options.seed)
    except runqueue.RunqueueError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(how_to_look(options.tracking_uri or mlflow.get_tracking_uri(), run_id))
    return 0


if __name__ == "__main__":
    sys.exit(main())
