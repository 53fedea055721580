"""
Everything queued for one run.

    any thread:       lane.append(record)
    engine's thread:  deal()  ->  take()  ->  settled: store() | give_back() | reject()

Rules of this file: it decides, and does no I/O: no clock, no socket, no await. `inbox` is the only thing another
thread may touch, by `append` and `push` alone, which are atomic; all else belongs to the engine's thread. One batch at a
time is out of a lane, and that is what keeps a run's requests in order. Nobody but `append` and `push` holds a way into
the inbox: by that an accumulator knows that a lane can be released.

`deal` closes a **window** over all that waits in the inbox. Windows are emptied one after the other, each in the order
"create, data, inputs, final status"; so that order holds in every flush, and no flush overtakes another. What came back
of a batch (`_bisection`) comes before the windows.

Artifacts take long, and must not keep the rest of a run waiting. What `deal` finds of them goes to **side lanes**, which
nobody but their owner and the sender knows: each of them a lane like any other, whose parent is the owner, and several, so
that the files of one run go side by side. One key is always in the same side lane, so that the last of it is stored last.
A final status waits for all that was dealt to them before it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Final

from runqueue.queueing._errors import Scope, StoreError
from runqueue.queueing._report import Failure, Ledger
from runqueue.queueing.batches._batch import KINDS, STATUS, TAG, Batch, Bounds, Record, weight
from runqueue.queueing.batches._bisection import Bisection
from runqueue.queueing.batches._part import JoinError, Slice
from runqueue.queueing.lanes._account import Account
from runqueue.queueing.lanes._inbox import Inbox
from runqueue.queueing.lanes._screening import Encode, Screening
from runqueue.queueing.lanes._window import Window

MAX_UPLOAD_LANES: Final = 4
"""Side lanes of one lane at most."""


class Lane:
    """
    The queue of one run.

    Args:
        run: What the caller calls the run. Opaque here, but for `repr`.
        encode: See [runqueue.queueing.Encode][].
        ledger: Where its entries are counted.
        opened: Whether the run exists already.
        parent: The lane whose run has to exist before this one's.
        owner: Of a side lane, the lane it belongs to.
    """

    def __init__(
        self,
        run: Hashable,
        encode: Encode,
        ledger: Ledger,
        *,
        run_exists: bool,
        parent: Lane | None = None,
        owner: Lane | None = None,
    ) -> None:
        self.run = run
        self.owner = owner
        self.upload_lanes: list[Lane] = []
        self.inbox: Inbox = Inbox()
        self.append: Callable[[Record], bool | None] = self.inbox.appender()
        """How a record gets into the inbox; where the client is bounded, it may wait, raise, or drop it: then True."""
        self.push: Callable[[Record], None] = self.inbox.appender()
        """The same for what belongs to a record that was let in: it is let in too."""
        self.ended = False  # whether a final status was asked for
        self.owned = False  # whether the client creates its run; a note of the log calls, like the next one
        self.block_raised = False  # whether the run's block has ended by an exception
        self.inbox_entries: int = 0  # entries in the inbox, where an intake counts them
        self.signalled = False  # whether the intake has told of this lane
        self.listed = False  # whether it stands among the lanes that are looked at, where an intake keeps them
        self.released = False  # whether it was forgotten: no name leads to it, and nobody can append any more
        self.name = run  # by which another lane of the run is to be opened
        self.names: list[Hashable] = [run]  # by which it is found
        self.run_exists: bool = run_exists
        self.parent = parent
        self.blocked_by: Exception | None = None  # why its pump ended with entries left
        self.in_flight: Batch | None = None
        self.last_emptied: int = 0  # serial of the last window that was emptied
        self.last_closed: int = 0  # serial of the last window that was closed
        self._encode = encode
        self._account = Account(run, ledger)
        self._screening = Screening(encode, self._account)
        self._windows: deque[Window] = deque()
        self._open = False  # whether the last window may still grow
        self._bisection = Bisection()

    @property
    def is_settled(self) -> bool:
        """Whether everything that was dealt is settled."""
        return not self._windows and not self._bisection and self.in_flight is None

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to send, and nothing to report."""
        return (
            not self.inbox
            and self.is_settled
            and self._account.is_clear
            and all(side.is_done for side in self.upload_lanes)
        )

    @property
    def is_releasable(self) -> bool:
        """Whether it can be released: its run has ended, or it never held a thing, and it knows nothing of use."""
        return (
            (self.ended or not self.last_closed) and self.run_exists and self.is_done and not self._screening.has_memory
        )

    @property
    def with_uploads(self) -> tuple[Lane, ...]:
        """The lane, and its side lanes."""
        return (self, *self.upload_lanes)

    @property
    def unfinished_uploads(self) -> list[Lane]:
        """If a final status comes next: the side lanes that are not through with what it has to come after."""
        window = None if self._bisection.has_next else next(filter(None, self._windows), None)
        if window is None or not window.only_status_left:
            return []
        return [side for side, serial in window.barrier if side.last_emptied < serial]

    @property
    def reportable(self) -> int:
        """Entries that a flush beginning now will report of: dealt and not settled, or failed and not named yet."""
        return self._account.pending + self._account.unreported

    def __repr__(self) -> str:
        # From any thread, so no queue is walked.
        in_flight = 0 if self.in_flight is None else self.in_flight.weight
        pending = self._account.pending - in_flight + sum(self.inbox.weights())
        pending += sum(side._account.pending for side in self.upload_lanes)
        return f"<Lane run={self.run} pending={pending} in_flight={in_flight} settled={self._account.settled}>"

    def close_window(self, most: int | None = None, *, extendable: bool = False) -> None:
        """
        Close a window over what waits in the inbox now; a busy producer does not keep it open.

        Args:
            most: Records.
            extendable: Leave the window open: what later ticks find joins it as long as it is not emptied, so that an outage
                leaves one long window behind and not many short ones. A flush closes it.
        """
        count = len(self.inbox) if most is None else min(most, len(self.inbox))
        if count:
            window, grows = self._window()
            ledger = self._account.ledger
            ledger.seqlock += 1  # so that whoever counts finds each record in one place
            try:
                entries = sum(map(window.put, self.inbox.draw(count)))
                self._account.add(entries)
                if window.uploads:
                    entries += self._queue_uploads(window)
            finally:
                ledger.seqlock += 1
            self.inbox_entries -= entries
            if window or grows:
                self._open = extendable
                self._set_barrier(window)
            else:  # all that was there has been set aside
                self._windows.pop()
                self.last_closed -= 1
        else:
            self._open = self._open and extendable  # what a flush has closed stays so
        if not extendable:
            self._account.close_report(self.last_closed)
        for side in self.upload_lanes:
            side.close_window(extendable=extendable)  # its inbox is empty: this closes what a flush has to close

    def _window(self) -> tuple[Window, bool]:
        """The window for what was found now, and whether it was there already."""
        grows = self._open and bool(self._windows)
        if not grows:
            self._windows.append(Window(self.last_closed + 1))
            self.last_closed += 1
        return self._windows[-1], grows

    def _queue_uploads(self, window: Window) -> int:
        """Take to the side lanes what this window has set aside; how many entries."""
        records, window.uploads = window.uploads, []
        entries = 0
        for record in records:
            for at, key in enumerate(record[1]):
                side = self._upload_lane(hash(key) % MAX_UPLOAD_LANES)
                side._window()[0].put_slice(Slice(record, at, [b""]))
                side._open = True
                side._account.add(1)
                entries += 1
        return entries

    def _set_barrier(self, window: Window) -> None:
        """If the final status is in this window, it comes after all that was dealt to the side lanes by now."""
        if self.upload_lanes and window.queues[STATUS]:
            window.barrier = [(side, side.last_closed) for side in self.upload_lanes]
            for side in self.upload_lanes:  # what comes later is not waited for
                side._open = False

    def _upload_lane(self, number: int) -> Lane:
        while len(self.upload_lanes) <= number:
            self.upload_lanes.append(
                Lane(self.run, self._encode, self._account.ledger, run_exists=self.run_exists, parent=self, owner=self)
            )
        return self.upload_lanes[number]

    def close_window_of_batches(self, size: int) -> None:
        """Deal, for a tick, no more than what fills batches of so many entries; the rest waits for company."""
        totals = list(accumulate(self.inbox.weights()))
        wanted = totals[-1] // size * size if totals else 0
        if wanted:
            self.close_window(max(1, bisect_right(totals, wanted)), extendable=True)

    def take(self, bounds: Bounds) -> Batch | None:
        """The next batch, as full as the bounds allow; None when nothing that was dealt is left."""
        assert self.in_flight is None, "one batch at a time"
        while (batch := self._next(bounds)) is not None:
            if batch.count:
                self.in_flight = batch
                self._account.mark_in_flight(batch.weight)
                return batch
            self._retire()
        return None

    def prepare(self, bounds: Bounds) -> None:
        """Encode ahead what comes after the batch that is out."""
        if self._windows and not self._bisection:
            self._windows[0].prepare(bounds, self._screening)

    def _next(self, bounds: Bounds) -> Batch | None:
        if self._bisection.has_next:
            return self._screening.screen(self._bisection.next())
        window = next(filter(None, self._windows), None)  # an emptied one stays as long as some of it is in doubt
        if window is None:
            return None
        self._bisection.passed_over()
        batch = window.fill(bounds, self._screening)
        if self._screening.creation_fault is not None:
            self._fail_rest(self._screening.creation_fault)
        return batch

    def _retire(self) -> None:
        """Drop the windows that are emptied; at once, as a flush waits for that."""
        while self._windows and not self._bisection and not self._windows[0]:
            self.last_emptied = self._windows.popleft().serial

    # -- settled -----------------------------------------------------------------------------------------------------

    def store(self, leftovers: Sequence[Record] = ()) -> None:
        """
        The batch that is out was stored.

        Args:
            leftovers: Records that the request which created the run could not carry after all; they go first.
        """
        batch = self._end_request()
        if batch.creates_run:
            self.run_exists = True
            self.parent = None  # else a chain of nested runs would keep each other
            for side in self.upload_lanes:
                side.run_exists = True
        self._bisection.stored(batch)
        self._screening.remember(batch)
        self._account.store(batch.weight)
        self._fail_doubts(self._bisection.overtaken(batch))
        for record in reversed(leftovers):
            self._account.add(weight(record))
            self._account.ledger.requeued += weight(record)
            self._windows[0].put_back(record)
        self._retire()

    def give_back(self) -> None:
        """The batch that is out was not delivered; it comes first again."""
        self._bisection.give_back(self._end_request())

    def reject(self, error: StoreError) -> bool:
        """
        The store refused the batch that is out, and to repeat it would change nothing.

        Returns:
            Whether the lane can go on. If not, all that is left stays queued.
        """
        batch = self._end_request()
        scope = error.scope
        if scope is Scope.STORE:
            self._bisection.give_back(batch)
            return False
        if batch.creates_run:
            return self._reject_creation(batch, error)
        if scope is Scope.ENTRY and batch.count > 1:
            try:
                self._bisection.halve(batch, bad=not error.too_large)
            except JoinError:  # a defect of ours: the whole batch fails, as nothing smaller can be sent
                scope = Scope.BATCH
            else:
                return True
        for part in batch.parts():
            self._account.fail(part, error, batch.serial)
            if scope is Scope.ENTRY and error.bars_key:
                self._screening.bar(part, error)
        if scope is Scope.ENTRY:
            self._bisection.isolated(batch)
        if scope is Scope.LANE:
            self._fail_rest(error)
        self._retire()
        return True

    # -- in doubt, see `_evidence` -----------------------------------------------------------------------------------

    def doubt(self, error: StoreError) -> None:
        """The store refused the batch that is out, as it might in an outage; nothing proves yet which of both it is."""
        batch = self._end_request()
        batch.doubted = error
        self._bisection.doubt(batch)

    @property
    def doubts(self) -> Sequence[Batch]:
        """What is in doubt."""
        return self._bisection.doubts

    @property
    def is_bisecting(self) -> bool:
        """Whether something that came with it is to be tried next."""
        return self._bisection.has_next

    @property
    def has_untried(self) -> bool:
        """Whether something was dealt that was not tried at all."""
        return any(self._windows)

    def retry_doubts(self, most: int | None = None) -> None:
        """Have another go at so many of what is in doubt; None: all."""
        self._bisection.retry(most)

    def fail_doubts(self) -> None:
        """What is in doubt has failed for good."""
        self._fail_doubts(self._bisection.doubts)
        self._bisection.doubts.clear()
        self._retire()

    def _fail_doubts(self, doubts: Sequence[Batch]) -> None:
        for batch in doubts:
            assert batch.doubted is not None
            for part in batch.parts():
                self._account.fail(part, batch.doubted, batch.serial)

    def _reject_creation(self, batch: Batch, error: StoreError) -> bool:
        if error.scope is not Scope.ENTRY or TAG not in batch.groups:
            batch.rejections = 0  # the next flush is a new chance, with all its retries
            self._bisection.give_back(batch)
            return False
        # One of the tags may be what was refused; as entries of a log batch they are isolated like any other.
        for rider in reversed(list(batch.slices_of(TAG))):
            self._windows[0].put_back(rider)
        self._bisection.give_back(batch.with_parts(part for part in batch.parts() if part.kind != TAG))
        return True

    def _fail_rest(self, error: Exception) -> None:
        for left in self.outstanding(self.last_closed, error):
            self._account.fail(Slice(left.record, left.start, [b""] * (left.stop - left.start)), error, left.serial)
        self._forget()

    def _forget(self) -> None:
        self._bisection.clear()
        self._windows.clear()
        self.last_emptied = self.last_closed

    def _end_request(self) -> Batch:
        batch, self.in_flight = self.in_flight, None
        assert batch is not None, "no batch is out"
        self._account.clear_in_flight(batch.weight)
        return batch

    # -- reports -----------------------------------------------------------------------------------------------------

    def take_unreported(self, serial: int) -> list[Failure]:
        """The failures of the windows up to `serial` that no report has named yet."""
        return self._account.take_unreported(serial)

    def outstanding(self, serial: int, error: Exception) -> Iterator[Failure]:
        """What of the windows up to `serial` is still queued, in flight included, in order."""
        for batch in [*([self.in_flight] if self.in_flight else []), *self._bisection]:
            if batch.serial <= serial:
                for part in batch.parts():
                    for record, start, stop in part.stretches():
                        yield self._pending(record, start, stop, error, batch.serial)
        for window in self._windows:
            if window.serial > serial:
                return
            for item in chain.from_iterable(map(window.items, range(KINDS))):
                if isinstance(item, Slice):
                    yield self._pending(item.record, item.start, item.stop, error, window.serial)
                else:
                    yield self._pending(item, 0, max(1, weight(item)), error, window.serial)

    def _pending(self, record: Record, start: int, stop: int, error: Exception, serial: int) -> Failure:
        return Failure(self.run, record, start, stop, error, final=False, serial=serial)

    @property
    def creation_refused(self) -> bool:
        """Whether the store has refused to create the run: only an explicit flush asks again."""
        blocked_by = self.blocked_by
        return (
            not self.run_exists
            and isinstance(blocked_by, StoreError)
            and not blocked_by.retriable
            and blocked_by.scope is not Scope.STORE
        )

    @property
    def awaits_flush(self) -> bool:
        """Whether nothing of this run can be sent unless somebody flushes: it, or a run above it, was refused."""
        return self.creation_refused or (not self.run_exists and self.parent is not None and self.parent.awaits_flush)

    def keep_only(self, *kinds: int) -> int:
        """Give up what is queued, in no request, and not of these kinds; the number of entries."""
        self.close_window(extendable=True)
        kept = [item for window in self._windows for kind in kinds for item in window.items(kind)]
        if not any(kind in batch.groups for batch in self._bisection for kind in kinds):
            self._bisection.clear()
        self._windows.clear()
        self._windows.append(Window(self.last_closed))
        left = sum(batch.weight for batch in self._bisection) + (self.in_flight.weight if self.in_flight else 0)
        records = [item.record if isinstance(item, Slice) else item for item in kept]
        left += self._windows[0].put([*chain.from_iterable(records)])
        count = self._account.pending - left
        self._account.drop(count)
        self._retire()
        return count + sum(side.keep_only() for side in self.upload_lanes)

    def abandon(self) -> int:
        """Forget all that is queued; the number of entries."""
        self.close_window()
        self._forget()
        return self._account.abandon() + sum(side.abandon() for side in self.upload_lanes)
