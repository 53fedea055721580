"""
Batches that came back, and the search for the bad entries in them.

They come before anything else of their lane, the next one last. A batch that was not delivered is kept as it is. One
that was rejected is halved, depth first, until a bad entry stands alone, with two savings:

- If one half was stored, the other has to hold the bad entry: it is *suspect*, and halved without being sent whole. That
  was wrong if in the end all of it is stored (a server with a limit of its own, say); it is not done again then.
- When the first bad entry of a batch stands alone, the untried parts are joined again, once: mostly it is the only one.

So one bad entry in a batch of 1,000 costs about 12 requests, where plain halving takes 21.

Rules of this file: no I/O; batches in, batches out.
"""

from __future__ import annotations

from collections.abc import Iterator

from runqueue.queueing._batch import Batch


class Returned:
    """A stack of batches, of one window."""

    def __init__(self) -> None:
        self._stack: list[Batch] = []
        self._infer = True  # whether a half may be suspected because the other was stored

    def __bool__(self) -> bool:
        return bool(self._stack)

    def __iter__(self) -> Iterator[Batch]:
        """In the order in which they will be tried."""
        return reversed(self._stack)

    def give_back(self, batch: Batch) -> None:
        """The batch comes next, as it is."""
        self._stack.append(batch)

    def next(self) -> Batch:
        """Take the batch to try next."""
        while (batch := self._stack[-1]).suspect and batch.count > 1:
            first, second = batch.halves()
            self._stack[-1:] = (second, first)
        return self._stack.pop()

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
        self._stack += (second, first)

    def stored(self, batch: Batch) -> None:
        """The batch was stored: what follows for its other half?"""
        if batch.suspect:
            self._infer = False
        if batch.sibling is not None:
            batch.sibling.suspect = self._infer

    def isolated(self, batch: Batch) -> None:
        """The batch of one entry was rejected: the entry stands alone."""
        if batch.regroup and len(self._stack) > 1:
            joined = Batch.of(batch.serial, (part for untried in self for part in untried.parts()))
            joined.regroup = False
            self._stack = [joined]

    def clear(self) -> None:
        self._stack.clear()
