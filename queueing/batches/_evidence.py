"""Evidence: what a refusal proves that an outage could cause as well, such as MLflow's 500 INTERNAL_ERROR."""

# Such an answer counts as a rejection when it has come several times for one batch *and the store works*: a request was
# stored since the refusal before, or reads (`Check`) of its run succeed before its last refusal and after it. If a read
# fails too, the store is out of reach: everything stays queued, and the count begins anew.
#
# A store may answer every read and still take no data: its disk is full, its database read-only. So halving is free,
# but no entry fails for good unless a request was stored after the batch that held the entry was first refused. Until
# then the entry is *in doubt*: it is put aside while the rest of its lane is tried, from the far end, where a good
# entry is most likely. When the whole lane has been tried:
#
#     a request was stored since     each entry in doubt is tried once more, as the store may have recovered, and fails
#                                    if it is refused again. It fails at once where another try would break the
#                                    run's order: a later request was stored, or the entry is a tag
#     none was stored, few entries   they fail: mostly a value that conflicts, with nothing else to send. `UNPROVEN` bounds
#                                    what a store that takes nothing costs until it takes a request again
#     none was stored, many entries  they stay queued, and the lane goes on to later entries. Later flushes and ticks
#                                    begin with one of them
#
# Rules of this file: no I/O and no clock. It counts, and answers questions.

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import attrs

from runqueue.queueing.batches._batch import Batch

UNPROVEN: Final = 10
"""The largest number of entries that may fail for good without proof, until the next request is stored."""


@attrs.define(eq=False)
class Evidence:
    """What a sender has seen its store do."""

    stores: int = 0
    """Requests that were stored."""
    _passed: int = 0

    def stored(self) -> None:
        """Note that a request was stored: the store takes data."""
        self.stores += 1
        self._passed = 0

    def refused(self, batch: Batch) -> bool:
        """Count a refusal of the batch. True if a request was stored since the refusal before it."""
        between = batch.rejections > 0 and self.stores > batch.seen
        batch.rejections += 1
        batch.seen = self.stores
        if batch.since is None:
            batch.since = self.stores
        return between

    def proves(self, batch: Batch) -> bool:
        """Whether a request was stored since this batch, or the batch it was cut from, was first refused."""
        return batch.since is not None and self.stores > batch.since

    def lets_pass(self, doubts: Iterable[Batch]) -> bool:
        """Whether these batches may fail without proof. If so, their entries are counted."""
        passed = self._passed + sum(batch.count for batch in doubts)
        if passed > UNPROVEN:
            return False
        self._passed = passed
        return True
