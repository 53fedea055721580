"""The encoder and the bodies: each entry is in the JSON exactly as it was logged, and a bad one fails alone."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue import Dataset, Entry
from runqueue.queueing import Batch, Record, Slice
from runqueue.queueing.batches._batch import DATASET, METRIC, PARAM, RUN, STATUS, TAG, record_of
from runqueue.wire._bodies import create_run_body, log_batch_body, log_inputs_body, status_body
from runqueue.wire._encoder import Encoder
from runqueue.wire._limits import ENVELOPE_BYTES, MAX_KEY, MAX_PARAM_VALUE, MAX_TAG_VALUE
from runqueue.wire._records import MILLISECOND, InvalidValue, NewRun, entries_of

CHARACTERS = st.characters(exclude_categories=["Cs"])
TEXT = st.text(CHARACTERS)
KEYS = st.text(CHARACTERS, min_size=1, max_size=MAX_KEY)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
NUMBERS = st.one_of(
    FLOATS, st.booleans(), st.integers(-(2**1023), 2**1023), st.fractions(), st.decimals(allow_nan=False)
)
STEPS = st.integers(-(2**63), 2**63 - 1)
STAMPS = st.integers(0, 2**63 - 1)
SURROGATES = st.text(st.characters(categories=["Cs"]), min_size=1)

NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def encoded(record: Record, encoder: Encoder | None = None, memory: dict[Any, Any] | None = None) -> list[Any]:
    """The JSON object of each entry, or the error that it fails with."""
    pieces, faults = (encoder or Encoder()).encode(record, {} if memory is None else memory)
    apart = Slice(record, 0, pieces).pieces
    return [faults[at] if faults and at in faults else json.loads(piece) for at, piece in enumerate(apart)]


def metric(values: Mapping[Any, Any], timestamp: Any = 1, step: Any = 0) -> Record:
    """A record of metrics as the clients queue it; *timestamp* in ms."""
    return record_of(
        METRIC, values, timestamp if isinstance(timestamp, InvalidValue) else timestamp * MILLISECOND, step
    )


def as_float(sent: object) -> float:
    """The value that MLflow reads: a JSON number, or one of three texts."""
    if isinstance(sent, str):
        return NOT_FINITE[sent]
    assert isinstance(sent, (int, float))
    return float(sent)


def same(one: float, other: float) -> bool:
    """Whether two floats are equal, with the sign of zero; NaN equals NaN."""
    return (math.isnan(one) and math.isnan(other)) or (
        one == other and math.copysign(1, one) == math.copysign(1, other)
    )


def batch(*records: Record) -> Batch:
    """A batch with all entries of the records."""
    encoder = Encoder()
    return Batch.of(1, [Slice(record, 0, encoder.encode(record, {})[0]) for record in records])


def mlflow_cuts(text: str, longest: int) -> str:
    """The text as MLflow's own function cuts it."""
    from mlflow.utils import _truncate_and_ellipsize

    return str(_truncate_and_ellipsize(text, longest))  # type: ignore[no-untyped-call]


# -- metrics ---------------------------------------------------------------------------------------------------------


@given(values=st.dictionaries(KEYS, NUMBERS), step=STEPS, timestamp=STAMPS)
def test_numbers_are_encoded_exactly(values: dict[str, Any], step: int, timestamp: int) -> None:
    """Keys, values, steps and timestamps survive, in order, also if the keys are cached."""
    encoder = Encoder()
    for _ in range(2):  # the second time, all keys are in the cache
        points = encoded(metric(values, timestamp, step), encoder)
        assert [point["key"] for point in points] == list(values)
        for point, value in zip(points, values.values(), strict=True):
            assert same(as_float(point["value"]), float(value))
            assert (point["step"], point["timestamp"]) == (step, timestamp)
            assert type(point["step"]) is int and type(point["timestamp"]) is int
            assert set(point) == {"key", "value", "timestamp", "step"}


@given(value=FLOATS)
def test_numbers_that_are_not_finite_are_encoded_as_texts(value: float) -> None:
    """JSON has no NaN, and a server drops the rest of a batch after one."""
    (point,) = encoded(metric({"m": value}))
    assert isinstance(point["value"], float if math.isfinite(value) else str)
    assert isinstance(point["value"], float) or point["value"] in NOT_FINITE


@given(values=st.dictionaries(KEYS, st.one_of(NUMBERS, st.sampled_from(["1", b"1", None, 1j, [1.0], 10**400, (), {}]))))
def test_values_that_are_no_numbers_fail_alone(values: dict[str, Any]) -> None:
    """The numbers of the same call are sent, and each other entry is named."""
    for key, value, sent in zip(values, values.values(), encoded(metric(values)), strict=True):
        if isinstance(value, (bool, int, float, Fraction, Decimal)) and value != 10**400:
            assert sent["key"] == key and same(as_float(sent["value"]), float(value))
        else:
            assert isinstance(sent, Exception)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("0.5", "'0.5'"),
        (b"0.5", "b'0.5'"),
        (None, "None"),
        (1 + 2j, "(1+2j)"),
        ([1.0], "[1.0]"),
        (10**400, "10000"),
        (10**5000, "int"),
        (Decimal("sNaN"), "sNaN"),
        (Fraction(10**400), "Fraction"),
        (InvalidValue("x", "said before"), "said before"),
        ("x" * 10_000, "xxx..."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_error_of_a_value_quotes_it_in_short(value: object, words: str) -> None:
    """However long it is."""
    good, bad = encoded(metric({"good": 1, "bad": value}))
    assert good["value"] == 1
    assert isinstance(bad, Exception) and words in str(bad)
    assert len(str(bad)) < 250


@pytest.mark.parametrize(
    ("timestamp", "step", "words"),
    [
        (1, 2**63, "step 9223372036854775808 does not fit"),
        (1, -(2**63) - 1, "step -9223372036854775809 does not fit"),
        (1, InvalidValue("7", "step '7' is text"), "step '7' is text"),
        (2**63, 1, "timestamp 9223372036854775808 does not fit"),
        (-1, 1, "timestamp -1 is negative"),
        (InvalidValue(1.5, "timestamp 1.5 is"), 1, "timestamp 1.5 is"),
        (1, 10**5000, "step"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_bad_step_or_timestamp_fails_every_point_of_its_call(timestamp: object, step: object, words: str) -> None:
    """All points of a call have the same step and timestamp."""
    first, second = encoded(metric({"a": 1.0, "b": 2.0}, timestamp, step))
    assert words in str(first) and words in str(second)


def test_each_point_names_its_model_and_dataset() -> None:
    """By the field names of MLflow's REST API."""
    (point,) = encoded(record_of(METRIC, {"m": 1.0}, MILLISECOND, 2, "m-1", ("iris", "abc")))
    assert (point["model_id"], point["dataset_name"], point["dataset_digest"]) == ("m-1", "iris", "abc")


@pytest.mark.parametrize(
    ("model_id", "dataset"), [(7, None), ("\ud800", None), ("m", ("\udfff", "d")), ("m", ("n", 1))]
)
def test_a_bad_model_or_dataset_fails_its_call(model_id: Any, dataset: Any) -> None:
    """They have to be text, and valid Unicode."""
    for sent in encoded(record_of(METRIC, {"a": 1.0, "b": 2.0}, MILLISECOND, 2, model_id, dataset)):
        assert isinstance(sent, Exception)


# -- params, tags ----------------------------------------------------------------------------------------------------


@given(values=st.dictionaries(KEYS, st.one_of(TEXT, st.integers(), FLOATS, st.booleans(), st.none())))
@pytest.mark.parametrize("kind", [PARAM, TAG])
def test_texts_are_encoded_exactly(kind: int, values: dict[str, Any]) -> None:
    """Unicode, control characters and quotes survive; other values are sent as their `str()`."""
    sent = encoded(record_of(kind, values, True))
    assert [(each["key"], each["value"]) for each in sent] == [(key, str(value)) for key, value in values.items()]


@given(text=SURROGATES, around=TEXT)
def test_lone_surrogates_fail_alone(text: str, around: str) -> None:
    """As a key of any kind, and as a value. Other entries of the call are sent."""
    bad = around[:100] + text[:100]
    for record in (
        metric({"a": 1.0, bad: 2.0, "z": 3.0}),
        record_of(PARAM, {"a": "1", bad: "2", "z": "3"}),
        record_of(TAG, {"a": "1", bad: "2", "z": "3"}, True),
        record_of(PARAM, {"a": "1", "b": bad, "z": "3"}),
        record_of(TAG, {"a": "1", "b": bad, "z": "3"}, True),
    ):
        first, second, third = encoded(record)
        assert (first["key"], third["key"]) == ("a", "z")
        assert isinstance(second, Exception)
        assert "surrogate" in str(second)
        str(second).encode()  # the message itself can be written anywhere


@pytest.mark.parametrize("key", [1, None, 1.5, b"k", ("a", "b"), True])
def test_a_key_that_is_no_text_fails_alone(key: object) -> None:
    """The error names its type."""
    for record in (
        metric({"a": 1.0, key: 2.0}),
        record_of(PARAM, {"a": 1, key: 2}),
        record_of(TAG, {"a": 1, key: 2}, True),
    ):
        good, bad = encoded(record)
        assert good["key"] == "a"
        assert type(key).__name__ in str(bad)


def test_an_int_that_python_refuses_to_convert_fails_alone() -> None:
    """An int of more than 4,300 digits has no `str()`. Other params of the call are sent."""
    for record in (record_of(PARAM, {"a": 1, "huge": 10**5000}), record_of(TAG, {"a": 1, "huge": 10**5000}, True)):
        good, bad = encoded(record)
        assert good == {"key": "a", "value": "1"}
        assert isinstance(bad, Exception)


# -- cuts ------------------------------------------------------------------------------------------------------------


@given(length=st.integers(0, 700), character=st.sampled_from("aä\U0001f600"))
def test_keys_are_cut_as_mlflow_cuts_them(length: int, character: str) -> None:
    """To 250 characters, not bytes, with three dots at the end. MLflow's own function does the same."""
    key = character * length
    expected = mlflow_cuts(key, MAX_KEY)
    for record in (metric({key: 1.0}), record_of(PARAM, {key: ""}), record_of(TAG, {key: ""}, True)):
        (sent,) = encoded(record)
        assert sent["key"] == expected


@pytest.mark.parametrize(("kind", "longest"), [(PARAM, MAX_PARAM_VALUE), (TAG, MAX_TAG_VALUE)])
@pytest.mark.parametrize("beyond", [-1, 0, 1, 1_000])
def test_values_are_cut_as_mlflow_cuts_them(kind: int, longest: int, beyond: int) -> None:
    """To 6,000 characters of a param, and 8,000 of a tag."""
    from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH

    assert (MAX_PARAM_VALUE, MAX_TAG_VALUE) == (MAX_PARAM_VAL_LENGTH, MAX_TAG_VAL_LENGTH)
    encoder = Encoder()
    text = "ü" * (longest + beyond)
    (sent,) = encoded(record_of(kind, {"k": text}, True), encoder)
    assert sent["value"] == mlflow_cuts(text, longest)
    assert encoder.cut == (1 if beyond > 0 else 0)


def test_cuts_are_counted_and_one_warning_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The warning names the first text that was cut, and its length."""
    encoder = Encoder()
    memory: dict[Any, Any] = {}
    with caplog.at_level(logging.WARNING, "runqueue"):
        for step in range(5):
            encoded(metric({"k" * 300: 1.0}, step=step), encoder, memory)
        encoded(record_of(PARAM, {"p": "v" * 7_000}), encoder, memory)
    assert encoder.cut == 6
    (warning,) = caplog.records
    assert "kkk" in warning.getMessage() and "300" in warning.getMessage() and "250" in warning.getMessage()


@pytest.mark.parametrize("kind", [METRIC, PARAM, TAG])
def test_two_keys_that_collide_after_the_cut_are_reported(kind: int) -> None:
    """The first key is sent, in this call and the next. The other one fails alone."""
    first, second, cut = "k" * 250 + "1", "k" * 250 + "2", "k" * 247 + "..."
    encoder, memory = Encoder(), dict[Any, Any]()
    kept, collided = encoded(record_of(kind, {first: 1, second: 2}, 1, 1, None, None), encoder, memory)
    assert kept["key"] == cut
    assert "cut" in str(collided)
    (kept, collided, literal, other) = encoded(
        record_of(kind, {first: 1, second: 2, cut: 3, "other": 4}, 1, 1, None, None), encoder, memory
    )
    assert kept["key"] == cut and other["key"] == "other"
    assert isinstance(collided, Exception) and isinstance(literal, Exception)
    (in_another_run,) = encoded(record_of(kind, {second: 2}, 1, 1, None, None), encoder, {})
    assert in_another_run["key"] == cut


@pytest.mark.parametrize("kind", [METRIC, PARAM, TAG])
def test_a_cut_key_may_not_equal_a_literal_one(kind: int) -> None:
    """The key that is cut to the text of an existing key fails."""
    encoder, memory = Encoder(), dict[Any, Any]()
    literal = "k" * 247 + "..."
    (kept,) = encoded(record_of(kind, {literal: 1}, 1, 1, None, None), encoder, memory)
    assert kept["key"] == literal
    (collided,) = encoded(record_of(kind, {"k" * 300: 2}, 1, 1, None, None), encoder, memory)
    assert isinstance(collided, Exception)


# -- datasets, runs --------------------------------------------------------------------------------------------------


@given(
    texts=st.tuples(TEXT, TEXT, TEXT, TEXT),
    optional=st.tuples(st.none() | TEXT, st.none() | TEXT),
    tags=st.dictionaries(KEYS, TEXT),
)
def test_datasets_are_encoded_exactly(
    texts: tuple[str, str, str, str], optional: tuple[str | None, str | None], tags: dict[str, str]
) -> None:
    """Schema and profile are left out if they are None."""
    (sent,) = encoded(record_of(DATASET, (Dataset(*texts, *optional, tags),)))
    expected = dict(zip(("name", "digest", "source_type", "source"), texts, strict=True))
    expected |= {key: text for key, text in zip(("schema", "profile"), optional, strict=True) if text is not None}
    assert sent == {"dataset": expected, "tags": [{"key": key, "value": text} for key, text in tags.items()]}


@pytest.mark.parametrize(
    "bad",
    [
        InvalidValue("x", "no dataset"),
        Dataset(7, "d"),  # type: ignore[arg-type]
        Dataset("n", None),  # type: ignore[arg-type]
        Dataset("n", "d", schema=b"{}"),  # type: ignore[arg-type]
        Dataset("\ud800", "d"),
        Dataset("n", "d", tags={"k": 1}),  # type: ignore[dict-item]
        Dataset("n", "d", tags={"k": "\udc00"}),
    ],
)
def test_a_bad_dataset_fails_alone(bad: object) -> None:
    """The other datasets of its call are sent."""
    first, second, third = encoded(record_of(DATASET, (Dataset("a", "1"), bad, Dataset("z", "2"))))
    assert (first["dataset"]["name"], third["dataset"]["name"]) == ("a", "z")
    assert isinstance(second, Exception)


@given(run_id=st.text(CHARACTERS, min_size=1), metrics=st.dictionaries(KEYS, FLOATS), texts=st.dictionaries(KEYS, TEXT))
def test_bodies_are_the_json_that_mlflow_documents(
    run_id: str, metrics: dict[str, float], texts: dict[str, str]
) -> None:
    """They equal the output of `json.dumps`, and absent kinds are left out."""
    pairs = [{"key": key, "value": text} for key, text in texts.items()]
    points = [
        {"key": key, "value": value if math.isfinite(value) else str(value), "timestamp": 5, "step": 3}
        for key, value in metrics.items()
    ]
    body = json.loads(
        log_batch_body(run_id, batch(metric(metrics, 5, 3), record_of(TAG, texts, True), record_of(PARAM, texts)))
    )
    for point in body["metrics"]:
        point["value"] = as_float(point["value"]) if math.isfinite(as_float(point["value"])) else point["value"]
    words = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    points = [{**point, "value": words.get(str(point["value"]), point["value"])} for point in points]
    assert body == {"run_id": run_id, "metrics": points, "params": pairs, "tags": pairs}
    assert json.loads(log_batch_body(run_id, batch(record_of(TAG, texts, True)))) == {"run_id": run_id, "tags": pairs}


def test_the_envelope_is_never_larger_than_its_constant() -> None:
    """With the longest run id and all kinds, all but the fragments and commas is below ENVELOPE_BYTES."""
    whole = batch(metric({"m": 1.0}), record_of(PARAM, {"p": "1"}), record_of(TAG, {"t": "1"}, True))
    assert len(log_batch_body("r" * 256, whole)) <= whole.size + ENVELOPE_BYTES
    inputs = batch(record_of(DATASET, (Dataset("a", "b"),)))
    assert len(log_inputs_body("r" * 256, inputs)) <= inputs.size + ENVELOPE_BYTES
    assert json.loads(log_inputs_body("r", inputs)) == {
        "run_id": "r",
        "datasets": [
            {"dataset": {"name": "a", "digest": "b", "source_type": "local", "source": ""}, "tags": []},
        ],
    }


@pytest.mark.parametrize("own", [{}, {"a": "1", "b": 'q"\n'}])
@pytest.mark.parametrize("name", [None, 'x"y'])
def test_create_run_carries_name_and_tags(own: dict[str, str], name: str | None) -> None:
    """System tags and the user's tags are one list. Without a name, no name is sent."""
    new = NewRun("12", None, 1_700, name, None, own)
    record = record_of(RUN, ("run",), tuple(own), new)
    riders = batch(record, record_of(TAG, {"r": "2"}, True))
    body = create_run_body(new, "12", {"ours": "0"}, [*riders.pieces(RUN), *riders.pieces(TAG)])
    tags = {"ours": "0", **own, "r": "2"}
    expected: dict[str, Any] = {"experiment_id": "12", "start_time": 1_700}
    expected |= {} if name is None else {"run_name": name}
    assert json.loads(body) == {**expected, "tags": [{"key": key, "value": value} for key, value in tags.items()]}


def test_one_small_body_ends_a_run() -> None:
    """It holds the run, the status and the time."""
    record = record_of(STATUS, (), "FAILED", 1_800)
    assert json.loads(status_body("r", record)) == {"run_id": "r", "status": "FAILED", "end_time": 1_800}


# -- reports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "at", "entry"),
    [
        (metric({"a": 1, "b": "x"}, 5, 3), 1, Entry("metric", "b", "x", 3, 5)),
        (
            metric({"a": InvalidValue(1j, "why")}, InvalidValue("t", "why"), InvalidValue(1.5, "why")),
            0,
            Entry("metric", "a", 1j, 1.5, "t"),
        ),
        (record_of(PARAM, {"a": 1, "b": InvalidValue("o", "why")}), 1, Entry("param", "b", "o")),
        (record_of(TAG, {"a": 1}, True), 0, Entry("tag", "a", 1)),
        (record_of(DATASET, (Dataset("n", "d"),)), 0, Entry("dataset", "n", Dataset("n", "d"))),
        (record_of(RUN, ("run",), (), NewRun("0", None, 1, "name", None, {})), 0, Entry("run", "name")),
        (record_of(STATUS, (), "FAILED", 1), 0, Entry("run", "status", "FAILED")),
    ],
)
def test_an_entry_is_described_as_it_was_given(record: Record, at: int, entry: Entry) -> None:
    """With key, value, step and time, for each kind of record."""
    assert list(entries_of(record, at, at + 1)) == [entry]
