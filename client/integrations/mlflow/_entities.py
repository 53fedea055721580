"""
MLflow's entities as log calls of a `runqueue.Client`: which of them can be queued, and the calls that queue metrics.
"""

# Rules of this file: an entity cannot be queued where MLflow raises an error at the call, or where a client would store
# something else than MLflow does (a client cuts long values, for instance). The caller hands such an entity to MLflow's
# own store, whose answer the user then gets. MLflow's own validation decides what is valid.

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Final, NamedTuple

from mlflow.exceptions import MlflowException

_validation: Any = importlib.import_module("mlflow.utils.validation")  # Any: MLflow's entities have no types either
_INT64: Final = 2**63


class _DatasetReference(NamedTuple):
    """The dataset of a metric, as `log_metrics` takes it."""

    name: str
    digest: str


class MetricCall(NamedTuple):
    """The arguments of one call of `log_metrics`."""

    values: dict[str, float]
    step: int
    timestamp: int
    model_id: str | None
    dataset: _DatasetReference | None


def can_queue_metrics(metrics: Iterable[Any]) -> bool:
    """Return whether MLflow takes all of these metrics, and a client stores them as MLflow does."""
    try:
        for metric in metrics:
            if not (isinstance(metric.value, (float, int)) and _is_int64(metric.timestamp) and _is_int64(metric.step)):
                return False
            if not all(map(_is_none_or_text, (metric.model_id, metric.dataset_name, metric.dataset_digest))):
                return False
            if (metric.dataset_name is None) != (metric.dataset_digest is None):
                return False
            _validation._validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
    except (MlflowException, AttributeError):
        return False
    return True


def can_queue_params(params: Iterable[Any]) -> bool:
    """Return whether MLflow takes all of these params, and a client stores them as MLflow does."""
    try:
        for param in params:
            if not _is_text(param.value, _validation.MAX_PARAM_VAL_LENGTH):
                return False
            _validation._validate_param(param.key, param.value)
        _validation._validate_param_keys_unique(params)
    except (MlflowException, AttributeError):
        return False
    return True


def can_queue_tags(tags: Iterable[Any]) -> bool:
    """Return whether MLflow takes all of these tags, and a client stores them as MLflow does."""
    try:
        for tag in tags:
            if not _is_text(tag.value, _validation.MAX_TAG_VAL_LENGTH):
                return False
            _validation._validate_tag(tag.key, tag.value)
    except (MlflowException, AttributeError):
        return False
    return True


def can_queue_datasets(datasets: Any) -> bool:
    """Return whether MLflow takes all of these dataset inputs."""
    try:
        _validation._validate_dataset_inputs(datasets)
    except (MlflowException, AttributeError, TypeError):
        return False
    return True


def metric_calls(metrics: Iterable[Any]) -> Iterator[MetricCall]:
    """
    Group metrics into calls of `log_metrics`, in their order.

    Neighbours with the same step, time, model and dataset share a call. A key that comes twice begins another call,
    since a call has one value a key.
    """
    for (step, timestamp, model_id, name, digest), group in groupby(metrics, _arguments_in_common):
        dataset = None if name is None else _DatasetReference(name, digest)
        values: dict[str, float] = {}
        for metric in group:
            if metric.key in values:
                yield MetricCall(values, step, timestamp, model_id, dataset)
                values = {}
            values[metric.key] = metric.value
        yield MetricCall(values, step, timestamp, model_id, dataset)


def _arguments_in_common(metric: Any) -> tuple[Any, ...]:
    return metric.step, metric.timestamp, metric.model_id, metric.dataset_name, metric.dataset_digest


def _is_int64(value: Any) -> bool:
    return value.__class__ is int and -_INT64 <= value < _INT64


def _is_none_or_text(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _is_text(value: Any, max_length: int) -> bool:
    return isinstance(value, str) and len(value) <= max_length and _is_encodable(value)


def _is_encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
