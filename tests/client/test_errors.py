"""The tree of errors, the text of a FlushError, and that all of it survives pickling and copying."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import runqueue
from runqueue import Entry, FlushError, OperationFailure, errors
from runqueue._entities import Entries
from runqueue.errors import RunqueueError, Scope, StoreError
from support.answers import error
from support.proxy import Fault, ScriptedServer

RUN = "a" * 32
CLASSES = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, RunqueueError)]
COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "old pickle": lambda value: pickle.loads(pickle.dumps(value, 0)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def failure(**fields: Any) -> OperationFailure:
    """A failure of one metric, but for what is given."""
    given: dict[str, Any] = {
        "run_id": RUN,
        "operation": "log_metrics",
        "entries": (Entry("metric", "m", 1.0, 3, 5),),
        "error": errors.RejectedError("no"),
        "final": True,
        "count": 1,
    }
    return OperationFailure(**(given | fields))


# -- the tree --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_public_and_documents_its_origin(kind: type[RunqueueError]) -> None:
    """Users and tracebacks read `runqueue.X`."""
    assert kind.__module__ == "runqueue" and kind.__qualname__ == kind.__name__
    assert getattr(runqueue, kind.__name__) is kind
    assert (kind.__doc__ and "aise" in kind.__doc__) or kind is RunqueueError


@pytest.mark.parametrize("name", [name for name in vars(runqueue) if not name.startswith("_")])
def test_every_public_class_names_runqueue_as_its_module(name: str) -> None:
    """Whatever module defines it."""
    value = getattr(runqueue, name)
    if inspect.isclass(value):
        assert value.__module__ == "runqueue"
        assert pickle.loads(pickle.dumps(value)) is value


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "kind", [kind for kind in CLASSES if issubclass(kind, StoreError)], ids=lambda kind: kind.__name__
)
def test_a_store_error_survives_copying(kind: type[StoreError], how: Callable[[Any], Any]) -> None:
    """With its policy."""
    original = kind(
        "what happened", retriable=True, retry_after=7.5, scope=Scope.LANE, rejects_after=3, bars_key=True, code="C"
    )
    copied = how(original)
    assert type(copied) is kind and str(copied) == "what happened"
    assert copied.__dict__ == original.__dict__
    assert (copied.retriable, copied.scope, copied.retry_after, copied.code) == (True, Scope.LANE, 7.5, "C")


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", [errors.ConfigError, errors.CallTypeError, errors.ClosedError, RunqueueError])
def test_other_errors_survive_copying(kind: type[RunqueueError], how: Callable[[Any], Any]) -> None:
    """Type and text."""
    copied = how(kind("what happened"))
    assert type(copied) is kind and str(copied) == "what happened"


# -- FlushError ------------------------------------------------------------------------------------------------------


@pytest.fixture
def flush_error(server: ScriptedServer) -> FlushError:
    """One of a real flush: a run that was not created, a value that cannot be sent, a value that was refused."""
    server.fail("runs/create", Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST", "no experiment")))
    server.fail(
        "runs/log-batch", Fault.answer(400, error("INVALID_PARAMETER_VALUE", "refused")), times=None, when=has_refused
    )
    client = runqueue.Client(server.uri)
    pending = client.create_run("77", run_name="mine")
    client.log_metrics(pending, {"a": 1.0, "b": 2.0}, step=1)
    client.set_terminated(pending)
    for step in range(3):
        client.log_metrics(RUN, {"good": 1.0, "text": "x", "refused": 1.0}, step=step, timestamp=9)
    with pytest.raises(FlushError) as caught:
        client.flush()
    client.__exit__(KeyError, KeyError(), None)
    return caught.value


def has_refused(request: Any) -> bool:
    """Whether the batch has the metric that this server does not like."""
    return any(point["key"] == "refused" for point in request.json.get("metrics", ()))


def test_a_flush_error_names_every_entry(flush_error: FlushError) -> None:
    """By run, operation and cause; a run that was not created with all that is queued for it."""
    found = {
        (getattr(each.run_id, "token", each.run_id) == RUN, each.operation, each.final, str(each.error)): [
            (entry.kind, entry.key, entry.value, entry.step, entry.timestamp) for entry in each.entries
        ]
        for each in flush_error.failures
    }
    refused = (True, "log_metrics", True, "INVALID_PARAMETER_VALUE: refused")
    assert found.pop(refused) == [("metric", "refused", 1.0, step, 9) for step in range(3)]
    text = "a metric value is a number, not the text 'x'"
    assert found.pop((True, "log_metrics", True, text)) == [("metric", "text", "x", step, 9) for step in range(3)]
    cause = "RESOURCE_DOES_NOT_EXIST: no experiment"
    assert found.pop((False, "create_run", False, cause)) == [("run", "mine", None, None, None)]
    assert [entry[1:4] for entry in found.pop((False, "log_metrics", False, cause))] == [("a", 1.0, 1), ("b", 2.0, 1)]
    assert [entry[:3] for entry in found.pop((False, "set_terminated", False, cause))] == [
        ("run", "status", "FINISHED")
    ]
    assert found == {}
    assert flush_error.total == 12


def test_the_text_of_a_flush_error_names_each_run_and_each_cause_once(flush_error: FlushError) -> None:
    """It begins with the counts."""
    lines = str(flush_error).splitlines()
    assert lines[0].startswith("9 of 12 entries were not stored")
    assert "3 of them are still queued" in lines[0]
    heads = [line for line in lines if line.startswith("Failed to perform one or more operations on the run with ID ")]
    assert len(heads) == 2 and sum(RUN in head for head in heads) == 1
    assert sum(line.count("no experiment") for line in lines) == 1
    assert sum(line.count("refused: ") + line.endswith(": refused") for line in lines) == 1
    assert any("metric 'text' at step 0" in line for line in lines)


@pytest.mark.parametrize("how", COPIES.values(), ids=COPIES)
def test_a_flush_error_survives_copying(flush_error: FlushError, how: Callable[[Any], Any]) -> None:
    """With every entry, and with the same text."""
    copied = how(flush_error)
    assert type(copied) is FlushError and str(copied) == str(flush_error)
    assert [list(each.entries) for each in copied.failures] == [list(each.entries) for each in flush_error.failures]
    assert [each.run_id for each in copied.failures] == [each.run_id for each in flush_error.failures]
    assert copied.total == flush_error.total


def test_a_flush_error_can_be_pickled_whatever_was_logged(client: runqueue.Client) -> None:
    """Even with values that cannot be pickled: schedulers pickle the exception of a job."""
    client.log_metric(RUN, "lock", __import__("threading").Lock())
    client.log_metric(RUN, "m", 1.0, step=(lambda: 1))  # type: ignore[arg-type]
    with pytest.raises(FlushError) as caught:
        client.flush()
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_failure_of_which_only_a_count_was_kept_says_how_many() -> None:
    """As those of `client.failures` beyond the first 10,000 entries."""
    assert failure(entries=(), count=12_345).summary() == "log_metrics of 12,345 entries"
    assert failure().summary() == "log_metrics (metric 'm' at step 3)"
    assert failure(entries=(Entry("param", "p", "v"),) * 2, count=2).summary().endswith("2 entries (param 'p', ...)")


# -- Entries ---------------------------------------------------------------------------------------------------------


def test_entries_are_a_lazy_sequence() -> None:
    """Length, indices from both ends, slices, iteration, equality, repr."""
    made: list[int] = []

    def entries(start: int, stop: int) -> Iterator[Entry]:
        for at in range(start, stop):
            made.append(at)
            yield Entry("metric", f"m{at}")

    several = Entries([(3, entries), (0, entries), (1_000_000, lambda start, stop: entries(start + 3, stop + 3))])
    assert len(several) == 1_000_003 and made == []
    assert several[0].key == "m0" and several[3].key == "m3" and several[-1].key == "m1000002"
    assert [each.key for each in several[2:5]] == ["m2", "m3", "m4"]
    assert len(made) == 6
    assert repr(several).endswith("1,000,003 in all)")
    for beyond in (1_000_003, -1_000_004):
        with pytest.raises(IndexError):
            several[beyond]
    few = Entries([(2, entries)])
    assert few == (Entry("metric", "m0"), Entry("metric", "m1")) == tuple(few) and few != () and few != "m"
    assert hash(few) == hash(tuple(few)) and Entry("metric", "m1") in few and few.index(Entry("metric", "m1")) == 1
    assert pickle.loads(pickle.dumps(few)) == tuple(few)
