"""`install` and `uninstall` replace MLflow's queueing client in all of mlflow's modules, and restore it."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import mlflow
import pytest
from mlflow.utils import autologging_utils
from mlflow.utils.autologging_utils import client as defining

from runqueue.integrations import mlflow as integration
from runqueue.integrations.mlflow import QueueingClient, RunOperations, install, uninstall
from support.mlflow_server import clean_environment

NAME = "MlflowAutologgingQueueingClient"
ORIGINAL: Any = defining.MlflowAutologgingQueueingClient
INTEGRATIONS = {"lightgbm", "paddle", "pytorch", "sklearn", "xgboost"}
SOURCES = ("mlflow.utils.autologging_utils", "mlflow.utils.autologging_utils.client")
PACKAGE = Path(inspect.getfile(mlflow)).parent


def installed_classes() -> list[object]:
    """Return what mlflow's modules hold under the class's name."""
    return [
        vars(module)[NAME]
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "mlflow" and NAME in vars(module)
    ]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    assert set(installed_classes()) == {ORIGINAL}
    yield
    uninstall()
    assert set(installed_classes()) == {ORIGINAL}


def test_install_replaces_the_class_in_every_module_and_uninstall_restores_it() -> None:
    """In the module that defines it, the one that re-exports it, and those of the integrations."""
    assert len(installed_classes()) >= 2
    install()
    assert set(installed_classes()) == {QueueingClient}
    assert vars(autologging_utils)[NAME] is QueueingClient
    uninstall()
    assert set(installed_classes()) == {ORIGINAL}
    uninstall()  # a second call does nothing


def test_one_uninstall_ends_any_number_of_installs() -> None:
    """Installations without a block are not counted."""
    install()
    install()
    uninstall()
    assert set(installed_classes()) == {ORIGINAL}


def test_a_block_takes_back_its_own_installation_only() -> None:
    """Also when the block raises, when blocks are nested, and inside of an installation without a block."""
    with install() as installation, install():
        assert "in place" in repr(installation)
    assert set(installed_classes()) == {ORIGINAL}
    assert "taken back" in repr(installation)
    install()
    with pytest.raises(RuntimeError), install():
        raise RuntimeError
    assert set(installed_classes()) == {QueueingClient}
    with install():
        uninstall()
        assert set(installed_classes()) == {ORIGINAL}
    assert set(installed_classes()) == {ORIGINAL}


def test_threads_may_install_at_once() -> None:
    """`QueueingClient` is in place inside of each block, and MLflow's client after the last one."""
    together, wrong = threading.Barrier(4), list[object]()

    def work() -> None:
        together.wait()
        for _ in range(100):
            with install():
                wrong.extend(each for each in installed_classes() if each is not QueueingClient)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_mock_in_place_of_the_class_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock in one of mlflow's modules stays, and so does the class in a module that is not mlflow's."""
    mock, other = object(), ModuleType("mlflowish")
    other.name = ORIGINAL  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlflowish", other)
    with monkeypatch.context() as patch:
        patch.setattr(autologging_utils, NAME, mock)
        with install():
            assert vars(autologging_utils)[NAME] is mock
            assert vars(other)["name"] is ORIGINAL
        assert vars(autologging_utils)[NAME] is mock


LATER = """
import sys
from runqueue.integrations import mlflow as integration
assert "mlflow" not in sys.modules and "runqueue._public" not in sys.modules
integration.install()
import mlflow.sklearn, mlflow.xgboost, mlflow.lightgbm
ours = integration.QueueingClient
flavors = mlflow.sklearn, mlflow.xgboost, mlflow.lightgbm
assert all(each.MlflowAutologgingQueueingClient is ours for each in flavors)
integration.uninstall()
from mlflow.utils.autologging_utils.client import MlflowAutologgingQueueingClient as original
assert original is not ours and original.__module__ == "mlflow.utils.autologging_utils.client"
assert all(each.MlflowAutologgingQueueingClient is original for each in flavors)
held = [name for name, each in sys.modules.items() if name.startswith("mlflow") and ours in vars(each).values()]
assert held == [], held
"""


def test_modules_that_are_imported_after_install_are_covered() -> None:
    """In a new interpreter. Importing the integration loads neither mlflow nor runqueue's public names."""
    done = subprocess.run(
        [sys.executable, "-c", LATER], capture_output=True, text=True, check=False, timeout=120, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr


# -- integrations whose library is not installed ----------------------------------------------------------------------


def unreached_uses_by_file() -> dict[str, list[str]]:
    """
    Return the uses of the class that `install` would not reach, by file of mlflow.

    Such a use is evaluated at import (a default, a base class, a decorator, a constant), or is an import of the class
    from an unknown module. `install` reaches a name that a function looks up when it runs.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text("utf-8")
        if NAME in source and path != Path(inspect.getfile(defining)):
            found[str(path.relative_to(PACKAGE))] = unreached_uses(source)
    return found


def unreached_uses(source: str) -> list[str]:
    """Return the uses in one file's source that `install` would not reach."""
    tree = ast.parse(source)
    inside_functions = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for statement in (function.body if isinstance(function.body, list) else [function.body])
        for inner in ast.walk(statement)
    }
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == NAME and id(node) not in inside_functions:
            found.append(f"line {node.lineno}: used when the module is imported")
        if (
            isinstance(node, ast.ImportFrom)
            and node.module not in SOURCES
            and any(alias.name == NAME for alias in node.names)
        ):
            found.append(f"line {node.lineno}: imported from {node.module}")
    return found


def test_install_reaches_every_use_of_the_class_in_mlflow() -> None:
    """In all integrations of the installed mlflow, also in those whose library is not installed."""
    found = unreached_uses_by_file()
    assert {name: faults for name, faults in found.items() if faults} == {}
    assert {name.split("/")[0] for name in found} >= INTEGRATIONS


@pytest.mark.parametrize(
    "source",
    [
        f"from elsewhere import {NAME}",
        f"class Client({NAME}): ...",
        f"def f(kind={NAME}): ...",
        f"KINDS = [{NAME}]",
        f"@{NAME}\ndef f(): ...",
    ],
)
def test_each_kind_of_unreached_use_is_found(source: str) -> None:
    """The test above would miss nothing."""
    assert len(unreached_uses(source)) == 1


# -- signatures ------------------------------------------------------------------------------------------------------


def arguments(function: Any) -> list[tuple[str, Any, Any]]:
    """Return name, kind and default of each argument."""
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_all_methods_have_the_signatures_of_mlflows() -> None:
    """Names, order, kinds and defaults of the arguments; no method of MLflow's client is missing."""
    methods = [name for name, each in vars(ORIGINAL).items() if callable(each) and not name.startswith("_")]
    assert len(methods) >= 7
    for name in (*methods, "__init__", "__enter__", "__exit__"):
        assert arguments(getattr(QueueingClient, name)) == arguments(getattr(ORIGINAL, name)), name
    for name in ("__init__", "await_completion"):
        assert arguments(getattr(RunOperations, name)) == arguments(getattr(defining.RunOperations, name)), name


def test_the_integration_has_its_public_names_and_no_others() -> None:
    """An unknown name raises AttributeError."""
    assert {"PendingRunId", "QueueingClient", "RunOperations", "install", "uninstall"} <= set(dir(integration))
    with pytest.raises(AttributeError, match="nosuch"):
        getattr(integration, "nosuch")  # noqa: B009
