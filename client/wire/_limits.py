"""
The limits of MLflow's REST API: what a batch, a key, a value and the request that creates a run may hold.
"""

from __future__ import annotations

from typing import Final

from runqueue.queueing import Limits

MLFLOW_LIMITS: Final = Limits(metrics=1_000, params=100, tags=100, entities=1_000, datasets=1_000, bytes=1_000_000)
"""Source: MLflow's REST API, "Log Batch"; datasets from `mlflow.utils.validation.MAX_DATASETS_PER_BATCH`."""

ENVELOPE_BYTES: Final = 320
"""Bytes of a log-batch besides its fragments, at most: brackets, names, and a run id of up to 256 characters."""

MAX_KEY: Final = 250
"""Characters; source: `mlflow.utils.validation.MAX_ENTITY_KEY_LENGTH`. Longer keys and values are cut."""
MAX_PARAM_VALUE: Final = 6_000
"""Characters; source: `mlflow.utils.validation.MAX_PARAM_VAL_LENGTH`."""
MAX_TAG_VALUE: Final = 8_000
"""Characters; source: `mlflow.utils.validation.MAX_TAG_VAL_LENGTH`."""

SYSTEM_TAGS: Final = 2
"""Tags that runqueue adds to a create-run: TOKEN_TAG and PARENT_TAG."""
MAX_CREATE_TAGS: Final = 1_000 - SYSTEM_TAGS
"""The user's tags that a create-run may carry."""
MAX_CREATE_TAG_BYTES: Final = 250_000
"""Their size as ASCII-escaped JSON. The answer repeats them, and answers are read only up to 1 MB."""
