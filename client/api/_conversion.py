"""
What a log call does to its values: as little as it can on the caller's time.

Rules of this file: a bad *value* becomes an `InvalidValue` in its place and fails alone, later; a bad *call* raises here and
now. Converted at the call is only what could change after it, or could not be converted in another thread.
"""

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
"""What a dataset is read for; source: `mlflow.utils.mlflow_tags.MLFLOW_DATASET_CONTEXT`."""

_TEXT: Final = (str, bytes, bytearray, memoryview)
_TEXT_DTYPES: Final = ("U", "S")
_COMPLEX_DTYPES: Final = ("c",)
_IMMUTABLE: Final = (float, int, complex, str, bytes, type(None))
_IMMUTABLE_TOO: Final = frozenset(("decimal", "fractions"))
"""Modules of such numbers; they are not imported for this."""
_PLAIN_TEXTS: Final = frozenset((str, int, float, bool, type(None)))


def numbers(metrics: dict[Any, Any]) -> dict[Any, Any]:
    """Metric values, those converted that could change after the call: 0-d arrays, tensors, whatever has __float__."""
    return {key: value if _stays(value) else _number(value) for key, value in metrics.items()}


def _stays(value: Any) -> bool:
    return isinstance(value, _IMMUTABLE) or type(value).__module__ in _IMMUTABLE_TOO


def _number(value: Any) -> float | InvalidValue:
    dtype = getattr(getattr(value, "dtype", None), "kind", None)  # numpy's word for what an array holds
    if not is_number(value) or dtype in _TEXT_DTYPES:
        return InvalidValue(_name(value), f"a metric value is a number, not {_name(value)}")
    if dtype in _COMPLEX_DTYPES:
        return InvalidValue(_name(value), f"a metric value is a real number, not {_name(value)} of complex ones")
    try:
        return float(value)
    except Exception as error:  # a foreign __float__ may raise anything; it concerns this entry alone
        return InvalidValue(_name(value), f"{_name(value)} cannot be converted to a float: {error}")


def texts(values: dict[Any, Any]) -> dict[Any, Any]:
    """Values of params or tags, as text where their text could change or fail later."""
    if _PLAIN_TEXTS.issuperset(map(type, values.values())):
        return values
    return {key: value if type(value) in _PLAIN_TEXTS else _text(value) for key, value in values.items()}


def _text(value: Any) -> str | InvalidValue:
    try:
        return str(str(value))  # the inner one may be of a subclass
    except Exception as error:
        return InvalidValue(_name(value), f"{_name(value)} cannot be converted to text: {error}")


def _name(value: object) -> str:
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def whole(value: Any, name: str) -> int | InvalidValue:
    """A step or time as an int, if that loses nothing: numpy and torch scalars, bool, Decimal, 3.0."""
    if isinstance(value, _TEXT):
        return InvalidValue(value, f"{name} {value[:40]!r} is text, not a whole number")
    try:
        with suppress(TypeError):  # a tensor of floats has __index__, and refuses
            return int(operator.index(value))
        number = int(value)
        if number == value:
            return number
    except Exception as error:  # as above
        return InvalidValue(value, f"{name} {_shown(value)} cannot be converted to a whole number: {error}")
    return InvalidValue(value, f"{name} {_shown(value)} is not a whole number")


def _shown(value: object) -> str:
    try:
        return repr(value)[:100]
    except Exception:
        return _name(value)


def millis(value: Any, name: str) -> int:
    """
    A time in milliseconds, of a call that concerns a whole run.

    Raises:
        CallTypeError: It is no whole number.
        ConfigError: It is negative or beyond 64 bits.
    """
    number = whole(value, name)
    if isinstance(number, InvalidValue):
        raise CallTypeError(number.reason)
    if not 0 <= number < 2**63:
        raise ConfigError(f"{name}={_shown(number)}: milliseconds since the epoch")
    return number


def mapping(value: Any, name: str) -> dict[Any, Any]:
    """
    A copy of a mapping.

    Raises:
        CallTypeError: It is none.
    """
    if not isinstance(value, Mapping):
        raise CallTypeError(f"{name} takes a mapping, not {type(value).__name__}")
    return dict(value)


def text_or_none(value: Any, name: str) -> str | None:
    """
    Raises:
        CallTypeError: It is neither text nor None.
        ConfigError: It cannot be encoded.
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
    Raises:
        CallTypeError: It is no text.
        ConfigError: MLflow knows no such status.
    """
    name = text_or_none(value, "status")
    if name is None:
        return "FINISHED"
    if name not in STATUSES:
        raise ConfigError(f"status={name!r}: one of {', '.join(STATUSES)}")
    return name


def own_tags(tags: dict[Any, Any], riders: int, rider_bytes: int) -> tuple[dict[str, str], dict[Any, Any]]:
    """
    The tags of a new run: those that travel inside create-run, and those that go by log-batch, where the server checks
    keys, long values are cut, and what is bad fails alone.
    """
    inside: dict[str, str] = {}
    others: dict[Any, Any] = {}
    room = rider_bytes
    for key, value in tags.items():
        text = _text(value)
        if isinstance(text, str) and isinstance(key, str) and is_safe_in_create(key) and _encodable(text):
            size = len(key) + len(json.dumps(text)) + len('{"key":"","value":},')
            if len(inside) < riders and size <= room:
                inside[key] = text
                room -= size
                continue
        others[key] = text
    return inside, others


def riding(tags: dict[Any, Any]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Tags in two: those that may travel inside create-run, and the others."""
    others = {key: value for key, value in tags.items() if not (isinstance(key, str) and is_safe_in_create(key))}
    return ({key: value for key, value in tags.items() if key not in others} if others else tags), others


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return len(text) <= MAX_TAG_VALUE


def datasets(given: Any, contexts: Any = None, tags_list: Any = None) -> tuple[Dataset | InvalidValue, ...]:
    """
    Dataset inputs as our own entity, with nothing in it that could change after the call.

    Args:
        given: What `log_inputs` takes.
        contexts: What each is read for; the tag `CONTEXT_TAG`.
        tags_list: More tags of each.

    Raises:
        CallTypeError: One of them is no list, a context is no text, tags are no mapping.
        ConfigError: They are not of one length, or two values are given for a tag.
    """
    alone = any(hasattr(given, name) for name in ("dataset", "digest"))  # mlflow's entities are iterable
    if alone or isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise CallTypeError(f"datasets takes a list, not {_name(given)}")
    each_given: Iterable[Any] = given
    made = tuple(_dataset(each) for each in each_given)
    if contexts is None and tags_list is None:
        return made
    each_context = _one_each(contexts, "contexts", len(made))
    each_tags = _one_each(tags_list, "tags_list", len(made))
    return tuple(map(_tagged, made, each_context, each_tags))


def _one_each(given: Any, name: str, count: int) -> list[Any]:
    if given is None:
        return [None] * count
    if isinstance(given, (str, bytes, bytearray, Mapping)) or not isinstance(given, Iterable):
        raise CallTypeError(f"{name} takes a list with one for each dataset, not {_name(given)}")
    each_given: list[Any] = list(given)
    if len(each_given) != count:
        raise ConfigError(f"{name} holds {len(each_given)} for {count} datasets: one for each, or None")
    return each_given


def _tagged(dataset: Dataset | InvalidValue, context: Any, tags: Any) -> Dataset | InvalidValue:
    """With what this call says of the dataset, besides what comes with it."""
    context = text_or_none(context, "context")
    added = {} if tags is None else {key: _text(value) for key, value in mapping(tags, "tags").items()}
    if context:  # to MLflow, "" is none too
        _agree(added, {CONTEXT_TAG: context})
        added[CONTEXT_TAG] = context
    if isinstance(dataset, InvalidValue):
        return dataset
    _agree(dataset.tags, added)
    plain: dict[Any, str] = {}
    for key, value in added.items():
        if isinstance(value, InvalidValue):
            return InvalidValue(dataset, f"tag {_shown(key)} of dataset {dataset.name!r}: {value.reason}")
        plain[key] = value
    return attrs.evolve(dataset, tags={**dataset.tags, **plain})


def _agree(tags: Mapping[Any, Any], others: Mapping[Any, Any]) -> None:
    for key in tags.keys() & others.keys():
        if tags[key] != others[key]:
            one, other = _shown(tags[key]), _shown(others[key])
            raise ConfigError(f"two values are given for the tag {_shown(key)} of a dataset: {one} and {other}")


def _dataset(given: Any) -> Dataset | InvalidValue:
    try:
        if isinstance(given, Dataset):
            return attrs.evolve(given, tags=dict(given.tags))
        # By shape, not by class: mlflow is not imported for this, and need not be installed.
        if hasattr(given, "_to_mlflow_entity"):  # mlflow.data.Dataset
            return _entity(given._to_mlflow_entity(), ())
        if hasattr(given, "dataset") and hasattr(given, "tags"):  # mlflow.entities.DatasetInput
            return _entity(given.dataset, given.tags)
    except Exception as error:  # a foreign class may raise anything; it concerns this entry alone
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
    Name and digest of the dataset that a metric was measured on.

    Raises:
        CallTypeError: It has none.
    """
    name, digest = getattr(dataset, "name", None), getattr(dataset, "digest", None)
    if not isinstance(name, str) or not isinstance(digest, str):
        raise CallTypeError(f"dataset takes a dataset with a name and a digest, not {type(dataset).__name__}")
    return name, digest
