"""
A window: the records that a flush or tick has drawn from an inbox, in a queue a kind. Batches are filled from it.
"""

# Rules of this file: no I/O. The stages of a window are emptied in the order of `STAGES`. `counts` holds the entries of
# each queue, by which `must_take` decides what the next batch has to hold; whatever adds or removes entries updates it.
# Metrics lie flat, for the reason given in `_inbox`, until they come near the head of their queue.

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
"""Item of a RUN record: the keys of the tags that its fragment holds."""
IN_CREATION: Final = 2
"""Item of a TAG record: whether its tags may be sent in the request that creates the run."""
MAX_PACK: Final = 1_000
"""Entries in one pack, at most. Larger packs save nothing more, and a pack that does not fit was encoded in vain."""


class _Repeats:
    """The keys of the params in the batch that is being filled, and the entries that repeat one of them."""

    __slots__ = ("delayed", "inside")

    def __init__(self) -> None:
        self.inside: set[Any] = set()
        self.delayed: list[Slice] = []


class Window:
    """
    The records of one window, in a queue a kind.

    Args:
        serial: The window's number in its lane, from 1.
    """

    __slots__ = ("_current", "_flat", "_mean_bytes", "_prepared", "barrier", "counts", "queues", "serial", "uploads")

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.queues: list[deque[Record | Slice]] = [deque() for _ in range(KINDS)]
        self.counts = [0] * KINDS
        self.uploads: list[Record] = []
        """Records of artifacts, for the upload lanes."""
        self.barrier: list[tuple[Any, int]] = []
        """Upload lanes, each with the last window that has to be empty before the final status is sent."""
        self._flat: list[list[Any]] = []  # metrics that come after those in their queue; empty if the queue is
        self._current: Slice | None = None  # taken off its queue, and not in the batch yet
        self._prepared: Pack | None = None  # made ahead, of records that are still in their queue
        self._mean_bytes = 0.0  # of an entry in the last pack

    def __bool__(self) -> bool:
        return any(self.queues)

    @property
    def only_status_left(self) -> bool:
        """Whether a final status is all that is left."""
        return bool(self.queues[STATUS]) and not any(self.queues[:STATUS])

    def items(self, kind: int) -> Iterator[Record | Slice]:
        """The records and slices of one kind, in order."""
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
        Add records at the end.

        Args:
            flat: The records, item behind item. The list is kept.

        Returns:
            The number of entries, without those of artifacts, which go to `uploads`.
        """
        # The loop in Python is over changes of kind only; loops in C go over the records.
        total = at = 0
        for kind, group in groupby(flat[::WIDTH]):
            begin, at = at, at + WIDTH * len([*group])
            if kind == ARTIFACT:
                self.uploads += as_records(flat[begin:at])
                continue
            if kind == STATUS:
                self.queues[kind].clear()  # the last final status that was logged is the run's
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
        """Make tuples of flat metrics until their queue holds *most* records, if there are as many."""
        queue, stock = self.queues[METRIC], self._flat
        if stock and not queue:
            queue.extend(as_records(stock[0][:WIDTH]))
            stock[0] = stock[0][WIDTH:]
        while stock and len(queue) < most:
            queue.extend(as_records(stock.pop(0)))

    def put_slice(self, part: Slice) -> None:
        """Add a slice at the end of its queue."""
        self.queues[part.kind].append(part)
        self.counts[part.kind] += part.count

    def put_back(self, item: Record | Slice) -> None:
        """Put a record or slice at the head of its queue."""
        if isinstance(item, Slice):
            kind, count = item.kind, item.count
        else:
            kind, count = item[0], weight(item)
        self.queues[kind].appendleft(item)
        self.counts[kind] += count

    def fill(self, bounds: Bounds, screening: Screening) -> Batch:
        """The next batch, as full as the bounds allow; empty if the screening let nothing of it pass."""
        batch = Batch(self.serial)
        stage = next(stage for stage in STAGES if any(self.queues[kind] for kind in stage))
        try:
            if stage == MERGED:
                self._fill_merged(batch, bounds, screening)
            else:
                self._draw(batch, stage[0], bounds.room(stage[0]), bounds.body, screening)
            if batch.creates_run:
                self._draw_create_tags(batch, bounds, screening)
        except JoinError as error:  # a defect of ours costs this record, not the run
            if self._current is None:
                raise
            screening.fail(self._current, error, self.serial)
        self._current = None
        return batch

    def prepare(self, bounds: Bounds, screening: Screening) -> None:
        """Encode the metrics that the next batch is likely to begin with, for `fill` to use. They stay queued."""
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
        """Move up to *count* entries of one kind into the batch, in order."""
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
        Take whole records of metrics off their queue as one pack.

        Args:
            count: Entries that the batch has room for.
            room: Bytes that the batch has room for.

        Returns:
            The pack. None: no pack can be made; and how many of the next records to take one by one.
        """
        queue = self.queues[METRIC]
        most = self._pack_size(count, room)
        while records := self._whole_records(most):
            entries = sum(weights(records))
            ahead, self._prepared = self._prepared, None
            if ahead is not None and screening.is_current(ahead, records):
                pack: Pack | None = ahead
            else:
                pack = screening.pack(records, entries)
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
        """How many metrics to try to pack."""
        most = min(count, MAX_PACK)
        return _estimate(room, self._mean_bytes) if most * self._mean_bytes > room else most

    def _whole_records(self, most: int) -> list[Record]:
        """The next records of metrics, as long as they are whole and have no more than *most* entries together."""
        queue = self.queues[METRIC]
        self._unpack(most)
        if not queue or isinstance(queue[0], Slice) or not 0 < (first := weight(queue[0])) <= most:
            return []
        records: list[Any] = list(islice(queue, most // first))
        try:
            totals = list(accumulate(weights(records)))
        except TypeError:  # one of them is a slice, behind records that were put back
            return []
        return records if totals[-1] <= most else records[: bisect_right(totals, most)]

    def _draw_params(
        self, batch: Batch, part: Slice, count: int, body: int, screening: Screening, repeats: _Repeats
    ) -> tuple[int, Slice | None]:
        """Move params. Servers refuse a batch that holds a key twice, so a repeated key is left for the next batch."""
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
        """Move tags into the batch that creates the run, as far as the bounds of that request allow."""
        room = bounds.create_tag_bytes - sum(map(_escaped, batch.pieces(RUN)))
        keys: set[Any] = set(
            next(batch.records(RUN))[CREATED_KEYS]
        )  # a second value of a key is sent later, to stay the last
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
        """Take the next slice off a queue: encoded, and without entries that cannot or need not be sent."""
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
    """How many entries are likely to fit: rather too few, as another pack can follow, than too many again."""
    return int(max(0, room) / mean * 0.95)


def _escaped(piece: bytes) -> int:
    """The largest size of the fragment as ASCII-escaped JSON: a byte of UTF-8 becomes at most three bytes."""
    return len(piece) + 1 if piece.isascii() else 3 * len(piece) + 1
