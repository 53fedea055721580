"""
Everything queued for one run.

    any thread:       lane.inbox.append(record)
    engine's thread:  deal()  ->  take()  ->  settled: store() | give_back() | reject()

Rules of this file: it decides, and does no I/O: no clock, no socket, no await. `inbox` is the only thing another
thread may touch, by `append` alone, which is atomic; all else belongs to the engine's thread. One batch at a time is
out of a lane, and that is what keeps a run's requests in order.

`deal` closes a **window**: all that waits in the inbox, sorted into a queue a kind. Windows are emptied one after the
other, the stages of each in the order of `STAGES`; so the order "create, data, inputs, final status" holds in every
flush, and no flush overtakes another. `returned` comes before the windows: the parts of a halved batch, or a batch
that was not delivered, the next one last.

The search for bad entries halves depth first, with two savings. If one half was stored, the other has to hold the bad
entry, and is halved without being sent whole; that was wrong if in the end all of it is stored (a server with a limit
of its own, say), and is not done again then. When the first bad entry of a batch stands alone, the untried parts are
joined again, once: mostly it is the only one. One bad entry in a batch of 1,000 so costs about 12 requests, not 21.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeAlias

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
    Joined,
    Record,
    Slice,
    must_take,
    weight,
)
from runqueue.queueing._errors import RejectedError, Scope, StoreError
from runqueue.queueing._report import Failure, Ledger

Fragments: TypeAlias = "tuple[list[bytes] | Joined, dict[int, Exception] | None]"
Encode: TypeAlias = Callable[[Record, dict[Any, Any]], Fragments]
"""
`encode(record, memory) -> (pieces, faults)`: one piece an entry, in order, and by index what is wrong with the entries
that cannot be sent (their pieces are ignored). If nothing is wrong, the pieces may come joined. `memory` is a dict of the lane's own, for what has to be remembered of
a run from record to record. Pure but for that.
"""


class Window:
    """What one flush or tick found in an inbox."""

    __slots__ = ("left", "queues", "serial")

    def __init__(self, serial: int) -> None:
        self.serial = serial
        self.queues: list[deque[Record | Slice]] = [deque() for _ in range(KINDS)]
        self.left = [0] * KINDS  # entries by kind

    def put(self, record: Record) -> int:
        kind, count = record[0], weight(record)
        queue: deque[Record | Slice] = self.queues[kind]
        if kind == STATUS:
            queue.clear()  # a run has one final status: the last one asked for
        queue.append(record)
        self.left[kind] += count
        return count


class Lane:
    """
    The queue of one run.

    Args:
        run: What the caller calls the run. Opaque here, but for `repr`.
        encode: See [Encode][].
        ledger: Where its entries are counted.
        opened: Whether the run exists already.
        parent: The lane whose run has to exist before this one's.
    """

    def __init__(
        self, run: Hashable, encode: Encode, ledger: Ledger, *, opened: bool, parent: Lane | None = None
    ) -> None:
        self.run = run
        self.inbox: deque[Record] = deque()
        self.opened = opened
        self.parent = parent
        self.stuck: Exception | None = None  # why its pump ended with entries left
        self.flying: Batch | None = None
        self.done = 0  # serial of the last window that was emptied
        self.dealt = 0  # serial of the last window that was closed
        self._encode = encode
        self._ledger = ledger
        self._memory: dict[Any, Any] = {}
        self._windows: deque[Window] = deque()
        self._returned: list[Batch] = []
        self._once: dict[Any, bytes] = {}  # params that are stored
        self._barred: dict[tuple[int, Any], StoreError] = {}  # names the store refused
        self._failures: list[Failure] = []
        self._infer = True  # whether a half may be suspected because the other was stored
        self._never: Exception | None = None  # why this run can never be created
        self._at_hand: Slice | None = None  # what a batch is being filled with
        self._entries = 0
        self._settled = 0

    @property
    def idle(self) -> bool:
        """Whether everything that was dealt is settled."""
        return not self._windows and not self._returned and self.flying is None

    @property
    def owed(self) -> int:
        """Entries that a flush beginning now will report of: dealt and not settled, or failed and not named yet."""
        return self._entries - self._settled + sum(failure.weight for failure in self._failures)

    def __repr__(self) -> str:
        # From any thread, so no queue is walked; the inbox is copied, which is atomic.
        flying = 0 if self.flying is None else self.flying.weight
        pending = self._entries - self._settled - flying + sum(map(weight, self.inbox.copy()))
        return f"<Lane run={self.run} pending={pending} in_flight={flying} settled={self._settled}>"

    # -- in ----------------------------------------------------------------------------------------------------------

    def deal(self, most: int | None = None) -> None:
        """Close a window over what waits in the inbox now; a busy producer does not keep it open."""
        count = len(self.inbox) if most is None else min(most, len(self.inbox))
        if not count:
            return
        window = Window(self.dealt + 1)
        with self._ledger.lock:
            entries = 0
            for _ in range(count):
                entries += window.put(self.inbox.popleft())
            self._ledger.dealt += entries
        self._entries += entries
        self._windows.append(window)
        self.dealt = window.serial

    # -- out ---------------------------------------------------------------------------------------------------------

    def take(self, bounds: Bounds) -> Batch | None:
        """The next batch, as full as the bounds allow; None when nothing that was dealt is left."""
        assert self.flying is None, "one batch at a time"
        while (batch := self._next(bounds)) is not None:
            if batch.count:
                self.flying = batch
                self._ledger.in_flight += batch.weight
                return batch
        return None

    def _next(self, bounds: Bounds) -> Batch | None:
        if self._returned:
            batch = self._returned.pop()
            if batch.suspect and batch.count > 1:
                first, second = batch.halves()
                self._returned += (second, first)
                return Batch(batch.serial)
            return self._screened_batch(batch) if self._barred else batch
        if self._never is not None:
            self._fail_rest(self._never)
        self._retire()
        if not self._windows:
            return None
        window = self._windows[0]
        stage = next(stage for stage in STAGES if any(window.queues[kind] for kind in stage))
        return self._fill(window, stage, bounds)

    def _retire(self) -> None:
        """Drop the windows that are emptied; at once, as a flush waits for that."""
        while self._windows and not self._returned and not any(self._windows[0].queues):
            self.done = self._windows.popleft().serial

    def _fill(self, window: Window, stage: tuple[int, ...], bounds: Bounds) -> Batch:
        batch = Batch(window.serial)
        self._at_hand = None
        try:
            if stage == MERGED:
                self._fill_merged(batch, window, bounds)
                return batch
            (kind,) = stage
            self._draw(batch, window, kind, bounds.room(kind), bounds.body)
            if kind == RUN and batch.count:
                self._draw_riders(batch, window, bounds)
        except Exception as error:  # fragments that do not come apart: a defect of ours may cost a record, not the run
            part = self._at_hand
            if part is None:
                raise
            window.left[part.kind] -= part.count
            self._fail(part, error, window.serial)
        return batch

    def _fill_merged(self, batch: Batch, window: Window, bounds: Bounds) -> None:
        rooms = [bounds.room(kind) for kind in MERGED]
        queued = [window.left[kind] for kind in MERGED]
        delayed: list[Slice] = []
        for kind, count in zip(MERGED, must_take(queued, rooms, bounds.entities), strict=True):
            self._draw(batch, window, kind, count, bounds.body, delayed)
        for kind, room in zip(MERGED, rooms, strict=True):
            taken = sum(part.count for part in batch.groups.get(kind, ()))
            count = min(room - taken, bounds.entities - batch.count)
            self._draw(batch, window, kind, count, bounds.body, delayed)
        window.queues[PARAM].extendleft(reversed(delayed))

    def _draw(
        self, batch: Batch, window: Window, kind: int, count: int, body: int, delayed: list[Slice] | None = None
    ) -> None:
        """Move up to `count` entries of one kind from the window into the batch, in order."""
        while count > 0 and (part := self._head(window, kind, body)) is not None:
            if kind == PARAM and delayed is not None:
                taken, rest = self._draw_params(batch, window, part, count, body, delayed)
            else:
                taken = part.fitting(count, body - batch.size)
                head, rest = (part, None) if taken == part.count else part.split(taken)
                if taken:
                    batch.add(head)
            window.left[kind] -= taken
            count -= taken
            if rest is not None:
                window.queues[kind].appendleft(rest)
                return

    def _draw_params(
        self, batch: Batch, window: Window, part: Slice, count: int, body: int, delayed: list[Slice]
    ) -> tuple[int, Slice | None]:
        """
        The same for params, which are write-once: a key goes into a batch once (servers refuse the batch otherwise),
        a stored one needs no second request, and another value for it is refused here, as the server would.
        """
        taken = 0
        inside = {key for held in batch.groups.get(PARAM, ()) for key, _ in held.keyed()}
        for at, (key, one) in enumerate(part.keyed()):
            stored = self._once.get(key)
            if stored is not None:
                window.left[PARAM] -= 1
                if stored == one.pieces[0]:
                    self._settle_stored(one.weight)
                else:
                    error = RejectedError(f"{key!r} is stored with another value already, and cannot be changed")
                    self._fail(one, error, window.serial)
            elif key in inside:
                delayed.append(one)
            elif taken < count and one.size <= body - batch.size:
                batch.add(one)
                inside.add(key)
                taken += 1
            else:
                return taken, part.split(at)[1]
        return taken, None

    def _draw_riders(self, batch: Batch, window: Window, bounds: Bounds) -> None:
        """Let queued tags travel inside the request that creates the run, as far as its bounds allow."""
        room = bounds.rider_bytes - sum(map(_escaped, batch.pieces(RUN)))
        left_behind: deque[Record | Slice] = deque()
        keys: set[Any] = set()  # a later value of the same key must not overtake
        count: int = next(batch.records(RUN))[2]
        while count < bounds.riders and (part := self._head(window, TAG, bounds.body)) is not None:
            for key, one in part.keyed():
                size = _escaped(one.pieces[0])
                if part.record[2] and key not in keys and size <= room and count < bounds.riders:
                    batch.add(one)
                    window.left[TAG] -= 1
                    room -= size
                    count += 1
                else:
                    left_behind.append(one)
                keys.add(key)
        window.queues[TAG].extendleft(reversed(left_behind))

    def _head(self, window: Window, kind: int, body: int) -> Slice | None:
        """Take the next slice off a queue: encoded, and without what cannot or need not be sent."""
        queue = window.queues[kind]
        while queue:
            head = queue.popleft()
            parts = [head] if isinstance(head, Slice) else self._encoded(head, window, body)
            if self._barred:
                before = sum(part.count for part in parts)
                parts = [kept for part in parts for kept in self._screened(part, window.serial)]
                window.left[kind] -= before - sum(part.count for part in parts)
            if parts:
                queue.extendleft(reversed(parts[1:]))
                self._at_hand = parts[0]
                return parts[0]
        return None

    def _encoded(self, record: Record, window: Window, body: int) -> list[Slice]:
        try:
            pieces, faults = self._encode(record, self._memory)
        except Exception as error:  # a defect of ours: it may cost this record, not the run
            count = max(1, weight(record))
            pieces, faults = [b""] * count, dict.fromkeys(range(count), error)
        whole = Slice(record, 0, pieces)
        if whole.size > body:
            faults = dict(faults or {})
            for at, piece in enumerate(whole.pieces):
                if len(piece) >= body:
                    faults.setdefault(at, RejectedError(f"{len(piece)} bytes are more than a request may have"))
        return [whole] if not faults else self._without(faults, whole, window)

    def _without(self, faults: dict[int, Exception], whole: Slice, window: Window) -> list[Slice]:
        """What is left of a record whose faulty entries have failed."""
        record, pieces = whole.record, whole.pieces
        parts: list[Slice] = []
        start = 0
        for at in [*sorted(faults), len(pieces)]:
            if at > start:
                parts.append(Slice(record, start, pieces[start:at]))
            start = at + 1
        for at, fault in sorted(faults.items()):
            self._fail(Slice(record, at, [b""]), fault, window.serial)
            if record[0] == RUN:
                self._never = fault
        window.left[record[0]] -= len(faults) if weight(record) else 0
        return parts

    def _screened_batch(self, batch: Batch) -> Batch:
        screened = Batch.of(
            batch.serial, (kept for part in batch.slices() for kept in self._screened(part, batch.serial))
        )
        screened.rejections = batch.rejections
        screened.sibling = batch.sibling
        screened.regroup = batch.regroup
        return screened

    def _screened(self, part: Slice, serial: int) -> list[Slice]:
        """The entries whose name the store has not refused yet; the others fail without a request."""
        kind = part.kind
        if kind not in MERGED or not any((kind, key) in self._barred for key in part.record[1]):
            return [part]
        kept: list[Slice] = []
        for key, one in part.keyed():
            error = self._barred.get((kind, key))
            if error is None:
                kept.append(one)
            else:
                self._fail(one, error, serial)
        return kept

    # -- settled -----------------------------------------------------------------------------------------------------

    def store(self, leftovers: Sequence[Record] = ()) -> None:
        """
        The batch that is out was stored.

        Args:
            leftovers: Records that the request which created the run could not carry after all; they go first.
        """
        batch = self._land()
        if batch.opens:
            self.opened = True
        if batch.suspect:
            self._infer = False
        if batch.sibling is not None:
            batch.sibling.suspect = self._infer
        for part in batch.slices():
            if part.kind == PARAM:
                self._once.update((key, one.pieces[0]) for key, one in part.keyed())
        self._settle_stored(batch.weight)
        if leftovers:
            self._add_leftovers(leftovers)
        self._retire()

    def give_back(self) -> None:
        """The batch that is out was not delivered; it comes first again."""
        self._returned.append(self._land())

    def reject(self, error: StoreError) -> bool:
        """
        The store refused the batch that is out, and to repeat it would change nothing.

        Returns:
            Whether the lane can go on. If not, all that is left stays queued.
        """
        batch = self._land()
        scope = error.scope
        if scope is Scope.STORE:
            self._returned.append(batch)
            return False
        if batch.opens:
            return self._reject_opening(batch, error)
        if scope is Scope.ENTRY and batch.count > 1:
            first, second = batch.halves()
            self._returned += (second, first)
            return True
        for part in batch.slices():
            self._fail(part, error, batch.serial)
        if scope is Scope.ENTRY:
            self._isolated(batch, error)
        if scope is Scope.LANE:
            self._fail_rest(error)
        self._retire()
        return True

    def _isolated(self, batch: Batch, error: StoreError) -> None:
        """A bad entry stands alone."""
        (part,) = batch.slices()
        if error.bars_key and part.kind in MERGED:
            ((key, _),) = part.keyed()
            self._barred[part.kind, key] = error
        if batch.regroup and len(self._returned) > 1:
            parts = [part for untried in reversed(self._returned) for part in untried.slices()]
            joined = Batch.of(batch.serial, parts)
            joined.regroup = False
            self._returned = [joined]

    def _reject_opening(self, batch: Batch, error: StoreError) -> bool:
        if error.scope is not Scope.ENTRY or TAG not in batch.groups:
            self._returned.append(batch)
            return False
        # One of the tags may be what was refused; as entries of a log batch they are isolated like any other.
        riders = batch.groups.pop(TAG)
        self._returned.append(Batch.of(batch.serial, batch.slices()))
        window = self._windows[0]
        window.queues[TAG].extendleft(reversed(riders))
        window.left[TAG] += sum(part.count for part in riders)
        return True

    def _fail_rest(self, error: Exception) -> None:
        for run_failure in self.outstanding(self.dealt, error):
            part = Slice(run_failure.record, run_failure.start, [b""] * (run_failure.stop - run_failure.start))
            self._fail(part, error, run_failure.serial)
        self._returned.clear()
        self._windows.clear()
        self.done = self.dealt

    def _add_leftovers(self, records: Sequence[Record]) -> None:
        window = self._windows[0]
        for record in reversed(records):
            count = weight(record)
            window.queues[record[0]].appendleft(record)
            window.left[record[0]] += count
            self._entries += count
            with self._ledger.lock:
                self._ledger.dealt += count

    def _land(self) -> Batch:
        batch, self.flying = self.flying, None
        assert batch is not None, "no batch is out"
        self._ledger.in_flight -= batch.weight
        return batch

    def _settle_stored(self, count: int) -> None:
        self._ledger.stored += count
        self._settled += count

    def _fail(self, part: Slice, error: Exception, serial: int) -> None:
        failure = Failure(self.run, part.record, part.start, part.stop, error, final=True, serial=serial)
        self._failures.append(failure)
        self._ledger.failed += part.weight
        self._ledger.log.add(failure)
        self._settled += part.weight

    # -- reports -----------------------------------------------------------------------------------------------------

    def claim(self, serial: int) -> list[Failure]:
        """The failures of the windows up to `serial` that no report has named yet."""
        mine = [failure for failure in self._failures if failure.serial <= serial]
        if mine:
            self._failures = [failure for failure in self._failures if failure.serial > serial]
        return mine

    def outstanding(self, serial: int, error: Exception) -> Iterator[Failure]:
        """What of the windows up to `serial` is still queued, in flight included, in order."""
        batches = [*([self.flying] if self.flying else []), *reversed(self._returned)]
        for batch in batches:
            if batch.serial <= serial:
                for part in batch.slices():
                    yield self._pending(part, error, batch.serial)
        for window in self._windows:
            if window.serial > serial:
                return
            for item in (item for queue in window.queues for item in queue):
                part = item if isinstance(item, Slice) else Slice(item, 0, [b""] * max(1, weight(item)))
                yield self._pending(part, error, window.serial)

    def _pending(self, part: Slice, error: Exception, serial: int) -> Failure:
        return Failure(self.run, part.record, part.start, part.stop, error, final=False, serial=serial)

    def abandon(self) -> int:
        """Forget all that is queued; the number of entries."""
        self.deal()
        pending = self._entries - self._settled
        self._settled = self._entries
        self._returned.clear()
        self._windows.clear()
        self.done = self.dealt
        return pending


def _escaped(piece: bytes) -> int:
    """At most so many bytes has the fragment as ASCII-escaped JSON: of UTF-8, a byte becomes three at worst."""
    return len(piece) + 1 if piece.isascii() else 3 * len(piece) + 1
