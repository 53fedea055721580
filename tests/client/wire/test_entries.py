"""Values of log calls, from the call to the server: valid ones are sent exactly, and bad ones fail alone, by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import runqueue
from runqueue import Entry, FlushError
from support.proxy import ScriptedServer
from support.wire_log import entries

RUN = "a" * 32


class Tensor:
    """Like a tensor of torch: floats have no `__index__`, and its value may change after the call."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> float:
        return float(self.value)

    def __index__(self) -> int:
        if not isinstance(self.value, int):
            raise TypeError("only integer tensors of a single element can be converted to an index")
        return self.value

    def __int__(self) -> int:
        return int(self.value)

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"tensor({self.value})"


class Broken:
    """Fails at each use, like a tensor of a lost device."""

    def __float__(self) -> float:
        raise RuntimeError("the device is lost")

    def __index__(self) -> int:
        raise RuntimeError("the device is lost")

    def __str__(self) -> str:
        raise RuntimeError("the device is lost")

    __repr__ = __str__


class LooseMapping(Mapping[str, float]):
    """A mapping that is not a dict."""

    def __getitem__(self, key: str) -> float:
        return {"a": 1.0, "b": 2.0}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2


def logged(server: ScriptedServer, kind: str) -> list[dict[str, Any]]:
    """All entries of one kind that the server has received."""
    return [entry for request in server.to("runs/log-batch") for entry in entries(request, kind)]


def only_failure(client: runqueue.Client) -> runqueue.OperationFailure:
    """The single failure that the next flush reports."""
    with pytest.raises(FlushError) as caught:
        client.flush()
    (failure,) = caught.value.failures
    assert failure.final and failure.run_id == RUN and failure.count == len(failure.entries)
    return failure


# -- what can be converted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (True, 1.0),
        (2**63, 2.0**63),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.float16(0.5), 0.5),
        (np.longdouble(0.25), 0.25),
        (np.int8(-7), -7.0),
        (np.uint64(2**64 - 1), float(2**64 - 1)),
        (np.bool_(True), 1.0),
        (np.array(0.25), 0.25),
        (np.float64("nan"), "NaN"),
        (np.array(np.inf), "Infinity"),
        (-np.float32(np.inf), "-Infinity"),
        (Decimal("0.1"), 0.1),
        (Decimal("-Infinity"), "-Infinity"),
        (Fraction(1, 3), 1 / 3),
        (Tensor(0.75), 0.75),
        (5e-324, 5e-324),
        (-0.0, -0.0),
    ],
    ids=repr,
)
def test_values_that_float_converts_are_sent_exactly(
    client: runqueue.Client, server: ScriptedServer, value: Any, number: float | str
) -> None:
    """By both forms of the call, with new and with cached keys."""
    client.log_metrics(RUN, {"m": value, "plain": 1.0})
    client.log_metric(RUN, "m", value)
    client.log_metrics(RUN, {"m": value, "plain": 1.0})
    client.flush()
    sent = [point["value"] for point in logged(server, "metrics") if point["key"] == "m"]
    assert sent == [number] * 3
    if isinstance(number, float):
        assert all(math.copysign(1, each) == math.copysign(1, number) for each in sent)


@pytest.mark.parametrize(
    ("step", "sent"),
    [
        (None, 0),
        (True, 1),
        (3.0, 3),
        (-3, -3),
        (np.int64(7), 7),
        (np.float32(7.0), 7),
        (np.array(7), 7),
        (Decimal("7.0"), 7),
        (Decimal(10) ** 3, 1000),
        (Fraction(14, 2), 7),
        (Tensor(7), 7),
        (Tensor(7.0), 7),
        (2**63 - 1, 2**63 - 1),
        (-(2**63), -(2**63)),
        (float(2**62), 2**62),
    ],
    ids=repr,
)
def test_a_step_or_timestamp_may_be_any_whole_number(
    client: runqueue.Client, server: ScriptedServer, step: Any, sent: int
) -> None:
    """Any type that loses nothing as an int. A step may be negative, a time may not."""
    client.log_metrics(RUN, {"a": 1.0}, step=step)
    client.log_metric(RUN, "a", 1.0, step)
    if sent >= 0 and step is not None:
        client.log_metrics(RUN, {"b": 1.0}, timestamp=step)
        client.log_metric(RUN, "b", 1.0, None, step)
    client.flush()
    points = logged(server, "metrics")
    assert {point["step"] for point in points if point["key"] == "a"} == {sent}
    assert {point["timestamp"] for point in points if point["key"] == "b"} <= {sent}
    assert all(type(point[name]) is int for point in points for name in ("step", "timestamp"))


def test_all_metrics_of_a_call_have_one_timestamp(client: runqueue.Client, server: ScriptedServer) -> None:
    """The time of the call, in milliseconds."""
    client.log_metrics(RUN, dict.fromkeys(map(str, range(1_000)), 1.0))
    client.flush()
    (stamp,) = {point["timestamp"] for point in logged(server, "metrics")}
    assert 1_600_000_000_000 < stamp < 5_000_000_000_000


def test_changes_after_the_call_are_not_sent(client: runqueue.Client, server: ScriptedServer) -> None:
    """Of a dict, or of a tensor, a 0-d array or a list in it."""
    tensor, scalar, items = Tensor(1.0), np.array(1.0), [1]
    step = Tensor(1)
    metrics = {"tensor": tensor, "array": scalar}
    params = {"list": items, "tensor": tensor}
    dataset_tags = {"k": "1"}
    client.log_metrics(RUN, metrics, step=step)  # type: ignore[arg-type]
    client.log_params(RUN, params)
    client.set_tags(RUN, params)
    client.log_inputs(RUN, [runqueue.Dataset("n", "d", tags=dataset_tags)])
    tensor.value, scalar[()], step.value = 2.0, 2.0, 2
    items.append(2)
    metrics.clear()
    params.clear()
    dataset_tags["k"] = "2"
    client.flush()
    points = logged(server, "metrics")
    assert [(point["key"], point["value"], point["step"]) for point in points] == [
        ("tensor", 1.0, 1),
        ("array", 1.0, 1),
    ]
    expected = [{"key": "list", "value": "[1]"}, {"key": "tensor", "value": "tensor(1.0)"}]
    assert logged(server, "params") == logged(server, "tags") == expected
    (request,) = server.to("runs/log-inputs")
    assert entries(request, "datasets")[0]["tags"] == [{"key": "k", "value": "1"}]


@pytest.mark.parametrize(
    "value", ["text", 1, 1.5, True, None, [1, "a"], np.float32(0.5), Tensor(1), float("nan"), b"b"]
)
def test_params_and_tags_are_sent_as_their_str(client: runqueue.Client, server: ScriptedServer, value: Any) -> None:
    """By the calls for one entry and by those for many."""
    client.log_params(RUN, {"a": value})
    client.log_param(RUN, "b", value)
    client.set_tags(RUN, {"a": value})
    client.set_tag(RUN, "b", value)
    client.flush()
    for kind in ("params", "tags"):
        assert logged(server, kind) == [{"key": key, "value": str(value)} for key in "ab"]


def test_any_mapping_may_be_logged(client: runqueue.Client, server: ScriptedServer) -> None:
    """It need not be a dict."""
    client.log_metrics(RUN, LooseMapping())
    client.log_params(RUN, LooseMapping())
    client.set_tags(RUN, LooseMapping())
    client.flush()
    assert [len(logged(server, kind)) for kind in ("metrics", "params", "tags")] == [2, 2, 2]


# -- what cannot -----------------------------------------------------------------------------------------------------

BAD_VALUES: dict[str, Any] = {
    "text": "0.5",
    "numpy text": np.str_("0.5"),
    "bytes": b"0.5",
    "bytearray": bytearray(b"0.5"),
    "memoryview": memoryview(b"0.5"),
    "0-d array of text": np.array("0.5"),
    "None": None,
    "complex": 1 + 2j,
    "numpy complex": np.complex128(1 + 2j),
    "large": 10**400,
    "list": [1.0],
    "array": np.array([1.0, 2.0]),
    "broken": Broken(),
    "object": object(),
}


@pytest.mark.parametrize("value", BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_value_that_is_no_number_fails_alone(client: runqueue.Client, server: ScriptedServer, value: Any) -> None:
    """The failure names run, key and step. Other entries are stored, and the call does not raise."""
    client.log_metrics(RUN, {"first": 1.0, "bad key": value, "last": 2.0}, step=7, timestamp=5)
    client.log_metric(RUN, "bad key", value, step=7, timestamp=5)
    client.log_metric(RUN, "later", 3.0)
    with pytest.raises(FlushError) as caught:
        client.flush()
    named = [entry for failure in caught.value.failures for entry in failure.entries]
    assert [(entry.kind, entry.key, entry.step, entry.timestamp) for entry in named] == [
        ("metric", "bad key", 7, 5)
    ] * 2
    assert {failure.run_id for failure in caught.value.failures} == {RUN}
    text = str(caught.value)
    assert "'bad key' at step 7" in text and RUN in text
    assert [point["key"] for point in logged(server, "metrics")] == ["first", "last", "later"]
    statistics = client.statistics()
    assert (statistics.stored, statistics.failed, statistics.accepted) == (3, 2, 5)


@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_a_complex_number_of_numpy_fails(client: runqueue.Client, server: ScriptedServer) -> None:
    """`float()` would drop its imaginary part with only a warning."""
    client.log_metrics(RUN, {"bad": np.complex128(1 + 2j), "good": 1.0})
    client.log_metric(RUN, "good", 1.0, step=np.complex128(1 + 2j))  # type: ignore[arg-type]
    with pytest.raises(FlushError) as caught:
        client.flush()
    assert [entry.key for failure in caught.value.failures for entry in failure.entries] == ["bad", "good"]
    assert [point["key"] for point in logged(server, "metrics")] == ["good"]


@pytest.mark.parametrize("value", ["0.5", None, 1 + 2j, b"0.5"], ids=repr)
def test_the_entry_of_a_bad_value_holds_it_as_given(client: runqueue.Client, value: Any) -> None:
    """If the value cannot change, it is the very object."""
    client.log_metric(RUN, "bad", value, step=3, timestamp=4)
    failure = only_failure(client)
    assert list(failure.entries) == [Entry("metric", "bad", value, 3, 4)]


BAD_STEPS: dict[str, Any] = {
    "fraction": 1.5,
    "text": "7",
    "bytes": b"7",
    "too large": 2**63,
    "too small": -(2**63) - 1,
    "nan": math.nan,
    "infinite": math.inf,
    "numpy fraction": np.float64(1.5),
    "Decimal fraction": Decimal("1.5"),
    "complex": 1j,
    "list": [1],
    "array": np.array([1, 2]),
    "tensor fraction": Tensor(1.5),
    "broken": Broken(),
}


@pytest.mark.parametrize("step", BAD_STEPS.values(), ids=BAD_STEPS)
@pytest.mark.parametrize("name", ["step", "timestamp"])
def test_a_step_or_timestamp_that_is_no_whole_number_fails_its_call_alone(
    client: runqueue.Client, server: ScriptedServer, name: str, step: Any
) -> None:
    """The call does not raise. The failure's entries hold the step as it was given, and other calls are stored."""
    client.log_metrics(RUN, {"good": 1.0}, step=1)
    client.log_metrics(RUN, {"bad": 1.0, "bad too": 2.0}, **{name: step})
    client.log_metrics(RUN, {"good": 2.0}, step=2)
    failure = only_failure(client)
    assert [(entry.key, entry.value) for entry in failure.entries] == [("bad", 1.0), ("bad too", 2.0)]
    assert [getattr(entry, name) for entry in failure.entries] == [step, step]  # the same, or equal
    assert {type(getattr(entry, name)) for entry in failure.entries} == {type(step)}
    assert name in str(failure.error)
    assert [point["value"] for point in logged(server, "metrics")] == [1.0, 2.0]
    with pytest.raises(FlushError):  # the single form too
        client.log_metric(RUN, "bad", 1.0, **{name: step})
        client.flush()


def test_a_negative_timestamp_fails_its_call_alone(client: runqueue.Client, server: ScriptedServer) -> None:
    """MLflow's times are counted from the epoch."""
    client.log_metric(RUN, "bad", 1.0, timestamp=-1)
    client.log_metric(RUN, "good", 1.0, timestamp=0)
    failure = only_failure(client)
    assert [entry.timestamp for entry in failure.entries] == [-1]
    assert [point["key"] for point in logged(server, "metrics")] == ["good"]


@pytest.mark.parametrize("method", ["log_params", "set_tags"])
@pytest.mark.parametrize("value", [Broken(), 10**5000, "\ud800"], ids=["broken", "huge", "surrogate"])
def test_a_value_without_a_valid_str_fails_alone(
    client: runqueue.Client, server: ScriptedServer, method: str, value: Any
) -> None:
    """Its `str()` raises, or UTF-8 cannot encode it."""
    getattr(client, method)(RUN, {"first": 1, "bad key": value, "last": 2})
    failure = only_failure(client)
    assert [entry.key for entry in failure.entries] == ["bad key"]
    assert failure.operation == method
    kind = {"log_params": "params", "set_tags": "tags"}[method]
    assert [entry["key"] for entry in logged(server, kind)] == ["first", "last"]


@pytest.mark.parametrize("key", [1, None, b"k", ("a",), "\udfff"], ids=repr)
@pytest.mark.parametrize("method", ["log_metrics", "log_params", "set_tags"])
def test_a_key_that_is_no_text_fails_alone(
    client: runqueue.Client, server: ScriptedServer, method: str, key: Any
) -> None:
    """The failure holds it as it was given, and can be printed."""
    getattr(client, method)(RUN, {"first": 1, key: 2, "last": 3})
    failure = only_failure(client)
    assert [entry.key for entry in failure.entries] == [key]
    str(failure.error).encode()
    kind = {"log_metrics": "metrics", "log_params": "params", "set_tags": "tags"}[method]
    assert [entry["key"] for entry in logged(server, kind)] == ["first", "last"]


BAD_TAGS: dict[str, Callable[[], Any]] = {
    "broken": Broken,
    "huge": lambda: 10**5000,
    "surrogate": lambda: "\ud800",
    "null": lambda: "\0",
}


@pytest.mark.parametrize("make", BAD_TAGS.values(), ids=BAD_TAGS)
def test_a_bad_tag_of_create_run_fails_alone(
    client: runqueue.Client, server: ScriptedServer, make: Callable[[], Any]
) -> None:
    """It is sent by log-batch, and the run is created."""
    server.fail("runs/create", _created("r1"), times=None)
    run = client.create_run("0", tags={"first": 1, "bad": make(), "last": 2})
    try:
        client.flush()
    except FlushError as error:
        assert [entry.key for failure in error.failures for entry in failure.entries] == ["bad"]
    assert run.run_id == "r1"
    (request,) = server.to("runs/create")
    sent = {tag["key"]: tag["value"] for tag in [*request.json["tags"], *logged(server, "tags")]}
    assert sent["first"] == "1" and sent["last"] == "2"
    assert sent.get("bad", "\0") == "\0"


def _created(run_id: str) -> Any:
    from support.proxy import Fault

    return Fault.answer(200, {"run": {"info": {"run_id": run_id}}})


def test_every_body_is_strict_json(client: runqueue.Client, server: ScriptedServer) -> None:
    """No NaN, no name twice in an object, and valid UTF-8."""

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len({key for key, _ in pairs}) == len(pairs)
        return dict(pairs)

    def no_constant(text: str) -> None:
        raise AssertionError(f"a bare {text}")

    client.log_metrics(RUN, {"a": math.nan, 'q"\\/\b\n\0%s %b %%': math.inf, "\N{SNOWMAN}": 1}, model_id='m"', step=1)
    client.log_metrics(RUN, {"a": 0.5, 'q"\\/\b\n\0%s %b %%': 2, "\N{SNOWMAN}": 1}, model_id='m"', step=1)
    client.log_params(RUN, {'p"\x7f\u2028': 'v"\x00\x1f'})
    client.flush()
    (request,) = server.to("runs/log-batch")
    json.loads(request.body.decode(), object_pairs_hook=no_duplicates, parse_constant=no_constant)
    assert [point["key"] for point in entries(request, "metrics")][1::3] == ['q"\\/\b\n\0%s %b %%'] * 2
