"""
Encodes records as the JSON fragments that batches are cut from.
"""

# Rules of this file:
# - No I/O, no clock.
# - Every field is checked and typed before it is sent: a server that cannot parse an entry drops the rest of the batch,
#   and answers 200.
# - An entry that cannot be sent becomes an empty fragment and a RejectedError. The others of its record are encoded.

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import orjson

from runqueue.queueing import Encoding, Fragments, Joined, Record, RejectedError
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, RUN, TAG
from runqueue.wire._limits import MAX_KEY, MAX_PARAM_VALUE, MAX_TAG_VALUE
from runqueue.wire._points import INT64, NOT_FINITE, PLAIN_TAIL, Points, is_number
from runqueue.wire._records import InvalidValue, milliseconds

logger = logging.getLogger("runqueue")


class Encoder:
    """
    Encodes records.

    Attributes:
        cut: Keys and values that were shortened to the server's limits.
        encode: See `runqueue.queueing.Encode`. Its argument `memory` belongs to one run, and holds which keys were cut
            to which text.
    """

    def __init__(self) -> None:
        self.cut = 0
        self._points = Points(_safe_metric_head, _metric_tail)
        self.encode = Encoding(self._one, self._many)

    def _one(self, record: Record, memory: dict[Any, Any]) -> Fragments:
        kind = record[0]
        if kind == METRIC:
            return self._metrics(record, memory)
        if kind in (PARAM, TAG):
            return self._texts(record, memory, MAX_PARAM_VALUE if kind == PARAM else MAX_TAG_VALUE)
        if kind == DATASET:
            return self._datasets(record)
        if kind == RUN:
            return [b",".join(key_value(key, value) for key, value in record[3].tags.items())], None
        return [b""], None  # STATUS: `status_body` makes the whole body

    # -- metrics -----------------------------------------------------------------------------------------------------

    def _metrics(self, record: Record, memory: dict[Any, Any]) -> Fragments:
        encoded = self._many((record,), memory)
        if encoded is not None:
            joined, (tail,) = encoded
            return Joined(joined, len(record[1]), tail), None
        _, entries, stamp, step, model_id, dataset = record
        try:
            tail = _metric_tail(stamp, step, model_id, dataset)
        except RejectedError as error:
            return [b""] * len(entries), dict.fromkeys(range(len(entries)), error)
        return self._metrics_one_by_one(entries, tail, memory)

    def _many(self, records: Sequence[Record], memory: dict[Any, Any]) -> tuple[bytes, list[bytes]] | None:
        if memory:  # one of these keys may equal a key that was cut, see `_key`
            return None
        try:
            return self._points.encode(records)
        except Exception:  # RejectedError, or any error of a foreign __float__: `_metrics_one_by_one` finds the entry
            return None

    def _metrics_one_by_one(self, entries: dict[Any, Any], tail: bytes, memory: dict[Any, Any]) -> Fragments:
        """Encode the entries that can be sent, and say of each other one why it cannot."""
        pieces: list[bytes] = []
        faults: dict[int, Exception] = {}
        for at, (key, value) in enumerate(entries.items()):
            try:
                head = None if memory else self._points.known(key)
                if head is None:
                    head = _metric_head(self._key(METRIC, key, memory))
                pieces.append(head + _number(value) + tail)
            except RejectedError as error:
                pieces.append(b"")
                faults[at] = error
        return pieces, faults or None

    # -- params, tags ------------------------------------------------------------------------------------------------

    def _texts(self, record: Record, memory: dict[Any, Any], longest: int) -> Fragments:
        pieces: list[bytes] = []
        faults: dict[int, Exception] = {}
        for at, (key, value) in enumerate(record[1].items()):
            try:
                short = self._key(record[0], key, memory)
                if isinstance(value, InvalidValue):
                    raise RejectedError(value.reason)
                pieces.append(key_value(short, self._shortened(_text(value), longest, f"the value of {short!r}")))
            except RejectedError as error:
                pieces.append(b"")
                faults[at] = error
        return pieces, faults or None

    def _key(self, kind: int, key: Any, memory: dict[Any, Any]) -> str:
        """
        Return the key as it is sent: cut, if it is too long.

        Raises:
            RejectedError: The key is no text, or another key of this run was cut to the same text.
        """
        if not isinstance(key, str):
            raise RejectedError(f"a key is text, not {type(key).__name__}")
        may_collide = _may_collide(key)
        if not may_collide and not memory:
            return key
        short = self._shortened(key, MAX_KEY, f"the key {key[:40]!r}...")
        if (may_collide or (kind, short) in memory) and memory.setdefault((kind, short), key) != key:
            raise RejectedError(f"the key has {len(key)} characters, and is the same as another when cut to {MAX_KEY}")
        return short

    def _shortened(self, text: str, longest: int, name: str) -> str:
        if len(text) <= longest:
            return text
        self.cut += 1
        if self.cut == 1:
            logger.warning(
                "%s has %d characters and is cut to the server's %d; further cuts are only counted (Statistics.cut)",
                name,
                len(text),
                longest,
            )
        return text[: longest - 3] + "..."

    # -- datasets ----------------------------------------------------------------------------------------------------

    def _datasets(self, record: Record) -> Fragments:
        pieces: list[bytes] = []
        faults: dict[int, Exception] = {}
        for at, dataset in enumerate(record[1]):
            try:
                pieces.append(_dataset(dataset))
            except RejectedError as error:
                pieces.append(b"")
                faults[at] = error
        return pieces, faults or None


def _metric_head(key: str) -> bytes:
    return b'{"key":' + _json_text(key, "key") + b',"value":'


def _may_collide(key: str) -> bool:
    """Tell if the key will be cut, or may equal the text that a longer key is cut to."""
    return len(key) > MAX_KEY or (len(key) == MAX_KEY and key.endswith("..."))


def _safe_metric_head(key: Any) -> bytes:
    """
    Return the head for a key that is sent as it is and cannot collide with another one.

    Raises:
        RejectedError: The key is not of that kind.
    """
    if not isinstance(key, str) or _may_collide(key):
        raise RejectedError("the key has to be looked at alone")
    return _metric_head(key)


def _metric_tail(stamp: Any, step: Any, model_id: str | None, dataset: tuple[str, str] | None) -> bytes:
    timestamp: Any = milliseconds(stamp)
    if not (timestamp.__class__ is step.__class__ is int and 0 <= timestamp < INT64 and -INT64 <= step < INT64):
        timestamp, step = _whole(timestamp, "timestamp", 0), _whole(step, "step")
    if model_id is None and dataset is None:
        return PLAIN_TAIL % (timestamp, step)
    more = b',"timestamp":%d,"step":%d' % (timestamp, step)
    if model_id is not None:
        more += b',"model_id":' + _json_text(model_id, "model_id")
    if dataset is not None:
        more += b',"dataset_name":' + _json_text(dataset[0], "dataset name")
        more += b',"dataset_digest":' + _json_text(dataset[1], "dataset digest")
    return more + b"}"


def _whole(value: Any, name: str, least: int = -(2**63)) -> int:
    if isinstance(value, InvalidValue):
        raise RejectedError(value.reason)
    if not -INT64 <= value < INT64:
        raise RejectedError(f"{name} {_shown(value)} does not fit into 64 bits")
    if value < least:
        raise RejectedError(f"{name} {value} is negative")
    return int(value)


def _number(value: Any) -> bytes:
    if isinstance(value, InvalidValue):
        raise RejectedError(value.reason)
    if not is_number(value):
        what = "the text " if isinstance(value, (str, bytes)) else ""
        raise RejectedError(f"a metric value is a number, not {what}{_shown(value)}")
    if isinstance(value, complex):  # float() would silently drop the imaginary part of numpy's
        raise RejectedError(f"a metric value is a real number, not {_shown(value)}")
    try:
        number = float(value)
    except Exception as error:  # a foreign __float__ may raise anything, and only this entry fails
        raise RejectedError(f"{_shown(value)} cannot be converted to a float: {error}") from None
    return NOT_FINITE.get(repr(number)) or orjson.dumps(number)


def _text(value: Any) -> str:
    try:
        return str(value)
    except ValueError as error:  # an int with more digits than Python converts
        raise RejectedError(f"{_shown(value)} cannot be converted to text: {error}") from None


def _shown(value: object) -> str:
    """Return a short repr for a message, even if `repr()` fails."""
    try:
        text = repr(value)
    except Exception as error:  # for example an int with more digits than Python converts
        text = f"<{type(value).__name__}: {error}>"
    return text if len(text) <= 100 else text[:97] + "..."


def _json_text(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise RejectedError(f"{name} is text, not {type(text).__name__}")
    try:
        return orjson.dumps(text)
    except TypeError:
        raise RejectedError(f"{name} {_shown(text)} is no valid Unicode (a lone surrogate)") from None


def key_value(key: str, value: str) -> bytes:
    """
    Return the JSON object of a param or tag.

    Raises:
        RejectedError: The key or the value is no text, or not valid Unicode.
    """
    return b'{"key":' + _json_text(key, "key") + b',"value":' + _json_text(value, "value") + b"}"


def _dataset(dataset: Any) -> bytes:
    if isinstance(dataset, InvalidValue):
        raise RejectedError(dataset.reason)
    fields = [
        b'"%s":%s' % (name.encode(), _json_text(value, f"a dataset's {name}"))
        for name in ("name", "digest", "source_type", "source", "schema", "profile")
        if (value := getattr(dataset, name)) is not None or name not in ("schema", "profile")
    ]
    tags = [key_value(key, value) for key, value in dataset.tags.items()]
    return b'{"dataset":{' + b",".join(fields) + b'},"tags":[' + b",".join(tags) + b"]}"
