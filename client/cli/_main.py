"""
The entry point `runqueue`.

Rule of this file: it can be imported without the extra `cli`, to say that it is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run a command, and end the process with its exit code.

    Args:
        arguments: Without the program's name; None: those of the process.
    """
    try:
        from runqueue.cli._commands import commands
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        sys.exit("runqueue: the command line needs click: pip install 'runqueue[cli]'")
    commands(arguments, prog_name="runqueue")
