"""
The pump of a lane: it takes a batch, delivers it, settles it, takes the next: that is the order of a run's requests.
"""

# The lane and the error decide whether a batch is halved, fails, or is tried again, with the help of `_evidence`. The
# pump only waits.
#
# A pump ends when its lane is empty, or when the lane is *blocked* for one of these reasons. Each leaves the entries
# queued for a later flush:
#   - the outage: trying has ended, or a probe has failed (see `Outage` in `_retry`)
#   - the credentials were refused
#   - the run, or its parent, could not be created
#   - all remaining entries are in doubt (see `_evidence`)
#   - only the final status is left, and the run's artifacts were not stored
#   - no flush waits for the lane any longer: it timed out or was cancelled, or no request has ended for too long. A
#     request that is under way then is neither cancelled nor repeated: the pump settles it and ends
#
# Rules of this file: there is one pump a lane at a time. While it holds a worker slot, it waits for its request only.

from __future__ import annotations

from collections.abc import Callable

import anyio

from runqueue.queueing._errors import Scope, StoreError
from runqueue.queueing.batches._batch import Batch
from runqueue.queueing.delivery._dispatch import Dispatch, StopError
from runqueue.queueing.delivery._flush import NotWaitedForError
from runqueue.queueing.delivery._retry import RetriesEndedError
from runqueue.queueing.lanes._account import Ledger
from runqueue.queueing.lanes._lane import Lane


class Pump:
    """
    Empties one lane.

    Args:
        lane: The lane to empty.
        dispatch: The way to the store.
        ledger: Counts the repeated attempts.
        settled: Called whenever entries of the lane may have been settled.
        give_up: Gives the store up until the next flush. Its second argument is the number of flushes begun when the
            attempt started; it returns False if another flush has begun since, which has not had its own attempt yet.
        must_wait: Whether the final status that comes next has to wait. Raises a StopError if it would wait in vain.
    """

    def __init__(
        self,
        lane: Lane,
        dispatch: Dispatch,
        ledger: Ledger,
        *,
        settled: Callable[[], None],
        give_up: Callable[[StoreError, int], bool],
        must_wait: Callable[[Lane], bool],
    ) -> None:
        self.epoch = dispatch.outage.epoch
        self.halted = False
        self._lane = lane
        self._dispatch = dispatch
        self._ledger = ledger
        self._settled = settled
        self._give_up = give_up
        self._must_wait = must_wait
        self.waits_for_uploads = False
        """Whether the pump waits for artifacts before the final status."""
        self._wake_event: anyio.Event | None = None
        # Whether the pump begins by trying an entry that was left in doubt, as the store may have recovered; and
        # whether that try is under way. If it fails, the rest of the lane is tried as well.
        self._tries_doubted_entry = self._trying_doubted_entry = False

    def __repr__(self) -> str:
        return f"<Pump {self._lane!r}>"

    async def empty(self) -> None:
        """
        Deliver until every closed window of the lane is empty.

        Raises:
            StopError: The lane cannot go on.
        """
        lane = self._lane
        self._tries_doubted_entry = bool(lane.bisection.doubts)
        while not lane.is_settled:
            if lane.bisection.doubts:
                self._weigh_doubts()
            await self._wait_for_uploads()
            await self._deliver_one()

    async def sleep(self, seconds: float | None) -> None:
        """Sleep for so many seconds, or until `wake` is called. None: until then."""
        self._wake_event = anyio.Event()
        with anyio.move_on_after(seconds):
            await self._wake_event.wait()
        self._wake_event = None

    def wake(self) -> None:
        if self._wake_event is not None:
            self._wake_event.set()

    def check(self) -> None:
        """
        Raises:
            StopError: The pump has to end.
        """
        if self.halted:
            raise StopError(NotWaitedForError("no flush waits for it any longer"))
        if not self._dispatch.outage.admits(self.epoch):
            raise StopError(self._dispatch.outage.error or NotWaitedForError("the store is out of reach"))

    async def _wait_for_uploads(self) -> None:
        while self._lane.upload_lanes and self._must_wait(self._lane):
            self.waits_for_uploads = True
            await self.sleep(None)
            self.waits_for_uploads = False
            self.check()

    async def _deliver_one(self) -> None:
        """Deliver one batch, or a part of a halved one, with as many attempts as it takes."""

        lane, attempts, flushes = self._lane, 0, 0

        async def attempt() -> None:
            nonlocal attempts, flushes
            async with self._dispatch.worker_slot(self.check, self.sleep):
                self._dispatch.give_way()
                if lane.in_flight is None and lane.take(self._dispatch.bounds) is None:
                    return
                self._settled()
                flushes = self._dispatch.outage.flushes
                attempts += 1
                if attempts > 1:
                    self._ledger.retried += 1
                await self._dispatch.attempt(lane)
                self._settled()

        def rejected(error: StoreError) -> bool:
            batch = lane.in_flight
            return error.rejects_after is not None and batch is not None and batch.rejections >= error.rejects_after

        async def sleep(seconds: float) -> None:
            self.check()
            await self.sleep(seconds)
            self.check()

        try:
            await self._dispatch.retry(attempt, rejected=rejected, sleep=sleep)
        except StopError:
            if lane.in_flight is not None:
                lane.give_back()
            raise
        except RetriesEndedError as ended:
            # A probe with an entry that may be bad itself proves nothing for the other lanes.
            probes_doubt = (
                self._dispatch.outage.given_up and lane.in_flight is not None and lane.in_flight.doubted is not None
            )
            lane.give_back()
            if self._retries_other_entries():
                return
            if ended.error.scope is not Scope.LANE and not probes_doubt and not self._give_up(ended.error, flushes):
                return
            raise StopError(ended.error) from None
        except StoreError as error:
            batch = lane.in_flight
            if error.retriable and batch is not None and not self._is_rejection(batch):
                self._suspect(batch, error)
                return
            if error.too_large and batch is not None and batch.count > 1:
                self._dispatch.bounds = self._dispatch.bounds.below(batch.size)
            goes_on = lane.reject(error)
            self._settled()
            if not goes_on:
                if error.scope is Scope.STORE and not self._give_up(error, flushes):
                    return
                raise StopError(error) from None

    def _is_rejection(self, batch: Batch) -> bool:
        """Whether an answer that came often enough to count as a rejection was one."""
        # A refused create-run stays queued in any case.
        stands = batch.creates_run or self._dispatch.evidence.proves(batch)
        if stands:
            self._dispatch.outage.succeeded()
        return stands

    def _suspect(self, batch: Batch, error: StoreError) -> None:
        """The store can be read, but nothing shows yet that it takes data: bisect the batch, or put it in doubt."""
        if error.scope is Scope.ENTRY and batch.count > 1:
            self._lane.reject(error)
        else:
            self._lane.doubt(error)
        self._settled()
        if not self._retries_other_entries() and self._dispatch.outage.given_up:  # The request was a probe.
            raise StopError(error) from None

    def _retries_other_entries(self) -> bool:
        goes_on, self._trying_doubted_entry = self._trying_doubted_entry, False
        return goes_on and (self._lane.bisection.has_next or self._lane.has_untried)

    def _weigh_doubts(self) -> None:
        """Decide what to try next while entries of the lane are in doubt, by the table in `_evidence`."""
        lane, doubts = self._lane, self._lane.bisection.doubts
        if any(map(self._dispatch.evidence.proves, doubts)):
            lane.bisection.retry()
        elif not lane.bisection.has_next and self._dispatch.evidence.lets_pass(doubts):
            self._dispatch.outage.succeeded()
            lane.fail_doubts()
            self._settled()
        elif self._tries_doubted_entry:
            self._tries_doubted_entry, self._trying_doubted_entry = False, True
            lane.bisection.retry(1)
        elif not lane.bisection.has_next and not lane.has_untried:
            raise StopError(doubts[0].doubted or NotWaitedForError("in doubt"))
