"""
Empties one lane: takes a batch, delivers it, settles it, and takes the next; and that is the order of its run.

Whether to halve, to fail or to go on is decided by the lane, by the error, and by `_evidence`; a pump only waits.

A pump ends when its lane is empty, or *stuck*, for one of six reasons, each of which leaves what is queued in place
for a later flush:
  - the outage: retrying is over, or a probe has failed (see `_retry.Outage`)
  - the credentials were refused
  - its run, or its run's parent, could not be created
  - all that is left of it is in doubt (see `_evidence`)
  - all that is left of it is its final status, and its artifacts were not stored
  - nobody waits for it any longer: the flush timed out or was cancelled, or no request has ended for so long that it
    lost its patience. A request that is under way then is neither cancelled nor repeated; its pump settles it and ends.

Rules of this file: one pump a lane at a time; it never awaits while it holds a worker slot but for its request.
"""

from __future__ import annotations

from collections.abc import Callable

import anyio

from runqueue.queueing._errors import Scope, StoreError
from runqueue.queueing._report import Ledger
from runqueue.queueing.batches._batch import Batch
from runqueue.queueing.delivery._dispatch import Dispatch, StopError
from runqueue.queueing.delivery._flush import HaltedError
from runqueue.queueing.delivery._retry import SpentError
from runqueue.queueing.lanes._lane import Lane


class Pump:
    """
    Args:
        lane: To be emptied.
        dispatch: The way to the store.
        ledger: Where attempts are counted.
        moved: Told whenever something of the lane may have been settled.
        spend: Gives the store up until the next flush. Is told which flush was the last when the attempt began; where
            another one has begun since, that one has not had its try yet, and it returns False.
        hold: Whether the final status that comes next has to wait. Raises a StopError where it would wait in vain.
    """

    def __init__(
        self,
        lane: Lane,
        dispatch: Dispatch,
        ledger: Ledger,
        *,
        moved: Callable[[], None],
        spend: Callable[[StoreError, int], bool],
        hold: Callable[[Lane], bool],
    ) -> None:
        self.epoch = dispatch.outage.epoch
        self.halted = False
        self._lane = lane
        self._dispatch = dispatch
        self._ledger = ledger
        self._moved = moved
        self._spend = spend
        self._hold = hold
        self.holds = False
        """Whether it waits for side lanes."""
        self._nap: anyio.Event | None = None
        # Whether it begins with another go at an entry that was left in doubt, as the store may have recovered; and
        # whether that go is under way: if it fails, the rest of the lane has one too.
        self._tries_doubt = self._retries_doubt = False

    def __repr__(self) -> str:
        return f"<Pump {self._lane!r}>"

    async def empty(self) -> None:
        """
        Until nothing is left of what was dealt.

        Raises:
            StopError: The lane is stuck.
        """
        lane = self._lane
        self._tries_doubt = bool(lane.doubts)
        while not lane.idle:
            if lane.doubts:
                self._weigh_doubts()
            await self._wait_for_sides()
            await self._turn()

    async def sleep(self, seconds: float | None) -> None:
        """Sleep so long, or until woken."""
        self._nap = anyio.Event()
        with anyio.move_on_after(seconds):
            await self._nap.wait()
        self._nap = None

    def wake(self) -> None:
        if self._nap is not None:
            self._nap.set()

    def check(self) -> None:
        """
        Raises:
            StopError: It has to end.
        """
        if self.halted:
            raise StopError(HaltedError("nobody waits for it any longer"))
        if not self._dispatch.outage.admits(self.epoch):
            raise StopError(self._dispatch.outage.error or HaltedError("the store is out of reach"))

    async def _wait_for_sides(self) -> None:
        while self._lane.sides and self._hold(self._lane):
            self.holds = True
            await self.sleep(None)
            self.holds = False
            self.check()

    async def _turn(self) -> None:
        """Deliver one batch, or a part of one that was halved, with as many attempts as it takes."""

        lane, attempts, asked = self._lane, 0, 0

        async def attempt() -> None:
            nonlocal attempts, asked
            async with self._dispatch.admitted(self.check, self.sleep):
                self._dispatch.give_way()
                if lane.flying is None and lane.take(self._dispatch.bounds) is None:
                    return
                self._moved()
                asked = self._dispatch.outage.asked
                attempts += 1
                if attempts > 1:
                    self._ledger.retried += 1
                await self._dispatch.attempt(lane)
                self._moved()

        def rejected(error: StoreError) -> bool:
            batch = lane.flying
            return error.rejects_after is not None and batch is not None and batch.rejections >= error.rejects_after

        async def sleep(seconds: float) -> None:
            self.check()
            await self.sleep(seconds)
            self.check()

        try:
            await self._dispatch.retry(attempt, rejected=rejected, sleep=sleep)
        except StopError:
            if lane.flying is not None:
                lane.give_back()
            raise
        except SpentError as spent:
            # Of those that probe, one whose entry may be bad itself does not speak for the others.
            probes_doubt = self._dispatch.outage.spent and lane.flying is not None and lane.flying.doubted is not None
            lane.give_back()
            if self._goes_on():
                return
            if spent.error.scope is not Scope.LANE and not probes_doubt and not self._spend(spent.error, asked):
                return
            raise StopError(spent.error) from None
        except StoreError as error:
            batch = lane.flying
            if error.retriable and batch is not None and not self._stands(batch):
                self._suspect(batch, error)
                return
            if error.too_large and batch is not None and batch.count > 1:
                self._dispatch.bounds = self._dispatch.bounds.below(batch.size)
            goes_on = lane.reject(error)
            self._moved()
            if not goes_on:
                if error.scope is Scope.STORE and not self._spend(error, asked):
                    return
                raise StopError(error) from None

    def _stands(self, batch: Batch) -> bool:
        """Whether an answer that has come so often that it passes for a rejection was one."""
        # A run that is not created stays queued in any case.
        stands = batch.opens or self._dispatch.evidence.proves(batch)
        if stands:
            self._dispatch.outage.succeeded()
        return stands

    def _suspect(self, batch: Batch, error: StoreError) -> None:
        """The store can be read, and nothing shows yet that it takes data."""
        if error.scope is Scope.ENTRY and batch.count > 1:
            self._lane.reject(error)
        else:
            self._lane.doubt(error)
        self._moved()
        if not self._goes_on() and self._dispatch.outage.spent:  # this was a probe
            raise StopError(error) from None

    def _goes_on(self) -> bool:
        goes_on, self._retries_doubt = self._retries_doubt, False
        return goes_on and (self._lane.searching or self._lane.untouched)

    def _weigh_doubts(self) -> None:
        """Some of a lane's entries are in doubt: what is to be tried next? By the table of `_evidence`."""
        lane, doubts = self._lane, self._lane.doubts
        if any(map(self._dispatch.evidence.proves, doubts)):
            lane.retry_doubts()
        elif not lane.searching and self._dispatch.evidence.lets_pass(doubts):
            self._dispatch.outage.succeeded()
            lane.fail_doubts()
            self._moved()
        elif self._tries_doubt:
            self._tries_doubt, self._retries_doubt = False, True
            lane.retry_doubts(1)
        elif not lane.searching and not lane.untouched:
            raise StopError(doubts[0].doubted or HaltedError("in doubt"))
