"""
What one flush or tick found in an inbox, sorted into a queue a kind, and how batches are filled from it.

Rules of this file: no I/O. The stages of a window are emptied in the order of `STAGES`. `left` counts the entries of
each queue, so that the next batch knows what it must take (see `must_take`); it is kept by what enters and leaves.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from runqueue.queueing._batch import (
    KINDS,
    MERGED,
    PARAM,
    RUN,
    STAGES,
    STATUS,
    TAG,
    Batch,
    Bounds,
    JoinError,
    Record,
    Slice,
    must_take,
    weight,
)
from runqueue.queueing._gate import Gate

CARRIED: Final = 2
"""Item of a RUN record: the keys of the tags it brings along."""
RIDES: Final = 2
"""Item of a TAG record: whether its tags may travel inside the request that creates the run."""


class _Repeats:
    """The params of the batch that is being filled: keys that are in it, and entries that repeat one of them."""

    __slots__ = ("delayed", "inside")

    def __init__(self) -> None:
        self.inside: set[Any] = set()
        self.delayed: list[Slice] = []


class Window:
    """
    Args:
        serial: 1 for a lane's first window, and so on.
    """

    __slots__ = ("_at_hand", "left", "queues", "serial")

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.queues: list[deque[Record | Slice]] = [deque() for _ in range(KINDS)]
        self.left = [0] * KINDS
        self._at_hand: Slice | None = None  # off its queue, and not in the batch yet

    def __bool__(self) -> bool:
        return any(self.queues)

    def put(self, record: Record) -> int:
        """Add a record at the end; how many entries it has."""
        kind, count = record[0], weight(record)
        queue: deque[Record | Slice] = self.queues[kind]
        if kind == STATUS:
            queue.clear()  # a run has one final status: the last one asked for
        queue.append(record)
        self.left[kind] += count
        return count

    def put_back(self, item: Record | Slice) -> None:
        """Put something at the head of its queue."""
        if isinstance(item, Slice):
            kind, count = item.kind, item.count
        else:
            kind, count = item[0], weight(item)
        self.queues[kind].appendleft(item)
        self.left[kind] += count

    def fill(self, bounds: Bounds, gate: Gate) -> Batch:
        """The next batch, as full as the bounds allow; empty if nothing of what it looked at passed the gate."""
        batch = Batch(self.serial)
        stage = next(stage for stage in STAGES if any(self.queues[kind] for kind in stage))
        try:
            if stage == MERGED:
                self._fill_merged(batch, bounds, gate)
            else:
                self._draw(batch, stage[0], bounds.room(stage[0]), bounds.body, gate)
            if batch.opens:
                self._draw_riders(batch, bounds, gate)
        except JoinError as error:  # a defect of ours may cost a record, not the run
            if self._at_hand is None:
                raise
            gate.fail(self._at_hand, error, self.serial)
        self._at_hand = None
        return batch

    def _fill_merged(self, batch: Batch, bounds: Bounds, gate: Gate) -> None:
        rooms = [bounds.room(kind) for kind in MERGED]
        queued = [self.left[kind] for kind in MERGED]
        repeats = _Repeats()
        try:
            for kind, count in zip(MERGED, must_take(queued, rooms, bounds.entities), strict=True):
                self._draw(batch, kind, count, bounds.body, gate, repeats)
            for kind, room in zip(MERGED, rooms, strict=True):
                taken = sum(part.count for part in batch.groups.get(kind, ()))
                count = min(room - taken, bounds.entities - batch.count)
                self._draw(batch, kind, count, bounds.body, gate, repeats)
        finally:
            for part in reversed(repeats.delayed):
                self.put_back(part)

    def _draw(
        self, batch: Batch, kind: int, count: int, body: int, gate: Gate, repeats: _Repeats | None = None
    ) -> None:
        """Move up to `count` entries of one kind into the batch, in order."""
        while count > 0 and (part := self._head(kind, body, gate)) is not None:
            if kind == PARAM and repeats is not None:
                taken, rest = self._draw_params(batch, part, count, body, gate, repeats)
            else:
                taken = part.fitting(count, body - batch.size)
                head, rest = (part, None) if taken == part.count else part.split(taken)
                if taken:
                    batch.add(head)
            count -= taken
            if rest is not None:
                self.put_back(rest)
                return

    def _draw_params(
        self, batch: Batch, part: Slice, count: int, body: int, gate: Gate, repeats: _Repeats
    ) -> tuple[int, Slice | None]:
        """The same for params: servers refuse a batch that holds a key twice, so the second waits for the next one."""
        taken = begun = at = 0
        room = body - batch.size
        rest: Slice | None = None
        for at, (key, piece) in enumerate(zip(part.keys(), part.pieces, strict=True)):
            fits = taken < count and len(piece) < room
            settled = gate.is_settled(key, part, at, self.serial)
            if not settled and key not in repeats.inside and fits:
                repeats.inside.add(key)
                taken += 1
                room -= len(piece) + 1
                continue
            if at > begun:
                batch.add(part.stretch(begun, at))
            begun = at + 1
            if not settled and key in repeats.inside:
                repeats.delayed.append(part.stretch(at, at + 1))
            elif not settled:
                rest = part.stretch(at, part.count)
                break
        if rest is None and part.count > begun:
            batch.add(part.stretch(begun, part.count))
        return taken, rest

    def _draw_riders(self, batch: Batch, bounds: Bounds, gate: Gate) -> None:
        """Let queued tags travel inside the request that creates the run, as far as its bounds allow."""
        room = bounds.rider_bytes - sum(map(_escaped, batch.pieces(RUN)))
        keys: set[Any] = set(next(batch.records(RUN))[CARRIED])  # a later value of the same key must not overtake
        count = len(keys)
        left_behind: list[Slice] = []
        while count < bounds.riders and (part := self._head(TAG, bounds.body, gate)) is not None:
            for key, one in part.keyed():
                size = _escaped(one.pieces[0])
                if part.record[RIDES] and key not in keys and size <= room and count < bounds.riders:
                    batch.add(one)
                    room -= size
                    count += 1
                else:
                    left_behind.append(one)
                keys.add(key)
        for part in reversed(left_behind):
            self.put_back(part)

    def _head(self, kind: int, body: int, gate: Gate) -> Slice | None:
        """Take the next slice off a queue: encoded, and without what cannot or need not be sent."""
        queue = self.queues[kind]
        self._at_hand = None
        while queue:
            item = queue.popleft()
            self.left[kind] -= item.count if isinstance(item, Slice) else weight(item)
            parts = gate.slices(item, body, self.serial)
            if parts:
                for part in reversed(parts[1:]):
                    self.put_back(part)
                self._at_hand = parts[0]
                return parts[0]
        return None


def _escaped(piece: bytes) -> int:
    """At most so many bytes has the fragment as ASCII-escaped JSON: of UTF-8, a byte becomes three at worst."""
    return len(piece) + 1 if piece.isascii() else 3 * len(piece) + 1
