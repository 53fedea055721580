"""
The rooms of the packages: imports point down only, are absolute and spelt `runqueue...`, and the install is current.

Rules of this file: it reads the imports and imports nothing; imports inside of functions and under TYPE_CHECKING count
too. A room is a folder, or a module that stands in the folder of a package itself. `ROOMS` has one row a room, from the
ground up. A module may import its own room and the rooms that its room's row names, all of which stand in rows above that
row. Within a room, too, no two modules import each other, directly or by a detour.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import attrs
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = {"runqueue": ROOT / "client", "runqueue.queueing": ROOT / "queueing"}
FOLDER_NAMES = {"client", "queueing", "tests"}
MOST_FILES: Final = 12
MOST_LINES: Final = 400


@attrs.frozen
class Room:
    """
    What the modules of a room may import, besides the standard library and each other.

    Args:
        rooms: Names of rooms, without `runqueue.`, separated by blanks.
        needs: Third-party packages that every module of the room may import.
        only: Third-party packages that a single module of the room may import, by the module's name.
    """

    rooms: str = ""
    needs: str = ""
    only: Mapping[str, str] = attrs.field(factory=dict[str, str])


ROOMS: Final[dict[str, Room]] = {
    # The package runqueue.queueing knows neither MLflow nor HTTP.
    "queueing._errors": Room(),
    "queueing.batches": Room("queueing._errors", "attrs"),
    "queueing._report": Room("queueing.batches", "attrs"),
    "queueing.lanes": Room("queueing._errors queueing._report queueing.batches", "attrs"),
    "queueing.delivery": Room(
        "queueing._errors queueing._report queueing.batches queueing.lanes", "anyio attrs", {"_retry": "tenacity"}
    ),
    "queueing": Room("queueing._errors queueing._report queueing.batches queueing.lanes"),
    # The package runqueue, up to what users import.
    "runtime": Room("queueing queueing.delivery", "anyio", {"_waiting": "sniffio trio"}),
    "_entities": Room("", "attrs"),
    "errors": Room("_entities queueing"),
    "_run_id": Room("runtime"),
    "settings": Room("errors queueing", "attrs", {"_config": "httpx", "_tracking_uri": "mlflow"}),
    "wire": Room("_entities _run_id errors queueing queueing.batches", "attrs orjson"),
    "http": Room(
        "errors queueing runtime settings wire",
        "anyio attrs httpx",
        {
            "_plugins": "mlflow requests requests_auth_aws_sigv4",
            "_transports": "aiohttp httpx_aiohttp",
        },
    ),
    "stores": Room(
        "errors http queueing runtime settings wire",
        "anyio attrs orjson",
        {"_databricks": "databricks", "_mlflow": "mlflow", "_mlflow_calls": "mlflow"},
    ),
    "artifacts": Room(
        "errors http queueing runtime settings stores wire",
        "anyio attrs orjson",
        {"_content": "PIL yaml", "_repositories": "mlflow"},
    ),
    "engine": Room(
        "_entities _run_id artifacts errors http queueing queueing._report queueing.batches queueing.delivery"
        " queueing.lanes runtime settings stores wire",
        "anyio attrs orjson",
        {"_progress": "tqdm"},
    ),
    "api": Room(
        "_entities _run_id artifacts engine errors queueing queueing.batches runtime settings stores wire",
        "anyio attrs",
    ),
    "_public": Room("_entities _run_id api errors queueing settings"),
    "runqueue": Room("_public"),
    # What stands on the public names.
    "integrations": Room(),
    "integrations.mlflow": Room("_run_id errors runqueue runtime settings wire", "mlflow"),
    "cli": Room(
        "errors http runtime settings stores",
        "anyio attrs orjson",
        {"_commands": "click", "_local_stores": "mlflow sqlalchemy", "_output": "click rich"},
    ),
    "__main__": Room("cli"),
}
"""By name, without `runqueue.` in front of it."""

TYPING_ONLY = {"typing_extensions"}

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
    """The module that an imported name comes from, e.g. `runqueue._run_id` for `runqueue._run_id.PendingRunId`."""
    parts = target.split(".")
    for end in range(len(parts), 0, -1):
        if (name := ".".join(parts[:end])) in known:
            return name
    return None


# -- rules -----------------------------------------------------------------------------------------------------------


def room_of(module: str) -> str:
    """The room of a module: its folder's name, or in the folder of a package its own."""
    name = module.removeprefix("runqueue.")
    folder = name.rpartition(".")[0]
    if name in PACKAGE_FOLDERS or folder in ("", "queueing"):
        return name
    return folder


PACKAGE_FOLDERS = {
    ".".join(path.parent.relative_to(folder).parts)
    if package == "runqueue"
    else ".".join(("queueing", *path.parent.relative_to(folder).parts))
    for package, folder in PACKAGES.items()
    for path in folder.rglob("__init__.py")
}


def breaches(module: str, source: str, rooms: Mapping[str, Room] = ROOMS) -> list[str]:
    """What is wrong with the imports of one module, each with its line."""
    room = room_of(module)
    if room not in rooms:
        return [f"{module} is in no room: add {room!r} to ROOMS"]
    known = {*modules(), module}
    found: list[str] = []
    for each in read_imports(source):
        fault = _fault(module, each, rooms[room], known)
        if fault is not None:
            found.append(f"{module}:{each.line}: {fault}")
    return found


def _fault(module: str, each: Import, room: Room, known: set[str]) -> str | None:
    if each.level:
        return f"a relative import of {each.target}"
    top = each.target.split(".")[0]
    if top == "runqueue":
        target = owner(each.target, known)
        if target is None or target == module:
            return f"{each.target} is no other module"
        there = room_of(target)
        if there == room_of(module) or there in room.rooms.split(" "):
            return None
        return f"{there} is no room that {room_of(module)} may import"
    if top in FOLDER_NAMES:
        return f"{each.target} is imported by its folder's name"
    if top in sys.stdlib_module_names:
        return None
    if top in TYPING_ONLY:
        return None if each.typing_only else f"{top} at run time"
    if top in (*room.needs.split(), *room.only.get(module.rpartition(".")[2], "").split()):
        return None
    return f"{top} is not for this module"


def circles(imports: Mapping[str, set[str]]) -> list[str]:
    """Modules that import themselves by a detour."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for target in imports.get(waiting.pop(), set()) - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    return [name for name in imports if name in reached(name)]


def too_large(folders: Mapping[str, Path]) -> list[str]:
    """Folders of too many modules, and modules of too many lines."""
    found: list[str] = []
    for folder in folders.values():
        for each in sorted({path.parent for path in folder.rglob("*.py")}):
            paths = sorted(each.glob("*.py"))
            if len(paths) > MOST_FILES:
                found.append(f"{each.name}: {len(paths)} modules, more than {MOST_FILES}")
            for path in paths:
                lines = len(path.read_text("utf-8").splitlines())
                if lines > MOST_LINES:
                    found += [f"{each.name}/{path.name}: {lines} lines, more than {MOST_LINES}"]
    return found


def differences(source: Path, installed: Path) -> list[str]:
    """How an installed package differs from its source folder, by names and content."""
    ours, theirs = _files(source), _files(installed)
    found = [f"{name} is not installed" for name in sorted(ours.keys() - theirs.keys())]
    found += [f"{name} is installed, but no longer there" for name in sorted(theirs.keys() - ours.keys())]
    found += [f"{name} differs" for name in sorted(ours.keys() & theirs.keys()) if ours[name] != theirs[name]]
    return found


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.exists() else b"(a link to nowhere)"
        for path in folder.rglob("*")
        if path.suffix in (".py", ".pyi", ".typed") and path.relative_to(folder).parts[0] != "queueing"
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
    """No module imports a room that its row does not name, relatively, by a folder's name, or a package not for it."""
    assert breaches(module, modules()[module].read_text("utf-8")) == []


def test_the_table_names_the_rooms_that_exist() -> None:
    """No row is left of a room that is gone."""
    assert sorted(ROOMS) == sorted({room_of(module) for module in modules()})


def test_a_row_names_only_rooms_of_rows_before_it() -> None:
    """So the order of the table is the order of the rooms, and no two rooms import each other."""
    rows = list(ROOMS)
    found = [
        f"{name} names {other}"
        for at, (name, room) in enumerate(ROOMS.items())
        for other in room.rooms.split()
        if other not in rows[:at]
    ]
    assert found == []


def test_no_row_allows_what_nobody_uses() -> None:
    """A permission that no import needs is taken back."""
    used: dict[str, set[str]] = {name: set() for name in ROOMS}
    for module, path in modules().items():
        for each in read_imports(path.read_text("utf-8")):
            top = each.target.split(".")[0]
            target = owner(each.target, set(modules())) if top == "runqueue" else None
            used[room_of(module)].add(top if target is None else f"room {room_of(target)}")
    found = [
        f"{name}: {word}"
        for name, room in ROOMS.items()
        for word in (
            *(f"room {each}" for each in room.rooms.split()),
            *room.needs.split(),
            *" ".join(room.only.values()).split(),
        )
        if word not in used[name]
    ]
    assert found == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Within a room, too, imports point one way."""
    known = set(modules())
    imports = {
        module: {
            target
            for each in read_imports(path.read_text("utf-8"))
            if each.target.startswith("runqueue") and (target := owner(each.target, known)) not in (None, module)
        }
        for module, path in modules().items()
    }
    assert circles(imports) == []


def test_rooms_and_modules_are_small() -> None:
    """A folder of more than a dozen modules is a corridor; a module of more than 400 lines holds two nouns."""
    assert too_large(PACKAGES) == []


def test_every_room_says_what_it_is_for() -> None:
    """The docstring of each `__init__` is the sign on the room's door."""
    paths = [path for folder in PACKAGES.values() for path in folder.rglob("__init__.py")]
    assert [path for path in paths if not ast.get_docstring(ast.parse(path.read_text("utf-8")))] == []


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
        (
            "runqueue.wire._encoder",
            "from runqueue.engine._engine import Engine",
            "engine is no room that wire may import",
        ),
        ("runqueue.wire._encoder", "import runqueue.engine._engine", "engine is no room that wire may import"),
        ("runqueue.wire._encoder", "from runqueue.engine import _engine", "engine is no room that wire may import"),
        ("runqueue.wire._encoder", "from runqueue import Client", "runqueue is no room that wire may import"),
        (
            "runqueue.wire._encoder",
            "def f():\n    from runqueue.stores._resolve import x",
            "stores is no room that wire",
        ),
        (
            "runqueue.wire._encoder",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from runqueue.stores._rest import x",
            "stores is no room that wire may import",
        ),
        (
            "runqueue.wire._encoder",
            "import importlib\nimportlib.import_module('runqueue.stores._rest')",
            "stores is no room",
        ),
        ("runqueue.wire._encoder", "from . import _run_id", "a relative import"),
        ("runqueue.wire._encoder", "from .._run_id import RunId", "a relative import"),
        ("runqueue.wire._encoder", "import queueing", "by its folder's name"),
        ("runqueue.wire._encoder", "from client._run_id import RunId", "by its folder's name"),
        ("runqueue.wire._encoder", "import httpx", "httpx is not for this module"),
        ("runqueue.engine._engine", "import requests", "requests is not for this module"),
        ("runqueue.engine._engine", "def f():\n    import mlflow.entities", "mlflow is not for this module"),
        ("runqueue.engine._engine", "import tqdm", "tqdm is not for this module"),
        ("runqueue.engine._engine", "from typing_extensions import Self", "typing_extensions at run time"),
        (
            "runqueue.queueing.lanes._lane",
            "from runqueue.wire._encoder import Encoder",
            "wire is no room that queueing.lanes",
        ),
        ("runqueue.queueing.lanes._lane", "from runqueue.queueing import Limits", "queueing is no room that"),
        ("runqueue.queueing.batches._batch", "from runqueue.queueing.lanes._lane import Lane", "lanes is no room that"),
        ("runqueue.queueing.lanes._lane", "import orjson", "orjson is not for this module"),
        ("runqueue.queueing.delivery._sender", "import trio", "trio is not for this module"),
        ("runqueue.corridor._new", "", "runqueue.corridor._new is in no room"),
        ("runqueue._new", "", "runqueue._new is in no room"),
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
        ("runqueue.wire._encoder", "from runqueue import _run_id, _entities\nimport orjson, json"),
        ("runqueue.wire._encoder", "from runqueue.wire._points import Points"),
        ("runqueue.http._transports", "import httpx\ndef f():\n    from httpx_aiohttp import AiohttpTransport"),
        ("runqueue.integrations.mlflow._queue", "from runqueue import Client"),
        (
            "runqueue.queueing.lanes._lane",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import typing_extensions",
        ),
    ],
)
def test_an_import_that_points_down_is_no_breach(module: str, source: str) -> None:
    """The rules let pass what the rows allow."""
    assert breaches(module, source) == []


def test_a_planted_circle_is_caught() -> None:
    """A detour counts as well as a direct import."""
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]


def test_a_planted_corridor_and_a_planted_long_module_are_caught(tmp_path: Path) -> None:
    """Both are named with what is too much."""
    for at in range(MOST_FILES + 1):
        (tmp_path / f"{at}.py").write_text("")
    (tmp_path / "0.py").write_text("#\n" * (MOST_LINES + 1))
    assert too_large({"runqueue": tmp_path}) == [
        f"{tmp_path.name}: 13 modules, more than 12",
        f"{tmp_path.name}/0.py: 401 lines, more than 400",
    ]


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
