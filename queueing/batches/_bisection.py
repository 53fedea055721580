"""
Batches that came back, and the search for the bad entries in them.

They come before anything else of their lane, the next one last. A batch that was not delivered is kept as it is. One
that was rejected is halved, depth first, until a bad entry stands alone, with two savings:

- If one half was stored, the other has to hold the bad entry: it is *suspect*, and halved without being sent whole. That
  was wrong if in the end all of it is stored (a server with a limit of its own, say); it is not done again then.
- When the first bad entry of a batch stands alone, the untried parts are joined again, once: mostly it is the only one.

So one bad entry in a batch of 1,000 costs about 12 requests, where plain halving takes 21.

Entries *in doubt* (see `_evidence`) are kept aside. As long as there are any of the batch that is searched, the search
goes on from its far end; but never past tags, of which the last one of a name has to be stored last.

Rules of this file: no I/O; batches in, batches out.
"""

from __future__ import annotations

from collections.abc import Iterator

from runqueue.queueing.batches._batch import TAG, Batch


class Returned:
    """A stack of batches, of one window."""

    def __init__(self) -> None:
        self._stack: list[Batch] = []
        self.doubts: list[Batch] = []
        """Refused, and tried no more for now."""
        self._far = False  # whether what was taken last came from the far end
        self._infer = True  # whether a half may be suspected because the other was stored

    def __bool__(self) -> bool:
        return bool(self._stack or self.doubts)

    def __iter__(self) -> Iterator[Batch]:
        """Those in doubt, then the others in the order of their entries."""
        yield from self.doubts
        yield from reversed(self._stack)

    @property
    def untried(self) -> bool:
        """Whether there is something to try next."""
        return bool(self._stack)

    def give_back(self, batch: Batch) -> None:
        """The batch comes next, as it is."""
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
        """Where the last one was taken from; the last entries first."""
        at = 0 if self._far else len(self._stack)
        self._stack[at:at] = batches

    def halve(self, batch: Batch, *, bad: bool = True) -> None:
        """
        The batch of several entries was rejected.

        Args:
            batch: As it was sent.
            bad: Something in it is bad. False: it was only too large.

        Raises:
            JoinError: It does not come apart.
        """
        first, second = batch.halves()
        if not bad:
            first.sibling = None
        self._put(second, first)

    def stored(self, batch: Batch) -> None:
        """The batch was stored: what follows for its other half?"""
        if batch.suspect:
            self._infer = False
        if batch.sibling is not None:
            batch.sibling.suspect = self._infer

    def isolated(self, batch: Batch) -> None:
        """The batch of one entry was rejected: the entry stands alone."""
        if batch.regroup and len(self._stack) > 1:
            joined = Batch.of(batch.serial, (part for untried in reversed(self._stack) for part in untried.parts()))
            joined.regroup, joined.since = False, batch.since
            self._stack = [joined]

    def doubt(self, batch: Batch) -> None:
        """The batch was refused, and stands aside until more is known."""
        self.isolated(batch)
        batch.regroup, batch.rejections = False, 0
        self.doubts.append(batch)

    def passed_over(self) -> None:
        """The lane goes on to what came after those in doubt."""
        for batch in self.doubts:
            batch.passed = True

    def overtaken(self, stored: Batch) -> list[Batch]:
        """Those in doubt that can have no other go, since what has to come after them was stored. They are let go."""
        if stored.doubted is not None or not self.doubts:
            return []
        late = [batch for batch in self.doubts if batch.passed or TAG in batch.groups]
        self.doubts = [batch for batch in self.doubts if batch not in late]
        return late

    def retry(self, most: int | None = None) -> None:
        """Have another go at so many of those in doubt; None: all."""
        again, self.doubts = self.doubts[:most], self.doubts[len(self.doubts) if most is None else most :]
        self._stack += reversed(again)

    def clear(self) -> None:
        self._stack.clear()
        self.doubts.clear()
