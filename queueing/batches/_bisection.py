"""Bisection: the batches of one lane that were not stored, and the search for the bad entries in them."""

# An undelivered batch is kept as it is. A rejected batch is halved, depth first, until each bad entry stands alone. Two
# rules save requests:
#
# - If one half was stored, the other half must hold the bad entry. It is *suspect*, and is halved again without being
#   sent whole. If a suspect half is stored after all (a server may have a limit of its own), this rule is not used any
#   more.
# - When the first bad entry has been found, the untried parts are joined again, once: mostly it is the only one.
#
# So one bad entry in a batch of 1,000 costs about 12 requests, where plain halving takes 21.
#
# Batches *in doubt* (see `_evidence`) are kept aside. While there are any, the search continues from the far end of the
# batch; but never past tags, because the last value of a tag has to be stored last.
#
# Rules of this file: no I/O. Batches go in, batches come out.

from __future__ import annotations

from collections.abc import Iterator

from runqueue.queueing.batches._batch import TAG, Batch


class Bisection:
    """The unstored batches of one window. They are tried again before anything else of their lane."""

    def __init__(self) -> None:
        self._stack: list[Batch] = []
        self.doubts: list[Batch] = []
        """Batches that were refused without proof, and that are not tried for now."""
        self._far = False  # whether what was taken last came from the far end
        self._infer = True  # whether a half may be suspected because the other was stored

    def __bool__(self) -> bool:
        return bool(self._stack or self.doubts)

    def __iter__(self) -> Iterator[Batch]:
        """The batches in doubt, then the other batches in the order of their entries."""
        yield from self.doubts
        yield from reversed(self._stack)

    @property
    def has_next(self) -> bool:
        """Whether there is a batch to try next."""
        return bool(self._stack)

    def give_back(self, batch: Batch) -> None:
        """Put an undelivered batch back: it is tried next, as it is."""
        if batch.doubted is not None:
            self.doubts.insert(0, batch)
        else:
            self._put(batch)

    def next(self) -> Batch:
        """Take the batch to try next."""
        self._far = (
            any(not doubt.passed for doubt in self.doubts)
            and self._stack[-1].doubted is None
            and TAG not in self._stack[0].groups
        )
        end = 0 if self._far else -1
        while (batch := self._stack[end]).suspect and batch.count > 1:
            self._stack.pop(end)
            self._put(*reversed(batch.halves()))
        return self._stack.pop(end)

    def _put(self, *batches: Batch) -> None:
        """Put batches back at the end that the last batch was taken from; their last entries first."""
        at = 0 if self._far else len(self._stack)
        self._stack[at:at] = batches

    def halve(self, batch: Batch, *, bad: bool = True) -> None:
        """
        Cut a rejected batch of several entries in two.

        Args:
            batch: The batch as it was sent.
            bad: Whether an entry in it is bad. False: the batch was only too large.

        Raises:
            JoinError: The batch cannot be cut.
        """
        first, second = batch.halves()
        if not bad:
            first.sibling = None
        self._put(second, first)

    def stored(self, batch: Batch) -> None:
        """Note that a batch was stored: its sibling is suspect then."""
        if batch.suspect:
            self._infer = False
        if batch.sibling is not None:
            batch.sibling.suspect = self._infer

    def isolated(self, batch: Batch) -> None:
        """Note that a batch of one entry was rejected: a bad entry has been found."""
        if batch.regroup and len(self._stack) > 1:
            joined = Batch.of(batch.serial, (part for untried in reversed(self._stack) for part in untried.parts()))
            joined.regroup, joined.since = False, batch.since
            self._stack = [joined]

    def doubt(self, batch: Batch) -> None:
        """Put a batch aside that was refused without proof."""
        self.isolated(batch)
        batch.regroup, batch.rejections = False, 0
        self.doubts.append(batch)

    def passed_over(self) -> None:
        """Note that the lane goes on to entries behind the batches in doubt."""
        for batch in self.doubts:
            batch.passed = True

    def overtaken(self, stored: Batch) -> list[Batch]:
        """Remove and return the batches in doubt that must not be tried again, because later entries were stored."""
        if stored.doubted is not None or not self.doubts:
            return []
        late = [batch for batch in self.doubts if batch.passed or TAG in batch.groups]
        self.doubts = [batch for batch in self.doubts if batch not in late]
        return late

    def retry(self, most: int | None = None) -> None:
        """Try *most* of the batches in doubt again. None: all."""
        again, self.doubts = self.doubts[:most], self.doubts[len(self.doubts) if most is None else most :]
        self._stack += reversed(again)

    def clear(self) -> None:
        self._stack.clear()
        self.doubts.clear()
