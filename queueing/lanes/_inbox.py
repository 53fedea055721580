"""
The inbox of a lane: the records that log calls have queued and that the engine has not drawn yet.

    any thread:       appender()(record)    one call of C: atomic, and the whole record or nothing
    engine's thread:  draw(count)           the oldest records
"""

# Rules of this file: records lie flat, item behind item, so every record has the same number of items. CPython's
# garbage collector would track each record as a tuple that holds a dict: it would walk the tuple while it is young, and
# count it as growth, which brings the next full collection nearer. That takes a fifth of a call of ten metrics, and 56
# bytes a record. A full collection walks the list as it would walk the tuples.
#
# Rejected: `deque.extend`, which can fail midway for want of memory and leave half a record; `list.extend` makes room
# for the whole tuple first. Rejected: records of two tuples, keys and values, which the collector stops tracking once
# it has walked them: new ones cost twice the walking.

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from runqueue.queueing.batches._part import WIDTH, Record

PIECE: Final = 1_000
"""Records that one call of C draws: while it draws a million, no other thread would run."""


class Inbox:
    """First in, first out. Any thread may append; only the engine's thread draws."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[Any] = []

    def appender(self) -> Callable[[Record], None]:
        """
        The function that appends a record.

        Only the lane's `append` and `push` may keep it. It holds the items, and by the count of its references the
        accumulator learns whether a log call may still append (see `Accumulator.release`).
        """
        return self._items.extend

    @property
    def items(self) -> list[Any]:
        """The items, for `Accumulator.release`, which counts the references to them."""
        return self._items

    def __len__(self) -> int:
        return len(self._items) // WIDTH

    def weights(self) -> Iterator[int]:
        """The number of entries of each record that is here now."""
        return map(len, self._items[1::WIDTH])

    def draw(self, count: int) -> list[list[Any]]:
        """Take the first *count* records, flat, in pieces of at most `PIECE` records."""
        items, end, length = self._items, count * WIDTH, PIECE * WIDTH
        pieces = [items[at : min(at + length, end)] for at in range(0, end, length)]
        del items[:end]  # other threads append behind it
        return pieces
