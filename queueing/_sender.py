"""
Empties the lanes: one pump a busy lane, at most `max_workers` requests at once.

Theory of operation. A flush deals every inbox into a window (`Lane.deal`), starts a pump where none runs, and waits
until each of its lanes has emptied that window or is stuck. A pump is the order of its run: it takes a batch, delivers
it, settles it, and takes the next. Whether to halve, to fail or to go on is decided by the lane and by the error; the
sender only waits, and counts who waits.

A pump ends when its lane is empty, or *stuck*, for one of five reasons, each of which leaves what is queued in place
for a later flush:
  - the outage: retrying is over, or a probe has failed (see `_retry.Outage`)
  - the credentials were refused
  - its run, or its run's parent, could not be created
  - all that is left of it is in doubt (see `_evidence`)
  - nobody waits for it any longer: the flush timed out or was cancelled, or no request has ended for so long that it
    lost its patience. A request that is under way then is neither cancelled nor repeated; its pump settles it and ends.

A client that streams calls `tick` besides: it deals and starts pumps likewise, and nobody waits. Pumps go on then until
their lanes are empty.

Rules of this file: it is the only one of this package that awaits. A worker slot is held by a request, never by a
wait for anything else.
"""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final, TypeAlias

import anyio
import attrs
from anyio.abc import TaskGroup

from runqueue.queueing._accumulator import Accumulator
from runqueue.queueing._batch import METRIC, Batch, Bounds, Record
from runqueue.queueing._errors import Scope, StoreError
from runqueue.queueing._evidence import Evidence
from runqueue.queueing._flush import Flush, HaltedError
from runqueue.queueing._lane import Lane
from runqueue.queueing._report import Report
from runqueue.queueing._retry import Outage, Retrying, RetryPolicy, SpentError

if TYPE_CHECKING:
    from typing_extensions import Self

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
SENT: Final = 0.001
"""Seconds after which a request is on its way; nothing is to come before that."""


@attrs.define(eq=False)
class _Pump:
    """What the sender keeps of a busy lane."""

    epoch: int
    halted: bool = False
    nap: anyio.Event | None = None
    tries_doubt: bool = False
    """Whether it begins with another go at an entry that was left in doubt: the store may have recovered."""
    goes_on: bool = False
    """Whether that go is under way: if it fails, the rest of the lane has one too."""

    async def sleep(self, seconds: float | None) -> None:
        """Sleep so long, or until woken."""
        self.nap = anyio.Event()
        with anyio.move_on_after(seconds):
            await self.nap.wait()
        self.nap = None

    def wake(self) -> None:
        if self.nap is not None:
            self.nap.set()


class _StopError(Exception):
    """Raised inside a pump that has to end, with the reason why its entries stay queued."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Sender:
    """
    Delivers what an accumulator holds. An async context manager: what still runs at its end is cancelled.

    Args:
        accumulator: Where the lanes are.
        deliver: See [Deliver][].
        check: See [Check][]; asked before an answer that an outage gives too passes for a rejection. None: it does.
        bounds: Of a batch.
        max_workers: Requests under way at once.
        retry: When to try again.
        on_outage: Told once an outage, with what was answered last.
        streams: Whether ticks go on sending what no flush waits for.
        patience: Seconds in which some request has to end, if only by failing; else the store has got stuck, and no
            flush waits for it any longer. More than any healthy store needs, its outages included.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        deliver: Deliver,
        *,
        bounds: Bounds,
        check: Check | None = None,
        max_workers: int = 8,
        retry: RetryPolicy | None = None,
        on_outage: Callable[[StoreError], None] | None = None,
        streams: bool = False,
        patience: float = math.inf,
    ) -> None:
        policy = retry or RetryPolicy()
        self.accumulator = accumulator
        self.bounds = bounds
        self.outage = Outage(timeout=policy.timeout, on_outage=on_outage)
        self._deliver = deliver
        self._check_store = check
        self._evidence = Evidence()
        self._retry = Retrying(policy, self.outage)
        self._streams = streams
        self._patience = patience
        self._ended = 0  # requests, whatever came of them
        self._answered = 0.0  # seconds that the last of them took
        self._slots = anyio.Semaphore(max_workers, fast_acquire=True)
        self._probe = anyio.Lock()
        self._moved: anyio.Event | None = None
        self._pumps: dict[Lane, _Pump] = {}
        self._flushes: list[Flush] = []
        self._children: dict[Lane, set[_Pump]] = {}  # those that wait for this lane's run
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup

    async def __aenter__(self) -> Self:
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        # Not told of the exception: the task group would wrap it into a group.
        await self._stack.__aexit__(None, None, None)

    def __repr__(self) -> str:
        state = "spent" if self.outage.spent else "failing" if self.outage.since is not None else "healthy"
        return f"<Sender {state} pumps={len(self._pumps)} flushes={len(self._flushes)}>"

    # -- flush -------------------------------------------------------------------------------------------------------

    async def flush(self, lane: Lane | None = None, timeout: float | None = None) -> Report:
        """
        Send what is queued now.

        Args:
            lane: Only this run (and the creation of its parents). None: all.
            timeout: Seconds after which what is left stays queued, and is reported so. None: no bound but retrying's.

        Returns:
            What was not stored. Failures are reported once, by the first flush to end whose window holds them.
        """
        flush = self.begin(lane)
        await self.completion(flush, timeout)
        report = flush.report()
        self.tidy(flush)
        return report

    async def completion(self, flush: Flush, timeout: float | None) -> None:
        """Wait for a flush that `begin` has begun."""
        try:
            with anyio.move_on_after(timeout) as waiting:
                while not flush.done.is_set():
                    ended = self._ended
                    with anyio.move_on_after(self._patience):
                        await flush.done.wait()
                    if ended == self._ended and not flush.done.is_set():
                        flush.late = f"no request had ended for {self._patience:g} s"
                        return
            if waiting.cancelled_caught:
                flush.late = f"the flush timed out after {timeout:g} s"
        finally:
            self._end(flush)

    def begin(self, lane: Lane | None = None) -> Flush:
        """Close a window in each lane concerned and start what is needed to empty it; does not wait."""
        lanes: Iterable[Lane] = self.accumulator.busy()
        if lane is not None:
            lanes = [*_unopened_parents(lane), lane]
        goals: dict[Lane, int] = {}
        for each in lanes:
            each.deal(most=1 if lane is not None and each is not lane else None)
            goals[each] = each.dealt
        parents = set(goals) - {lane} if lane is not None else set[Lane]()
        total = sum(each.owed for each in goals if each not in parents) + len(parents)
        flush = Flush(goals, total, {each for each in goals if not each.idle}, parents)
        for each in goals:
            if each in flush.open:
                self._start(each)
        self._flushes.append(flush)
        if not flush.open:
            flush.done.set()
        return flush

    def _end(self, flush: Flush) -> None:
        self._flushes.remove(flush)
        for lane in flush.open:
            self._halt_unless_awaited(lane)

    def tidy(self, flush: Flush | None = None) -> None:
        """
        Let lanes go that have nothing to do.

        Args:
            flush: It has ended, and has reported.
        """
        if flush is not None:
            self.accumulator.nominate(flush.goals)
        self.accumulator.tidy(self._needs)

    def _needs(self, lane: Lane) -> bool:
        return lane in self._pumps or any(lane in flush.goals for flush in self._flushes)

    def _halt_unless_awaited(self, lane: Lane) -> None:
        if self._streams:
            return
        pump = self._pumps.get(lane)
        if pump is not None and not any(lane in flush.open for flush in self._flushes):
            pump.halted = True
            pump.wake()

    # -- ticks ---------------------------------------------------------------------------------------------------------

    def tick(self, full: Iterable[Lane] | None = None) -> None:
        """
        Send what waits, and wait for nothing. In an outage that retrying has given up, only now and then, to probe.

        Args:
            full: Only these lanes, and of each only what fills batches. None: all, and everything.
        """
        if not self.outage.may_probe(anyio.current_time()):
            return
        for lane in self.accumulator.busy() if full is None else full:
            if lane.doomed:
                continue
            for parent in _unopened_parents(lane):
                if not parent.dealt:  # what comes first is its creation, and nothing else of it is wanted here
                    parent.deal(most=1, tick=True)
                self._go_on(parent)
            if full is None:
                lane.deal(tick=True)
            else:
                lane.deal_batches(self.bounds.room(METRIC))
            self._go_on(lane)

    @property
    def busy(self) -> bool:
        """Whether anything is being sent, or waits to be sent again."""
        return bool(self._pumps)

    def moved(self) -> None:
        """Entries may have been settled: tell whoever waits for that."""
        if self.accumulator.intake is not None:
            self.accumulator.intake.settle()
        if self._moved is not None:
            self._moved.set()
            self._moved = None

    async def progress(self) -> None:
        """Wait until some entry may have been settled."""
        if self._moved is None:
            self._moved = anyio.Event()
        await self._moved.wait()

    def _go_on(self, lane: Lane) -> None:
        if not lane.idle:
            self._start(lane)

    # -- pumps -------------------------------------------------------------------------------------------------------

    def _start(self, lane: Lane) -> None:
        pump = self._pumps.get(lane)
        if pump is None:
            self._pumps[lane] = pump = _Pump(self.outage.epoch)
            self._tasks.start_soon(self._pump, lane, pump, name=f"runqueue pump {lane.run}")
        else:
            pump.epoch = self.outage.epoch
            pump.halted = False

    async def _pump(self, lane: Lane, pump: _Pump) -> None:
        lane.stuck = None
        try:
            await self._wait_for_parent(lane, pump)
            pump.tries_doubt = bool(lane.doubts)
            while not lane.idle:
                if lane.doubts:
                    self._weigh_doubts(lane, pump)
                await self._turn(lane, pump)
        except _StopError as stop:
            lane.stuck = stop.reason
        except Exception as error:  # a defect of ours must not end the engine; what is queued stays so, and is reported
            lane.stuck = StoreError(f"a defect in runqueue: {type(error).__name__}: {error}")
            lane.stuck.__cause__ = error
        finally:
            if lane.flying is not None:  # we were cancelled in mid-request
                lane.give_back()
            del self._pumps[lane]
            self.accumulator.nominate([lane])
            self._progress(lane, ended=True)

    async def _wait_for_parent(self, lane: Lane, pump: _Pump) -> None:
        parent = lane.parent
        while parent is not None and not (lane.opened or parent.opened):
            if parent not in self._pumps:
                raise _StopError(HaltedError(f"its parent, the run {parent.run}, was not created"))
            self._children.setdefault(parent, set()).add(pump)
            await pump.sleep(None)
            self._check(pump)

    async def _turn(self, lane: Lane, pump: _Pump) -> None:
        """Deliver one batch, or a part of one that was halved, with as many attempts as it takes."""

        attempts = 0

        async def attempt() -> None:
            nonlocal attempts
            async with self._admitted(pump):
                if lane.flying is None and lane.take(self.bounds) is None:
                    return
                self._progress(lane, ended=False)
                attempts += 1
                if attempts > 1:
                    self.accumulator.ledger.retried += 1
                await self._attempt(lane)

        def rejected(error: StoreError) -> bool:
            batch = lane.flying
            return error.rejects_after is not None and batch is not None and batch.rejections >= error.rejects_after

        async def sleep(seconds: float) -> None:
            self._check(pump)
            await pump.sleep(seconds)
            self._check(pump)

        try:
            await self._retry(attempt, rejected=rejected, sleep=sleep)
        except _StopError:
            if lane.flying is not None:
                lane.give_back()
            raise
        except SpentError as spent:
            # Of those that probe, one whose entry may be bad itself does not speak for the others.
            probes_doubt = self.outage.spent and lane.flying is not None and lane.flying.doubted is not None
            lane.give_back()
            if self._goes_on(lane, pump):
                return
            if spent.error.scope is not Scope.LANE and not probes_doubt:
                self._spend(spent.error)
            raise _StopError(spent.error) from None
        except StoreError as error:
            batch = lane.flying
            if error.retriable and batch is not None and not self._stands(batch):
                self._suspect(lane, pump, batch, error)
                return
            if error.too_large and batch is not None and batch.count > 1:
                self.bounds = self.bounds.below(batch.size)
            goes_on = lane.reject(error)
            self._progress(lane, ended=False)
            if not goes_on:
                if error.scope is Scope.STORE:
                    self._spend(error)
                raise _StopError(error) from None

    def _stands(self, batch: Batch) -> bool:
        """Whether an answer that has come so often that it passes for a rejection was one."""
        stands = batch.opens or self._evidence.proves(batch)  # a run that is not created stays queued in any case
        if stands:
            self.outage.succeeded()
        return stands

    def _suspect(self, lane: Lane, pump: _Pump, batch: Batch, error: StoreError) -> None:
        """The store can be read, and nothing shows yet that it takes data."""
        if error.scope is Scope.ENTRY and batch.count > 1:
            lane.reject(error)
        else:
            lane.doubt(error)
        self._progress(lane, ended=False)
        if not self._goes_on(lane, pump) and self.outage.spent:  # this was a probe
            raise _StopError(error) from None

    @staticmethod
    def _goes_on(lane: Lane, pump: _Pump) -> bool:
        goes_on, pump.goes_on = pump.goes_on, False
        return goes_on and (lane.searching or lane.untouched)

    def _weigh_doubts(self, lane: Lane, pump: _Pump) -> None:
        """Some of a lane's entries are in doubt: what is to be tried next? By the table of `_evidence`."""
        doubts = lane.doubts
        if any(map(self._evidence.proves, doubts)):
            lane.retry_doubts()
        elif not lane.searching and self._evidence.lets_pass(doubts):
            self.outage.succeeded()
            lane.fail_doubts()
            self._progress(lane, ended=False)
        elif pump.tries_doubt:
            pump.tries_doubt, pump.goes_on = False, True
            lane.retry_doubts(1)
        elif not lane.searching and not lane.untouched:
            raise _StopError(doubts[0].doubted or HaltedError("in doubt"))

    async def _attempt(self, lane: Lane) -> None:
        batch = lane.flying
        assert batch is not None
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
        self.outage.succeeded()
        self._evidence.stored()
        lane.store(leftovers)
        self._progress(lane, ended=False)

    async def _delivered(self, lane: Lane, batch: Batch) -> Sequence[Record]:
        began = anyio.current_time()
        if self._answered >= SLOW and not self._slots.statistics().tasks_waiting:
            self._tasks.start_soon(self._prepare, lane)
        try:
            return await self._deliver(lane, batch)
        finally:
            self._ended += 1
            self._answered = anyio.current_time() - began

    async def _prepare(self, lane: Lane) -> None:
        """While the answer is on its way: what comes next is encoded by the time it is there."""
        # Not where others wait for a slot: they fill the time, and each of them would keep a whole body in memory.
        await anyio.sleep(SENT)
        if lane.flying is not None:
            lane.prepare(self.bounds)

    async def _examined(self, lane: Lane, batch: Batch, error: StoreError) -> StoreError:
        """The error of an answer that will pass for a rejection; that of the store if it is found not to work."""
        between = self._evidence.refused(batch)
        # A look before the last of them and one after it: a single one could come just when an outage ends.
        if between or self._check_store is None or batch.rejections < (error.rejects_after or 0) - 1:
            return error
        try:
            await self._check_store(lane, batch)
        except StoreError as fault:
            if fault.retriable or fault.scope is Scope.STORE:
                batch.rejections = 0  # they told of the store, not of the batch
                return fault
        except Exception:  # a defect in a store says nothing of its health
            return error
        finally:
            self._ended += 1
        return error

    @asynccontextmanager
    async def _admitted(self, pump: _Pump) -> AsyncGenerator[None, None]:
        """Wait until this pump may send a request, and hold a worker slot for it."""
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
                wait = -1.0 if probing else self.outage.not_before - anyio.current_time()
                if wait <= 0 and probing == self.outage.spent:
                    break
                self._slots.release()
                self._check(pump)
                if wait > self.outage.left(anyio.current_time()):
                    raise _StopError(self.outage.error or HaltedError("the store asked to wait"))
                if wait > 0:
                    await pump.sleep(wait)
            try:
                self._check(pump)
                yield
            finally:
                self._slots.release()
        finally:
            if probing:
                self._probe.release()

    def _check(self, pump: _Pump) -> None:
        if pump.halted:
            raise _StopError(HaltedError("nobody waits for it any longer"))
        if not self.outage.admits(pump.epoch):
            raise _StopError(self.outage.error or HaltedError("the store is out of reach"))

    def _spend(self, error: StoreError) -> None:
        self.outage.spend(error)
        for pump in self._pumps.values():
            pump.wake()

    def _progress(self, lane: Lane, *, ended: bool) -> None:
        self.moved()
        for flush in self._flushes:
            if lane in flush.open:
                flush.progress(lane, ended=ended)
        if ended or lane.opened:
            for child in self._children.pop(lane, ()):
                child.wake()
        self._halt_unless_awaited(lane)


def _unopened_parents(lane: Lane) -> list[Lane]:
    """The runs that have to be created before this one, the outermost first."""
    parents: list[Lane] = []
    while not lane.opened and (parent := lane.parent) is not None and not parent.opened:
        parents.insert(0, parent)
        lane = parent
    return parents
