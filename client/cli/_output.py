"""
Prints the doctor's findings: as a table on a terminal, as plain lines anywhere else.
"""

# Rules of this file:
# - Output that is piped stays one `key: value` line a finding, for grep and for bug reports.
# - A value is printed as it is. It may hold square brackets, which rich would read as markup.

from __future__ import annotations

import sys
from collections.abc import Sequence

import click
from rich.box import ROUNDED
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 17
"""Columns of a key and its colon in plain lines."""


def print_findings(rows: Sequence[tuple[str, str]]) -> None:
    """
    Print the findings to stdout.

    Args:
        rows: Keys and values, in the order in which they are shown.
    """
    if not sys.stdout.isatty():
        for key, value in rows:
            click.echo(f"{key + ':':<{_WIDTH}}{value}")
        return
    table = Table(box=ROUNDED, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows:
        table.add_row(key, Text(value))
    Console().print(table)


def print_fault(fault: str) -> None:
    """Print what is wrong to stderr: one line, red on a terminal."""
    click.secho(f"runqueue doctor: {fault}", err=True, fg="red")
