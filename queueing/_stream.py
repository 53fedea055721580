"""
The ticks of a client that streams: everything that waits is sent once an interval, and full batches at once.

    nothing queued  ->  asleep, until the first record rings
    something is    ->  a tick at the end of each interval; in between, a lane that has filled a batch rings for itself

Rules of this file: it decides when, `Sender.tick` does the rest. Whatever is worth a word is handed to `tell` here, in
the engine's thread, never by a log call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from runqueue.queueing._accumulator import Accumulator
from runqueue.queueing._batch import RUN
from runqueue.queueing._intake import Intake
from runqueue.queueing._report import Failure
from runqueue.queueing._sender import Sender


class Stream:
    """
    Args:
        accumulator: With an intake.
        sender: Of the same accumulator.
        interval: Seconds.
        tell: Is given the first failure of each cause, and entries that were dropped, by run.
        claims: Whether nobody else is to hear of failures: they are let go once they are told.
    """

    def __init__(
        self,
        accumulator: Accumulator,
        sender: Sender,
        interval: float,
        tell: Callable[[list[Failure], dict[Any, int]], None],
        *,
        claims: bool,
    ) -> None:
        assert accumulator.intake is not None
        self._accumulator = accumulator
        self._intake: Intake = accumulator.intake
        self._sender = sender
        self._interval = interval
        self._tell = tell
        self._claims = claims
        self._bell = anyio.Event()

    def hear(self) -> None:
        """The bell. In the engine's thread."""
        self._bell.set()

    async def run(self) -> None:
        """Until cancelled."""
        resting = False
        due = anyio.current_time() + self._interval
        while True:
            if self._is_idle():
                asleep, resting = resting, True
                self._intake.rest()
                # A record may be on its way still that has seen the mark before it was lowered; it has arrived by the
                # end of another interval.
                due = anyio.current_time() + self._interval
                with anyio.move_on_after(None if asleep else self._interval):
                    await self._bell.wait()
            else:
                resting = False
                with anyio.move_on_after(max(0.0, due - anyio.current_time())):
                    await self._bell.wait()
            if self._bell.is_set():
                self._bell = anyio.Event()
                if resting:
                    due = anyio.current_time() + self._interval
                resting = False
            full = self._intake.answer()
            if anyio.current_time() >= due:
                self._sender.tick()
                due = anyio.current_time() + self._interval
            elif full:
                self._sender.tick(full)
            self._intake.settle()
            if self._intake.pending >= self._intake.max_pending:
                self._shed()
            self._say()

    def _is_idle(self) -> bool:
        return not any(lane.inbox or not lane.idle for lane in self._accumulator.all())

    def _shed(self) -> None:
        """Make room: nothing of a run that was refused will ever be sent without somebody's doing."""
        for lane in self._accumulator.busy():
            if lane.doomed:
                self._intake.note(lane, lane.keep_only(RUN))
        self._intake.settle()

    def _say(self) -> None:
        if self._claims:
            for lane in self._accumulator.busy():
                lane.claim(lane.dealt)
        news, dropped = self._accumulator.ledger.log.news(), self._intake.told()
        if news or dropped:
            self._tell(news, dropped)
