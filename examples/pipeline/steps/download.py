"""The first step: get the data, and keep it as it came. Here it comes with scikit-learn, so that no network is needed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlflow
from sklearn import datasets

from pipeline_run import step_run

LOADERS = {"wine": datasets.load_wine, "iris": datasets.load_iris, "cancer": datasets.load_breast_cancer}


def main() -> int:
    parser = argparse.ArgumentParser(description="Get the data.")
    parser.add_argument("--dataset", default="wine")
    parser.add_argument("--source", default="https://archive.ics.uci.edu/dataset/109/wine")
    options = parser.parse_args()
    # The folder goes last: files are read when they are uploaded, at the latest when the client ends.
    with TemporaryDirectory() as folder, step_run("download", vars(options)) as (_, run):
        if options.dataset not in LOADERS:
            raise SystemExit(f"no dataset {options.dataset!r}: one of {', '.join(LOADERS)}")
        frame: Any = LOADERS[options.dataset](as_frame=True).frame
        path = Path(folder, "raw.csv")
        frame.to_csv(path, index=False)
        run.log_artifact(path, "raw")
        data: Any = mlflow.data
        # As floats: MLflow warns of schemas with integers, since those cannot be missing.
        raw = data.from_pandas(frame.astype(float), source=options.source, targets="target", name=options.dataset)
        run.log_input(raw, context="raw")
        run.log_metrics({"rows": len(frame), "columns": len(frame.columns)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
