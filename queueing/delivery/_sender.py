"""The sender: which lanes are emptied when, for flushes and for ticks."""

# A flush closes a window in every lane, starts a pump where none runs, and waits until each of its lanes has emptied
# that window or is blocked. A pump (`_pump`) keeps the order of its run. All pumps share one way to the store
# (`_dispatch`), with at most `max_workers` requests at once. The sender waits, and keeps count of the flushes that wait
# for each lane: the pump of a lane that no flush waits for is halted. The lanes of artifacts have a dispatch of their
# own, with `uploads` requests at once and an outage of their own, so that neither kind holds up the other.
#
# A client that streams calls `tick` besides: it closes windows and starts pumps, too, and no caller waits. The pumps go
# on until their lanes are empty.
#
# Rules of this file: it knows lanes, flushes and pumps, and nothing of batches and answers.

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final

import anyio
from anyio.abc import TaskGroup

from runqueue.queueing._errors import StoreError
from runqueue.queueing._report import Report
from runqueue.queueing.batches._batch import METRIC, Bounds
from runqueue.queueing.delivery._dispatch import Check, Deliver, Dispatch, StopError
from runqueue.queueing.delivery._flush import Flush, NotWaitedForError
from runqueue.queueing.delivery._pump import Pump
from runqueue.queueing.delivery._retry import RetryPolicy
from runqueue.queueing.delivery._task_pool import TaskPool
from runqueue.queueing.lanes._accumulator import Accumulator
from runqueue.queueing.lanes._lane import Lane

if TYPE_CHECKING:
    from typing_extensions import Self

RESERVE: Final = 2.0
"""Seconds at the end of the last flush that are kept for final statuses, if artifacts take longer."""


class Sender:
    """
    Delivers what an accumulator holds. An async context manager: work that is under way at its end is cancelled.

    Args:
        accumulator: Holds the lanes.
        deliver, check, bounds, max_workers, retry, on_outage: See `Dispatch` in `_dispatch`.
        uploads: Requests for artifacts at once, besides `max_workers`.
        upload_progress: A counter that grows while an upload makes progress. An upload may take as long as it needs.
        streams: Whether ticks go on sending entries that no flush waits for.
        pause: Called between two pieces of work while no flush waits and little is queued. It stops for as long as
            another thread needs to get hold of the interpreter.
        patience: Seconds within which some request has to end, if only by failing. Otherwise no flush waits any longer.
            The bound has to exceed the longest request of a healthy store, and the longest pause of an outage.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        deliver: Deliver,
        *,
        bounds: Bounds,
        check: Check | None = None,
        max_workers: int = 8,
        uploads: int = 4,
        upload_progress: Callable[[], int] = lambda: 0,
        retry: RetryPolicy | None = None,
        on_outage: Callable[[StoreError], None] | None = None,
        streams: bool = False,
        pause: Callable[[], None] = lambda: None,
        patience: float = math.inf,
    ) -> None:
        self.accumulator = accumulator
        self._dispatch, self._uploads = (
            Dispatch(
                deliver,
                check,
                bounds=bounds,
                max_workers=workers,
                policy=retry or RetryPolicy(),
                on_outage=on_outage,
                give_way=self.give_way,
            )
            for workers in (max_workers, uploads)
        )
        self.outage = self._dispatch.outage
        self._upload_progress = upload_progress
        self._last = False  # whether the last flush has begun
        self._uploads_waived = False  # whether final statuses no longer wait for artifacts
        self._streams = streams
        self._pause = pause
        self._patience = patience
        self._settled: anyio.Event | None = None
        self._pumps: dict[Lane, Pump] = {}
        self._flushes: list[Flush] = []
        self._children: dict[Lane, set[Pump]] = {}  # pumps that wait for the creation of this lane's run
        self._stack = AsyncExitStack()
        self._tasks: TaskGroup
        self._task_pool: TaskPool

    async def __aenter__(self) -> Self:
        self._tasks = await self._stack.enter_async_context(anyio.create_task_group())
        self._task_pool = self._dispatch.task_pool = self._uploads.task_pool = TaskPool(self._tasks)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tasks.cancel_scope.cancel()
        # The exception is not passed on: the task group would wrap it into an exception group.
        await self._stack.__aexit__(None, None, None)

    def __repr__(self) -> str:
        state = "given up" if self.outage.given_up else "failing" if self.outage.since is not None else "healthy"
        return f"<Sender {state} pumps={len(self._pumps)} flushes={len(self._flushes)}>"

    # -- flush -------------------------------------------------------------------------------------------------------

    async def flush(self, lane: Lane | None = None, timeout: float | None = None) -> Report:
        """
        Send what is queued now.

        Args:
            lane: Only this run, and the creation of its parents. None: all runs.
            timeout: Seconds after which unsent entries stay queued and are reported so. None: only retrying bounds it.

        Returns:
            The entries that were not stored. A failure is reported by the first flush to end whose window holds it.
        """
        flush = self.begin(lane)
        await self.completion(flush, timeout)
        report = flush.report()
        self.tidy(flush)
        return report

    async def completion(self, flush: Flush, timeout: float | None) -> None:
        """Wait for a flush that `begin` has started."""
        try:
            now = since = anyio.current_time()
            seen = self._signs_of_life()
            end = math.inf if timeout is None else since + timeout
            waive_at = math.inf if timeout is None or not self._last else end - min(RESERVE, timeout / 4)
            while not flush.done.is_set():
                if now >= end:
                    flush.ended_early_because = f"the flush timed out after {timeout:g} s"
                    return
                if seen != self._signs_of_life():
                    seen, since = self._signs_of_life(), now
                elif now - since >= self._patience:
                    flush.ended_early_because = f"no request had ended for {self._patience:g} s"
                    return
                if now >= waive_at:
                    waive_at = math.inf
                    self._stop_waiting_for_uploads()
                with anyio.move_on_after(min(end, waive_at, since + self._patience) - now):
                    await flush.done.wait()
                    return
                now = anyio.current_time()
        finally:
            self._end(flush)

    def _signs_of_life(self) -> int:
        """A number that changes whenever the store shows that it answers."""
        return self._dispatch.ended + self._uploads.ended + self._upload_progress()

    def _stop_waiting_for_uploads(self) -> None:
        self._uploads_waived = True
        for pump in self._pumps.values():
            if pump.waits_for_uploads:
                pump.wake()

    def begin(self, lane: Lane | None = None, *, last: bool = False) -> Flush:
        """
        Close a window in each lane of the flush, and start the pumps that empty them. Returns at once.

        Args:
            lane: Only this run.
            last: No flush follows. Final statuses are sent without artifacts that cannot be stored, or not in time.
        """
        self._last = self._last or last
        for dispatch in (self._dispatch, self._uploads):
            dispatch.outage.flushes += 1
        lanes: Iterable[Lane] = self.accumulator.busy()
        if lane is not None:
            lanes = [*_unopened_parents(lane), lane]
        last_windows: dict[Lane, int] = {}
        for each in lanes:
            whole = lane is None or each is lane
            each.close_window(most=None if whole else 1)
            last_windows |= {member: member.last_closed for member in (each.with_uploads if whole else (each,))}
        parents = set(last_windows) - set(lane.with_uploads) if lane is not None else set[Lane]()
        total = sum(each.reportable for each in last_windows if each not in parents) + len(parents)
        flush = Flush(
            last_windows, total, {each for each in last_windows if not each.is_settled}, parents, self.outage.flushes
        )
        for each in last_windows:
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
        Release lanes that have nothing to do.

        Args:
            flush: A flush that has ended and has been reported.
        """
        if flush is not None:
            self.accumulator.mark_live(flush.last_windows)
        self.accumulator.tidy(self._needs)

    def _needs(self, lane: Lane) -> bool:
        return lane in self._pumps or any(lane in flush.last_windows for flush in self._flushes)

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
        Send what is queued, without waiting. While the store is given up, only a probe from time to time.

        Args:
            full: Only these lanes, and of each only what fills batches. None: all lanes, and everything.
        """
        if not self.outage.may_probe(anyio.current_time()):
            return
        for lane in self.accumulator.busy() if full is None else full:
            if lane.awaits_flush:
                continue
            for parent in _unopened_parents(lane):
                if not parent.last_closed:  # its first record creates the run; nothing else of it is needed here
                    parent.close_window(most=1, extendable=True)
                self._start_if_busy(parent)
            if full is None:
                lane.close_window(extendable=True)
            else:
                lane.close_window_of_batches(self.bounds.room(METRIC))
            self._start_if_busy(lane)
            uploads = [each for each in lane.upload_lanes if not each.is_settled]
            if uploads and self._uploads.outage.may_probe(anyio.current_time()):
                for each in uploads:
                    self._start(each)

    def give_way(self) -> None:
        """Let other threads have the interpreter, if nothing is urgent."""
        intake = self.accumulator.intake
        if self._streams and not self._flushes and intake is not None and intake.is_calm:
            self._pause()

    @property
    def bounds(self) -> Bounds:
        """The bounds of a batch. They shrink when the store refuses a batch as too large."""
        return self._dispatch.bounds

    @property
    def busy(self) -> bool:
        """Whether a request is under way, or waits to be repeated."""
        return bool(self._pumps)

    def note_settled(self) -> None:
        """Note that entries may have been settled, and wake the callers of `progress`."""
        if self.accumulator.intake is not None:
            self.accumulator.intake.update_bound()
        if self._settled is not None:
            self._settled.set()
            self._settled = None

    async def progress(self) -> None:
        """Wait until some entry may have been settled."""
        if self._settled is None:
            self._settled = anyio.Event()
        await self._settled.wait()

    def _start_if_busy(self, lane: Lane) -> None:
        if not lane.is_settled:
            self._start(lane)

    # -- pumps -------------------------------------------------------------------------------------------------------

    def _start(self, lane: Lane) -> None:
        pump = self._pumps.get(lane)
        dispatch = self._dispatch_of(lane)
        if pump is None:
            settled = partial(self._progress, lane, ended=False)
            give_up = partial(self._give_up, dispatch)
            self._pumps[lane] = pump = Pump(
                lane,
                dispatch,
                self.accumulator.ledger,
                settled=settled,
                give_up=give_up,
                must_wait=self._must_wait_for_uploads,
            )
            self._task_pool.start(partial(self._pump, lane, pump))
        else:
            pump.epoch = dispatch.outage.epoch
            pump.halted = False

    async def _pump(self, lane: Lane, pump: Pump) -> None:
        lane.blocked_by = None
        try:
            await self._wait_for_parent(lane, pump)
            await pump.empty()
        except StopError as stop:
            lane.blocked_by = stop.reason
        except Exception as error:  # A defect here must not end the engine: the entries stay queued and are reported.
            lane.blocked_by = StoreError(f"a defect in runqueue: {type(error).__name__}: {error}")
            lane.blocked_by.__cause__ = error
        finally:
            if lane.in_flight is not None:  # The pump was cancelled during a request.
                lane.give_back()
            del self._pumps[lane]
            self.accumulator.mark_live([lane])
            self._progress(lane, ended=True)

    async def _wait_for_parent(self, lane: Lane, pump: Pump) -> None:
        parent = lane.parent
        while parent is not None and not (lane.run_exists or parent.run_exists):
            if parent not in self._pumps:
                raise StopError(NotWaitedForError(f"its parent, the run {parent.run}, was not created"))
            self._children.setdefault(parent, set()).add(pump)
            await pump.sleep(None)
            pump.check()

    def _must_wait_for_uploads(self, lane: Lane) -> bool:
        """Whether the lane's final status has to wait for artifacts; see `Pump`."""
        awaited = lane.unfinished_uploads
        if not awaited or self._uploads_waived:
            return False
        reasons = [each.blocked_by for each in awaited if each not in self._pumps]
        if self._last:
            return len(reasons) < len(awaited)
        if reasons:
            raise StopError(NotWaitedForError(f"the artifacts that come before it were not stored: {reasons[0]}"))
        return True

    def _dispatch_of(self, lane: Lane) -> Dispatch:
        return self._dispatch if lane.owner is None else self._uploads

    def _lanes_depending_on(self, dispatch: Dispatch) -> list[Lane]:
        """The busy lanes that send by this dispatch, or wait for a lane that does."""
        return [
            lane
            for lane, pump in self._pumps.items()
            if self._dispatch_of(lane) is dispatch
            or (pump.waits_for_uploads if dispatch is self._uploads else not lane.run_exists)
        ]

    def _give_up(self, dispatch: Dispatch, error: StoreError, flushes_begun: int) -> bool:
        if flushes_begun < dispatch.outage.flushes:
            earlier = [flush for flush in self._flushes if flush.number <= flushes_begun]
            for lane in self._lanes_depending_on(dispatch):
                for flush in earlier:
                    flush.give_up(lane, error)
                self._halt_unless_awaited(lane)
            return False
        dispatch.outage.give_up(error)
        for pump in self._pumps.values():
            pump.wake()
        return True

    def _progress(self, lane: Lane, *, ended: bool) -> None:
        self.note_settled()
        for flush in self._flushes:
            if lane in flush.open:
                flush.progress(lane, ended=ended)
        owner = None if lane.owner is None else self._pumps.get(lane.owner)
        if owner is not None and owner.waits_for_uploads:
            owner.wake()
        if ended or lane.run_exists:
            for child in self._children.pop(lane, ()):
                child.wake()
        self._halt_unless_awaited(lane)


def _unopened_parents(lane: Lane) -> list[Lane]:
    """The runs that have to be created before this one, the outermost first."""
    parents: list[Lane] = []
    while not lane.run_exists and (parent := lane.parent) is not None and not parent.run_exists:
        parents.insert(0, parent)
        lane = parent
    return parents
