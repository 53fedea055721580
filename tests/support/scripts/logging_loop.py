"""A training loop that only logs. It prints how many seconds it took, the end of its run included."""

import time

import mlflow

mlflow.start_run()
begun = time.perf_counter()
mlflow.log_params({f"param {number}": number for number in range(20)})
for step in range(150):
    mlflow.log_metric("loss", 1 / (step + 1), step=step)
    mlflow.log_metrics({"accuracy": step / 150, "rate": 0.1}, step=step)
mlflow.set_tag("done", "yes")
mlflow.end_run()
print("SECONDS", time.perf_counter() - begun)
