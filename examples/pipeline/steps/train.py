"""The third step: fit a linear classifier, an epoch at a time, and log each."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.linear_model import SGDClassifier
from sklearn.metrics import classification_report, log_loss

from pipeline_run import step_run


def main() -> int:
    parser = argparse.ArgumentParser(description="Train.")
    parser.add_argument("--data", required=True, help="the folder that the step before has made")
    parser.add_argument("--epochs", default="40")
    parser.add_argument("--rate", default="0.02")
    parser.add_argument("--pause", default="0", help="seconds after each epoch")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    with step_run("train", vars(options)) as (_, run):
        train: Any = pd.read_csv(Path(options.data, "train.csv"))
        test: Any = pd.read_csv(Path(options.data, "test.csv"))
        features, classes = list(train.columns.drop("target")), sorted(set(train["target"].tolist()))
        model = SGDClassifier(
            loss="log_loss", learning_rate="constant", eta0=float(options.rate), random_state=int(float(options.seed))
        )
        for epoch in range(1, int(float(options.epochs)) + 1):
            model.partial_fit(train[features], train["target"], classes=classes)
            losses = {
                f"{name}_loss": log_loss(part["target"], model.predict_proba(part[features]))
                for name, part in (("train", train), ("test", test))
            }
            accuracy = model.score(test[features], test["target"])
            run.log_metrics({**losses, "test_accuracy": accuracy}, step=epoch)
            print(f"epoch {epoch}  loss {losses['test_loss']:.3f}  accuracy {accuracy:.3f}", flush=True)
            time.sleep(float(options.pause))
        weights = pd.DataFrame(model.coef_, index=classes, columns=features)
        run.log_dict({"weights": weights.to_dict("index"), "bias": model.intercept_.tolist()}, "model/linear.json")
        run.log_text(classification_report(test["target"], model.predict(test[features])), "report.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
