"""
MLflow's entities as log calls of a client.

Rules of this file: what has to be told at the call, because it is wrong in itself, and what a client would store
otherwise than MLflow does (values that it cuts, say), does not *fit*: it goes MLflow's own way, with MLflow's own
answer. Whether it does is for MLflow's own validation to say.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, Final, NamedTuple

from mlflow.exceptions import MlflowException

_validation: Any = importlib.import_module("mlflow.utils.validation")  # as untyped as its entities
_INT64: Final = 2**63


class _Reference(NamedTuple):
    """The dataset of a metric, as `log_metrics` takes it."""

    name: str
    digest: str


class Points(NamedTuple):
    """What one `log_metrics` takes."""

    values: dict[str, float]
    step: int
    timestamp: int
    model_id: str | None
    dataset: _Reference | None


def metrics_fit(metrics: Iterable[Any]) -> bool:
    """Whether MLflow would take all of these for metrics, and a client stores them as MLflow does."""
    try:
        for metric in metrics:
            if not (isinstance(metric.value, (float, int)) and _whole(metric.timestamp) and _whole(metric.step)):
                return False
            if not (_optional(metric.model_id) and _optional(metric.dataset_name) and _optional(metric.dataset_digest)):
                return False
            if (metric.dataset_name is None) != (metric.dataset_digest is None):
                return False
            _validation._validate_metric(metric.key, metric.value, metric.timestamp, metric.step)
    except (MlflowException, AttributeError):
        return False
    return True


def params_fit(params: Iterable[Any]) -> bool:
    """The same of params."""
    try:
        for param in params:
            if not _text(param.value, _validation.MAX_PARAM_VAL_LENGTH):
                return False
            _validation._validate_param(param.key, param.value)
        _validation._validate_param_keys_unique(params)
    except (MlflowException, AttributeError):
        return False
    return True


def tags_fit(tags: Iterable[Any]) -> bool:
    """The same of tags."""
    try:
        for tag in tags:
            if not _text(tag.value, _validation.MAX_TAG_VAL_LENGTH):
                return False
            _validation._validate_tag(tag.key, tag.value)
    except (MlflowException, AttributeError):
        return False
    return True


def datasets_fit(datasets: Any) -> bool:
    """The same of dataset inputs."""
    try:
        _validation._validate_dataset_inputs(datasets)
    except (MlflowException, AttributeError, TypeError):
        return False
    return True


def points(metrics: Iterable[Any]) -> Iterator[Points]:
    """Metrics in their order, those of one time, step, model and dataset together; of one key, one at a time."""
    for (step, timestamp, model_id, name, digest), group in groupby(metrics, _circumstances):
        dataset = None if name is None else _Reference(name, digest)
        values: dict[str, float] = {}
        for metric in group:
            if metric.key in values:
                yield Points(values, step, timestamp, model_id, dataset)
                values = {}
            values[metric.key] = metric.value
        yield Points(values, step, timestamp, model_id, dataset)


def _circumstances(metric: Any) -> tuple[Any, ...]:
    return metric.step, metric.timestamp, metric.model_id, metric.dataset_name, metric.dataset_digest


def _whole(value: Any) -> bool:
    return value.__class__ is int and -_INT64 <= value < _INT64


def _optional(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _text(value: Any, most: int) -> bool:
    return isinstance(value, str) and len(value) <= most and _encodable(value)


def _encodable(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
