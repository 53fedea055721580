"""
One flush under way: which lanes it waits for, when it is done, and what it has to report.

Rule of this file: it waits for nothing itself; it is told of progress.
"""

from __future__ import annotations

import anyio
import attrs

from runqueue.queueing._errors import StoreError
from runqueue.queueing._report import Failure, Report
from runqueue.queueing.batches._batch import RUN
from runqueue.queueing.lanes._lane import Lane


class HaltedError(StoreError):
    """Given as the reason why entries are still queued when nothing has gone wrong but the time was over."""

    retriable = True


@attrs.define(eq=False)
class Flush:
    """One flush under way: the lanes it waits for, each up to a window."""

    goals: dict[Lane, int]
    total: int
    open: set[Lane]
    parents: set[Lane]
    """Lanes of which only the creation of the run is wanted."""
    number: int
    """1 for a sender's first flush, and so on."""
    done: anyio.Event = attrs.field(factory=anyio.Event)
    late: str = "the engine was stopped"
    """Why it ended before it was done, if it did."""
    given_up: dict[Lane, StoreError] = attrs.field(factory=dict)
    """Lanes that it waits for no longer, by what the store answered."""

    def progress(self, lane: Lane, *, ended: bool) -> None:
        if ended or lane.done >= self.goals[lane] or (lane in self.parents and lane.opened):
            self.open.discard(lane)
        if not self.open:
            self.done.set()

    def give_up(self, lane: Lane, error: StoreError) -> None:
        """What was tried of it after this flush began has failed, and is tried again for later ones only."""
        if lane in self.open:
            self.given_up[lane] = error
            self.progress(lane, ended=True)

    def report(self) -> Report:
        """What this flush, which has ended, did not store; each failure is named once."""
        failures: list[Failure] = []
        late = HaltedError(f"still queued when {self.late}")
        for lane, goal in self.goals.items():
            reason = self.given_up.get(lane) or (late if lane in self.open else lane.stuck or late)
            if lane in self.parents:
                if not lane.opened:
                    failures += [each for each in lane.outstanding(goal, reason) if each.kind == RUN]
                continue
            failures += lane.claim(goal)
            if lane.done < goal:
                failures += lane.outstanding(goal, reason)
        return Report(total=self.total, failures=tuple(failures))
