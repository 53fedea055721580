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
from runqueue.queueing.batches._part import WIDTH, JoinError, Pack, Record, Slice, Stretch, as_records
from runqueue.queueing.lanes._screening import Screening

CREATED_KEYS: Final = 2
"""Item of a RUN record: the keys of the tags it brings along."""
IN_CREATION: Final = 2
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

    __slots__ = ("_current", "_flat", "_mean_bytes", "_prepared", "barrier", "counts", "queues", "serial", "uploads")

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.queues: list[deque[Record | Slice]] = [deque() for _ in range(KINDS)]
        self.counts = [0] * KINDS
        self.uploads: list[Record] = []
        """Records that were put here, and are to be taken to another lane."""
        self.barrier: list[tuple[Any, int]] = []
        """The final status comes after these: lanes, and a window of each."""
        self._flat: list[list[Any]] = []  # metrics behind those in their queue, flat; that is never empty before this
        self._current: Slice | None = None  # off its queue, and not in the batch yet
        self._prepared: Pack | None = None  # of records that are on their queue still
        self._mean_bytes = 0.0  # bytes an entry in the last pack

    def __bool__(self) -> bool:
        return any(self.queues)

    @property
    def only_status_left(self) -> bool:
        """Whether nothing is left of it but a final status."""
        return bool(self.queues[STATUS]) and not any(self.queues[:STATUS])

    def items(self, kind: int) -> Iterator[Record | Slice]:
        """What is queued of one kind, in order."""
        stock = self._flat if kind == METRIC else ()
        return chain(self.queues[kind], chain.from_iterable(map(as_records, stock)))

    def stretches(self) -> Iterator[Stretch]:
        """Everything that is queued, in order; a final status, which has no entries, as a stretch of one."""
        for item in chain.from_iterable(map(self.items, range(KINDS))):
            if isinstance(item, Slice):
                yield item.record, item.start, item.stop
            else:
                yield item, 0, max(1, weight(item))

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
                self.uploads += as_records(flat[begin:at])
                continue
            if kind == STATUS:
                self.queues[kind].clear()  # a run has one final status: the last one asked for
                begin = at - WIDTH
            count = sum(map(len, flat[begin + 1 : at : WIDTH]))
            if kind == METRIC:
                self._flat.append(flat if at - begin == len(flat) else flat[begin:at])
                self._unpack()
            else:
                self.queues[kind].extend(as_records(flat[begin:at]))
            self.counts[kind] += count
            total += count
        return total

    def _unpack(self, most: int = 1) -> None:
        """Have so many records of metrics upright, if there are as many; as a head of their queue, one will do."""
        queue, stock = self.queues[METRIC], self._flat
        if stock and not queue:
            queue.extend(as_records(stock[0][:WIDTH]))
            stock[0] = stock[0][WIDTH:]
        while stock and len(queue) < most:
            queue.extend(as_records(stock.pop(0)))

    def put_slice(self, part: Slice) -> None:
        """Add a slice at the end."""
        self.queues[part.kind].append(part)
        self.counts[part.kind] += part.count

    def put_back(self, item: Record | Slice) -> None:
        """Put something at the head of its queue."""
        if isinstance(item, Slice):
            kind, count = item.kind, item.count
        else:
            kind, count = item[0], weight(item)
        self.queues[kind].appendleft(item)
        self.counts[kind] += count

    def fill(self, bounds: Bounds, screening: Screening) -> Batch:
        """The next batch, as full as the bounds allow; empty if nothing of what it looked at passed the gate."""
        batch = Batch(self.serial)
        stage = next(stage for stage in STAGES if any(self.queues[kind] for kind in stage))
        try:
            if stage == MERGED:
                self._fill_merged(batch, bounds, screening)
            else:
                self._draw(batch, stage[0], bounds.room(stage[0]), bounds.body, screening)
            if batch.creates_run:
                self._draw_create_tags(batch, bounds, screening)
        except JoinError as error:  # a defect of ours may cost a record, not the run
            if self._current is None:
                raise
            screening.fail(self._current, error, self.serial)
        self._current = None
        return batch

    def prepare(self, bounds: Bounds, screening: Screening) -> None:
        """Encode the metrics that the next batch is likely to begin with. Nothing moves; `fill` may use it or not."""
        if self._prepared is None and screening.can_pack and self._only_metrics:
            records = self._whole_records(self._pack_size(bounds.room(METRIC), bounds.body))
            if records:
                self._prepared = screening.pack(records, sum(weights(records)))

    def _fill_merged(self, batch: Batch, bounds: Bounds, screening: Screening) -> None:
        if self._only_metrics:
            self._draw(batch, METRIC, bounds.room(METRIC), bounds.body, screening)
            return
        rooms = [bounds.room(kind) for kind in MERGED]
        queued = [self.counts[kind] for kind in MERGED]
        repeats = _Repeats()
        try:
            for kind, count in zip(MERGED, must_take(queued, rooms, bounds.entities), strict=True):
                self._draw(batch, kind, count, bounds.body, screening, repeats)
            for kind, room in zip(MERGED, rooms, strict=True):
                taken = sum(part.count for part in batch.groups.get(kind, ()))
                count = min(room - taken, bounds.entities - batch.count)
                self._draw(batch, kind, count, bounds.body, screening, repeats)
        finally:
            for part in reversed(repeats.delayed):
                self.put_back(part)

    def _draw(
        self, batch: Batch, kind: int, count: int, body: int, screening: Screening, repeats: _Repeats | None = None
    ) -> None:
        """Move up to `count` entries of one kind into the batch, in order."""
        packs = kind == METRIC and screening.can_pack
        singly = 0
        while count > 0:
            if packs and singly <= 0:
                pack, singly = self._pack(count, body - batch.size, screening)
                if pack is not None:
                    batch.add(pack)
                    count -= pack.count
                    continue
            singly -= 1
            part = self._next_slice(kind, body, screening)
            if part is None:
                return
            if kind == PARAM and repeats is not None:
                taken, rest = self._draw_params(batch, part, count, body, screening, repeats)
            else:
                taken = part.fitting(count, body - batch.size)
                head, rest = (part, None) if taken == part.count else part.split(taken)
                if taken:
                    batch.add(head)
            count -= taken
            if rest is not None:
                self.put_back(rest)
                return

    def _pack(self, count: int, room: int, screening: Screening) -> tuple[Pack | None, int]:
        """
        Take whole records of metrics off their queue in one go.

        Args:
            count: Entries that there is room for.
            room: Bytes that there is room for.

        Returns:
            The pack. If there is none, how many of the next records have to go one by one.
        """
        queue = self.queues[METRIC]
        most = self._pack_size(count, room)
        while records := self._whole_records(most):
            entries = sum(weights(records))
            ahead, self._prepared = self._prepared, None
            pack = (
                ahead
                if ahead is not None and screening.is_current(ahead, records)
                else screening.pack(records, entries)
            )
            if pack is None:
                return None, len(records)
            self._mean_bytes = pack.size / entries
            if pack.size <= room:
                for _ in records:
                    queue.popleft()
                self._unpack()
                self.counts[METRIC] -= entries
                return pack, 0
            most = _estimate(room, self._mean_bytes)
        return None, 1

    @property
    def _only_metrics(self) -> bool:
        return bool(self.queues[METRIC]) and not (self.queues[PARAM] or self.queues[TAG] or self.queues[RUN])

    def _pack_size(self, count: int, room: int) -> int:
        """How many metrics to try for a pack."""
        most = min(count, PACKED)
        return _estimate(room, self._mean_bytes) if most * self._mean_bytes > room else most

    def _whole_records(self, most: int) -> list[Record]:
        """The next records of metrics, as far as they are whole and have no more than so many entries together."""
        queue = self.queues[METRIC]
        self._unpack(most)
        if not queue or isinstance(queue[0], Slice) or not 0 < (first := weight(queue[0])) <= most:
            return []
        records: list[Any] = list(islice(queue, most // first))
        try:
            totals = list(accumulate(weights(records)))
        except TypeError:  # a slice is among them: records were put back before it
            return []
        return records if totals[-1] <= most else records[: bisect_right(totals, most)]

    def _draw_params(
        self, batch: Batch, part: Slice, count: int, body: int, screening: Screening, repeats: _Repeats
    ) -> tuple[int, Slice | None]:
        """The same for params: servers refuse a batch that holds a key twice, so the second waits for the next one."""
        taken = begun = at = 0
        room = body - batch.size
        rest: Slice | None = None
        for at, (key, piece) in enumerate(part.items()):
            fits = taken < count and len(piece) < room
            settled = screening.settle_known(key, part, at, self.serial)
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

    def _draw_create_tags(self, batch: Batch, bounds: Bounds, screening: Screening) -> None:
        """Let queued tags travel inside the request that creates the run, as far as its bounds allow."""
        room = bounds.create_tag_bytes - sum(map(_escaped, batch.pieces(RUN)))
        keys: set[Any] = set(next(batch.records(RUN))[CREATED_KEYS])  # a later value of the same key must not overtake
        count = len(keys)
        left_behind: list[Slice] = []
        while count < bounds.create_tags and (part := self._next_slice(TAG, bounds.body, screening)) is not None:
            for key, one in part.keyed():
                size = _escaped(one.pieces[0])
                if part.record[IN_CREATION] and key not in keys and size <= room and count < bounds.create_tags:
                    batch.add(one)
                    room -= size
                    count += 1
                else:
                    left_behind.append(one)
                keys.add(key)
        for part in reversed(left_behind):
            self.put_back(part)

    def _next_slice(self, kind: int, body: int, screening: Screening) -> Slice | None:
        """Take the next slice off a queue: encoded, and without what cannot or need not be sent."""
        queue = self.queues[kind]
        self._current = None
        while queue:
            item = queue.popleft()
            if kind == METRIC:
                self._unpack()
            self.counts[kind] -= item.count if isinstance(item, Slice) else weight(item)
            parts = screening.slices(item, body, self.serial)
            if parts:
                for part in reversed(parts[1:]):
                    self.put_back(part)
                self._current = parts[0]
                return parts[0]
        return None


def _estimate(room: int, mean: float) -> int:
    """How many entries to try next: rather too few, as they can be followed by more, than too many once more."""
    return int(max(0, room) / mean * 0.95)


def _escaped(piece: bytes) -> int:
    """At most so many bytes has the fragment as ASCII-escaped JSON: of UTF-8, a byte becomes three at worst."""
    return len(piece) + 1 if piece.isascii() else 3 * len(piece) + 1
