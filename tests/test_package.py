"""The sdist and the wheel hold what they should, and nothing that an earlier build or a test run left behind."""

# Rules of this file: it builds from a copy of the tree, so that neither the tree nor its editable install changes. It
# needs no network: the build backend is one of the development requirements.

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"runqueue": "client", "runqueue/queueing": "queueing"}
NOT_SOURCES = ("build", "dist", ".*", "*.egg-info", "__pycache__", "mlruns", "mlartifacts", "mlflow.db*")
"""What `.gitignore` names, and hidden folders."""
LEFT_BEHIND = (
    "build/lib/runqueue/_gone.py",
    "client/__pycache__/_gone.cpython-311.pyc",
    "client/api/__pycache__/_gone.cpython-311.pyc",
    "tests/__pycache__/conftest.cpython-311.pyc",
    "dist/runqueue-0.0.1.tar.gz",
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel that was built from an sdist, and that sdist."""
    folder = tmp_path_factory.mktemp("package")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_SOURCES))
    for name in LEFT_BEHIND:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "dist"


def files(folder: str, pattern: str = "*") -> set[str]:
    """The source files below a folder of the tree, relative to it."""
    top = ROOT / folder
    return {
        str(path.relative_to(top))
        for path in top.rglob(pattern)
        if path.is_file() and not any(Path(part).match(each) for part in path.parts for each in NOT_SOURCES)
    }


def test_the_wheel_holds_every_module_and_the_mark_of_types(built: Path) -> None:
    """Under the names by which they are imported, and nothing else but its metadata."""
    expected = {f"{package}/{name}" for package, folder in PACKAGES.items() for name in files(folder, "*.py")}
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected | {"runqueue/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert any(name.endswith(".dist-info/entry_points.txt") for name in names)


def test_the_sdist_holds_what_the_wheel_is_built_from(built: Path) -> None:
    """The sources, the metadata and the changelog; no tests, and nothing of an earlier build."""
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    expected = {f"{folder}/{name}" for folder in PACKAGES.values() for name in files(folder)}
    expected |= {"README.md", "CHANGELOG.md", "LICENSE", "MANIFEST.in", "PKG-INFO", "pyproject.toml", "setup.cfg"}
    assert {name for name in names if not name.startswith("runqueue.egg-info/")} == expected
