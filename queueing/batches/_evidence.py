"""
What a refusal proves that an outage might give as well as a bad entry: MLflow's 500 INTERNAL_ERROR, say.

Such an answer passes for a rejection when it has come several times for one batch *and the store works*: something was
stored since the batch's refusal before, or looks (`Check`) at its run succeed, before its last refusal and after it.
Where a look fails too it is an outage: everything stays queued, and the count begins anew.

A store may answer every look and still take nothing: its disk is full, its database read-only. So to halve is free, but
no entry fails for good unless something was stored after the batch that held it was first refused. Until then the entry
is *in doubt*: set aside, while the rest of its lane is tried, from the far end, where something good is most likely.
When all of it was tried:

    something was stored since       each entry in doubt has another go, as the store may have recovered between, and
                                     fails if it is refused again; it fails at once where that would break the order
                                     of the run: something of a later request was stored, or it is a tag
    nothing, and they are few        they fail: mostly a value that conflicts, with nothing else to send. `UNPROVEN` is
                                     what a store that takes nothing may cost at most until it takes something again
    nothing, and they are many       they stay queued, and the lane goes on to what came after them; later flushes and
                                     ticks begin with one of them

Rules of this file: no I/O and no clock; it counts, and answers questions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

from runqueue.queueing.batches._batch import Batch

UNPROVEN: Final = 10
"""Entries that may fail for good with nothing stored between them and their refusal, until something is stored."""


@attrs.define(eq=False)
class Evidence:
    """What a sender has seen its store do."""

    stores: int = 0
    """Requests that were stored."""
    _passed: int = 0

    def stored(self) -> None:
        """A request was stored: the store takes data."""
        self.stores += 1
        self._passed = 0

    def refused(self, batch: Batch) -> bool:
        """Count such an answer; whether something was stored since the one before it."""
        between = batch.rejections > 0 and self.stores > batch.seen
        batch.rejections += 1
        batch.seen = self.stores
        if batch.since is None:
            batch.since = self.stores
        return between

    def proves(self, batch: Batch) -> bool:
        """Whether something was stored since this batch, or the one it is a part of, was first refused."""
        return batch.since is not None and self.stores > batch.since

    def lets_pass(self, doubts: Iterable[Batch]) -> bool:
        """Whether these may fail without a proof; they are counted then."""
        passed = self._passed + sum(batch.count for batch in doubts)
        if passed > UNPROVEN:
            return False
        self._passed = passed
        return True
