"""
Encodes the metric points of many records at once, as JSON.

A training logs the same keys at every step. So the head of a point, `{"key":"loss","value":`, is cached by its key, and
the points of many records are joined from three columns: heads, numbers, and tails (timestamp and step, the same for all
points of a record). Anything unusual raises, and `_encoder` then makes the same bytes point by point.
"""

# Rules of this file:
# - No I/O, no clock.
# - Loops in Python go over records; loops over points run in C.

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, Final

import orjson

from runqueue.queueing import Record
from runqueue.wire._records import MILLISECOND

INT64: Final = 2**63
NOT_FINITE: Final = {"nan": b'"NaN"', "inf": b'"Infinity"', "-inf": b'"-Infinity"'}
"""JSON of what is not finite, by its repr; JSON itself has no such numbers, and MLflow reads these texts."""
_CACHE_BYTES: Final = 8_000_000
"""About how much memory the cached heads may take: a caller may use new keys in every call."""
_MAX_REPEATED: Final = 1_000
"""Up to so many keys, a full batch, are compared with those of the call before."""
PLAIN_TAIL: Final = b',"timestamp":%d,"step":%d}'
_BODY_BYTES: Final = 1_000_000
"""The size of a full body. malloc then keeps up to twice as much, see `mallopt(3)` on M_TRIM_THRESHOLD."""
_entries = itemgetter(1)


class Points:
    """
    Encodes metric records. The only state is a cache of heads.

    Args:
        head: Returns the head of a key's points. Raises if the key cannot be sent as it is.
        tail: Returns the tail of a record's points, from its timestamp (ns), step, model and dataset. Raises if one of
            them is invalid.
    """

    def __init__(self, head: Callable[[Any], bytes], tail: Callable[[Any, Any, Any, Any], bytes]) -> None:
        self._head = head
        self._tail = tail
        self._heads: dict[Any, bytes] = {}
        self._cached_bytes = 0
        self._last_keys: list[Any] = []
        self._last_heads: list[bytes] = []
        # glibc returns the memory of a freed body to the system and requests it again for the next one: 90 page faults a
        # batch, which cost more than the encoding. Freeing one large block raises glibc's threshold for that.
        bytes(_BODY_BYTES)

    def encode(self, records: Sequence[Record]) -> tuple[bytes, list[bytes]]:
        """
        Return all points, joined by commas, and the tail of each record.

        Raises:
            Exception: Any. An entry or a record is unusual, and has to be looked at alone.
        """
        entries: list[dict[Any, Any]] = [*map(_entries, records)]
        tails = [
            PLAIN_TAIL % (stamp // MILLISECOND, step)
            if stamp.__class__ is step.__class__ is int and 0 <= stamp | step < INT64 and model is dataset is None
            else self._tail(stamp, step, model, dataset)
            for _, _, stamp, step, model, dataset in records
        ]
        heads = self._heads_of([*chain.from_iterable(entries)])
        values: list[Any] = [*chain.from_iterable(map(dict.values, entries))]
        count = len(values)
        if [*map(type, values)].count(float) != count:
            values = _floats(values)
        # One call for all numbers and a split are far faster than a call for each of them.
        text = orjson.dumps(values)
        numbers = text[1:-1].split(b",")
        if b"n" in text:  # orjson writes null for what is not finite
            numbers = [
                NOT_FINITE[repr(value)] if number == b"null" else number
                for number, value in zip(numbers, values, strict=True)
            ]
        pieces = [b""] * (3 * count)
        pieces[0::3] = heads
        pieces[0] = pieces[0][1:]
        pieces[1::3] = numbers
        pieces[2::3] = tails if len(tails) == count else chain.from_iterable(map(repeat, tails, map(len, entries)))
        return b"".join(pieces), tails

    def known(self, key: Any) -> bytes | None:
        """Return the cached head of a key; None if there is none. Use it only for a run none of whose keys was cut."""
        head = self._heads.get(key)
        return None if head is None else head[1:]

    def _heads_of(self, keys: list[Any]) -> list[bytes]:
        """Return the heads of these keys, each with the comma before it."""
        count = len(keys)
        if keys == self._last_keys[:count]:
            return self._last_heads[:count]
        try:
            heads = [*map(self._heads.__getitem__, keys)]
        except KeyError:
            self._cache(set(keys))
            heads = [*map(self._heads.__getitem__, keys)]
        if count <= _MAX_REPEATED:
            self._last_keys, self._last_heads = keys, heads
        return heads

    def _cache(self, keys: set[Any]) -> None:
        fresh = {key: b"," + self._head(key) for key in keys}
        size = sum(2 * len(head) + 200 for head in fresh.values())  # the head, the key, and Python's overhead
        self._cached_bytes += size
        if self._cached_bytes > _CACHE_BYTES:
            self._heads.clear()
            self._cached_bytes = size
        self._heads |= fresh


def is_numeric(kind: type) -> bool:
    """Tell if `float()` would convert values of this type without reading them as text."""
    if issubclass(kind, (str, bytes)):  # numpy's text types have __float__, too
        return False
    return hasattr(kind, "__float__") or hasattr(kind, "__index__")


def is_number(value: object) -> bool:
    """Tell if `float()` would convert the value without reading it as text."""
    return is_numeric(type(value))


def _floats(values: list[Any]) -> list[float]:
    """
    Convert the values of a column.

    Raises:
        Exception: Any. One of them is no real number, or cannot be converted.
    """
    for kind in set(map(type, values)):
        if issubclass(kind, complex) or not is_numeric(kind):
            raise TypeError
    return [*map(float, values)]
