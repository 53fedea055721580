"""
The floors of the packages: imports point down only, are absolute and spelt `runqueue...`, and the install is not stale.

Rules of this file: it reads the imports and imports nothing; those inside of functions and under TYPE_CHECKING count
too. A module belongs on exactly one floor of `FLOORS`, and may import from lower floors alone; within one floor nobody
knows anybody.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import attrs
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = {"runqueue": ROOT / "client", "runqueue.queueing": ROOT / "queueing"}
FOLDER_NAMES = {"client", "queueing", "tests"}

FLOORS: tuple[frozenset[str], ...] = tuple(
    frozenset(floor.split())
    for floor in (
        # the engine of queues
        "runqueue.queueing._errors runqueue.queueing._crew",
        "runqueue.queueing._part",
        "runqueue.queueing._batch runqueue.queueing._retry",
        "runqueue.queueing._report runqueue.queueing._returned runqueue.queueing._evidence",
        "runqueue.queueing._account",
        "runqueue.queueing._gate",
        "runqueue.queueing._window runqueue.queueing._inbox",
        "runqueue.queueing._lane",
        "runqueue.queueing._intake runqueue.queueing._flush",
        "runqueue.queueing._accumulator",
        "runqueue.queueing._dispatch",
        "runqueue.queueing._pump",
        "runqueue.queueing._sender",
        "runqueue.queueing._stream",
        "runqueue.queueing",
        # config, entities, errors; the placeholder of a run is a value like them, and the wire format reads it
        "runqueue._fork runqueue._blocking runqueue._say runqueue._spellings",
        "runqueue._entities runqueue._run runqueue._bridge runqueue._file_lock runqueue._loop_thread",
        "runqueue.errors",
        "runqueue._environment runqueue._plain_uri",
        "runqueue._config runqueue._tls",
        # the wire format, and what needs nothing else
        "runqueue._signing runqueue._points runqueue._connection",
        "runqueue._artifact_content",
        "runqueue._wire runqueue._answer runqueue._credentials runqueue._operations runqueue._store",
        "runqueue._artifacts runqueue._conversion runqueue._reports runqueue._plugins",
        "runqueue._body",
        "runqueue._transports",
        "runqueue._mlflow_calls",
        # http and mlflow stores, and which of them a URI means
        "runqueue._http_store runqueue._mlflow_store runqueue._experiments",
        "runqueue._databricks",
        "runqueue._artifact_server runqueue._artifact_repositories",
        "runqueue._artifact_store",
        "runqueue._stores runqueue._creation",
        "runqueue._delivery",
        # the thread, and how it ends
        "runqueue._exit runqueue._progress runqueue._news",
        "runqueue._engine",
        # the faces
        "runqueue._face runqueue._run_handle runqueue._artifact_calls",
        "runqueue._recorder",
        "runqueue._sync_client",
        "runqueue._async_client",
        "runqueue._public",
        "runqueue",
        # under the APIs of others
        "runqueue.integrations",
        "runqueue.integrations.mlflow._run_operations",
        "runqueue.integrations.mlflow._queueing_client",
        "runqueue.integrations.mlflow._install",
        "runqueue.integrations.mlflow._entities",
        "runqueue.integrations.mlflow._queue",
        "runqueue.integrations.mlflow._queued_store",
        "runqueue.integrations.mlflow._switch",
        "runqueue.integrations.mlflow",
        "runqueue.plugin",
        # the command line
        "runqueue._veil runqueue._tables",
        "runqueue._findings",
        "runqueue._doctor",
        "runqueue._commands",
        "runqueue._cli",
        "runqueue.__main__",
    )
)

QUEUEING_NEEDS = {"anyio", "attrs", "tenacity"}
CLIENT_NEEDS = {"anyio", "attrs", "orjson", "sniffio"}
TYPING_ONLY = {"typing_extensions"}
NEEDED_BY = {
    "aiohttp": {"runqueue._transports"},
    "click": {"runqueue._commands"},
    "databricks": {"runqueue._databricks"},
    "h11": {"runqueue._connection"},
    "httpx": {"runqueue._connection", "runqueue._http_store", "runqueue._tls", "runqueue._transports"},
    "httpx_aiohttp": {"runqueue._transports"},
    "mlflow": {
        "runqueue._artifact_repositories",
        "runqueue._mlflow_calls",
        "runqueue._mlflow_store",
        "runqueue._plugins",
        "runqueue._tables",
        "runqueue.integrations.mlflow._install",
        "runqueue.integrations.mlflow._queueing_client",
        "runqueue.integrations.mlflow._run_operations",
        "runqueue.integrations.mlflow._entities",
        "runqueue.integrations.mlflow._queue",
        "runqueue.integrations.mlflow._queued_store",
        "runqueue.integrations.mlflow._switch",
    },
    "PIL": {"runqueue._artifact_content"},
    "requests": {"runqueue._plugins"},
    "requests_auth_aws_sigv4": {"runqueue._plugins"},
    "tqdm": {"runqueue._progress"},
    "sqlalchemy": {"runqueue._tables"},
    "trio": {"runqueue._bridge"},
    "yaml": {"runqueue._artifact_content"},
    "yarl": {"runqueue._transports"},
}
"""What only the named modules may import."""

HEAVY = ("httpx", "anyio", "tenacity", "mlflow", "aiohttp", "httpx_aiohttp", "databricks", "trio", "asyncio", "numpy")


@attrs.frozen
class Import:
    """One imported name."""

    target: str
    line: int
    level: int
    typing_only: bool


# -- reading ---------------------------------------------------------------------------------------------------------


def read_imports(source: str) -> Iterator[Import]:
    """All imports of a file, those of functions, of TYPE_CHECKING and by `import_module("...")` included."""
    tree = ast.parse(source)
    guarded = {
        id(inner)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for statement in block.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        typing_only = id(node) in guarded
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, 0, typing_only)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield Import(f"{node.module or ''}.{alias.name}", node.lineno, node.level, typing_only)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            for argument in node.args[:1]:
                assert isinstance(argument, ast.Constant), f"line {node.lineno}: an import that cannot be read"
                yield Import(str(argument.value), node.lineno, 0, typing_only)


def modules() -> dict[str, Path]:
    """Every module of the two packages, by its name as it is imported."""
    found: dict[str, Path] = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


def owner(target: str, known: set[str]) -> str | None:
    """The module that an imported name comes from, e.g. `runqueue._run` for `runqueue._run.PendingRunId`."""
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in known:
            return name
    return None


# -- rules -----------------------------------------------------------------------------------------------------------


def breaches(module: str, source: str, floors: tuple[frozenset[str], ...] = FLOORS) -> list[str]:
    """What is wrong with the imports of one module, each with its line."""
    floor_of = {name: at for at, floor in enumerate(floors) for name in floor}
    if module not in floor_of:
        return [f"{module} is on no floor: add it to FLOORS"]
    found: list[str] = []
    for each in read_imports(source):
        fault = _fault(module, each, floor_of)
        if fault is not None:
            found.append(f"{module}:{each.line}: {fault}")
    return found


def _fault(module: str, each: Import, floor_of: dict[str, int]) -> str | None:
    if each.level:
        return f"a relative import of {each.target}"
    top = each.target.split(".")[0]
    if top == "runqueue":
        target = owner(each.target, set(floor_of))
        if target is None or target == module:
            return f"{each.target} is no module of another floor"
        if floor_of[target] >= floor_of[module]:
            return f"{target} does not stand below it"
        return None
    if top in FOLDER_NAMES:
        return f"{each.target} is imported by its folder's name"
    if top in sys.stdlib_module_names:
        return None
    if top in TYPING_ONLY:
        return None if each.typing_only else f"{top} at run time"
    if module.startswith("runqueue.queueing"):
        return None if top in QUEUEING_NEEDS else f"{top} is none of the engine's business"
    if top in CLIENT_NEEDS or module in NEEDED_BY.get(top, ()):
        return None
    return f"{top} is not for this module"


def differences(source: Path, installed: Path) -> list[str]:
    """How an installed package differs from its source folder, by names and content."""
    ours, theirs = _files(source), _files(installed)
    found = [f"{name} is not installed" for name in sorted(ours.keys() - theirs.keys())]
    found += [f"{name} is installed, but no longer there" for name in sorted(theirs.keys() - ours.keys())]
    found += [f"{name} differs" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() if path.exists() else b"(a link to nowhere)"
        for path in folder.iterdir()
        if path.suffix in (".py", ".pyi", ".typed")
    }


def unlisted(pyproject: str, folders: dict[str, Path]) -> list[str]:
    """Packages that pyproject.toml does not name or maps elsewhere: they would not be installed."""
    tool = tomllib.loads(pyproject)["tool"]["setuptools"]
    wanted = {
        ".".join([package, *path.parent.relative_to(folder).parts]): path.parent
        for package, folder in folders.items()
        for path in folder.rglob("*.py")
    }
    found = [name for name in sorted(wanted) if name not in tool["packages"]]
    found += [name for name in tool["packages"] if name not in wanted]
    for name, folder in wanted.items():
        parent, dirs = name, tool["package-dir"]
        while parent not in dirs and "." in parent:
            parent = parent.rpartition(".")[0]
        below = name.removeprefix(parent).strip(".").replace(".", "/")
        if parent not in dirs or (ROOT / dirs[parent] / below).resolve() != folder.resolve():
            found.append(f"{name} is mapped to another folder")
    return found


# -- the packages as they are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_point_down_only(module: str) -> None:
    """No module imports from its own floor or above, relatively, by a folder's name, or what is not for it."""
    assert breaches(module, modules()[module].read_text("utf-8")) == []


def test_every_module_of_the_table_exists_once() -> None:
    """The table of floors names what is there, and nothing else."""
    named = [name for floor in FLOORS for name in floor]
    assert sorted(named) == sorted(modules())


def test_nobody_imports_the_packages_by_their_folders() -> None:
    """Tests, benchmarks and examples say `runqueue` too, and import nothing relatively."""
    found = [
        f"{path.relative_to(ROOT)}:{each.line}: {each.target}"
        for folder in ("tests", "benchmarks", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for each in read_imports(path.read_text("utf-8"))
        if each.level or each.target.split(".")[0] in FOLDER_NAMES
    ]
    assert found == []


@pytest.mark.parametrize("package", PACKAGES)
def test_the_install_is_not_stale(package: str) -> None:
    """What is imported is what stands in the source folders."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    assert differences(PACKAGES[package], Path(spec.origin).parent) == [], "run `pip install -e .` again"


def test_every_package_is_listed_in_pyproject() -> None:
    """An omitted subpackage would be missing from every install but the developer's own."""
    assert unlisted((ROOT / "pyproject.toml").read_text("utf-8"), PACKAGES) == []


def test_import_runqueue_imports_nothing_heavy() -> None:
    """In a fresh interpreter, `import runqueue` leaves HTTP, event loops, tenacity and mlflow alone."""
    script = f"import runqueue, sys; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


# -- planted breaches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("runqueue._wire", "from runqueue._engine import Engine", "runqueue._engine does not stand below it"),
        ("runqueue._wire", "import runqueue._engine", "runqueue._engine does not stand below it"),
        ("runqueue._wire", "from runqueue import _engine", "runqueue._engine does not stand below it"),
        ("runqueue._wire", "from runqueue import Client", "runqueue does not stand below it"),
        ("runqueue._wire", "def f():\n    from runqueue._stores import x", "runqueue._stores does not stand below it"),
        (
            "runqueue._wire",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from runqueue._stores import x",
            "runqueue._stores does not stand below it",
        ),
        (
            "runqueue._wire",
            "import importlib\nimportlib.import_module('runqueue._stores')",
            "runqueue._stores does not stand below it",
        ),
        ("runqueue._wire", "from runqueue._answer import judge", "runqueue._answer does not stand below it"),
        ("runqueue._wire", "from . import _run", "a relative import"),
        ("runqueue._wire", "from ._run import RunId", "a relative import"),
        ("runqueue._wire", "import queueing", "by its folder's name"),
        ("runqueue._wire", "from client._run import RunId", "by its folder's name"),
        ("runqueue._wire", "import httpx", "httpx is not for this module"),
        ("runqueue._engine", "import requests", "requests is not for this module"),
        ("runqueue._engine", "def f():\n    import mlflow.entities", "mlflow is not for this module"),
        ("runqueue._engine", "from typing_extensions import Self", "typing_extensions at run time"),
        ("runqueue.queueing._lane", "from runqueue._wire import Encoder", "runqueue._wire does not stand below it"),
        ("runqueue.queueing._lane", "from runqueue.queueing import Limits", "runqueue.queueing does not stand below"),
        ("runqueue.queueing._batch", "from runqueue.queueing._lane import Lane", "_lane does not stand below it"),
        ("runqueue.queueing._retry", "from runqueue.queueing._batch import RUN", "_batch does not stand below it"),
        ("runqueue.queueing._lane", "import orjson", "orjson is none of the engine's business"),
        ("runqueue.queueing._sender", "import trio", "trio is none of the engine's business"),
        ("runqueue._new", "", "runqueue._new is on no floor"),
    ],
)
def test_a_planted_breach_is_caught(module: str, source: str, fault: str) -> None:
    """Each kind of breach is found, and named with its line."""
    (found,) = breaches(module, source)
    assert fault in found
    assert found.startswith(module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("runqueue._wire", "from runqueue import _run, _entities\nimport orjson, json"),
        ("runqueue._transports", "import httpx\ndef f():\n    from httpx_aiohttp import HttpxAiohttpClient"),
        (
            "runqueue.queueing._lane",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import typing_extensions",
        ),
    ],
)
def test_an_import_that_points_down_is_no_breach(module: str, source: str) -> None:
    """The rules let pass what the floors allow."""
    assert breaches(module, source) == []


def test_a_planted_stale_install_is_caught(tmp_path: Path) -> None:
    """A file that is new, gone or changed is named."""
    source, installed = tmp_path / "source", tmp_path / "installed"
    for folder, names in ((source, "same new changed"), (installed, "same gone changed")):
        folder.mkdir()
        for name in names.split():
            (folder / f"{name}.py").write_text("")
    (source / "changed.py").write_text("1")
    (installed / "py.typed").symlink_to(source / "py.typed")
    (source / "cache.pyc").write_text("")
    assert differences(source, installed) == [
        "new.py is not installed",
        "gone.py is installed, but no longer there",
        "py.typed is installed, but no longer there",
        "changed.py differs",
    ]


def test_a_planted_subpackage_that_is_not_listed_is_caught(tmp_path: Path) -> None:
    """A folder below a package is missed where pyproject.toml does not name it."""
    (tmp_path / "integrations").mkdir()
    (tmp_path / "integrations" / "__init__.py").write_text("")
    (tmp_path / "__init__.py").write_text("")
    listed = '[tool.setuptools]\npackages = ["runqueue"]\npackage-dir = {"runqueue" = "%s"}'
    assert unlisted(listed % tmp_path, {"runqueue": tmp_path}) == ["runqueue.integrations"]
    assert unlisted(listed % (tmp_path / "x"), {"runqueue": tmp_path})[1:] == [
        "runqueue is mapped to another folder",
        "runqueue.integrations is mapped to another folder",
    ]
