"""
Checks and converts what the log calls are given, with as little work as possible on the caller's time.
"""

# Rules of this file: a bad value becomes an `InvalidValue` in its place, which fails alone, later; a bad call raises
# here. A value is converted at the call only if it may change afterwards, or if another thread could not convert it.

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final

import attrs

from runqueue._entities import Dataset
from runqueue.errors import CallTypeError, ConfigError
from runqueue.wire._limits import MAX_TAG_VALUE
from runqueue.wire._points import is_number
from runqueue.wire._records import InvalidValue, is_safe_in_create

STATUSES: Final = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")
"""Source: `mlflow.entities.RunStatus`."""

CONTEXT_TAG: Final = "mlflow.data.context"
"""The purpose a dataset is read for. Source: `mlflow.utils.mlflow_tags.MLFLOW_DATASET_CONTEXT`."""

_TEXT: Final = (str, bytes, bytearray, memoryview)
_TEXT_DTYPES: Final = ("U", "S")
_COMPLEX_DTYPES: Final = ("c",)
_IMMUTABLE: Final = (float, int, complex, str, bytes, type(None))
_IMMUTABLE_MODULES: Final = frozenset(("decimal", "fractions"))
"""Modules whose numbers are immutable. They are compared by name, so as not to import them."""
_PLAIN_TEXTS: Final = frozenset((str, int, float, bool, type(None)))


def numbers(metrics: dict[Any, Any]) -> dict[Any, Any]:
    """Metric values, in which mutable ones are converted: 0-d arrays, tensors, any object with `__float__`."""
    return {key: value if _is_immutable(value) else _number(value) for key, value in metrics.items()}


def _is_immutable(value: Any) -> bool:
    return isinstance(value, _IMMUTABLE) or type(value).__module__ in _IMMUTABLE_MODULES


def _number(value: Any) -> float | InvalidValue:
    dtype = getattr(getattr(value, "dtype", None), "kind", None)  # numpy's code for the type of an array's elements
    if not is_number(value) or dtype in _TEXT_DTYPES:
        return InvalidValue(_name(value), f"a metric value is a number, not {_name(value)}")
    if dtype in _COMPLEX_DTYPES:
        return InvalidValue(_name(value), f"a metric value is a real number, not {_name(value)} of complex ones")
    try:
        return float(value)
    except Exception as error:  # the value's __float__ may raise anything
        return InvalidValue(_name(value), f"{_name(value)} cannot be converted to a float: {error}")


def texts(values: dict[Any, Any]) -> dict[Any, Any]:
    """Values of params or tags, in which those are converted whose text could change, or fail, after the call."""
    if _PLAIN_TEXTS.issuperset(map(type, values.values())):
        return values
    return {key: value if type(value) in _PLAIN_TEXTS else _text(value) for key, value in values.items()}


def _text(value: Any) -> str | InvalidValue:
    try:
        return str(str(value))  # __str__ may return a subclass of str
    except Exception as error:
        return InvalidValue(_name(value), f"{_name(value)} cannot be converted to text: {error}")


def _name(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def whole(value: Any, name: str) -> int | InvalidValue:
    """A step or time as an int, if the conversion is exact: of numpy and torch scalars, bool, Decimal, 3.0."""
    if isinstance(value, _TEXT):
        return InvalidValue(value, f"{name} {value[:40]!r} is text, not a whole number")
    try:
        with suppress(TypeError):  # a float tensor has an __index__ that raises
            return int(operator.index(value))
        number = int(value)
        if number == value:
            return number
    except Exception as error:  # the value's own methods may raise anything
        return InvalidValue(value, f"{name} {_shown(value)} cannot be converted to a whole number: {error}")
    return InvalidValue(value, f"{name} {_shown(value)} is not a whole number")


def _shown(value: object) -> str:
    try:
        return repr(value)[:100]
    except Exception:
        return _name(value)


def millis(value: Any, name: str) -> int:
    """
    Return the start or end time of a run, in milliseconds.

    Raises:
        CallTypeError: The value is no whole number.
        ConfigError: The value is negative or beyond 64 bits.
    """
    number = whole(value, name)
    if isinstance(number, InvalidValue):
        raise CallTypeError(number.reason)
    if not 0 <= number < 2**63:
        raise ConfigError(f"{name}={_shown(number)}: milliseconds since the epoch")
    return number


def mapping(value: Any, name: str) -> dict[Any, Any]:
    """
    Return a copy of a mapping as a dict.

    Raises:
        CallTypeError: The value is no mapping.
    """
    if not isinstance(value, Mapping):
        raise CallTypeError(f"{name} takes a mapping, not {type(value).__name__}")
    return dict(value)


def text_or_none(value: Any, name: str) -> str | None:
    """
    Return a plain `str`, or None.

    Raises:
        CallTypeError: The value is neither text nor None.
        ConfigError: The text cannot be encoded in UTF-8.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise CallTypeError(f"{name} takes text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} {value!r} is no valid Unicode: {error.reason}") from None
    return str(value)


def status(value: Any) -> str:
    """
    Return the name of a status; FINISHED for None.

    Raises:
        CallTypeError: The value is no text.
        ConfigError: MLflow does not know the status.
    """
    name = text_or_none(value, "status")
    if name is None:
        return "FINISHED"
    if name not in STATUSES:
        raise ConfigError(f"status={name!r}: one of {', '.join(STATUSES)}")
    return name


def split_first_tags(tags: dict[Any, Any], max_count: int, max_bytes: int) -> tuple[dict[str, str], dict[Any, Any]]:
    """
    Split the first tags of a run into those that travel inside create-run, and those that a log-batch sends.

    In a log-batch the server checks keys, the client cuts long values, and a bad tag fails alone.

    Args:
        tags: Values by key.
        max_count: Tags inside create-run, at most.
        max_bytes: Their bytes as JSON, at most.
    """
    in_create: dict[str, str] = {}
    in_batch: dict[Any, Any] = {}
    room = max_bytes
    for key, value in tags.items():
        text = _text(value)
        if isinstance(text, str) and isinstance(key, str) and is_safe_in_create(key) and _fits_in_create(text):
            size = len(key) + len(json.dumps(text)) + len('{"key":"","value":},')
            if len(in_create) < max_count and size <= room:
                in_create[key] = text
                room -= size
                continue
        in_batch[key] = text
    return in_create, in_batch


def split_tags(tags: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """
    Split tags that are set later in the same way; both kinds become records, whose values are checked by the encoder.
    """
    in_batch = {key: value for key, value in tags.items() if not (isinstance(key, str) and is_safe_in_create(key))}
    return ({key: value for key, value in tags.items() if key not in in_batch} if in_batch else tags), in_batch


def _fits_in_create(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return len(text) <= MAX_TAG_VALUE


def datasets(given: Any, contexts: Any = None, tags_list: Any = None) -> tuple[Dataset | InvalidValue, ...]:
    """
    Return dataset inputs as `Dataset`s that nothing can change after the call.

    Args:
        given: The datasets, in the types that `log_inputs` takes.
        contexts: For each the value of its tag `CONTEXT_TAG`, or None.
        tags_list: For each more tags, or None.

    Raises:
        CallTypeError: An argument is no list, a context is no text, or tags are no mapping.
        ConfigError: The lists are not of one length, or give two values for one tag.
    """
    is_single = any(hasattr(given, name) for name in ("dataset", "digest"))  # mlflow's entities are iterable
    if is_single or isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise CallTypeError(f"datasets takes a list, not {_name(given)}")
    items: Iterable[Any] = given
    converted = tuple(_dataset(each) for each in items)
    if contexts is None and tags_list is None:
        return converted
    context_list = _list_of(contexts, "contexts", len(converted))
    tags_lists = _list_of(tags_list, "tags_list", len(converted))
    return tuple(map(_with_tags, converted, context_list, tags_lists))


def _list_of(given: Any, name: str, count: int) -> list[Any]:
    if given is None:
        return [None] * count
    if isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise CallTypeError(f"{name} takes a list with one for each dataset, not {_name(given)}")
    items: list[Any] = list(given)
    if len(items) != count:
        raise ConfigError(f"{name} holds {len(items)} for {count} datasets: one for each, or None")
    return items


def _with_tags(dataset: Dataset | InvalidValue, context: Any, tags: Any) -> Dataset | InvalidValue:
    """The dataset with a context and tags in addition to its own."""
    context = text_or_none(context, "context")
    added = {} if tags is None else {key: _text(value) for key, value in mapping(tags, "tags").items()}
    if context:  # MLflow too takes "" as no context
        _check_agreement(added, {CONTEXT_TAG: context})
        added[CONTEXT_TAG] = context
    if isinstance(dataset, InvalidValue):
        return dataset
    _check_agreement(dataset.tags, added)
    plain: dict[Any, str] = {}
    for key, value in added.items():
        if isinstance(value, InvalidValue):
            return InvalidValue(dataset, f"tag {_shown(key)} of dataset {dataset.name!r}: {value.reason}")
        plain[key] = value
    return attrs.evolve(dataset, tags={**dataset.tags, **plain})


def _check_agreement(tags: Mapping[Any, Any], others: Mapping[Any, Any]) -> None:
    for key in tags.keys() & others.keys():
        if tags[key] != others[key]:
            one, other = _shown(tags[key]), _shown(others[key])
            raise ConfigError(f"two values are given for the tag {_shown(key)} of a dataset: {one} and {other}")


def _dataset(given: Any) -> Dataset | InvalidValue:
    try:
        if isinstance(given, Dataset):
            return attrs.evolve(given, tags=dict(given.tags))
        # Recognised by attributes, not by class: mlflow is not imported here, and need not be installed.
        if hasattr(given, "_to_mlflow_entity"):  # mlflow.data.Dataset
            return _entity(given._to_mlflow_entity(), ())
        if hasattr(given, "dataset") and hasattr(given, "tags"):  # mlflow.entities.DatasetInput
            return _entity(given.dataset, given.tags)
    except Exception as error:  # the dataset's own class may raise anything
        return InvalidValue(_name(given), f"{_name(given)} cannot be read as a dataset: {error}")
    return InvalidValue(
        _name(given),
        f"{_name(given)} is no dataset: pass an mlflow DatasetInput, an mlflow.data dataset or a runqueue.Dataset",
    )


def _entity(entity: Any, tags: Iterable[Any]) -> Dataset:
    if hasattr(entity, "_to_mlflow_entity"):
        entity = entity._to_mlflow_entity()
    return Dataset(
        name=entity.name,
        digest=entity.digest,
        source_type=entity.source_type,
        source=entity.source,
        schema=entity.schema or None,
        profile=entity.profile or None,
        tags={tag.key: tag.value for tag in tags},
    )


def dataset_reference(dataset: Any) -> tuple[str, str]:
    """
    Return the name and digest of the dataset that a metric was computed on.

    Raises:
        CallTypeError: The object has no name or no digest.
    """
    name, digest = getattr(dataset, "name", None), getattr(dataset, "digest", None)
    if not isinstance(name, str) or not isinstance(digest, str):
        raise CallTypeError(f"dataset takes a dataset with a name and a digest, not {type(dataset).__name__}")
    return name, digest
