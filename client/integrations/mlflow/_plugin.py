"""
The functions that MLflow's entry points name: stores for tracking URIs such as `runqueue+http://host:5000`.
"""

# Rules of this file: MLflow imports it with every `import mlflow`, also for users who have not asked for runqueue. So
# its own imports are few, and it changes nothing unless the environment asks for queueing. The environment is read
# during this import, before any other part of MLflow has read the tracking URI.

from __future__ import annotations

import os
from typing import Any

from runqueue.settings._plain_uri import PREFIX


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """Return the queued tracking store for a URI with the prefix `runqueue+`."""
    from runqueue.integrations.mlflow import _enable

    return _enable.tracking_store(store_uri, artifact_uri)


def model_registry_store(store_uri: str, tracking_uri: str | None = None) -> Any:
    """Return MLflow's own model registry for a URI with the prefix `runqueue+`."""
    from runqueue.integrations.mlflow import _enable

    return _enable.model_registry_store(store_uri, tracking_uri)


if os.environ.get("MLFLOW_TRACKING_URI", "").startswith(PREFIX) or os.environ.get("RUNQUEUE_MLFLOW"):
    from runqueue.integrations.mlflow import _enable

    _enable.follow_environment()
