"""
The way of one batch to the store: who may send, what is sent, and what the answer says of the store.

Rules of this file: it is shared by all pumps, and knows none of them. A worker slot is held by a request, never by a wait
for anything else. Errors that an outage, or a defect, gives rise to are told apart here; what becomes of the batch is
decided elsewhere.
"""

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
from runqueue.queueing.delivery._flush import HaltedError
from runqueue.queueing.delivery._retry import Outage, Retrying, RetryPolicy
from runqueue.queueing.delivery._task_pool import Crew
from runqueue.queueing.lanes._lane import Lane

Deliver: TypeAlias = Callable[[Lane, Batch], Awaitable[Sequence[Record]]]
"""
`await deliver(lane, batch)` stores the batch, or raises a StoreError. It returns records that a request which creates
a run could not carry after all; otherwise nothing.
"""

Check: TypeAlias = Callable[[Lane, Batch], Awaitable[None]]
"""
`await check(lane, batch)` reads something that the store keeps of the batch's run, and changes nothing; or raises a
StoreError.
"""

SLOW: Final = 0.005
"""Seconds to an answer from which it is worth while to encode the next batch meanwhile: a task costs a tenth of that."""
SOON: Final = 0.9
"""By when, of the time that the last answer took: what is encoded is in the processor's caches still when it is sent, and
no longer in memory than need be."""


class StopError(Exception):
    """Raised inside a pump that has to end, with the reason why its entries stay queued."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Dispatch:
    """
    Args:
        deliver: See [Deliver][].
        check: See [Check][]; asked before an answer that an outage gives too passes for a rejection. None: it does.
        bounds: Of a batch.
        max_workers: Requests under way at once.
        policy: When to try again.
        on_outage: Told once an outage, with what was answered last.
        give_way: Called between two pieces of work that keep other threads from theirs.
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
        """Requests, whatever came of them."""
        self.crew: Crew
        self.give_way = give_way
        self._deliver = deliver
        self._check = check
        self._answered = 0.0  # seconds that the last request took
        self._slots = anyio.Semaphore(max_workers, fast_acquire=True)
        self._probe = anyio.Lock()

    def __repr__(self) -> str:
        state = "spent" if self.outage.spent else "failing" if self.outage.since is not None else "healthy"
        return f"<Dispatch {state} ended={self.ended}>"

    @asynccontextmanager
    async def admitted(
        self, check: Callable[[], None], sleep: Callable[[float], Awaitable[None]]
    ) -> AsyncGenerator[None, None]:
        """
        Wait until a pump may send a request, and hold a worker slot for it.

        Args:
            check: Raises if the pump has to end.
            sleep: Waits, or is woken.

        Raises:
            StopError: The store has asked for more patience than there is.
        """
        probing = False
        try:
            while True:
                if self.outage.spent and not probing:
                    await self._probe.acquire()
                    probing = True
                if probing and not self.outage.spent:  # the one before us got through
                    self._probe.release()
                    probing = False
                await self._slots.acquire()
                # A probe does not wait for what the store has asked: that lay beyond our patience, and is asked again.
                asked = not probing and self.outage.not_before > -math.inf
                wait = self.outage.not_before - anyio.current_time() if asked else 0.0
                if wait <= 0 and probing == self.outage.spent:
                    break
                self._slots.release()
                check()
                if wait > self.outage.left(anyio.current_time()):
                    raise StopError(self.outage.error or HaltedError("the store asked to wait"))
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
        Deliver the batch that is out of this lane, once; it is settled only if it was stored.

        Raises:
            StoreError: It was not.
        """
        batch = lane.flying
        assert batch is not None
        self.give_way()
        try:
            leftovers = await self._delivered(lane, batch)
        except StoreError as error:
            found = error if error.rejects_after is None else await self._examined(lane, batch, error)
            if found.retriable and found.scope is not Scope.LANE:
                self.outage.failed(found, anyio.current_time())
            elif found.scope in (Scope.ENTRY, Scope.LANE):
                self.outage.succeeded()  # the store works: it judged what we sent
            if found is error:
                raise
            raise found from None
        except Exception as error:
            # A defect in a store. It must neither end the engine nor pass for delivered.
            raise StoreError(f"the store failed unexpectedly: {type(error).__name__}: {error}") from error
        self.give_way()
        self.outage.succeeded()
        self.evidence.stored()
        lane.store(leftovers)

    async def _delivered(self, lane: Lane, batch: Batch) -> Sequence[Record]:
        began = anyio.current_time()
        # Not where others wait for a slot: they fill the time, and each of them would keep a whole body in memory.
        if self._answered >= SLOW and not self._slots.statistics().tasks_waiting:
            self.crew.start(partial(self._prepare, lane))
        try:
            return await self._deliver(lane, batch)
        finally:
            self.ended += 1
            self._answered = anyio.current_time() - began

    async def _prepare(self, lane: Lane) -> None:
        """While the answer is on its way: what comes next is encoded by the time it is there."""
        await anyio.sleep(SOON * self._answered)
        if lane.flying is not None:
            lane.prepare(self.bounds)

    async def _examined(self, lane: Lane, batch: Batch, error: StoreError) -> StoreError:
        """The error of an answer that will pass for a rejection; that of the store if it is found not to work."""
        between = self.evidence.refused(batch)
        # A look before the last of them and one after it: a single one could come just when an outage ends.
        if between or self._check is None or batch.rejections < (error.rejects_after or 0) - 1:
            return error
        try:
            await self._check(lane, batch)
        except StoreError as fault:
            if fault.retriable or fault.scope is Scope.STORE:
                batch.rejections = 0  # they told of the store, not of the batch
                return fault
        except Exception:  # a defect in a store says nothing of its health
            return error
        finally:
            self.ended += 1
        return error
