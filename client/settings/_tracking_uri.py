"""
Resolves the tracking URI of a client: the one given, else the one that MLflow itself would use.
"""

# Rules of this file:
# - mlflow is never imported where its answer can be had otherwise: its import takes seconds, in the caller's thread.
# - The answer is mlflow's own. Its versions differ in the default: files (up to 3.6), a relative database path (3.7), a
#   percent-encoded one (3.17), one as it is (3.18). So mlflow's own function is evaluated, from its source.

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from runqueue.settings._plain_uri import plain_uri

if TYPE_CHECKING:
    import ast


def path_as_uri(given: str | os.PathLike[str] | None) -> str | None:
    """Turn a `pathlib.Path` into the file URI of that folder, as `mlflow.set_tracking_uri` does; text stays as it is."""
    return Path(given).absolute().resolve().as_uri() if isinstance(given, os.PathLike) else given


def resolve_tracking_uri(given: str | None) -> str:
    """
    Find the tracking URI as `mlflow` would resolve it.

    The order is: the argument, `mlflow.get_tracking_uri()` where mlflow is imported already, MLFLOW_TRACKING_URI, and
    the default of the installed mlflow.

    Args:
        given: The tracking URI that the user passed. None: not passed.

    Returns:
        The URI without the prefix `runqueue+`: a client queues in any case.
    """
    if given is not None:
        return plain_uri(given)
    get_tracking_uri = getattr(sys.modules.get("mlflow"), "get_tracking_uri", None)
    if get_tracking_uri is not None:
        return plain_uri(str(get_tracking_uri()))
    return plain_uri(os.environ.get("MLFLOW_TRACKING_URI") or _default_uri())


def installed_mlflow() -> Path | None:
    """Return the folder of the installed mlflow, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec("mlflow")
    folders = (spec and spec.submodule_search_locations) or ()
    return next(map(Path, folders), None)


def _default_uri() -> str:
    folder = installed_mlflow()
    if folder is None:
        # Such a client cannot be made, see `check_uri`, but the message names this URI: that of mlflow 3.18.
        return f"sqlite:///{Path('mlflow.db').absolute().as_posix()}"
    try:
        found = _evaluated(folder, "mlflow.tracking._tracking_service.utils", "get_tracking_uri")()
    except Exception:  # noqa: BLE001  this version's source is written in another way: import it, however long it takes
        found = importlib.import_module("mlflow").get_tracking_uri()
    return str(found)


def _evaluated(folder: Path, module: str, name: str) -> Any:
    """
    Evaluate one function or constant of an mlflow module from its source, with all that it refers to, and nothing else.

    Args:
        folder: The folder of the package mlflow.
        module: The module's dotted name.
        name: The name of the function or constant.

    Raises:
        Exception: The source cannot be read, or needs more than functions, constants and the standard library.
    """
    import ast  # with compiling, a few milliseconds that only clients without any setting pay for

    path = folder.joinpath(*module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    definitions: dict[str, ast.stmt] = {}
    for statement in ast.parse(source.read_bytes()).body:
        definitions.update(dict.fromkeys(_names_defined_by(statement), statement))

    namespace: dict[str, Any] = {
        # The variable is not set, else nobody would look for the default.
        "MLFLOW_TRACKING_URI": SimpleNamespace(get=lambda: None),
        # mlflow's function of this name imports its file store, and with it all of mlflow.
        "_has_existing_mlruns_data": _has_existing_mlruns_data,
    }

    def define(name: str) -> None:
        statement = definitions.pop(name, None)
        if statement is None or name in namespace:  # a built-in name, a local variable, or defined by now
            return
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").partition(".")[0] == "mlflow":
            original = next(alias.name for alias in statement.names if name in (alias.asname, alias.name))
            namespace[name] = _evaluated(folder, str(statement.module), original)
            return
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                define(node.id)
        exec(compile(ast.Module([statement], []), str(source), "exec"), namespace)  # noqa: S102  the installed mlflow's own code

    define(name)
    return namespace[name]


def _names_defined_by(statement: ast.stmt) -> list[str]:
    import ast

    if isinstance(statement, ast.FunctionDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    return []


def _has_existing_mlruns_data() -> bool:
    """Whether mlflow's file store has kept data in ./mlruns; mlflow goes on using that folder then."""
    try:
        return any(
            each.name.isdigit() and (each / "meta.yaml").exists() for each in Path("mlruns").iterdir() if each.is_dir()
        )
    except OSError:
        return False
