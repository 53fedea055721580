"""XGBoost autologging: every round of training, and early stopping; without a run of the script's own."""

import mlflow
import xgboost
from sklearn.datasets import load_breast_cancer

mlflow.xgboost.autolog()
X, y = load_breast_cancer(return_X_y=True, as_frame=True)
train = xgboost.DMatrix(X[:400], y[:400])
test = xgboost.DMatrix(X[400:], y[400:])
xgboost.train(
    {"objective": "binary:logistic", "eval_metric": ["logloss", "error"], "seed": 0, "nthread": 1},
    train,
    num_boost_round=40,
    evals=[(train, "train"), (test, "test")],
    early_stopping_rounds=5,
    verbose_eval=False,
)
