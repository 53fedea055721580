"""
What log calls have handed over for one run, and the engine has not looked at yet.

    any thread:       the way in, with one record     one call of C: atomic, and all of the record or nothing
    engine's thread:  draw(count)                     the oldest records

Records lie here flat, item behind item. As a tuple that holds a dict, each would be tracked by CPython's garbage collector
for as long as it is queued: walked while it is young, and counted as growth, which brings about the next full collection.
That is a fifth of what a call of ten metrics costs, and 56 bytes a record. Full collections that come about otherwise walk
the list as they would walk the tuples. So every record has the same number of items.

Rejected: `deque.extend`, which may fail midway for want of memory, and leave half a record; `list.extend` makes room
for all of a tuple first. Rejected: records of two tuples, keys and values, which are let be once they have been walked
once: twice the walking for those that are new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from runqueue.queueing.batches._part import WIDTH, Record

PIECE: Final = 1_000
"""Records that are taken in one go: a call of C that takes a million lets no other thread run meanwhile."""


class Inbox:
    """First in, first out. Any thread may add, the engine's alone takes."""

    __slots__ = ("_items",)

    def __init__(self) -> None:
        self._items: list[Any] = []

    def appender(self) -> Callable[[Record], None]:
        """
        What adds a record. Made anew at each call, and by nobody but the lane's `append` and `push`: who has one holds the
        items, and can be counted by that (see `Accumulator.release`).
        """
        return self._items.extend

    @property
    def items(self) -> list[Any]:
        """The items, for whoever counts the references to them."""
        return self._items

    def __len__(self) -> int:
        return len(self._items) // WIDTH

    def weights(self) -> Iterator[int]:
        """How many entries each record counts for, as of now."""
        return map(len, self._items[1::WIDTH])

    def draw(self, count: int) -> list[list[Any]]:
        """Take the first so many records, as they lie, in pieces."""
        items, end, length = self._items, count * WIDTH, PIECE * WIDTH
        pieces = [items[at : min(at + length, end)] for at in range(0, end, length)]
        del items[:end]  # others add behind it alone
        return pieces
