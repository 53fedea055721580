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
from runqueue.queueing.lanes._screening import Encode, Gate
from runqueue.queueing.lanes._window import Window

SIDES: Final = 4
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
        opened: bool,
        parent: Lane | None = None,
        owner: Lane | None = None,
    ) -> None:
        self.run = run
        self.owner = owner
        self.sides: list[Lane] = []
        self.inbox: Inbox = Inbox()
        self.append: Callable[[Record], bool | None] = self.inbox.way_in()
        """How a record gets into the inbox; where the client is bounded, it may wait, raise, or drop it: then True."""
        self.push: Callable[[Record], None] = self.inbox.way_in()
        """The same for what belongs to a record that was let in: it is let in too."""
        self.ended = False  # whether a final status was asked for
        self.made = False  # whether the client creates its run; a note of the log calls, like the next one
        self.raised = False  # whether the run's block has ended by an exception
        self.fresh: int = 0  # entries in the inbox, where an intake counts them
        self.rung = False  # whether the intake has told of this lane
        self.listed = False  # whether it stands among the lanes that are looked at, where an intake keeps them
        self.released = False  # whether it was forgotten: no name leads to it, and nobody can append any more
        self.name = run  # by which another lane of the run is to be opened
        self.names: list[Hashable] = [run]  # by which it is found
        self.opened: bool = opened
        self.parent = parent
        self.stuck: Exception | None = None  # why its pump ended with entries left
        self.flying: Batch | None = None
        self.done: int = 0  # serial of the last window that was emptied
        self.dealt: int = 0  # serial of the last window that was closed
        self._encode = encode
        self._account = Account(run, ledger)
        self._gate = Gate(encode, self._account)
        self._windows: deque[Window] = deque()
        self._open = False  # whether the last window may still grow
        self._bisection = Bisection()

    @property
    def idle(self) -> bool:
        """Whether everything that was dealt is settled."""
        return not self._windows and not self._bisection and self.flying is None

    @property
    def quiet(self) -> bool:
        """Whether there is nothing to send, and nothing to report."""
        return not self.inbox and self.idle and self._account.clean and all(side.quiet for side in self.sides)

    @property
    def over(self) -> bool:
        """Whether it can be released: its run has ended, or it never held a thing, and it knows nothing of use."""
        return (self.ended or not self.dealt) and self.opened and self.quiet and not self._gate.remembers

    @property
    def family(self) -> tuple[Lane, ...]:
        """The lane, and its side lanes."""
        return (self, *self.sides)

    @property
    def awaited(self) -> list[Lane]:
        """If a final status comes next: the side lanes that are not through with what it has to come after."""
        window = None if self._bisection.untried else next(filter(None, self._windows), None)
        if window is None or not window.ends:
            return []
        return [side for side, serial in window.awaited if side.done < serial]

    @property
    def owed(self) -> int:
        """Entries that a flush beginning now will report of: dealt and not settled, or failed and not named yet."""
        return self._account.pending + self._account.unnamed

    def __repr__(self) -> str:
        # From any thread, so no queue is walked.
        flying = 0 if self.flying is None else self.flying.weight
        pending = self._account.pending - flying + sum(self.inbox.weights())
        pending += sum(side._account.pending for side in self.sides)
        return f"<Lane run={self.run} pending={pending} in_flight={flying} settled={self._account.settled}>"

    def deal(self, most: int | None = None, *, tick: bool = False) -> None:
        """
        Close a window over what waits in the inbox now; a busy producer does not keep it open.

        Args:
            most: Records.
            tick: Leave the window open: what later ticks find joins it as long as it is not emptied, so that an outage
                leaves one long window behind and not many short ones. A flush closes it.
        """
        count = len(self.inbox) if most is None else min(most, len(self.inbox))
        if count:
            window, grows = self._window()
            ledger = self._account.ledger
            ledger.turn += 1  # so that whoever counts finds each record in one place
            try:
                entries = sum(map(window.put, self.inbox.draw(count)))
                self._account.deal(entries)
                if window.aside:
                    entries += self._deal_aside(window)
            finally:
                ledger.turn += 1
            self.fresh -= entries
            if window or grows:
                self._open = tick
                self._await_sides(window)
            else:  # all that was there has been set aside
                self._windows.pop()
                self.dealt -= 1
        else:
            self._open = self._open and tick  # what a flush has closed stays so
        if not tick:
            self._account.close(self.dealt)
        for side in self.sides:
            side.deal(tick=tick)  # its inbox is empty: this closes what a flush has to close

    def _window(self) -> tuple[Window, bool]:
        """The window for what was found now, and whether it was there already."""
        grows = self._open and bool(self._windows)
        if not grows:
            self._windows.append(Window(self.dealt + 1))
            self.dealt += 1
        return self._windows[-1], grows

    def _deal_aside(self, window: Window) -> int:
        """Take to the side lanes what this window has set aside; how many entries."""
        records, window.aside = window.aside, []
        entries = 0
        for record in records:
            for at, key in enumerate(record[1]):
                side = self._side(hash(key) % SIDES)
                side._window()[0].put_slice(Slice(record, at, [b""]))
                side._open = True
                side._account.deal(1)
                entries += 1
        return entries

    def _await_sides(self, window: Window) -> None:
        """If the final status is in this window, it comes after all that was dealt to the side lanes by now."""
        if self.sides and window.queues[STATUS]:
            window.awaited = [(side, side.dealt) for side in self.sides]
            for side in self.sides:  # what comes later is not waited for
                side._open = False

    def _side(self, number: int) -> Lane:
        while len(self.sides) <= number:
            self.sides.append(
                Lane(self.run, self._encode, self._account.ledger, opened=self.opened, parent=self, owner=self)
            )
        return self.sides[number]

    def deal_batches(self, size: int) -> None:
        """Deal, for a tick, no more than what fills batches of so many entries; the rest waits for company."""
        totals = list(accumulate(self.inbox.weights()))
        wanted = totals[-1] // size * size if totals else 0
        if wanted:
            self.deal(max(1, bisect_right(totals, wanted)), tick=True)

    def take(self, bounds: Bounds) -> Batch | None:
        """The next batch, as full as the bounds allow; None when nothing that was dealt is left."""
        assert self.flying is None, "one batch at a time"
        while (batch := self._next(bounds)) is not None:
            if batch.count:
                self.flying = batch
                self._account.fly(batch.weight)
                return batch
            self._retire()
        return None

    def prepare(self, bounds: Bounds) -> None:
        """Encode ahead what comes after the batch that is out."""
        if self._windows and not self._bisection:
            self._windows[0].prepare(bounds, self._gate)

    def _next(self, bounds: Bounds) -> Batch | None:
        if self._bisection.untried:
            return self._gate.screen(self._bisection.next())
        window = next(filter(None, self._windows), None)  # an emptied one stays as long as some of it is in doubt
        if window is None:
            return None
        self._bisection.passed_over()
        batch = window.fill(bounds, self._gate)
        if self._gate.never is not None:
            self._fail_rest(self._gate.never)
        return batch

    def _retire(self) -> None:
        """Drop the windows that are emptied; at once, as a flush waits for that."""
        while self._windows and not self._bisection and not self._windows[0]:
            self.done = self._windows.popleft().serial

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
            self.parent = None  # else a chain of nested runs would keep each other
            for side in self.sides:
                side.opened = True
        self._bisection.stored(batch)
        self._gate.remember(batch)
        self._account.store(batch.weight)
        self._fail_doubts(self._bisection.overtaken(batch))
        for record in reversed(leftovers):
            self._account.deal(weight(record))
            self._account.ledger.redealt += weight(record)
            self._windows[0].put_back(record)
        self._retire()

    def give_back(self) -> None:
        """The batch that is out was not delivered; it comes first again."""
        self._bisection.give_back(self._land())

    def reject(self, error: StoreError) -> bool:
        """
        The store refused the batch that is out, and to repeat it would change nothing.

        Returns:
            Whether the lane can go on. If not, all that is left stays queued.
        """
        batch = self._land()
        scope = error.scope
        if scope is Scope.STORE:
            self._bisection.give_back(batch)
            return False
        if batch.opens:
            return self._reject_opening(batch, error)
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
                self._gate.bar(part, error)
        if scope is Scope.ENTRY:
            self._bisection.isolated(batch)
        if scope is Scope.LANE:
            self._fail_rest(error)
        self._retire()
        return True

    # -- in doubt, see `_evidence` -----------------------------------------------------------------------------------

    def doubt(self, error: StoreError) -> None:
        """The store refused the batch that is out, as it might in an outage; nothing proves yet which of both it is."""
        batch = self._land()
        batch.doubted = error
        self._bisection.doubt(batch)

    @property
    def doubts(self) -> Sequence[Batch]:
        """What is in doubt."""
        return self._bisection.doubts

    @property
    def searching(self) -> bool:
        """Whether something that came with it is to be tried next."""
        return self._bisection.untried

    @property
    def untouched(self) -> bool:
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

    def _reject_opening(self, batch: Batch, error: StoreError) -> bool:
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
        for left in self.outstanding(self.dealt, error):
            self._account.fail(Slice(left.record, left.start, [b""] * (left.stop - left.start)), error, left.serial)
        self._forget()

    def _forget(self) -> None:
        self._bisection.clear()
        self._windows.clear()
        self.done = self.dealt

    def _land(self) -> Batch:
        batch, self.flying = self.flying, None
        assert batch is not None, "no batch is out"
        self._account.land(batch.weight)
        return batch

    # -- reports -----------------------------------------------------------------------------------------------------

    def claim(self, serial: int) -> list[Failure]:
        """The failures of the windows up to `serial` that no report has named yet."""
        return self._account.claim(serial)

    def outstanding(self, serial: int, error: Exception) -> Iterator[Failure]:
        """What of the windows up to `serial` is still queued, in flight included, in order."""
        for batch in [*([self.flying] if self.flying else []), *self._bisection]:
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
    def refused(self) -> bool:
        """Whether the store has refused to create the run: only an explicit flush asks again."""
        stuck = self.stuck
        return (
            not self.opened and isinstance(stuck, StoreError) and not stuck.retriable and stuck.scope is not Scope.STORE
        )

    @property
    def doomed(self) -> bool:
        """Whether nothing of this run can be sent unless somebody flushes: it, or a run above it, was refused."""
        return self.refused or (not self.opened and self.parent is not None and self.parent.doomed)

    def keep_only(self, *kinds: int) -> int:
        """Give up what is queued, in no request, and not of these kinds; the number of entries."""
        self.deal(tick=True)
        kept = [item for window in self._windows for kind in kinds for item in window.items(kind)]
        if not any(kind in batch.groups for batch in self._bisection for kind in kinds):
            self._bisection.clear()
        self._windows.clear()
        self._windows.append(Window(self.dealt))
        left = sum(batch.weight for batch in self._bisection) + (self.flying.weight if self.flying else 0)
        records = [item.record if isinstance(item, Slice) else item for item in kept]
        left += self._windows[0].put([*chain.from_iterable(records)])
        count = self._account.pending - left
        self._account.drop(count)
        self._retire()
        return count + sum(side.keep_only() for side in self.sides)

    def abandon(self) -> int:
        """Forget all that is queued; the number of entries."""
        self.deal()
        self._forget()
        return self._account.abandon() + sum(side.abandon() for side in self.sides)
