"""The rings of tests on every supported Python that is installed: `nox`, or `nox -s tests-3.12 -- tests/client`."""

from __future__ import annotations

import nox

nox.options.error_on_missing_interpreters = False


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """All rings; with arguments, what they name."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)
