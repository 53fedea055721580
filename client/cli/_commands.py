"""
The commands of the program, on click (extra `cli`).
"""

# Rules of this file:
# - stdout is for results. If something is wrong, stderr gets one line about it, and the exit code is 1.
# - `run` prints nothing by itself: the output and the exit code are the script's.

from __future__ import annotations

import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from importlib.metadata import entry_points
from importlib.util import find_spec

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="runqueue", prog_name="runqueue")
def commands() -> None:
    """Log to MLflow tracking servers, asynchronously and in batches."""


@commands.command()
@click.option("--tracking-uri", metavar="URI", help="As runqueue.Client takes it; without it, what Client() would use.")
def doctor(tracking_uri: str | None) -> None:
    """Say which store a client would use, from where that is known, and whether it works."""
    from runqueue.cli import _doctor, _output  # not at the top: `runqueue run` needs neither, and starts sooner

    with _quiet():
        found = _doctor.examine(tracking_uri)
    _output.print_findings(found.rows)
    if found.fault is not None:
        _output.print_fault(found.fault)
        raise SystemExit(1)


@commands.command(
    context_settings={
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
        "help_option_names": ["--help"],  # not -h: it may be part of Python's own options
    },
    options_metavar="",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[-m MODULE | SCRIPT] [ARGS]...")
def run(command: tuple[str, ...]) -> None:
    """
    Run a script as `python` does, with all that it logs by MLflow queued; the Python processes that it starts, too.

    What follows is the command line of the interpreter: a script, -m and a module, or -c and a program.
    """
    if find_spec("mlflow") is None:
        click.echo("runqueue run: mlflow is not installed: pip install 'runqueue[mlflow]'", err=True)
        raise SystemExit(1)
    if not any(
        point.value.startswith("runqueue.integrations.mlflow._plugin:")
        for point in entry_points(group="mlflow.tracking_store")
    ):
        click.echo("runqueue run: MLflow would not find runqueue, as it is not installed by pip", err=True)
        raise SystemExit(1)
    os.environ["RUNQUEUE_MLFLOW"] = "1"  # read by the plugin, see `runqueue.integrations.mlflow._plugin`
    # A new interpreter replaces this process. With runpy, argv, `__main__`, tracebacks, signals, exit codes and the
    # workers of multiprocessing would differ from those of a plain `python script.py`.
    arguments = [sys.executable, *command]
    if os.name == "nt":  # there, exec starts another process and ends this one at once
        raise SystemExit(subprocess.run(arguments, check=False).returncode)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, arguments)


@contextmanager
def _quiet() -> Generator[None, None, None]:
    """Silence logging and warnings: stderr is for one line, and mlflow and its database write more."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
