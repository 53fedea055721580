"""
Fits the same models twice under MLflow's autologging: with its own queueing client, then with runqueue's.

    python fit_twice.py sklearn|xgboost|lightgbm <tracking URI>

Prints the ids of the two experiments.
"""

from __future__ import annotations

import sys
import warnings

warnings.simplefilter("ignore")  # of the libraries that train: they are not what is looked at

import mlflow
from sklearn.datasets import load_iris

from runqueue.integrations.mlflow import install


def sklearn() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    mlflow.sklearn.autolog(max_tuning_runs=None)
    X, y = load_iris(as_frame=True, return_X_y=True)
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, random_state=0))
    GridSearchCV(pipeline, {"logisticregression__C": [0.1, 0.3, 1.0, 3.0, 10.0, 30.0]}, cv=3).fit(X, y)
    mlflow.sklearn.autolog(max_tuning_runs=None, log_models=False)
    with mlflow.start_run(run_name="alone"):
        LogisticRegression(max_iter=300, C=0.5, random_state=0).fit(X, y)


def xgboost() -> None:
    import xgboost

    mlflow.xgboost.autolog()
    X, y = load_iris(return_X_y=True)
    train, valid = xgboost.DMatrix(X[::2], y[::2]), xgboost.DMatrix(X[1::2], y[1::2])
    settings = {"objective": "multi:softprob", "num_class": 3, "seed": 0, "nthread": 1}
    evals = [(train, "train"), (valid, "valid")]
    xgboost.train(settings, train, 200, evals=evals, early_stopping_rounds=3, verbose_eval=False)


def lightgbm() -> None:
    import lightgbm

    mlflow.lightgbm.autolog()
    X, y = load_iris(return_X_y=True)
    settings = {
        "objective": "multiclass",
        "num_class": 3,
        "seed": 0,
        "num_threads": 1,
        "verbosity": -1,
        "early_stopping_round": 3,
        "metric": ["multi_logloss", "multi_error"],
    }
    train = lightgbm.Dataset(X[::2], y[::2], free_raw_data=False)
    valid = lightgbm.Dataset(X[1::2], y[1::2], reference=train, free_raw_data=False)
    lightgbm.train(settings, train, 200, valid_sets=[train, valid], valid_names=["train", "valid"])


FITS = {"sklearn": sklearn, "xgboost": xgboost, "lightgbm": lightgbm}


def main(flavor: str, uri: str) -> None:
    mlflow.set_tracking_uri(uri)
    ids = [str(mlflow.set_experiment(f"{flavor} plain").experiment_id)]
    FITS[flavor]()
    ids.append(str(mlflow.set_experiment(f"{flavor} queueing").experiment_id))
    with install():  # after mlflow's modules were imported, and autolog() was called
        FITS[flavor]()
    sys.stdout.write(" ".join(ids) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
