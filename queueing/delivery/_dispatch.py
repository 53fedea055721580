"""
Dispatch: sends a batch to the store, within the bound on requests at once, and notes what the answer says of the store.
"""

# Rules of this file: one dispatch serves all pumps and knows none of them. A worker slot is held for a request, and for
# no other wait. What an error means for the store is decided here; what becomes of the batch is decided by its lane.

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeAlias

import anyio

from runqueue.queueing._errors import Scope, StoreError
from runqueue.queueing.batches._batch import Batch, Bounds, Record
from runqueue.queueing.batches._evidence import Evidence
from runqueue.queueing.delivery._flush import NotWaitedForError
from runqueue.queueing.delivery._retry import Outage, Retrying, RetryPolicy
from runqueue.queueing.delivery._task_pool import TaskPool
from runqueue.queueing.lanes._lane import Lane

Deliver: TypeAlias = Callable[[Lane, Batch], Awaitable[Sequence[Record]]]
"""
`await deliver(lane, batch)` stores the batch, or raises a StoreError. It returns the records that a request which
creates a run could not carry after all, and nothing for other requests.
"""

Check: TypeAlias = Callable[[Lane, Batch], Awaitable[None]]
"""
`await check(lane, batch)` reads from the store without changing anything, or raises a StoreError: it tests whether the
store works for the batch's run.
"""

ENCODE_AHEAD_FROM: Final = 0.005
"""Seconds to an answer from which on the next batch is encoded in the meantime. A task for it costs a tenth of that."""
ENCODE_AHEAD_AT: Final = 0.9
"""
The share of the last answer's time after which the next batch is encoded: late enough that the bytes are still in the
processor's caches when they are sent, and in memory no longer than necessary.
"""


class StopError(Exception):
    """Raised inside a pump that has to end. It holds the reason why the pump's entries stay queued."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Dispatch:
    """
    The way of all pumps to the store.

    Args:
        deliver: See `Deliver`.
        check: See `Check`. It is called before an answer that an outage could cause counts as a rejection. None: such
            an answer counts without a check.
        bounds: Bounds of a batch.
        max_workers: Requests under way at once.
        policy: When to try again.
        on_outage: Called once an outage, with the last error.
        give_way: Called between two pieces of work that keep the interpreter from other threads.
    """

    def __init__(
        self,
        deliver: Deliver,
        check: Check | None,
        *,
        bounds: Bounds,
        max_workers: int,
        policy: RetryPolicy,
        on_outage: Callable[[StoreError], None] | None,
        give_way: Callable[[], None],
    ) -> None:
        self.bounds = bounds
        self.outage = Outage(timeout=policy.timeout, on_outage=on_outage)
        self.evidence = Evidence()
        self.retry = Retrying(policy, self.outage)
        self.ended = 0
        """Requests that have ended, whatever their outcome."""
        self.task_pool: TaskPool
        self.give_way = give_way
        self._deliver = deliver
        self._check = check
        self._last_duration = 0.0  # seconds that the last request took
        self._slots = anyio.Semaphore(max_workers, fast_acquire=True)
        self._probe = anyio.Lock()

    def __repr__(self) -> str:
        state = "given up" if self.outage.given_up else "failing" if self.outage.since is not None else "healthy"
        return f"<Dispatch {state} ended={self.ended}>"

    @asynccontextmanager
    async def worker_slot(
        self, check: Callable[[], None], sleep: Callable[[float], Awaitable[None]]
    ) -> AsyncGenerator[None, None]:
        """
        Wait until a pump may send a request, and hold a worker slot for it.

        Args:
            check: Raises if the pump has to end.
            sleep: Waits for so many seconds, or until it is woken.

        Raises:
            StopError: The store asked for a longer wait than the policy allows.
        """
        probing = False
        try:
            while True:
                if self.outage.given_up and not probing:
                    await self._probe.acquire()
                    probing = True
                if probing and not self.outage.given_up:  # An earlier probe succeeded.
                    self._probe.release()
                    probing = False
                await self._slots.acquire()
                # A probe ignores an earlier Retry-After, which was longer than the policy allows; its answer may renew
                # it.
                bound_by_retry_after = not probing and self.outage.not_before > -math.inf
                wait = self.outage.not_before - anyio.current_time() if bound_by_retry_after else 0.0
                if wait <= 0 and probing == self.outage.given_up:
                    break
                self._slots.release()
                check()
                if wait > self.outage.left(anyio.current_time()):
                    raise StopError(self.outage.error or NotWaitedForError("the store asked to wait"))
                if wait > 0:
                    await sleep(wait)
            try:
                check()
                yield
            finally:
                self._slots.release()
        finally:
            if probing:
                self._probe.release()

    async def attempt(self, lane: Lane) -> None:
        """
        Send the batch that the lane has in flight, once. The batch is settled only if it was stored.

        Raises:
            StoreError: It was not stored.
        """
        batch = lane.in_flight
        assert batch is not None
        self.give_way()
        try:
            leftovers = await self._deliver_batch(lane, batch)
        except StoreError as error:
            found = error if error.rejects_after is None else await self._error_to_act_on(lane, batch, error)
            if found.retriable and found.scope is not Scope.LANE:
                self.outage.failed(found, anyio.current_time())
            elif found.scope in (Scope.ENTRY, Scope.LANE):
                self.outage.succeeded()  # The store works: it has judged the batch.
            if found is error:
                raise
            raise found from None
        except Exception as error:
            # A defect in a store must neither end the engine nor count as a delivery.
            raise StoreError(f"the store failed unexpectedly: {type(error).__name__}: {error}") from error
        self.give_way()
        self.outage.succeeded()
        self.evidence.stored()
        lane.store(leftovers)

    async def _deliver_batch(self, lane: Lane, batch: Batch) -> Sequence[Record]:
        began = anyio.current_time()
        # Not while other lanes wait for a slot: they fill the time, and each would keep a whole body in memory.
        if self._last_duration >= ENCODE_AHEAD_FROM and not self._slots.statistics().tasks_waiting:
            self.task_pool.start(partial(self._prepare, lane))
        try:
            return await self._deliver(lane, batch)
        finally:
            self.ended += 1
            self._last_duration = anyio.current_time() - began

    async def _prepare(self, lane: Lane) -> None:
        """Encode the next batch while the answer to this one is under way."""
        await anyio.sleep(ENCODE_AHEAD_AT * self._last_duration)
        if lane.in_flight is not None:
            lane.prepare(self.bounds)

    async def _error_to_act_on(self, lane: Lane, batch: Batch, error: StoreError) -> StoreError:
        """The error to act on: that of the store if a check finds the store out of order, else the given one."""
        between = self.evidence.refused(batch)
        # One check before the last refusal and one after it: a single check could fall into the end of an outage.
        if between or self._check is None or batch.rejections < (error.rejects_after or 0) - 1:
            return error
        try:
            await self._check(lane, batch)
        except StoreError as fault:
            if fault.retriable or fault.scope is Scope.STORE:
                batch.rejections = 0  # The refusals were about the store, not about the batch.
                return fault
        except Exception:  # A defect in the check says nothing about the store.
            return error
        finally:
            self.ended += 1
        return error
