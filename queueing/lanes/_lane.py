"""
A lane: everything that is queued for one run, from the log call to the stored entry.

    any thread:       append(record)
    engine's thread:  close_window()  ->  take()  ->  store() | give_back() | reject()

`close_window` draws records out of the inbox, `take` cuts the next batch, and one of the last three says how it ended.
"""

# Rules of this file:
# - It decides, and does no I/O: no clock, no socket, no await.
# - Other threads touch the inbox alone, and only by `append` and `push`, which are atomic. Nothing else may keep a
#   reference to the inbox's items: the accumulator counts the references to learn whether a lane can be released.
# - One batch of a lane is in flight at a time: that keeps a run's requests in order.
# - Windows are emptied one after the other, each in the order creation, data, datasets, final status. So this order
#   holds for every flush, and no flush overtakes another. What is left of a batch that was refused or given back
#   (`_bisection`) comes before the windows.

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import accumulate, chain

from runqueue.queueing._errors import Scope, StoreError
from runqueue.queueing._report import Failure
from runqueue.queueing.batches._batch import TAG, Batch, Bounds, Record, weight
from runqueue.queueing.batches._bisection import Bisection
from runqueue.queueing.batches._part import JoinError, Slice
from runqueue.queueing.lanes._account import Account, Ledger
from runqueue.queueing.lanes._inbox import Inbox
from runqueue.queueing.lanes._screening import Encode, Screening
from runqueue.queueing.lanes._uploads import UploadLanes
from runqueue.queueing.lanes._window import Window


class Lane:
    """
    The queue of one run.

    Args:
        run: The caller's name of the run; used in reports and in `repr` only.
        encode: See [runqueue.queueing.Encode][].
        ledger: Where the lane's entries are counted.
        run_exists: Whether the store has the run already.
        parent: The lane whose run has to exist before this one's.
        owner: Of an upload lane, the lane of the run.
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
        self.run_exists: bool = run_exists
        self.parent = parent
        self.owner = owner
        self.inbox: Inbox = Inbox()
        self.append: Callable[[Record], bool | None] = self.inbox.appender()
        """Queues a record. Behind an intake it may wait, raise, or drop the record; then it returns True."""
        self.push: Callable[[Record], None] = self.inbox.appender()
        """Queues a record that belongs to one that was accepted: it never waits, raises or drops."""
        # Set by log calls:
        self.ended = False  # a final status was logged
        self.owned = False  # this client has created the run, and ends it at SIGTERM
        self.block_raised = False  # the run's block has ended by an exception
        # Set by the intake, where there is one:
        self.inbox_entries: int = 0
        self.signalled = False  # the engine was woken because this lane holds a full batch
        self.listed = False  # it is among the lanes that the engine looks at
        # Set by the accumulator:
        self.name = run  # a log call that comes after the release opens the run's next lane by this name
        self.names: list[Hashable] = [run]
        self.released = False
        # Set in the engine's thread:
        self.blocked_by: Exception | None = None  # why the last pump ended before the lane was empty
        self.in_flight: Batch | None = None
        self.last_emptied: int = 0  # serial of the last window that was emptied
        self.last_closed: int = 0  # serial of the last window that was closed
        self._encode = encode
        self._account = Account(run, ledger)
        self._screening = Screening(encode, self._account)
        self._windows: deque[Window] = deque()
        self._extendable = False  # whether the last window may take more records
        self.bisection: Bisection = Bisection()
        """The parts of refused batches; they are sent before anything else of the lane."""
        self._uploads: UploadLanes[Lane] = UploadLanes()
        self.upload_lanes: list[Lane] = self._uploads.lanes

    @property
    def is_settled(self) -> bool:
        """Whether every entry of the closed windows is settled."""
        return not self._windows and not self.bisection and self.in_flight is None

    @property
    def is_done(self) -> bool:
        """Whether the lane has nothing to send and nothing to report."""
        done = not self.inbox and self.is_settled and self._account.is_clear
        return done and all(lane.is_done for lane in self.upload_lanes)

    @property
    def is_releasable(self) -> bool:
        """Whether the lane may go: its run has ended or nothing was ever logged, and the lane keeps no state of it."""
        over = self.ended or not self.last_closed
        return over and self.run_exists and self.is_done and not self._screening.has_memory

    @property
    def with_uploads(self) -> tuple[Lane, ...]:
        """This lane and its upload lanes."""
        return (self, *self.upload_lanes)

    @property
    def unfinished_uploads(self) -> list[Lane]:
        """The upload lanes that the final status has to wait for, if it comes next."""
        window = None if self.bisection.has_next else next(filter(None, self._windows), None)
        if window is None or not window.only_status_left:
            return []
        return [lane for lane, serial in window.barrier if lane.last_emptied < serial]

    @property
    def reportable(self) -> int:
        """Entries that a flush which begins now has to report on: pending, or failed and not reported yet."""
        return self._account.pending + self._account.unreported

    def __repr__(self) -> str:
        # Other threads may call this, so no queue is walked.
        in_flight = 0 if self.in_flight is None else self.in_flight.weight
        pending = self._account.pending - in_flight + sum(self.inbox.weights())
        pending += sum(lane._account.pending for lane in self.upload_lanes)
        return f"<Lane run={self.run} pending={pending} in_flight={in_flight} settled={self._account.settled}>"

    def close_window(self, most: int | None = None, *, extendable: bool = False) -> None:
        """
        Draw the records that are in the inbox now, and close a window over them.

        Args:
            most: Records to draw. None: all that are there now; what a busy producer adds meanwhile stays.
            extendable: For ticks: a later call may add records to this window while it is not empty, so that an outage
                leaves one long window and not many short ones. False, for flushes: the window is final.
        """
        count = len(self.inbox) if most is None else min(most, len(self.inbox))
        if count:
            window, is_new = self._current_window()
            ledger = self._account.ledger
            ledger.seqlock += 1  # odd: a reader in another thread counts again, and finds each record in one place
            try:
                entries = sum(map(window.put, self.inbox.draw(count)))
                self._account.add(entries)
                if window.uploads:
                    entries += self._uploads.queue_from(window, self._make_upload_lane)
            finally:
                ledger.seqlock += 1
            self.inbox_entries -= entries
            if window or not is_new:
                self._extendable = extendable
                self._uploads.set_barrier(window)
            else:  # nothing but artifacts
                self._windows.pop()
                self.last_closed -= 1
        else:
            self._extendable = self._extendable and extendable  # a window that a flush has closed stays final
        if not extendable:
            self._account.close_report(self.last_closed)
        for lane in self.upload_lanes:
            lane.close_window(extendable=extendable)  # draws nothing: for a flush it makes the last window final

    def close_window_of_batches(self, size: int) -> None:
        """For ticks: close a window over what fills batches of *size* entries; the rest stays in the inbox."""
        totals = list(accumulate(self.inbox.weights()))
        wanted = totals[-1] // size * size if totals else 0
        if wanted:
            self.close_window(max(1, bisect_right(totals, wanted)), extendable=True)

    def _current_window(self) -> tuple[Window, bool]:
        """The window that takes the records drawn now, and whether it was made for them."""
        is_new = not (self._extendable and self._windows)
        if is_new:
            self._windows.append(Window(self.last_closed + 1))
            self.last_closed += 1
        return self._windows[-1], is_new

    # -- upload lanes, see `_uploads` --------------------------------------------------------------------------------

    def _make_upload_lane(self) -> Lane:
        return Lane(self.run, self._encode, self._account.ledger, run_exists=self.run_exists, parent=self, owner=self)

    def queue_upload(self, artifact: Slice) -> None:
        """Queue one artifact; for upload lanes."""
        self._current_window()[0].put_slice(artifact)
        self._extendable = True
        self._account.add(1)

    def seal_window(self) -> None:
        """Let no more records into the last window."""
        self._extendable = False

    # -- batches -----------------------------------------------------------------------------------------------------

    def take(self, bounds: Bounds) -> Batch | None:
        """The next batch, as full as the bounds allow; it is in flight now. None: the closed windows are empty."""
        assert self.in_flight is None, "one batch at a time"
        while (batch := self._next(bounds)) is not None:
            if batch.count:
                self.in_flight = batch
                self._account.mark_in_flight(batch.weight)
                return batch
            self._retire()
        return None

    def prepare(self, bounds: Bounds) -> None:
        """Encode the metrics that are likely to come after the batch in flight."""
        if self._windows and not self.bisection:
            self._windows[0].prepare(bounds, self._screening)

    def _next(self, bounds: Bounds) -> Batch | None:
        if self.bisection.has_next:
            return self._screening.screen(self.bisection.next())
        window = next(filter(None, self._windows), None)  # an empty one stays while entries of it are in doubt
        if window is None:
            return None
        self.bisection.passed_over()
        batch = window.fill(bounds, self._screening)
        if self._screening.creation_fault is not None:
            self._fail_rest(self._screening.creation_fault)
        return batch

    def _retire(self) -> None:
        """Drop the windows that are empty, and note it at once: a flush may be waiting for that."""
        while self._windows and not self.bisection and not self._windows[0]:
            self.last_emptied = self._windows.popleft().serial

    # -- what became of the batch in flight --------------------------------------------------------------------------

    def store(self, leftovers: Sequence[Record] = ()) -> None:
        """
        The store has taken the batch in flight.

        Args:
            leftovers: Records that the request which created the run could not carry after all; they are sent next.
        """
        batch = self._end_request()
        if batch.creates_run:
            self.run_exists = True
            self.parent = None  # else each of many nested runs would keep its parents in memory
            for lane in self.upload_lanes:
                lane.run_exists = True
        self.bisection.stored(batch)
        self._screening.remember(batch)
        self._account.store(batch.weight)
        self._fail_doubts(self.bisection.overtaken(batch))
        for record in reversed(leftovers):
            self._account.add(weight(record))
            self._account.ledger.requeued += weight(record)
            self._windows[0].put_back(record)
        self._retire()

    def give_back(self) -> None:
        """The batch in flight was not delivered; it is sent next again."""
        self.bisection.give_back(self._end_request())

    def reject(self, error: StoreError) -> bool:
        """
        The store refused the batch in flight, and would refuse it again.

        Returns:
            Whether the lane can go on. If not, everything that is left stays queued.
        """
        batch = self._end_request()
        scope = error.scope
        if scope is Scope.STORE:
            self.bisection.give_back(batch)
            return False
        if batch.creates_run:
            return self._reject_creation(batch, error)
        if scope is Scope.ENTRY and batch.count > 1:
            try:
                self.bisection.halve(batch, bad=not error.too_large)
            except JoinError:  # a defect of ours: the whole batch fails, as no part of it can be sent alone
                scope = Scope.BATCH
            else:
                return True
        for part in batch.parts():
            self._account.fail(part, error, batch.serial)
            if scope is Scope.ENTRY and error.bars_key:
                self._screening.bar(part, error)
        if scope is Scope.ENTRY:
            self.bisection.isolated(batch)
        if scope is Scope.LANE:
            self._fail_rest(error)
        self._retire()
        return True

    # -- in doubt, see `_evidence` -----------------------------------------------------------------------------------

    def doubt(self, error: StoreError) -> None:
        """The store refused the batch in flight as it might in an outage: the entries of the batch are in doubt."""
        batch = self._end_request()
        batch.doubted = error
        self.bisection.doubt(batch)

    @property
    def has_untried(self) -> bool:
        """Whether a window holds entries that were never sent."""
        return any(self._windows)

    def fail_doubts(self) -> None:
        """Let the entries in doubt fail for good."""
        self._fail_doubts(self.bisection.doubts)
        self.bisection.doubts.clear()
        self._retire()

    def _fail_doubts(self, doubts: Sequence[Batch]) -> None:
        for batch in doubts:
            assert batch.doubted is not None
            for part in batch.parts():
                self._account.fail(part, batch.doubted, batch.serial)

    def _reject_creation(self, batch: Batch, error: StoreError) -> bool:
        if error.scope is not Scope.ENTRY or TAG not in batch.groups:
            batch.rejections = 0  # the next flush tries again, as often as the first
            self.bisection.give_back(batch)
            return False
        # One of the tags may be at fault. Sent by log-batch, after the creation, it is isolated like any other entry.
        for tags in reversed(list(batch.slices_of(TAG))):
            self._windows[0].put_back(tags)
        self.bisection.give_back(batch.with_parts(part for part in batch.parts() if part.kind != TAG))
        return True

    def _fail_rest(self, error: Exception) -> None:
        for left in self.outstanding(self.last_closed, error):
            self._account.fail(Slice(left.record, left.start, [b""] * (left.stop - left.start)), error, left.serial)
        self._forget()

    def _forget(self) -> None:
        self.bisection.clear()
        self._windows.clear()
        self.last_emptied = self.last_closed

    def _end_request(self) -> Batch:
        batch, self.in_flight = self.in_flight, None
        assert batch is not None, "no batch is in flight"
        self._account.clear_in_flight(batch.weight)
        return batch

    # -- reports -----------------------------------------------------------------------------------------------------

    def take_unreported(self, serial: int) -> list[Failure]:
        """The failures up to the window `serial` that no flush has reported yet; from now on they count as reported."""
        return self._account.take_unreported(serial)

    def outstanding(self, serial: int, error: Exception) -> Iterator[Failure]:
        """The entries up to the window `serial` that are not settled, in order, as failures that are not final."""
        in_flight = [self.in_flight] if self.in_flight else []
        holders: list[Batch | Window] = [*in_flight, *self.bisection, *self._windows]
        for holder in holders:
            if holder.serial <= serial:
                for record, start, stop in holder.stretches():
                    yield Failure(self.run, record, start, stop, error, final=False, serial=holder.serial)

    @property
    def creation_refused(self) -> bool:
        """Whether the store has refused to create the run; ticks do not try again, a flush does."""
        error = self.blocked_by
        if self.run_exists or not isinstance(error, StoreError):
            return False
        return not error.retriable and error.scope is not Scope.STORE

    @property
    def awaits_flush(self) -> bool:
        """Whether ticks send nothing of this run, because its creation or that of a parent was refused."""
        return self.creation_refused or (not self.run_exists and self.parent is not None and self.parent.awaits_flush)

    def keep_only(self, *kinds: int) -> int:
        """Drop what is queued, except for these kinds and the batch in flight; return the number of entries."""
        self.close_window(extendable=True)
        kept = [item for window in self._windows for kind in kinds for item in window.items(kind)]
        if not any(kind in batch.groups for batch in self.bisection for kind in kinds):
            self.bisection.clear()
        self._windows.clear()
        self._windows.append(Window(self.last_closed))
        left = sum(batch.weight for batch in self.bisection) + (self.in_flight.weight if self.in_flight else 0)
        records = [item.record if isinstance(item, Slice) else item for item in kept]
        left += self._windows[0].put([*chain.from_iterable(records)])
        count = self._account.pending - left
        self._account.drop(count)
        self._retire()
        return count + sum(lane.keep_only() for lane in self.upload_lanes)

    def abandon(self) -> int:
        """Forget everything that is queued; return the number of entries."""
        self.close_window()
        self._forget()
        return self._account.abandon() + sum(lane.abandon() for lane in self.upload_lanes)
