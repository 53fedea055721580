"""
What one flush or tick found in an inbox, sorted into a queue a kind, and how batches are filled from it.

Rules of this file: no I/O. The stages of a window are emptied in the order of `STAGES`. `left` counts the entries of
each queue, so that the next batch knows what it must take (see `must_take`); it is kept by what enters and leaves.
Metrics lie flat, as in the inbox and for the same reason (see `_inbox`), until they come near the head of their queue.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from itertools import accumulate, chain, groupby, islice
from typing import Any, Final

from runqueue.queueing.batches._batch import (
    ARTIFACT,
    KINDS,
    MERGED,
    METRIC,
    PARAM,
    RUN,
    STAGES,
    STATUS,
    TAG,
    Batch,
    Bounds,
    must_take,
    weight,
    weights,
)
from runqueue.queueing.batches._part import WIDTH, JoinError, Pack, Record, Slice, upright
from runqueue.queueing.lanes._screening import Gate

CARRIED: Final = 2
"""Item of a RUN record: the keys of the tags it brings along."""
RIDES: Final = 2
"""Item of a TAG record: whether its tags may travel inside the request that creates the run."""
PACKED: Final = 1_000
"""Entries in one pack at most. More of them gain nothing, and what does not fit into a batch was encoded in vain."""


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

    __slots__ = ("_ahead", "_at_hand", "_mean", "_stock", "aside", "awaited", "left", "queues", "serial")

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.queues: list[deque[Record | Slice]] = [deque() for _ in range(KINDS)]
        self.left = [0] * KINDS
        self.aside: list[Record] = []
        """Records that were put here, and are to be taken to another lane."""
        self.awaited: list[tuple[Any, int]] = []
        """The final status comes after these: lanes, and a window of each."""
        self._stock: list[list[Any]] = []  # metrics behind those in their queue, flat; that is never empty before this
        self._at_hand: Slice | None = None  # off its queue, and not in the batch yet
        self._ahead: Pack | None = None  # of records that are on their queue still
        self._mean = 0.0  # bytes an entry in the last pack

    def __bool__(self) -> bool:
        return any(self.queues)

    @property
    def ends(self) -> bool:
        """Whether nothing is left of it but a final status."""
        return bool(self.queues[STATUS]) and not any(self.queues[:STATUS])

    def items(self, kind: int) -> Iterator[Record | Slice]:
        """What is queued of one kind, in order."""
        stock = self._stock if kind == METRIC else ()
        return chain(self.queues[kind], chain.from_iterable(map(upright, stock)))

    def put(self, flat: list[Any]) -> int:
        """
        Add records at the end; how many entries stay here, and are not set aside. Python's loop goes over changes of kind, C's
        over records.

        Args:
            flat: The records, item behind item. It is kept, and made upright in one go.
        """
        total = at = 0
        for kind, group in groupby(flat[::WIDTH]):
            begin, at = at, at + WIDTH * len([*group])
            if kind == ARTIFACT:
                self.aside += upright(flat[begin:at])
                continue
            if kind == STATUS:
                self.queues[kind].clear()  # a run has one final status: the last one asked for
                begin = at - WIDTH
            count = sum(map(len, flat[begin + 1 : at : WIDTH]))
            if kind == METRIC:
                self._stock.append(flat if at - begin == len(flat) else flat[begin:at])
                self._restock()
            else:
                self.queues[kind].extend(upright(flat[begin:at]))
            self.left[kind] += count
            total += count
        return total

    def _restock(self, most: int = 1) -> None:
        """Have so many records of metrics upright, if there are as many; as a head of their queue, one will do."""
        queue, stock = self.queues[METRIC], self._stock
        if stock and not queue:
            queue.extend(upright(stock[0][:WIDTH]))
            stock[0] = stock[0][WIDTH:]
        while stock and len(queue) < most:
            queue.extend(upright(stock.pop(0)))

    def put_slice(self, part: Slice) -> None:
        """Add a slice at the end."""
        self.queues[part.kind].append(part)
        self.left[part.kind] += part.count

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

    def prepare(self, bounds: Bounds, gate: Gate) -> None:
        """Encode the metrics that the next batch is likely to begin with. Nothing moves; `fill` may use it or not."""
        if self._ahead is None and gate.packs and self._lone_metrics:
            records = self._records(self._most(bounds.room(METRIC), bounds.body))
            if records:
                self._ahead = gate.pack(records, sum(weights(records)))

    def _fill_merged(self, batch: Batch, bounds: Bounds, gate: Gate) -> None:
        if self._lone_metrics:
            self._draw(batch, METRIC, bounds.room(METRIC), bounds.body, gate)
            return
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
        packs = kind == METRIC and gate.packs
        singly = 0
        while count > 0:
            if packs and singly <= 0:
                pack, singly = self._pack(count, body - batch.size, gate)
                if pack is not None:
                    batch.add(pack)
                    count -= pack.count
                    continue
            singly -= 1
            part = self._head(kind, body, gate)
            if part is None:
                return
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

    def _pack(self, count: int, room: int, gate: Gate) -> tuple[Pack | None, int]:
        """
        Take whole records of metrics off their queue in one go.

        Args:
            count: Entries that there is room for.
            room: Bytes that there is room for.

        Returns:
            The pack. If there is none, how many of the next records have to go one by one.
        """
        queue = self.queues[METRIC]
        most = self._most(count, room)
        while records := self._records(most):
            entries = sum(weights(records))
            ahead, self._ahead = self._ahead, None
            pack = ahead if ahead is not None and gate.holds(ahead, records) else gate.pack(records, entries)
            if pack is None:
                return None, len(records)
            self._mean = pack.size / entries
            if pack.size <= room:
                for _ in records:
                    queue.popleft()
                self._restock()
                self.left[METRIC] -= entries
                return pack, 0
            most = _fewer(room, self._mean)
        return None, 1

    @property
    def _lone_metrics(self) -> bool:
        return bool(self.queues[METRIC]) and not (self.queues[PARAM] or self.queues[TAG] or self.queues[RUN])

    def _most(self, count: int, room: int) -> int:
        """How many metrics to try for a pack."""
        most = min(count, PACKED)
        return _fewer(room, self._mean) if most * self._mean > room else most

    def _records(self, most: int) -> list[Record]:
        """The next records of metrics, as far as they are whole and have no more than so many entries together."""
        queue = self.queues[METRIC]
        self._restock(most)
        if not queue or isinstance(queue[0], Slice) or not 0 < (first := weight(queue[0])) <= most:
            return []
        records: list[Any] = list(islice(queue, most // first))
        try:
            totals = list(accumulate(weights(records)))
        except TypeError:  # a slice is among them: records were put back before it
            return []
        return records if totals[-1] <= most else records[: bisect_right(totals, most)]

    def _draw_params(
        self, batch: Batch, part: Slice, count: int, body: int, gate: Gate, repeats: _Repeats
    ) -> tuple[int, Slice | None]:
        """The same for params: servers refuse a batch that holds a key twice, so the second waits for the next one."""
        taken = begun = at = 0
        room = body - batch.size
        rest: Slice | None = None
        for at, (key, piece) in enumerate(part.items()):
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
            if kind == METRIC:
                self._restock()
            self.left[kind] -= item.count if isinstance(item, Slice) else weight(item)
            parts = gate.slices(item, body, self.serial)
            if parts:
                for part in reversed(parts[1:]):
                    self.put_back(part)
                self._at_hand = parts[0]
                return parts[0]
        return None


def _fewer(room: int, mean: float) -> int:
    """How many entries to try next: rather too few, as they can be followed by more, than too many once more."""
    return int(max(0, room) / mean * 0.95)


def _escaped(piece: bytes) -> int:
    """At most so many bytes has the fragment as ASCII-escaped JSON: of UTF-8, a byte becomes three at worst."""
    return len(piece) + 1 if piece.isascii() else 3 * len(piece) + 1
