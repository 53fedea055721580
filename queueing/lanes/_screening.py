"""
Screening: which entries of a run still have to be sent.

A record is screened once, on its way into a batch. It is encoded; entries that cannot be sent fail alone, and so do
entries whose name the store has refused before; a param that is stored already needs no second request.

Records of metrics that follow each other are screened together, as a pack, if none of them has a fault. Otherwise they
are screened one by one, with the same outcome.
"""

# Rules of this file: no I/O. What it remembers belongs to one run: the encoder's memory, refused names, stored params.

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
`encode(record, memory) -> (pieces, faults)`: one piece an entry, in order, and by index the errors of the entries that
cannot be sent; their pieces are ignored. If there is no fault, the pieces may be joined already. `memory` is a dict of
the lane, for state that the encoder keeps from one record of the run to the next. Pure otherwise.
"""
EncodeMany: TypeAlias = Callable[[Sequence[Record], dict[Any, Any]], "tuple[bytes, Sequence[bytes]] | None"]
"""
`encode_many(records, memory) -> (joined, tails)`: the fragments of records of metrics, joined by commas, with the bytes
that `encode` makes of each record; and for each record the bytes that each of its fragments ends with, and that occur
nowhere else in them. None: an entry may have a fault. `memory` is not changed.
"""


@attrs.frozen
class Encoding:
    """An `encode` that can also encode many records of metrics at once."""

    one: Encode
    many: EncodeMany

    def __call__(self, record: Record, memory: dict[Any, Any]) -> Fragments:
        return self.one(record, memory)


_entries = itemgetter(1)


class Screening:
    """
    Decides which entries of one run are sent, and encodes them.

    Args:
        encode: See [Encode][]. Packs are made only if it is an [Encoding][].
        account: Counts the entries that fail here, or that need no request.
    """

    def __init__(self, encode: Encode, account: Account) -> None:
        self.creation_fault: Exception | None = None
        """Why the run can never be created. None: it can."""
        self._encode = encode.one if isinstance(encode, Encoding) else encode
        self._encode_many = encode.many if isinstance(encode, Encoding) else None
        self._account = account
        self._memory: dict[Any, Any] = {}
        self._stored: dict[Any, bytes] = {}  # the fragments of stored params
        self._barred: dict[tuple[int, Any], StoreError] = {}

    @property
    def can_pack(self) -> bool:
        """Whether `pack` may succeed at all."""
        return self._encode_many is not None and not self._memory

    @property
    def has_memory(self) -> bool:
        """Whether the encoder keeps state of this run, e.g. which keys it has cut."""
        return bool(self._memory)

    def pack(self, records: Sequence[Record], count: int) -> Pack | None:
        """A pack of these records of metrics, *count* entries in all; None if they have to pass one by one."""
        if self._encode_many is None or (self._barred and self._any_barred(records)):
            return None
        try:
            made = self._encode_many(records, self._memory)
        except Exception:  # a defect of ours: `slices` finds the record that it happens with
            return None
        return None if made is None else Pack(records, *made, count)

    def is_current(self, pack: Pack, records: Sequence[Record]) -> bool:
        """Whether a pack that was made of the head of a queue is what `pack` would make of these records now."""
        ours = pack.records
        return (
            len(ours) == len(records)
            and ours[0] is records[0]
            and ours[-1] is records[-1]
            and not self._memory
            and not self._barred
        )

    def slices(self, item: Record | Slice, body: int, serial: int) -> list[Slice]:
        """The entries to send of a record, or of a slice that was put back: encoded, each of less than *body* bytes."""
        parts = self._check_sizes(item, body, serial) if isinstance(item, Slice) else self._encoded(item, body, serial)
        if self._barred:
            return [kept for part in parts for kept in self._without_barred(part, serial)]
        return parts

    def screen(self, batch: Batch) -> Batch:
        """A batch that is sent again, without the names that the store has refused meanwhile."""
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
        """Let entries fail that have passed the screening before."""
        self._account.fail(part, error, serial)

    def bar(self, part: Part, error: StoreError) -> None:
        """Send no other entry of the kind and key of this one: the store refused its name."""
        if part.kind in MERGED:
            (key,) = part.keys()
            self._barred[part.kind, key] = error

    def remember(self, batch: Batch) -> None:
        """Remember the params of a batch that was stored."""
        for part in batch.slices_of(PARAM):
            self._stored.update(zip(part.keys(), part.pieces, strict=True))

    def settle_known(self, key: Any, part: Slice, at: int, serial: int) -> bool:
        """
        Settle a param whose key is stored: it counts as stored if its value is equal, else it fails.

        Returns:
            Whether it was settled, so that it needs no request.
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
        except Exception as error:  # a defect of ours costs this record, not the run
            count = max(1, weight(record))
            pieces, faults = [b""] * count, dict.fromkeys(range(count), error)
        return self._check_sizes(Slice(record, 0, pieces), body, serial, faults)

    def _check_sizes(
        self, part: Slice, body: int, serial: int, faults: dict[int, Exception] | None = None
    ) -> list[Slice]:
        if part.size > body and part.allowed > body:  # the bound may be lower than when the slice was put back
            faults = dict(faults or {})
            for at, piece in enumerate(part.pieces):
                if len(piece) >= body:
                    faults.setdefault(at, RejectedError(f"{len(piece)} bytes are more than a request may have"))
            part.allowed = body
        return [part] if not faults else self._fail_faulty(faults, part, serial)

    def _fail_faulty(self, faults: Mapping[int, Exception], part: Slice, serial: int) -> list[Slice]:
        """Let the faulty entries of a slice fail; return the rest of it."""
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
        if kind not in MERGED or part.screened == len(self._barred):  # unchanged since it was put back
            return [part]
        part.screened = len(self._barred)
        barred = {at: self._barred[kind, key] for at, key in enumerate(part.keys()) if (kind, key) in self._barred}
        return [part] if not barred else self._fail_faulty(barred, part, serial)
