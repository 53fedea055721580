"""The second step: split the rows, and scale the features by what the training rows say."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
import pandas as pd
from sklearn.model_selection import train_test_split

from pipeline_run import step_run


def main() -> int:
    parser = argparse.ArgumentParser(description="Split and scale.")
    parser.add_argument("--download-run", required=True, help="the run of the step before")
    parser.add_argument("--test-share", default="0.25")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    with TemporaryDirectory() as folder, step_run("process", vars(options)) as (_, run):
        raw = f"runs:/{options.download_run}/raw/raw.csv"
        frame: Any = pd.read_csv(mlflow.artifacts.download_artifacts(raw, dst_path=folder), dtype=float)
        train, test = train_test_split(
            frame,
            test_size=float(options.test_share),
            random_state=int(float(options.seed)),
            stratify=frame["target"],
        )
        features = frame.columns.drop("target")
        mean, deviation = train[features].mean(), train[features].std()
        data: Any = mlflow.data
        made = Path(folder, "data")
        made.mkdir()
        for name, part in (("train", train), ("test", test)):
            scaled = part.assign(**(part[features] - mean) / deviation)
            scaled.to_csv(made / f"{name}.csv", index=False)
            used = data.from_pandas(scaled, targets="target", name=name)
            run.log_input(used, context=name, tags={"download_run": options.download_run})
            run.log_metric(f"{name}_rows", len(scaled))
        run.log_artifacts(made, "data")
        run.log_dict({"mean": mean.to_dict(), "deviation": deviation.to_dict()}, "scaling.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
