"""
The entry point of the program `runqueue`.
"""

# Rule of this file: it can be imported without the extra `cli`, so that it can name what to install.

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """
    Run a command, and end the process with its exit code.

    Args:
        arguments: The command line without the program's name. None: that of the process.
    """
    try:
        from runqueue.cli._commands import commands

        commands(arguments, prog_name="runqueue")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("click", "rich"):
            raise
        sys.exit(f"runqueue: the command line needs {missing}: pip install 'runqueue[cli]'")
