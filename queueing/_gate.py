"""
What of a run's records still has to be sent.

A record passes the gate once, on its way into a batch: it is encoded; entries that cannot be sent fail alone, and so do
those whose name the store has refused before; a param that is stored already needs no second request.

Rules of this file: no I/O. What it remembers is of one run: `memory` (the encoder's), refused names, stored params.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from runqueue.queueing._account import Account
from runqueue.queueing._batch import MERGED, PARAM, RUN, Batch, Joined, Record, Slice, weight
from runqueue.queueing._errors import RejectedError, StoreError

Fragments: TypeAlias = "tuple[list[bytes] | Joined, dict[int, Exception] | None]"
Encode: TypeAlias = Callable[[Record, dict[Any, Any]], Fragments]
"""
`encode(record, memory) -> (pieces, faults)`: one piece an entry, in order, and by index what is wrong with the entries
that cannot be sent (their pieces are ignored). If nothing is wrong, the pieces may come joined. `memory` is a dict of
the lane's own, for what has to be remembered of a run from record to record. Pure but for that.
"""


class Gate:
    """
    Args:
        encode: See [Encode][].
        account: Where what fails here, or is stored already, is booked.
    """

    def __init__(self, encode: Encode, account: Account) -> None:
        self.never: Exception | None = None
        """Why this run can never be created, if so."""
        self._encode = encode
        self._account = account
        self._memory: dict[Any, Any] = {}
        self._stored: dict[Any, bytes] = {}  # params
        self._barred: dict[tuple[int, Any], StoreError] = {}

    def slices(self, item: Record | Slice, body: int, serial: int) -> list[Slice]:
        """What passes of a record, or of a slice that was put back: encoded, none larger alone than `body` bytes."""
        parts = [item] if isinstance(item, Slice) else self._encoded(item, body, serial)
        if self._barred:
            return [kept for part in parts for kept in self._screened(part, serial)]
        return parts

    def screen(self, batch: Batch) -> Batch:
        """A batch that comes back, without the names that were refused meanwhile."""
        if not self._barred:
            return batch
        return batch.with_slices(kept for part in batch.slices() for kept in self._screened(part, batch.serial))

    def fail(self, part: Slice, error: Exception, serial: int) -> None:
        """These entries turned out to be unfit later."""
        self._account.fail(part, error, serial)

    def bar(self, part: Slice, error: StoreError) -> None:
        """The store refused the name of this entry; no other of its kind and key need be sent."""
        if part.kind in MERGED:
            ((key, _),) = part.keyed()
            self._barred[part.kind, key] = error

    def remember(self, batch: Batch) -> None:
        """The batch was stored."""
        for part in batch.groups.get(PARAM, ()):
            self._stored.update(zip(part.keys(), part.pieces, strict=True))

    def is_settled(self, key: Any, part: Slice, at: int, serial: int) -> bool:
        """
        Whether this entry of a slice of params needs no request: it is stored, or another value is, and the store
        would refuse this one.
        """
        stored = self._stored.get(key)
        if stored is None:
            return False
        if stored == part.pieces[at]:
            self._account.store(1)
        else:
            error = RejectedError(f"{key!r} is stored with another value already, and cannot be changed")
            self._account.fail(part.stretch(at, at + 1), error, serial)
        return True

    def _encoded(self, record: Record, body: int, serial: int) -> list[Slice]:
        try:
            pieces, faults = self._encode(record, self._memory)
        except Exception as error:  # a defect of ours: it may cost this record, not the run
            count = max(1, weight(record))
            pieces, faults = [b""] * count, dict.fromkeys(range(count), error)
        whole = Slice(record, 0, pieces)
        if whole.size > body:
            faults = dict(faults or {})
            for at, piece in enumerate(whole.pieces):
                if len(piece) >= body:
                    faults.setdefault(at, RejectedError(f"{len(piece)} bytes are more than a request may have"))
        return [whole] if not faults else self._without(faults, whole, serial)

    def _without(self, faults: dict[int, Exception], whole: Slice, serial: int) -> list[Slice]:
        """What is left of a record whose faulty entries have failed."""
        record, pieces = whole.record, whole.pieces
        parts: list[Slice] = []
        start = 0
        for at in [*sorted(faults), len(pieces)]:
            if at > start:
                parts.append(Slice(record, start, pieces[start:at]))
            start = at + 1
        for at, fault in sorted(faults.items()):
            self._account.fail(Slice(record, at, [b""]), fault, serial)
            if record[0] == RUN:
                self.never = fault
        return parts

    def _screened(self, part: Slice, serial: int) -> list[Slice]:
        kind = part.kind
        if kind not in MERGED or not any((kind, key) in self._barred for key in part.record[1]):
            return [part]
        kept: list[Slice] = []
        for key, one in part.keyed():
            error = self._barred.get((kind, key))
            if error is None:
                kept.append(one)
            else:
                self._account.fail(one, error, serial)
        return kept
