"""What `runqueue` offers to users: its names, their documentation, and the types of its signatures."""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, Final

import pytest

import runqueue
from runqueue import _public
from runqueue.api._base_client import BaseClient
from runqueue.errors import __all__ as ERROR_NAMES

MADE_BY_CALLS: Final = {
    "FlushReport",
    "Entry",
    "OperationFailure",
    "PendingRunId",
    "Run",
    "RunOperations",
    "Statistics",
}
"""Classes that calls return, and that users do not construct."""

FOREIGN_TYPES: Final = {"Any", "Callable", "Iterable", "Literal", "Mapping", "PathLike", "Self", "Sequence"}
"""Types of the standard library in public signatures."""


def classes() -> Iterator[type]:
    """The public classes."""
    yield from (each for name in runqueue.__all__ if isinstance(each := getattr(runqueue, name), type))


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """The public methods and properties of a class, those of its bases included, but not what `Exception` brings."""
    for name in dir(owner):
        if not name.startswith("_") and not hasattr(Exception, name):
            member = inspect.getattr_static(owner, name)
            if inspect.isfunction(member) or isinstance(member, property):
                yield name, member


def callables() -> list[Any]:
    """Every public callable: the constructors that users call, and all methods."""
    found: list[Any] = []
    for owner in classes():
        if owner.__name__ not in MADE_BY_CALLS and ("__init__" in vars(owner) or issubclass(owner, BaseClient)):
            found.append(pytest.param(owner, id=owner.__name__))
        for name, member in members(owner):
            if inspect.isfunction(member):
                found.append(pytest.param(member, id=f"{owner.__name__}.{name}"))
    return found


def descriptions(called: Callable[..., Any]) -> dict[str, str]:
    """The text of each argument in the section Args of a docstring."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", f"{inspect.getdoc(called)}\n", re.MULTILINE)
    if section is None:
        return {}
    parts = re.split(r"^    (\w+): ", section.group(1), flags=re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def parameters(called: Callable[..., Any]) -> list[inspect.Parameter]:
    """The named parameters of a callable, without `self`."""
    found = inspect.signature(called).parameters.values()
    return [each for each in found if each.name != "self" and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def test_completion_shows_the_public_names_and_nothing_else() -> None:
    """Also after private modules were imported, which Python binds in the package."""
    import runqueue.engine._engine
    import runqueue.integrations.mlflow

    assert sorted(runqueue.__all__) == [name for name in dir(runqueue) if not name.startswith("__")]
    assert "__version__" in dir(runqueue)
    assert not hasattr(runqueue, "annotations")


def test_all_names_are_sorted_and_stand_in_one_module() -> None:
    """`__all__` and the imports of `_public` are two lists of the same names."""
    assert sorted(runqueue.__all__) == runqueue.__all__
    assert set(runqueue.__all__) == {name for name in vars(_public) if not name.startswith("_")}
    assert set(ERROR_NAMES) <= set(runqueue.__all__)


def test_a_star_import_gives_the_public_names() -> None:
    """In a fresh interpreter."""
    script = (
        "from runqueue import *; import runqueue; assert set(runqueue.__all__) <= set(globals()); print(Client, RunId)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "<class 'runqueue.Client'> str | runqueue.PendingRunId\n"


def test_the_version_is_that_of_the_installed_package() -> None:
    """And asking for it loads no client."""
    script = "import runqueue, sys; print(runqueue.__version__, 'runqueue._public' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [version("runqueue"), "False"]


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    """Of the module, as without a `__getattr__`."""
    with pytest.raises(AttributeError, match="module 'runqueue' has no attribute 'Cleint'"):
        _ = runqueue.Cleint  # type: ignore[attr-defined]


def test_public_classes_name_the_package_as_their_module() -> None:
    """In tracebacks and pickles."""
    assert {each.__module__ for each in classes()} == {"runqueue"}


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        (runqueue.PendingRunId, {"run_id"}),
        (runqueue.RunOperations, {"await_completion", "cancel", "done", "report"}),
        (runqueue.FlushReport, {"failures", "stored", "total"}),
    ],
)
def test_what_calls_return_completes_only_public_names(owner: type, names: set[str]) -> None:
    """Hooks for forks and pickles are private."""
    assert {name for name in dir(owner) if not name.startswith("_")} == names


def test_a_run_has_the_log_calls_of_a_client() -> None:
    """And its ids, its end, and nothing else."""
    calls = {name for name in dir(runqueue.Client) if name.startswith(("log_", "set_"))}
    assert {name for name in dir(runqueue.Run) if not name.startswith("_")} == calls | {"id", "run_id", "start_run"}


@pytest.mark.parametrize("called", callables())
def test_every_argument_is_documented(called: Callable[..., Any]) -> None:
    """In the docstring that `help()` and editors show."""
    assert {each.name for each in parameters(called)} == set(descriptions(called))


@pytest.mark.parametrize("called", callables())
def test_an_argument_that_may_be_none_says_what_none_means(called: Callable[..., Any]) -> None:
    """A default of None tells nothing by itself."""
    unexplained = [each.name for each in parameters(called) if each.default is None]
    assert [name for name in unexplained if "None" not in descriptions(called)[name]] == []


@pytest.mark.parametrize("setting", [each for each in parameters(runqueue.Client) if each.default is not each.empty])
def test_the_default_of_every_setting_is_named(setting: inspect.Parameter) -> None:
    """As a number, a word in quotes, True or False; None is explained in words."""
    if setting.default is None:
        return
    value = setting.default
    text = f'"{value}"' if isinstance(value, str) else f"{value:g}" if type(value) is float else str(value)
    assert descriptions(runqueue.Client)[setting.name].endswith(f" Default: {text}.")


@pytest.mark.parametrize(
    "member", [pytest.param(each, id=f"{o.__name__}.{n}") for o in classes() for n, each in members(o)]
)
def test_every_public_member_has_a_docstring(member: Any) -> None:
    """Of each class, inherited ones included."""
    assert inspect.getdoc(member)


def test_every_public_class_has_a_docstring_of_its_own() -> None:
    """`inspect.getdoc` would show that of a base."""
    assert [each for each in classes() if not vars(each).get("__doc__")] == []


def test_both_clients_describe_the_same_settings_by_the_same_words() -> None:
    """Each class docstring is a literal, which editors show, so the text stands twice."""

    def settings(client_class: type) -> str:
        text = inspect.getdoc(client_class) or ""
        return text[text.index("Args:\n") : text.index("Guarantees:\n")]

    assert settings(runqueue.Client) == settings(runqueue.AsyncClient)
    assert runqueue.Client.__init__ is runqueue.AsyncClient.__init__


@pytest.mark.parametrize("called", callables())
def test_every_type_of_a_public_signature_is_importable(called: Callable[..., Any]) -> None:
    """From `runqueue`, or from the standard library."""
    signature = inspect.signature(called)
    annotations = [signature.return_annotation, *(each.annotation for each in signature.parameters.values())]
    found = {
        node.id
        for text in annotations
        if isinstance(text, str)
        for node in ast.walk(ast.parse(text, mode="eval"))
        if isinstance(node, ast.Name)
    }
    assert found - FOREIGN_TYPES - set(vars(builtins)) <= set(runqueue.__all__)
