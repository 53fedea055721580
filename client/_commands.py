"""
The commands, on click (extra `cli`).

Rules of this file: stdout is for what was asked for, stderr for one line that says what is wrong; exit code 1 then.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import click

from runqueue._doctor import examine

_WIDTH = 17


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="runqueue", prog_name="runqueue")
def commands() -> None:
    """Log to MLflow tracking servers, asynchronously and in batches."""


@commands.command()
@click.option("--tracking-uri", metavar="URI", help="As runqueue.Client takes it; without it, what Client() would use.")
def doctor(tracking_uri: str | None) -> None:
    """Say which store a client would use, from where that is known, and whether it works."""
    with _quiet():
        found = examine(tracking_uri)
    for key, value in found.rows:
        click.echo(f"{key + ':':<{_WIDTH}}{value}")
    if found.fault is not None:
        click.echo(f"runqueue doctor: {found.fault}", err=True)
        raise SystemExit(1)


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Keeps what mlflow and its database logs and warns of away from the one line on stderr."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
