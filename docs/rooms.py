"""
The table of rooms in CONTRIBUTING.md: prints it, or puts it into the file.

    python docs/rooms.py             # prints the table
    python docs/rooms.py --write     # replaces the table in CONTRIBUTING.md

The rooms, and what each may import, stand in `tests/test_layers.py`; the sentence beside a room is the first one of its
docstring.
"""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
CONTRIBUTING: Final = ROOT / "CONTRIBUTING.md"
HEAD: Final = "| room | what it is for | third-party packages |\n| --- | --- | --- |\n"


def table() -> str:
    """The table, from the room that users call down to those that import nothing."""
    rooms: dict[str, Any] = runpy.run_path(str(ROOT / "tests" / "test_layers.py"))["ROOMS"]
    return HEAD + "".join(_row(name, room) for name, room in reversed(rooms.items()))


def table_in(text: str) -> str:
    """
    The table that stands in a text.

    Raises:
        LookupError: There is none.
    """
    found = re.search(re.escape(HEAD) + r"(?:\|.*\n)*", text)
    if found is None:
        raise LookupError("the text holds no table of rooms")
    return found.group()


def place_of(name: str) -> Path:
    """The folder or module of a room, below the root of the repository."""
    if name == "runqueue":
        return Path("client")
    base = Path(name.replace(".", "/")) if name.split(".")[0] == "queueing" else Path("client", name.replace(".", "/"))
    return base if (ROOT / base).is_dir() else base.with_suffix(".py")


def first_sentence(docstring: str) -> str:
    """Up to the first full stop that ends a sentence, on one line."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph, maxsplit=1)[0]


def _row(name: str, room: Any) -> str:
    place = place_of(name)
    path = ROOT / place
    source = (path / "__init__.py" if path.is_dir() else path).read_text("utf-8")
    sentence = first_sentence(ast.get_docstring(ast.parse(source)) or "")
    packages = sorted({*room.needs.split(), *" ".join(room.only.values()).split()})
    shown = f"{place.as_posix()}/" if path.is_dir() else place.as_posix()
    return f"| `{shown}` | {sentence} | {' '.join(packages)} |\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The table of rooms in CONTRIBUTING.md.")
    parser.add_argument("--write", action="store_true", help="replace the table in CONTRIBUTING.md")
    if parser.parse_args().write:
        before = CONTRIBUTING.read_text("utf-8")
        CONTRIBUTING.write_text(before.replace(table_in(before), table()), "utf-8")
    else:
        sys.stdout.write(table())
