"""
The tracking URI: what a client resolves is what the installed mlflow would.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import runqueue
from runqueue.settings._tracking_uri import resolve_tracking_uri
from support.mlflow_server import clean_environment

OURS = """
import sys, runqueue
if {imports_mlflow}: import mlflow
if {sets!r}: mlflow.set_tracking_uri({sets!r})
client = runqueue.Client()
assert {imports_mlflow} or "mlflow" not in sys.modules, "mlflow was imported"
print("uri:", client._engine.uri)
"""
MLFLOWS = """
import mlflow
if {sets!r}: mlflow.set_tracking_uri({sets!r})
print("uri:", mlflow.get_tracking_uri())
"""


def resolved(script: str, folder: Path, variable: str | None, path: Path | None = None) -> str:
    """The URI that a fresh process in this folder resolves."""
    environment = clean_environment() | ({} if variable is None else {"MLFLOW_TRACKING_URI": variable})
    environment |= {"MLFLOW_ALLOW_FILE_STORE": "true"} | ({} if path is None else {"PYTHONPATH": str(path)})
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("uri: ")]
    return line.removeprefix("uri: ")


@pytest.mark.sample(
    "empty-None-None-False", "a folder with *", "mlruns of others-*", "empty-None-http://other:5000-True"
)
@pytest.mark.parametrize(
    ("folder", "variable", "sets", "imports_mlflow"),
    [
        ("empty", None, None, False),
        ("a folder with späces % & ?", None, None, False),
        ('a folder with # + ; = ~ @ : "quotes"', None, None, False),
        ("used", None, None, False),
        ("used with späces", None, None, False),
        ("mlruns of others", None, None, False),
        ("empty", "http://host:5000", None, False),
        ("used", "", None, False),
        ("empty", "sqlite:///x.db", None, True),
        ("empty", "http://host:5000", "http://other:5000", True),
        ("empty", None, "http://other:5000", True),
    ],
)
def test_the_tracking_uri_is_what_mlflow_resolves(
    tmp_path: Path, folder: str, variable: str | None, sets: str | None, imports_mlflow: bool
) -> None:
    """Both are resolved in fresh processes. Ours does not import mlflow."""
    here = tmp_path / folder
    (here / "mlruns" / ("0" if folder.startswith("used") else "models")).mkdir(parents=True)
    (here / "mlruns" / ("0" if folder.startswith("used") else "models") / "meta.yaml").write_text("")
    if folder.startswith(("empty", "a folder")):
        os.rename(here / "mlruns", tmp_path / "elsewhere")
    fields = {"sets": sets, "imports_mlflow": imports_mlflow}
    ours = resolved(OURS.format(**fields), here, variable)
    assert ours == resolved(MLFLOWS.format(**fields), here, variable)


def test_a_path_is_a_tracking_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `mlflow.set_tracking_uri`, it becomes the URI of the folder."""
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = runqueue.Client(tmp_path)
    assert client._engine.uri == tmp_path.resolve().as_uri()


# -- other versions of mlflow ----------------------------------------------------------------------------------------

UTILS = "tracking/_tracking_service/utils.py"
PLAIN = """
import os
from mlflow.environment_variables import MLFLOW_TRACKING_URI
from mlflow.store.tracking import DEFAULT_TRACKING_URI, FOLDER as MLRUNS
from mlflow.store.tracking.rest_store import RestStore

_tracking_uri = None

def _has_existing_mlruns_data():
    from mlflow.store.tracking.file_store import FileStore

def _get_default_tracking_uri():
    return MLRUNS if _has_existing_mlruns_data() else DEFAULT_TRACKING_URI

def get_tracking_uri() -> str:
    if _tracking_uri is not None:
        return _tracking_uri
    elif uri := MLFLOW_TRACKING_URI.get():
        return uri
    return f"sqlite:///{os.path.abspath(_get_default_tracking_uri().removeprefix('sqlite:///'))}"
"""
IN_A_CLASS = """
class Settings:
    default = "sqlite:///from-a-class.db"

def get_tracking_uri():
    return Settings.default
"""


def fake_mlflow(folder: Path, utils: str) -> Path:
    """Write a package mlflow with this module, and a module whose import would fail."""
    package = folder / "packages/mlflow"
    for name, source in {
        "__init__.py": "from mlflow.tracking._tracking_service.utils import get_tracking_uri",
        "tracking/__init__.py": "",
        "tracking/_tracking_service/__init__.py": "",
        UTILS: utils,
        "store/__init__.py": "",
        "store/tracking/__init__.py": "DEFAULT_TRACKING_URI = 'sqlite:///mlflow.db'; FOLDER = './mlruns'\nimport nowhere",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(source)
    return package.parent


RESOLVE = """
import sys
from runqueue.settings._tracking_uri import resolve_tracking_uri
print("uri:", resolve_tracking_uri(None))
assert ("mlflow" in sys.modules) is {imported}
"""


def test_the_default_follows_a_version_that_does_not_quote(tmp_path: Path) -> None:
    """As in mlflow 3.18. Its function is evaluated, and none of its modules is imported."""
    here = tmp_path / "späces % &"
    here.mkdir()
    path = fake_mlflow(tmp_path, PLAIN)
    assert resolved(RESOLVE.format(imported=False), here, None, path) == f"sqlite:///{here / 'mlflow.db'}"


def test_mlflow_is_imported_if_its_source_cannot_be_evaluated(tmp_path: Path) -> None:
    """That takes longer, and its answer is right in any case."""
    path = fake_mlflow(tmp_path, IN_A_CLASS)
    assert resolved(RESOLVE.format(imported=True), tmp_path, None, path) == "sqlite:///from-a-class.db"


def test_without_mlflow_the_message_names_the_default_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client cannot be made, and the message says what to install."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        monkeypatch.delitem(sys.modules, name)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == "mlflow" else find_spec(name, package)
    )
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    with pytest.raises(runqueue.ConfigError, match=r"mlflow\.db.*pip install 'runqueue\[mlflow\]'"):
        runqueue.Client()
