"""scikit-learn autologging: a pipeline, and a grid search with its child runs."""

import mlflow
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier

mlflow.sklearn.autolog(max_tuning_runs=4)
X, y = load_iris(return_X_y=True, as_frame=True)

with mlflow.start_run(run_name="pipeline"):
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200, random_state=0)).fit(X, y)
    pipeline.score(X, y)

with mlflow.start_run(run_name="search"):
    GridSearchCV(DecisionTreeClassifier(random_state=0), {"max_depth": [1, 2, 3], "criterion": ["gini"]}, cv=2).fit(
        X, y
    )
