"""
Stores: the one that a tracking URI means, and the calls of MLflow's REST API to servers, Databricks and MLflow's own.

A store makes one attempt a call, and raises a `StoreError`. Retries, batching and order belong to `runqueue.queueing`.
"""
