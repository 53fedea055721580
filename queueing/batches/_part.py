"""The parts of a batch: stretches of records, with the encoded bytes of their entries."""

# A **fragment** is the encoded bytes of one entry. A `Slice` is a stretch of one record with its fragments. A `Pack` is
# several whole records that were encoded in one go. In a batch a pack costs as much as one slice, however many records
# it holds; it is cut into one slice a record only where it has to be divided.
#
# Rules of this file: no I/O. Nothing but the fragment is kept for each entry. Dividing a slice copies no more than the
# smaller part, so that cutting a call of 100,000 entries into batches takes linear time. Sizes count one byte more than
# each fragment, for the comma behind it.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, islice
from sys import maxsize
from typing import Any, Final, TypeAlias

from runqueue.queueing._errors import RunqueueError

Record: TypeAlias = tuple[int, Any, Any, Any, Any, Any]
"""One queued call, see `_batch`."""
WIDTH: Final = 6
"""Items of a record. All records have as many, so that they can lie flat in a list, item behind item."""
Stretch: TypeAlias = tuple[Record, int, int]
"""A record and a range of its entries: the first, and the one after the last."""


def as_records(flat: list[Any]) -> Iterator[Record]:
    """Flat records as tuples."""
    return zip(*[iter(flat)] * WIDTH, strict=True)


class JoinError(RunqueueError):
    """Raised when joined fragments cannot be cut apart. It is a defect of the encoder."""


class Joined:
    """
    Fragments of one record that were encoded in one go, with commas between them. They are cut apart only where a batch
    ends inside of the record, or is halved; most never are.

    Args:
        joined: The fragments.
        count: Their number.
        tail: The bytes that each fragment ends with and that stand nowhere else in them.
    """

    __slots__ = ("count", "joined", "tail")

    def __init__(self, joined: bytes, count: int, tail: bytes) -> None:
        self.joined: bytes = joined
        self.count: int = count
        self.tail: bytes = tail

    def cut(self) -> list[bytes]:
        """
        The fragments, one by one.

        Raises:
            JoinError: The tail stands elsewhere, too.
        """
        tail = self.tail
        pieces = [piece + tail for piece in self.joined.split(tail + b",")]
        pieces[-1] = pieces[-1].removesuffix(tail)
        if len(pieces) != self.count:
            raise JoinError(f"{self.count} fragments that came joined come apart as {len(pieces)}")
        return pieces


class Slice:
    """
    A stretch of one record, with the fragments of its entries.

    Args:
        record: The record.
        start: The index of the slice's first entry in the record.
        pieces: The fragments of that entry and of the following ones.
    """

    __slots__ = ("_base", "_joined", "_keys", "_pieces", "allowed", "count", "record", "screened", "size", "start")

    def __init__(self, record: Record, start: int, pieces: list[bytes] | Joined) -> None:
        self.record: Record = record
        self.start: int = start
        self.screened: int = 0
        """How many names were barred when this slice was last screened."""
        self.allowed: int = maxsize
        """The bound of bytes that every fragment was last compared with; fragments within it need no new comparison."""
        self._pieces = pieces  # like `_keys`, shared by all slices that are cut from this one
        self._base = start  # the index of the entry that the first piece belongs to
        self._keys: list[Any] | None = None
        if isinstance(pieces, Joined):
            self.count: int = pieces.count
            self._joined: bytes | None = pieces.joined
            self.size: int = len(pieces.joined) + 1
        else:
            self.count = len(pieces)
            self._joined = None
            self.size = sum(map(len, pieces)) + len(pieces)

    @property
    def joined(self) -> bytes:
        """The fragments, with commas between them."""
        if self._joined is None:
            self._joined = b",".join(self.pieces)
        return self._joined

    @property
    def pieces(self) -> list[bytes]:
        """The fragments. The caller must not change the list."""
        pieces, at = self._apart(), self.start - self._base
        return pieces if len(pieces) == self.count else pieces[at : at + self.count]

    @property
    def kind(self) -> int:
        return int(self.record[0])

    @property
    def stop(self) -> int:
        return self.start + self.count

    @property
    def weight(self) -> int:
        return self.count if self.record[1] else 0  # a final status has no entries

    def piece(self, at: int) -> bytes:
        """The fragment at this index of the slice."""
        return self._apart()[self.start - self._base + at]

    def keys(self) -> list[Any]:
        """The key of each entry."""
        at = self.start - self._base
        return self._all_keys()[at : at + self.count]

    def items(self) -> Iterator[tuple[Any, bytes]]:
        """The key and fragment of each entry. Nothing is copied, so that a reader may stop early at no cost."""
        keys, pieces, base = self._all_keys(), self._apart(), self._base
        for at in range(self.start - base, self.stop - base):
            yield keys[at], pieces[at]

    def stretches(self) -> Iterator[Stretch]:
        yield self.record, self.start, self.stop

    def split(self, count: int) -> tuple[Slice, Slice]:
        """The first *count* entries, and the others."""
        return self.stretch(0, count), self.stretch(count, self.count)

    def stretch(self, start: int, stop: int) -> Slice:
        """The entries from *start* to before *stop*, counted within this slice."""
        pieces, at = self._apart(), self.start - self._base
        part = Slice.__new__(Slice)
        part.record, part.start = self.record, self.start + start
        part.screened, part.allowed = self.screened, self.allowed
        part._pieces, part._base, part._keys, part._joined = pieces, self._base, self._keys, None
        part.count = stop - start
        if 2 * part.count <= self.count:
            part.size = _size(pieces[at + start : at + stop])
        else:
            part.size = self.size - _size(pieces[at : at + start]) - _size(pieces[at + stop : at + self.count])
        return part

    def fitting(self, count: int, size: int) -> int:
        """How many of the first entries fit into *count* entries and *size* bytes."""
        if self.count <= count and self.size <= size:
            return self.count
        if not count or size <= 0:
            return 0
        fits, at = 0, self.start - self._base
        for piece in self._apart()[at : at + min(count, self.count)]:
            size -= len(piece) + 1
            if size < 0:
                break
            fits += 1
        return fits

    def keyed(self) -> Iterator[tuple[Any, Slice]]:
        """The key of each entry, with a slice of this entry alone."""
        for at, key in enumerate(self.keys()):
            yield key, self.stretch(at, at + 1)

    def _apart(self) -> list[bytes]:
        if isinstance(self._pieces, Joined):
            self._pieces = self._pieces.cut()
        return self._pieces

    def _all_keys(self) -> list[Any]:
        if self._keys is None:
            self._keys = list(islice(self.record[1], self._base, self._base + len(self._apart())))
        return self._keys

    def __repr__(self) -> str:
        return f"<Slice kind={self.kind} {self.start}:{self.stop} bytes={self.size}>"


class Pack:
    """
    Whole records of one kind, in order, encoded in one go, with commas between their fragments.

    Args:
        records: One or more records.
        joined: The fragments of all of them.
        tails: For each record, the bytes that its fragments end with and that stand nowhere else in them.
        count: The number of entries.
    """

    __slots__ = ("_slices", "count", "joined", "record", "records", "size", "tails")

    def __init__(self, records: Sequence[Record], joined: bytes, tails: Sequence[bytes], count: int) -> None:
        self.record: Record = records[0]
        self.records: Sequence[Record] = records
        self.joined: bytes = joined
        self.tails: Sequence[bytes] = tails
        self.count: int = count
        self.size: int = len(joined) + 1
        self._slices: list[Slice] | None = None

    @property
    def kind(self) -> int:
        return int(self.record[0])

    @property
    def weight(self) -> int:
        return self.count

    def keys(self) -> list[Any]:
        """The key of each entry."""
        return list(chain.from_iterable(record[1] for record in self.records))

    def stretches(self) -> Iterator[Stretch]:
        for record in self.records:
            yield record, 0, len(record[1])

    def slices(self) -> list[Slice]:
        """
        One slice for each record.

        Raises:
            JoinError: There are fewer tails than fragments.
        """
        if self._slices is None:
            self._slices = list(self._cut())
        return self._slices

    def _cut(self) -> Iterator[Slice]:
        joined, at, last = self.joined, 0, len(self.records) - 1
        for number, (record, tail) in enumerate(zip(self.records, self.tails, strict=True)):
            count, mark = len(record[1]), tail + b","
            end = len(joined) + 1 if number == last else at
            for _ in range(count if number < last else 0):
                end = joined.find(mark, end) + len(mark)
                if end < at + len(mark):
                    raise JoinError(f"record {number} of {last + 1} that came joined does not come apart")
            yield Slice(record, 0, Joined(joined[at : end - 1], count, tail))
            at = end

    def __repr__(self) -> str:
        return f"<Pack kind={self.kind} records={len(self.records)} entries={self.count} bytes={self.size}>"


Part: TypeAlias = "Slice | Pack"


def _size(pieces: list[bytes]) -> int:
    return sum(map(len, pieces)) + len(pieces)
