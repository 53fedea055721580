"""Records that are encoded in one go behave exactly like records that are encoded one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, TypeAlias
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue import Dataset
from runqueue.queueing import (
    Batch,
    Bounds,
    Encoding,
    Failure,
    Fragments,
    Joined,
    Lane,
    Ledger,
    Record,
    RejectedError,
    Scope,
    Slice,
    StoreError,
)
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, STATUS, TAG, record_of
from runqueue.queueing.batches._part import JoinError, Pack
from runqueue.wire._bodies import log_batch_body, log_inputs_body
from runqueue.wire._encoder import Encoder
from runqueue.wire._records import MILLISECOND, InvalidValue
from support.engine import bounds, check_lane, encode, fill, inside, lane_of, ledger_of, metrics, named, points

Answer: TypeAlias = "StoreError | str | None"

KEYS: Final = (
    "loss", "acc", "100%", "%b", 'q"\\', "é\U0001f600", "a,b", ',"timestamp":', "k" * 249, "k" * 250,
)  # fmt: skip
ODD_KEYS: Final = ("k" * 247 + "...", "k" * 251, "k" * 300, "\ud800", 7, None)
ODD_VALUES: Final = (
    math.nan, math.inf, -math.inf, -0.0, 0, 1, True, 2**63, 10**400, -(10**400), Decimal("0.1"), Decimal("sNaN"),
    Fraction(1, 3), np.float64(0.1), np.float32(0.1), np.int64(3), np.str_("1"), 1j, "text", b"1", None,
    InvalidValue("x", "why"),
)  # fmt: skip
ODD_WHOLES: Final = (-1, -(2**63), -(2**63) - 1, 2**63 - 1, 2**63, True, InvalidValue("x", "why"))

ANSWERS: Final[tuple[Answer, ...]] = (
    None, None, None, None, RejectedError("no"), RejectedError("name", bars_key=True),
    RejectedError("413", too_large=True), StoreError("batch"), StoreError("lane", scope=Scope.LANE),
    StoreError("store", scope=Scope.STORE), "give back", "log", "smaller",
)  # fmt: skip


@st.composite
def calls(draw: st.DrawFn) -> list[Record]:
    """Metrics of a few recurring key sets, most of them plain, with other kinds between them."""
    oddity = draw(st.integers(0, 12))  # one in so many; 0: none
    odd = st.just(False) if not oddity else st.integers(0, oddity).map(lambda at: at == oddity)
    pool = st.sampled_from(KEYS + ODD_KEYS) if draw(odd) else st.sampled_from(KEYS)
    key_sets = draw(st.lists(st.lists(pool, min_size=1, max_size=9, unique=True), min_size=1, max_size=3))
    records: list[Record] = []
    for at in range(draw(st.integers(0, 40))):
        if draw(st.integers(0, 9)) == 9:
            records.append(draw(st.sampled_from([
                record_of(PARAM, {"p": at, f"p{at}": "v"}), record_of(TAG, {"t": at, "é": 1}, True),
                record_of(DATASET, (Dataset("n", str(at)),)), record_of(STATUS, (), "FINISHED", at),
            ])))  # fmt: skip
            continue
        values = {
            key: draw(st.sampled_from(ODD_VALUES)) if draw(odd) else draw(st.floats(width=32))
            for key in draw(st.sampled_from(key_sets))
        }
        step = draw(st.sampled_from(ODD_WHOLES)) if draw(odd) else at
        stamp = draw(st.sampled_from(ODD_WHOLES)) if draw(odd) else 1_700_000_000_000 + at // 3
        if isinstance(stamp, int):
            stamp *= MILLISECOND
        model = draw(st.sampled_from(["m-1", "m-2", "\ud800", 7])) if draw(odd) else None
        dataset = draw(st.sampled_from([("n", "d"), ("n", 1)])) if draw(odd) else None
        records.append(record_of(METRIC, values, stamp, step, model, dataset))
    return records


@st.composite
def limits(draw: st.DrawFn) -> Bounds:
    return bounds(
        metrics=draw(st.integers(1, 40)),
        params=draw(st.integers(1, 3)),
        entities=draw(st.integers(1, 50)),
        body=draw(st.sampled_from([150, 400, 1_000, 3_000, 1_000_000])),
    )


def facts_of(failures: Sequence[Failure], number: dict[int, int]) -> list[Any]:
    return [
        (number[id(each.record[1])], each.start, each.stop, str(each.error), each.final, each.serial, each.weight)
        for each in failures
    ]


def history(
    encoding: Any, records: list[Record], script: list[Answer], at_first: int, limit: Bounds, ahead: Sequence[bool] = ()
) -> list[Any]:
    """Everything that can be observed of a lane while a store gives these answers; some batches are encoded ahead."""
    lane = Lane("r", encoding, Ledger(), run_exists=True)
    number = {id(record[1]): at for at, record in enumerate(records)}
    waiting = list(records)
    seen: list[Any] = []

    def log(count: int) -> None:
        fill(lane, waiting[:count])
        del waiting[:count]
        lane.close_window()

    log(at_first)
    answers, prepares = iter(script), iter(ahead)
    for _ in range(1_000):
        batch = lane.take(limit)
        check_lane(lane)
        if batch is None:
            if not waiting:
                break
            log(len(waiting))
            continue
        seen.append((batch.count, batch.size, batch.weight, batch.serial, batch.rejections, sorted(batch.groups)))
        seen.append(log_inputs_body("r", batch) if DATASET in batch.groups else log_batch_body("r", batch))
        seen.append(facts_of(list(lane.outstanding(lane.last_closed, StoreError("left"))), number))
        answer = next(answers, None)
        if next(prepares, False):
            lane.prepare(limit)
            check_lane(lane)
        if answer == "log":
            log(5)
        elif answer == "smaller":
            limit = limit.below(limit.body)
        if answer == "give back":
            lane.give_back()
        elif isinstance(answer, StoreError):
            named_alone = batch.count == 1 and STATUS not in batch.groups
            lane.reject(RejectedError("no") if answer.bars_key and not named_alone else answer)
        else:
            lane.store()
        check_lane(lane)
        ledger = ledger_of(lane)
        seen.append((ledger.drawn, ledger.stored, ledger.failed, ledger.in_flight, lane.last_emptied, repr(lane)))
        if answer is not None:
            seen.append([(part.start, part.stop, part.joined) for each in lane.bisection for part in each.slices()])
    assert lane.is_settled
    seen.append(facts_of(lane.take_unreported(lane.last_closed), number))
    return seen


@given(calls(), st.lists(st.sampled_from(ANSWERS), max_size=30), st.integers(0, 40), limits())
def test_packs_change_nothing_that_can_be_seen(
    records: list[Record], script: list[Answer], at_first: int, limit: Bounds
) -> None:
    """Bodies, batches, counts and reports are equal, whatever is logged and answered."""
    packed, single = Encoder(), Encoder()
    expected = history(single.encode.one, records, script, at_first, limit)
    assert history(packed.encode, records, script, at_first, limit) == expected
    assert packed.cut == single.cut


@given(calls(), st.lists(st.sampled_from(ANSWERS), max_size=30), st.integers(0, 40), limits(), st.integers(1, 5))
def test_the_pieces_that_records_are_drawn_in_cannot_be_seen(
    records: list[Record], script: list[Answer], at_first: int, limit: Bounds, piece: int
) -> None:
    """Metric records lie flat until they are needed; every event can fall on the boundary of a piece."""
    expected = history(Encoder().encode, records, script, at_first, limit)
    with patch("runqueue.queueing.lanes._inbox.PIECE", piece):
        assert history(Encoder().encode, records, script, at_first, limit) == expected


def test_of_a_long_window_few_records_are_upright() -> None:
    """A million tuples made in one go would hold up other threads and be walked by the garbage collector."""
    lane = lane_of(*points(5_500))
    lane.close_window()
    (window,) = lane._windows
    assert (len(window.queues[METRIC]), window.counts[METRIC]) == (1, 5_500)
    while (batch := lane.take(bounds(metrics=100))) is not None:
        assert batch.count == 100
        lane.store()
        assert len(window.queues[METRIC]) <= 1_000 + 100
        check_lane(lane)
    assert lane.is_settled and ledger_of(lane).stored == 5_500


@given(calls(), st.lists(st.sampled_from(ANSWERS), max_size=30), st.integers(0, 40), limits(), st.lists(st.booleans()))
def test_to_encode_ahead_changes_nothing_that_can_be_seen(
    records: list[Record], script: list[Answer], at_first: int, limit: Bounds, ahead: list[bool]
) -> None:
    """Whatever becomes of the batch in flight, and whatever the bounds of the next batch are."""
    expected = history(Encoder().encode, records, script, at_first, limit)
    assert history(Encoder().encode, records, script, at_first, limit, ahead) == expected


@given(calls())
def test_many_records_are_encoded_as_each_of_them_is(records: list[Record]) -> None:
    """Joined bytes equal the bytes of the parts; a single odd record makes the encoder refuse."""
    group = [record for record in records if record[0] == METRIC]
    if not group:
        return
    encoder = Encoder()
    apart = [Encoder().encode(record, {}) for record in group]
    made = encoder.encode.many(group, {})
    if made is None:
        assert any(not isinstance(pieces, Joined) for pieces, _ in apart)
        return
    joined, tails = made
    slices = [Slice(record, 0, pieces) for record, (pieces, _) in zip(group, apart, strict=True)]
    assert joined == b",".join(part.joined for part in slices)
    cut = Pack(group, joined, tails, sum(map(len, (record[1] for record in group)))).slices()
    assert [part.pieces for part in cut] == [part.pieces for part in slices]
    assert [(part.record, part.start, part.size) for part in cut] == [(p.record, p.start, p.size) for p in slices]


@pytest.mark.parametrize("keys", [1, 3, 10, 999, 1_000])
def test_a_full_batch_of_plain_metrics_is_a_pack_or_two(keys: int) -> None:
    """The cost of a batch does not grow with the records in it."""
    lane = lane_of(*(metrics(step, **{f"m{at}": step for at in range(keys)}) for step in range(3_000 // keys)))
    lane.close_window()
    while (batch := lane.take(bounds())) is not None:
        assert batch.count == 1_000 or not lane._windows[0]
        assert len(list(batch.parts())) <= 5
        lane.store()


def test_what_was_encoded_ahead_is_not_encoded_again() -> None:
    """Encoding ahead does no work twice."""
    encoded: list[int] = []

    def many(group: Sequence[Record], memory: dict[Any, Any]) -> Any:
        encoded.extend(record[2] for record in group)
        return encode.many(group, memory)

    lane = Lane("r", Encoding(encode.one, many), Ledger(), run_exists=True)
    fill(lane, points(5_500))
    lane.close_window()
    taken = 0
    while (batch := lane.take(bounds())) is not None:
        taken += batch.count
        for _ in range(2):
            lane.prepare(bounds())
            assert encoded == list(range(min(taken + 1_000, 5_500)))
        lane.store()


def test_an_odd_record_costs_only_its_own_pack() -> None:
    """Only the records of that attempt are encoded one by one; packs follow behind them."""
    records: list[Record] = points(5_000)
    records[100] = metrics(100, loss=lambda: None)
    encoded: list[int] = []

    def one(record: Record, memory: dict[Any, Any]) -> Fragments:
        encoded.append(record[2])
        return encode.one(record, memory)

    def many(group: Sequence[Record], memory: dict[Any, Any]) -> Any:
        return None if any(callable(record[1]["loss"]) for record in group) else encode.many(group, memory)

    lane = Lane("r", Encoding(one, many), Ledger(), run_exists=True)
    fill(lane, records)
    lane.close_window()
    batches: list[Batch] = []
    while (batch := lane.take(bounds())) is not None:
        batches.append(batch)
        lane.store()
    assert encoded == list(range(1_000))
    assert [len(list(batch.parts())) for batch in batches] == [1_000, 1, 1, 1, 1]


@pytest.mark.parametrize("body", [500, 5_000, 50_000])
def test_little_is_encoded_in_vain_where_bytes_bind(body: int) -> None:
    """The number of records to encode is estimated from the pack before."""
    encoded = 0

    def many(group: Sequence[Record], memory: dict[Any, Any]) -> Any:
        nonlocal encoded
        encoded += len(group)
        return encode.many(group, memory)

    lane = Lane("r", Encoding(encode.one, many), Ledger(), run_exists=True)
    fill(lane, points(20_000))
    lane.close_window()
    stored: list[Any] = []
    while (batch := lane.take(bounds(body=body))) is not None:
        assert batch.size <= body
        stored += inside(batch)
        lane.store()
    assert [entry[3] for entry in stored] == list(range(20_000))
    assert encoded <= 20_000 * 1.2 + 1_000


def test_an_encoder_whose_packs_do_not_come_apart_costs_the_batch_only() -> None:
    """Such a defect is reported with its entries, and the lane goes on."""

    def many(group: Sequence[Record], memory: dict[Any, Any]) -> Any:
        joined, tails = encode.many(group, memory) or (b"", ())
        return joined, [b"not there"] * len(tails)

    lane = Lane("r", Encoding(encode.one, many), Ledger(), run_exists=True)
    fill(lane, points(10))
    lane.close_window()
    batch = lane.take(bounds(metrics=6))
    assert batch is not None
    with pytest.raises(JoinError):
        list(batch.slices())
    assert lane.reject(RejectedError("halve it"))
    check_lane(lane)
    assert [entry[3] for entry in named(lane.take_unreported(1))] == list(range(6))
    assert lane.take(bounds(metrics=6)) is not None
    lane.store()
    assert (ledger_of(lane).stored, ledger_of(lane).failed, lane.is_settled) == (4, 6, True)


def test_an_encoder_that_raises_for_many_is_asked_for_each() -> None:
    """The failure is attributed to the record that causes it."""

    def many(group: Sequence[Record], memory: dict[Any, Any]) -> Any:
        raise ZeroDivisionError

    lane = Lane("r", Encoding(encode.one, many), Ledger(), run_exists=True)
    fill(lane, points(10))
    lane.close_window()
    batch = lane.take(bounds())
    assert batch is not None and len(inside(batch)) == 10


def test_packs_tell_what_they_hold() -> None:
    """The size in the repr includes the comma behind each fragment, as in that of a slice."""
    pack = Pack(points(2), b"a;,b;", [b";", b";"], 2)
    assert repr(pack) == "<Pack kind=3 records=2 entries=2 bytes=6>"
    assert (pack.keys(), pack.weight) == (["loss", "loss"], 2)
    assert [part.pieces for part in pack.slices()] == [[b"a;"], [b"b;"]]


# -- large calls -----------------------------------------------------------------------------------------------------


class CountedPieces(list[bytes]):
    """Counts the fragments that are copied out of it."""

    copied = 0

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        self.copied += len(found) if isinstance(at, slice) else 1
        return found


@pytest.mark.parametrize("kind", [PARAM, METRIC, TAG])
@pytest.mark.parametrize("barred", [False, True])
def test_a_large_call_is_cut_into_batches_in_linear_time(kind: int, barred: bool) -> None:
    """Each fragment is visited a few times, however many batches the call makes (50,000 params took 2.8 s)."""
    made: list[CountedPieces] = []

    def counting(record: Record, memory: dict[Any, Any]) -> Fragments:
        made.append(CountedPieces(b"x" * 99 for _ in record[1]))
        return made[-1], None

    lane = Lane("r", counting, Ledger(), run_exists=True)
    if barred:
        fill(lane, [record_of(kind, {"k7": 1}, 0)])
        lane.close_window()
        assert lane.take(bounds()) is not None
        lane.reject(RejectedError("name", bars_key=True))
    count = 20_000
    fill(lane, [record_of(kind, {f"k{at}": 1 for at in range(count)}, 0)])
    lane.close_window()
    batches = 0
    while (batch := lane.take(bounds(params=100, tags=100, metrics=100))) is not None:
        assert batch.joined(kind).count(b",") == batch.count - 1
        batches += 1
        lane.store()
    assert batches == count // 100
    assert ledger_of(lane).stored == count - barred
    assert made[-1].copied < 12 * count
