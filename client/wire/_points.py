"""
Metric points to JSON, those of many records in one go.

A training logs the same keys at every step, thousands of times. So what a point begins with is kept by its key, and the
points of many records are put together of three columns: what they begin with, the numbers, and what those of a record
end with. Whatever is not plain is left to `_wire`, which makes the same bytes point by point.

Rules of this file: no I/O, no clock. Python's loops go over records, C's over points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
from operator import itemgetter
from typing import Any, Final

import orjson

from runqueue.queueing import Record

INT64: Final = 2**63
MILLISECOND: Final = 1_000_000
"""In nanoseconds, which records of metrics are stamped by."""
NOT_FINITE: Final = {"nan": b'"NaN"', "inf": b'"Infinity"', "-inf": b'"-Infinity"'}
_CACHE_BYTES: Final = 8_000_000
"""About what the heads may take; keys that are new in every call would fill the memory."""
_REPEATED: Final = 1_000
"""Metrics that are compared with those encoded before them; a full batch."""
PLAIN_TAIL: Final = b',"timestamp":%d,"step":%d}'
_LEARNED: Final = 1_000_000
"""Bytes; malloc may keep twice as much, see `mallopt(3)` on M_TRIM_THRESHOLD. A full body, at most."""
_entries = itemgetter(1)


class Points:
    """
    Encodes metrics; its only state is a cache of what the points of a key begin with.

    Args:
        head: What a point begins with, up to its number. Raises where a key cannot be sent as it is.
        tail: What the points of a record end with, from its stamp (ns), step, model and dataset. Raises if it has none.
    """

    def __init__(self, head: Callable[[Any], bytes], tail: Callable[[Any, Any, Any, Any], bytes]) -> None:
        self._head = head
        self._tail = tail
        self._heads: dict[Any, bytes] = {}
        self._cached = 0
        self._keys: list[Any] = []  # of the points that were encoded last
        self._begun: list[bytes] = []  # what they begin with
        # glibc hands the memory of a body back to the system as soon as it is free, and takes it again for the next: 90
        # page faults a batch, more than all of the encoding. It learns not to from one large block that comes and goes.
        bytes(_LEARNED)

    def encode(self, records: Sequence[Record]) -> tuple[bytes, list[bytes]]:
        """
        All points, joined by commas, and for each record what its points end with.

        Raises:
            Exception: Of any kind. Something wants a closer look.
        """
        entries: list[dict[Any, Any]] = [*map(_entries, records)]
        tails = [
            PLAIN_TAIL % (stamp // MILLISECOND, step)
            if stamp.__class__ is step.__class__ is int and 0 <= stamp | step < INT64 and model is dataset is None
            else self._tail(stamp, step, model, dataset)
            for _, _, stamp, step, model, dataset in records
        ]
        heads = self._beginnings([*chain.from_iterable(entries)])
        values: list[Any] = [*chain.from_iterable(map(dict.values, entries))]
        count = len(values)
        if [*map(type, values)].count(float) != count:
            values = _floats(values)
        # No other way from floats to JSON is nearly as fast as one call for all of them.
        text = orjson.dumps(values)
        numbers = text[1:-1].split(b",")
        if b"n" in text:  # null, for what is not finite
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
        """What a point of this key begins with, if that is known already; only where no key was cut."""
        head = self._heads.get(key)
        return None if head is None else head[1:]

    def _beginnings(self, keys: list[Any]) -> list[bytes]:
        """What the point of each key begins with, the comma before it included."""
        count = len(keys)
        if keys == self._keys[:count]:
            return self._begun[:count]
        try:
            begun = [*map(self._heads.__getitem__, keys)]
        except KeyError:
            self._learn(set(keys))
            begun = [*map(self._heads.__getitem__, keys)]
        if count <= _REPEATED:
            self._keys, self._begun = keys, begun
        return begun

    def _learn(self, keys: set[Any]) -> None:
        fresh = {key: b"," + self._head(key) for key in keys}
        size = sum(2 * len(head) + 200 for head in fresh.values())  # with the key as text, and Python's own overhead
        self._cached += size
        if self._cached > _CACHE_BYTES:
            self._heads.clear()
            self._cached = size
        self._heads |= fresh


def is_numeric(kind: type) -> bool:
    """Whether `float()` would convert values of this type, and not read them as text."""
    if issubclass(kind, (str, bytes)):  # numpy's have __float__ too
        return False
    return hasattr(kind, "__float__") or hasattr(kind, "__index__")


def _floats(values: list[Any]) -> list[float]:
    """
    Raises:
        Exception: Not all of them are numbers, as `_wire` understands it, or one does not fit.
    """
    for kind in set(map(type, values)):
        if issubclass(kind, complex) or not is_numeric(kind):
            raise TypeError
    return [*map(float, values)]
