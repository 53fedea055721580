"""
What of a run's records still has to be sent.

A record passes the gate once, on its way into a batch: it is encoded; entries that cannot be sent fail alone, and so do
those whose name the store has refused before; a param that is stored already needs no second request.

Many records that follow each other pass in one go where nothing is wrong with any of them: as a pack. Otherwise they
pass one by one, with the same outcome.

Rules of this file: no I/O. What it remembers is of one run: `memory` (the encoder's), refused names, stored params.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, TypeAlias

import attrs

from runqueue.queueing._errors import RejectedError, StoreError
from runqueue.queueing.batches._batch import MERGED, PARAM, RUN, Batch, weight
from runqueue.queueing.batches._part import Joined, Pack, Part, Record, Slice
from runqueue.queueing.lanes._account import Account

Fragments: TypeAlias = "tuple[list[bytes] | Joined, dict[int, Exception] | None]"
Encode: TypeAlias = Callable[[Record, dict[Any, Any]], Fragments]
"""
`encode(record, memory) -> (pieces, faults)`: one piece an entry, in order, and by index what is wrong with the entries
that cannot be sent (their pieces are ignored). If nothing is wrong, the pieces may come joined. `memory` is a dict of
the lane's own, for what has to be remembered of a run from record to record. Pure but for that.
"""
EncodeMany: TypeAlias = Callable[[Sequence[Record], dict[Any, Any]], "tuple[bytes, Sequence[bytes]] | None"]
"""
`encode_many(records, memory) -> (joined, tails)`: the fragments of records of metrics, joined by commas, byte for byte
as `encode` makes them of each record; and for each record what its fragments end with, and nothing else in them holds.
None if anything is wrong with any of them, or only uncertain. It leaves `memory` as it is.
"""


@attrs.frozen
class Encoding:
    """An `encode` that can also take many records of metrics in one go."""

    one: Encode
    many: EncodeMany

    def __call__(self, record: Record, memory: dict[Any, Any]) -> Fragments:
        return self.one(record, memory)


_entries = itemgetter(1)


class Screening:
    """
    Args:
        encode: See [Encode][]; packs are made only by an [Encoding][].
        account: Where what fails here, or is stored already, is booked.
    """

    def __init__(self, encode: Encode, account: Account) -> None:
        self.creation_fault: Exception | None = None
        """Why this run can never be created, if so."""
        self._encode = encode.one if isinstance(encode, Encoding) else encode
        self._encode_many = encode.many if isinstance(encode, Encoding) else None
        self._account = account
        self._memory: dict[Any, Any] = {}
        self._stored: dict[Any, bytes] = {}  # params
        self._barred: dict[tuple[int, Any], StoreError] = {}

    @property
    def can_pack(self) -> bool:
        """Whether there is any use in offering records to `pack`."""
        return self._encode_many is not None and not self._memory

    @property
    def has_memory(self) -> bool:
        """Whether the encoder keeps something of this run, such as which keys were cut to what."""
        return bool(self._memory)

    def pack(self, records: Sequence[Record], count: int) -> Pack | None:
        """These records of metrics, with so many entries; None if they have to pass one by one."""
        if self._encode_many is None or (self._barred and self._any_barred(records)):
            return None
        try:
            made = self._encode_many(records, self._memory)
        except Exception:  # a defect of ours: `slices` finds the record, and names it
            return None
        return None if made is None else Pack(records, *made, count)

    def is_current(self, pack: Pack, records: Sequence[Record]) -> bool:
        """Whether a pack that was made earlier, of the head of a queue, is what `pack` would make of these now."""
        ours = pack.records
        return (
            len(ours) == len(records)
            and ours[0] is records[0]
            and ours[-1] is records[-1]
            and not self._memory
            and not self._barred
        )

    def slices(self, item: Record | Slice, body: int, serial: int) -> list[Slice]:
        """What passes of a record, or of a slice that was put back: encoded, none larger alone than `body` bytes."""
        parts = self._check_sizes(item, body, serial) if isinstance(item, Slice) else self._encoded(item, body, serial)
        if self._barred:
            return [kept for part in parts for kept in self._without_barred(part, serial)]
        return parts

    def screen(self, batch: Batch) -> Batch:
        """A batch that comes back, without the names that were refused meanwhile."""
        if not self._barred:
            return batch
        return batch.with_parts(kept for part in batch.parts() for kept in self._screen_part(part, batch.serial))

    def _screen_part(self, part: Part, serial: int) -> Sequence[Part]:
        if isinstance(part, Slice):
            return self._without_barred(part, serial)
        if not self._any_barred(part.records):
            return [part]
        return [kept for each in part.slices() for kept in self._without_barred(each, serial)]

    def fail(self, part: Slice, error: Exception, serial: int) -> None:
        """These entries turned out to be unfit later."""
        self._account.fail(part, error, serial)

    def bar(self, part: Part, error: StoreError) -> None:
        """The store refused the name of this entry; no other of its kind and key need be sent."""
        if part.kind in MERGED:
            (key,) = part.keys()
            self._barred[part.kind, key] = error

    def remember(self, batch: Batch) -> None:
        """The batch was stored."""
        for part in batch.slices_of(PARAM):
            self._stored.update(zip(part.keys(), part.pieces, strict=True))

    def settle_known(self, key: Any, part: Slice, at: int, serial: int) -> bool:
        """
        Whether this entry of a slice of params needs no request: it is stored, or another value is, and the store
        would refuse this one.
        """
        stored = self._stored.get(key)
        if stored is None:
            return False
        if stored == part.piece(at):
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
        return self._check_sizes(Slice(record, 0, pieces), body, serial, faults)

    def _check_sizes(
        self, part: Slice, body: int, serial: int, faults: dict[int, Exception] | None = None
    ) -> list[Slice]:
        if part.size > body and part.allowed > body:  # the bound may have come down since it was put back
            faults = dict(faults or {})
            for at, piece in enumerate(part.pieces):
                if len(piece) >= body:
                    faults.setdefault(at, RejectedError(f"{len(piece)} bytes are more than a request may have"))
            part.allowed = body
        return [part] if not faults else self._fail_faulty(faults, part, serial)

    def _fail_faulty(self, faults: Mapping[int, Exception], part: Slice, serial: int) -> list[Slice]:
        """What is left of a slice whose faulty entries have failed."""
        kept: list[Slice] = []
        begun = 0
        for at in [*sorted(faults), part.count]:
            if at > begun:
                kept.append(part.stretch(begun, at))
            begun = at + 1
        for at, fault in sorted(faults.items()):
            self._account.fail(part.stretch(at, at + 1), fault, serial)
            if part.kind == RUN:
                self.creation_fault = fault
        return kept

    def _any_barred(self, records: Sequence[Record]) -> bool:
        kind = records[0][0]
        return any((kind, key) in self._barred for key in set(chain.from_iterable(map(_entries, records))))

    def _without_barred(self, part: Slice, serial: int) -> list[Slice]:
        kind = part.kind
        if kind not in MERGED or part.screened == len(self._barred):  # what was put back is not looked through again
            return [part]
        part.screened = len(self._barred)
        barred = {at: self._barred[kind, key] for at, key in enumerate(part.keys()) if (kind, key) in self._barred}
        return [part] if not barred else self._fail_faulty(barred, part, serial)
