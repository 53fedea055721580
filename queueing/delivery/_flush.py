"""A flush under way: which lanes it waits for, when it is done, and what it reports."""

# Rules of this file: nothing here waits. The sender calls `progress`.

from __future__ import annotations

import anyio
import attrs

from runqueue.queueing._errors import StoreError
from runqueue.queueing._report import Failure, Report
from runqueue.queueing.batches._batch import RUN
from runqueue.queueing.lanes._lane import Lane


class NotWaitedForError(StoreError):
    """
    The reason given for entries that are still queued only because the time was over, or because the flush was stopped.
    """

    retriable = True


@attrs.define(eq=False)
class Flush:
    """
    A flush under way: for each of its lanes, the window up to which it waits.

    Args:
        last_windows: The last window of each lane that belongs to the flush.
        total: Entries that the flush reports on.
        open: Lanes that are not done yet.
    """

    last_windows: dict[Lane, int]
    total: int
    open: set[Lane]
    parents: set[Lane]
    """Lanes of which the flush needs only the creation of the run."""
    number: int
    """The serial number of the flush: 1 for a sender's first flush."""
    done: anyio.Event = attrs.field(factory=anyio.Event)
    ended_early_because: str = "the engine was stopped"
    """Why the flush ended before it was done, if it did."""
    given_up: dict[Lane, StoreError] = attrs.field(factory=dict)
    """Lanes that the flush no longer waits for, with the store's last error."""

    def progress(self, lane: Lane, *, ended: bool) -> None:
        """Note that entries of the lane may have been settled, or that its pump has ended."""
        if ended or lane.last_emptied >= self.last_windows[lane] or (lane in self.parents and lane.run_exists):
            self.open.discard(lane)
        if not self.open:
            self.done.set()

    def give_up(self, lane: Lane, error: StoreError) -> None:
        """Stop waiting for the lane: its requests failed after this flush had begun. Later flushes try again."""
        if lane in self.open:
            self.given_up[lane] = error
            self.progress(lane, ended=True)

    def report(self) -> Report:
        """The entries that this ended flush did not store. Each failure is reported by one flush only."""
        failures: list[Failure] = []
        not_waited_for = NotWaitedForError(f"still queued when {self.ended_early_because}")
        for lane, last_window in self.last_windows.items():
            reason = self.given_up.get(lane) or (None if lane in self.open else lane.blocked_by) or not_waited_for
            if lane in self.parents:
                if not lane.run_exists:
                    failures += [each for each in lane.outstanding(last_window, reason) if each.kind == RUN]
                continue
            failures += lane.take_unreported(last_window)
            if lane.last_emptied < last_window:
                failures += lane.outstanding(last_window, reason)
        return Report(total=self.total, failures=tuple(failures))
