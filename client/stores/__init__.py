"""
Stores: which one a tracking URI means, and MLflow's REST API over HTTP, on Databricks, and over MLflow's own stores.

A store tries each call once and raises a `StoreError`. Retries, batching and order belong to `runqueue.queueing`.
"""
