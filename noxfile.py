"""
The tests on other Pythons and other versions of mlflow.

    nox                                         every ring on each supported Python that is installed
    nox -s tests-3.12 -- tests/client           one Python, some tests
    nox -s mlflow-oldest mlflow-newest          the live ring on the oldest mlflow that pyproject admits, and on the newest
"""

from __future__ import annotations

import re

import nox

nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["tests"]

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)


def oldest_mlflow() -> str:
    """The floor that pyproject.toml sets."""
    (requirement,) = PROJECT["project"]["optional-dependencies"]["mlflow"]
    found = re.fullmatch(r"mlflow>=([\d.]+)", requirement)
    assert found is not None, requirement
    return found[1]


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """All rings; with arguments, only those tests."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session(name="mlflow-oldest")
def mlflow_oldest(session: nox.Session) -> None:
    """The live ring on the oldest mlflow; with arguments, only those tests."""
    session.install("-e", ".[dev]", f"mlflow~={oldest_mlflow()}.0")
    session.run("pytest", *(session.posargs or ["tests/live"]))


@nox.session(name="mlflow-newest")
def mlflow_newest(session: nox.Session) -> None:
    """The live ring on the newest mlflow; with arguments, only those tests."""
    session.install("--upgrade", "-e", ".[dev]", "mlflow")
    session.run("pytest", *(session.posargs or ["tests/live"]))
