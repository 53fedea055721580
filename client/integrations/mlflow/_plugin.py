"""
What MLflow's entry points name: stores for tracking URIs such as `runqueue+http://host:5000`.

Rules of this file: MLflow loads it with every `import mlflow`, whether anybody wants it or not, so it imports next to
nothing, and where the environment does not ask for the queued store, it changes nothing. Where it does, that is seen
here and now: before any other part of MLflow has read the tracking URI.
"""

from __future__ import annotations

import os
from typing import Any

from runqueue.settings._plain_uri import PREFIX


def tracking_store(store_uri: str, artifact_uri: str | None = None) -> Any:
    """MLflow's tracking store for a URI with our prefix: the queued one."""
    from runqueue.integrations.mlflow import _switch

    return _switch.tracking_store(store_uri, artifact_uri)


def model_registry_store(store_uri: str, tracking_uri: str | None = None) -> Any:
    """MLflow's own model registry for a URI with our prefix."""
    from runqueue.integrations.mlflow import _switch

    return _switch.model_registry_store(store_uri, tracking_uri)


if os.environ.get("MLFLOW_TRACKING_URI", "").startswith(PREFIX) or os.environ.get("RUNQUEUE_MLFLOW"):
    from runqueue.integrations.mlflow import _switch

    _switch.follow_environment()
