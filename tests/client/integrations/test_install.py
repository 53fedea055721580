"""`install` and `uninstall`: wherever mlflow holds the name of its queueing client, ours stands there, and goes again."""

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


def places() -> list[object]:
    """What stands for the name in the modules of mlflow."""
    return [
        vars(module)[NAME]
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "mlflow" and NAME in vars(module)
    ]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    assert set(places()) == {ORIGINAL}
    yield
    uninstall()
    assert set(places()) == {ORIGINAL}


def test_it_is_put_under_every_module_that_holds_the_name_and_taken_back() -> None:
    """The one that defines it, the one that passes it on, and those of the integrations."""
    assert len(places()) >= 2
    install()
    assert set(places()) == {QueueingClient}
    assert vars(autologging_utils)[NAME] is QueueingClient
    uninstall()
    assert set(places()) == {ORIGINAL}
    uninstall()  # once more: nothing


def test_one_uninstall_ends_any_number_of_installs() -> None:
    """They do not add up."""
    install()
    install()
    uninstall()
    assert set(places()) == {ORIGINAL}


def test_a_block_takes_back_its_own_installation_alone() -> None:
    """Also when it raises; nested, inside of one without a block, and entered twice."""
    with install() as installation, install():
        assert "in place" in repr(installation)
    assert set(places()) == {ORIGINAL}
    assert "taken back" in repr(installation)
    install()
    with pytest.raises(RuntimeError), install():
        raise RuntimeError
    assert set(places()) == {QueueingClient}
    with install():
        uninstall()
        assert set(places()) == {ORIGINAL}
    assert set(places()) == {ORIGINAL}


def test_threads_install_at_once() -> None:
    """Inside of each block ours is in place; after the last it is not."""
    together, wrong = threading.Barrier(4), list[object]()

    def work() -> None:
        together.wait()
        for _ in range(100):
            with install():
                wrong.extend(each for each in places() if each is not QueueingClient)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_somebody_else_has_put_there_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of one module stays, and so does what is not mlflow's."""
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


def test_modules_that_are_imported_later_find_ours_and_give_it_back() -> None:
    """In an interpreter that has not seen mlflow; until it is asked for, the integration loads nothing."""
    done = subprocess.run(
        [sys.executable, "-c", LATER], capture_output=True, text=True, check=False, timeout=120, env=clean_environment()
    )
    assert done.returncode == 0, done.stderr


# -- integrations that cannot be run here ----------------------------------------------------------------------------


def uses() -> dict[str, list[str]]:
    """
    By file of mlflow, what `install` would not reach: a use of the name that is not looked up in the module when a
    function runs (a default, a base, a decorator, a value kept at import), or an import of it from elsewhere.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        source = path.read_text("utf-8")
        if NAME in source and path != Path(inspect.getfile(defining)):
            found[str(path.relative_to(PACKAGE))] = unreached(source)
    return found


def unreached(source: str) -> list[str]:
    tree = ast.parse(source)
    late = {
        id(inner)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for statement in (function.body if isinstance(function.body, list) else [function.body])
        for inner in ast.walk(statement)
    }
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == NAME and id(node) not in late:
            found.append(f"line {node.lineno}: used when the module is imported")
        if (
            isinstance(node, ast.ImportFrom)
            and node.module not in SOURCES
            and any(alias.name == NAME for alias in node.names)
        ):
            found.append(f"line {node.lineno}: imported from {node.module}")
    return found


def test_every_use_of_the_name_in_mlflow_is_reached() -> None:
    """In all integrations of the installed mlflow, those included whose library is not installed here."""
    found = uses()
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
def test_a_planted_use_that_would_not_be_reached_is_found(source: str) -> None:
    """Each kind of it."""
    assert len(unreached(source)) == 1


# -- signatures ------------------------------------------------------------------------------------------------------


def arguments(function: Any) -> list[tuple[str, Any, Any]]:
    return [(each.name, each.kind, each.default) for each in inspect.signature(function).parameters.values()]


def test_all_methods_take_what_mlflows_take() -> None:
    """Names, order, kinds and defaults; and there is none that ours does not have."""
    methods = [name for name, each in vars(ORIGINAL).items() if callable(each) and not name.startswith("_")]
    assert len(methods) >= 7
    for name in (*methods, "__init__", "__enter__", "__exit__"):
        assert arguments(getattr(QueueingClient, name)) == arguments(getattr(ORIGINAL, name)), name
    for name in ("__init__", "await_completion"):
        assert arguments(getattr(RunOperations, name)) == arguments(getattr(defining.RunOperations, name)), name


def test_the_integration_names_what_it_offers() -> None:
    """And nothing else."""
    assert {"PendingRunId", "QueueingClient", "RunOperations", "install", "uninstall"} <= set(dir(integration))
    with pytest.raises(AttributeError, match="nosuch"):
        getattr(integration, "nosuch")  # noqa: B009
