"""Contexts and tags of datasets: how log calls take and check them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

import runqueue
from runqueue import CallTypeError, ConfigError, Dataset
from support.mlflow_server import clean_environment
from support.proxy import ScriptedServer
from support.wire_log import entries

RUN = "a" * 32
CONTEXT = "mlflow.data.context"

Call = Callable[[Any], object]


def sent_tags(server: ScriptedServer) -> dict[str, dict[str, str]]:
    """The tags of each dataset that was sent, by its name."""
    return {
        entry["dataset"]["name"]: {tag["key"]: tag["value"] for tag in entry["tags"]}
        for request in server.to("runs/log-inputs")
        for entry in entries(request, "datasets")
    }


def test_a_context_and_tags_are_sent_with_the_dataset(client: runqueue.Client, server: ScriptedServer) -> None:
    """One dataset, or several with one of each; by the client or by a run's handle; values as text."""
    client.log_input(RUN, Dataset("one", "1"), context="training", tags={"split": 1})
    client.log_input(RUN, Dataset("positional", "1"), "test", {"fold": "a"})
    client.log_inputs(
        RUN,
        [Dataset("two", "1"), Dataset("three", "1"), Dataset("four", "1")],
        contexts=["validation", None, ""],
        tags_list=[None, {"a": "b"}, {}],
    )
    run = client.attach(RUN)
    run.log_input(Dataset("five", "1"), context="handle")
    run.log_inputs([Dataset("six", "1")], tags_list=[{"c": "d"}])
    run.log_inputs(iter([Dataset("seven", "1")]), contexts=iter(["lazy"]))
    client.flush()
    assert sent_tags(server) == {
        "one": {"split": "1", CONTEXT: "training"},
        "positional": {"fold": "a", CONTEXT: "test"},
        "two": {CONTEXT: "validation"},
        "three": {"a": "b"},
        "four": {},
        "five": {CONTEXT: "handle"},
        "six": {"c": "d"},
        "seven": {CONTEXT: "lazy"},
    }


def test_they_are_added_to_the_tags_that_a_dataset_brings(client: runqueue.Client, server: ScriptedServer) -> None:
    """Of our own class and of mlflow's entity; the same value twice is no contradiction, and the given one stays."""
    from mlflow.entities import Dataset as Entity
    from mlflow.entities import DatasetInput, InputTag

    own = Dataset("own", "1", tags={"mine": "x", CONTEXT: "training"})
    theirs = DatasetInput(Entity("theirs", "1", "local", "s"), [InputTag("mine", "y")])
    client.log_inputs(RUN, [own, theirs], contexts=["training", "test"], tags_list=[{"mine": "x"}, {"more": "z"}])
    client.flush()
    assert sent_tags(server) == {
        "own": {"mine": "x", CONTEXT: "training"},
        "theirs": {"mine": "y", "more": "z", CONTEXT: "test"},
    }
    assert own.tags == {"mine": "x", CONTEXT: "training"}


def test_changing_the_arguments_after_the_call_changes_nothing(client: runqueue.Client, server: ScriptedServer) -> None:
    """Neither the list of contexts nor the tags."""
    contexts, tags = ["training"], {"a": "1"}
    client.log_inputs(RUN, [Dataset("n", "1")], contexts=contexts, tags_list=[tags])
    contexts[0], tags["a"] = "changed", "changed"
    client.flush()
    assert sent_tags(server) == {"n": {"a": "1", CONTEXT: "training"}}


ONE, TWO = Dataset("n", "1"), Dataset("m", "1", tags={CONTEXT: "training"})


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda c: c.log_inputs(RUN, [ONE], contexts="training"), CallTypeError, "contexts takes a list"),
        (lambda c: c.log_inputs(RUN, [ONE], contexts=5), CallTypeError, "contexts takes a list"),
        (lambda c: c.log_inputs(RUN, [ONE], tags_list={"a": "b"}), CallTypeError, "tags_list takes a list"),
        (lambda c: c.log_inputs(RUN, [ONE], contexts=["a", "b"]), ConfigError, "contexts holds 2 for 1 datasets"),
        (lambda c: c.log_inputs(RUN, [ONE, TWO], tags_list=[None]), ConfigError, "tags_list holds 1 for 2 datasets"),
        (lambda c: c.log_inputs(RUN, None, contexts=["a"]), ConfigError, "contexts holds 1 for 0 datasets"),
        (lambda c: c.log_inputs(RUN, [ONE], contexts=[5]), CallTypeError, "context takes text, not int"),
        (lambda c: c.log_input(RUN, ONE, context=["a"]), CallTypeError, "context takes text, not list"),
        (lambda c: c.log_input(RUN, ONE, context="\ud800"), ConfigError, "context '\\ud800' is no valid Unicode"),
        (lambda c: c.log_input(RUN, ONE, tags=[("a", "b")]), CallTypeError, "tags takes a mapping, not list"),
        (lambda c: c.log_input(RUN, ONE, tags="a"), CallTypeError, "tags takes a mapping, not str"),
        (lambda c: c.log_input(RUN, TWO, context="test"), ConfigError, "two values are given for the tag"),
        (lambda c: c.log_input(RUN, ONE, "test", {CONTEXT: "b"}), ConfigError, "two values are given for the tag"),
        (lambda c: c.attach(RUN).log_input(TWO, "test"), ConfigError, "'training' and 'test'"),
    ],
)
def test_a_bad_call_raises_at_once(
    client: runqueue.Client, server: ScriptedServer, call: Call, kind: type[Exception], words: str
) -> None:
    """The error names the bad argument; nothing is queued and nothing is sent."""
    with pytest.raises(kind) as caught:
        call(client)
    assert words in str(caught.value)
    assert client.statistics().accepted == 0 and server.count() == 0


class Mute:
    """Has no text."""

    def __str__(self) -> str:
        raise ValueError("no words")


class Broken:
    """Like a dataset of `mlflow.data` whose profile cannot be made."""

    name, digest = "broken", "1"

    def _to_mlflow_entity(self) -> object:
        raise ValueError("no such column: 'y'")


@pytest.mark.parametrize(
    ("bad", "tags", "words"),
    [
        ("iris", None, "a builtins.str is no dataset: pass an mlflow DatasetInput"),
        (None, None, "a builtins.NoneType is no dataset"),
        ([ONE], {"a": "b"}, "a builtins.list is no dataset"),
        (Broken(), None, "cannot be read as a dataset: no such column: 'y'"),
        (Dataset("mute", "1"), {"loud": Mute()}, "tag 'loud' of dataset 'mute'"),
        (Dataset("keys", "1"), {5: "a"}, "key is text, not int"),
        (Dataset("\ud800", "1"), None, "a dataset's name '\\ud800' is no valid Unicode"),
    ],
)
def test_a_bad_dataset_fails_alone_and_is_named(
    client: runqueue.Client, server: ScriptedServer, bad: Any, tags: dict[Any, Any] | None, words: str
) -> None:
    """The others of the call are sent."""
    good = Dataset("good", "1")
    client.log_inputs(RUN, [bad, good], contexts=["training", "test"], tags_list=[tags, None])
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    (failure,) = caught.value.failures
    assert words in str(failure.error)
    assert (failure.operation, failure.final, [entry.kind for entry in failure.entries]) == (
        "log_inputs",
        True,
        ["dataset"],
    )
    assert sent_tags(server) == {"good": {CONTEXT: "test"}}


WITHOUT_MLFLOW = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("mlflow", "pandas", "numpy"):
            raise ImportError(name + " is not installed")
sys.meta_path.insert(0, Absent())
import runqueue
with runqueue.Client(sys.argv[1]) as client:
    run = client.attach("{RUN}")
    run.log_input(runqueue.Dataset("n", "1"), context="training", tags={{"a": 1}})
print(client.statistics().stored)
"""


def test_without_mlflow_nothing_is_missing(server: ScriptedServer) -> None:
    """mlflow need not be installed."""
    command = [sys.executable, "-c", WITHOUT_MLFLOW, server.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env=clean_environment())
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert sent_tags(server) == {"n": {"a": "1", CONTEXT: "training"}}
