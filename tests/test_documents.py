"""
The documents agree with the tree: the table of rooms, the files and names that they mention, the form of their pages.
"""

# Rules of this file: it reads files and imports nothing of runqueue.

from __future__ import annotations

import ast
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT: Final = Path(__file__).parents[1]
CONTRIBUTING: Final = ROOT / "CONTRIBUTING.md"
CHANGELOG: Final = ROOT / "CHANGELOG.md"
DECISIONS: Final = ROOT / "docs" / "decisions"
PAGES: Final = sorted(path for path in DECISIONS.glob("*.md") if path.name != "README.md")
HEADINGS: Final = ["Context", "Decision", "Rejected", "Cost measured"]
MOST_LINES: Final = 150
MOST_LINES_OF_AN_ENTRY: Final = 2
LONGEST_LINE: Final = 120
FOR_DEVELOPERS: Final = ("bench", "dev")
TOP_FOLDERS: Final = "client|queueing|tests|benchmarks|docs|examples"
DOCUMENTS: Final = [
    ROOT / "README.md",
    CONTRIBUTING,
    CHANGELOG,
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def paths_in(text: str) -> set[str]:
    """Every path that begins with a folder of the repository's root."""
    return {found.rstrip(".,:") for found in re.findall(rf"(?<![\w./-])(?:{TOP_FOLDERS})/[\w./-]*", text)}


def links_in(text: str) -> set[str]:
    """The targets of links to other files."""
    return {found for found in re.findall(r"\]\(([^)#\s]+)\)", text) if "://" not in found}


def steps_in(text: str) -> list[tuple[str, str]]:
    """The file and the name of every line of a picture that gives both: `client/api/_run.py: Run.log_metrics`."""
    return re.findall(rf"((?:{TOP_FOLDERS})/[\w./-]+\.py): ([\w.]+)", text)


def defined_in(source: str) -> set[str]:
    """Functions, classes, and what classes define, by name: `store`, `Lane`, `Lane.store`."""
    found: set[str] = set()

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
                collect(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
                found.update(prefix + ast.unparse(target).removeprefix("self.") for target in targets)

    collect(ast.parse(source).body, "")
    # Attributes are set in `__init__`.
    return {name.replace(".__init__.", ".") for name in found}


def entries_of(changelog: str) -> Iterator[str]:
    """Each entry of a changelog, with the lines that continue it."""
    for block in re.split(r"\n(?=- )|\n\n", changelog):
        if block.startswith("- "):
            yield block.rstrip("\n")


# -- CONTRIBUTING.md -------------------------------------------------------------------------------------------------


def test_the_table_of_rooms_is_what_its_script_prints() -> None:
    """Each room stands in it, from top to bottom, with the first sentence of its docstring."""
    rooms = runpy.run_path(str(ROOT / "docs" / "rooms.py"))
    shown = rooms["table_in"](CONTRIBUTING.read_text("utf-8"))
    assert shown == rooms["table"](), "run `python docs/rooms.py --write`"


def test_the_guide_is_short() -> None:
    """A newcomer reads it to the end."""
    assert len(CONTRIBUTING.read_text("utf-8").splitlines()) <= MOST_LINES


def test_each_step_of_a_picture_is_in_the_file_beside_it() -> None:
    """The way of a metric, of a failure and of an artifact, with the names that the code has."""
    steps = [step for path in (CONTRIBUTING, *PAGES) for step in steps_in(path.read_text("utf-8"))]
    assert len(steps) > 10
    missing = [f"{path}: {name}" for path, name in steps if name not in defined_in((ROOT / path).read_text("utf-8"))]
    assert missing == []


def test_each_dependency_has_its_reason() -> None:
    """The table names what pyproject.toml installs, the extras for users included, and nothing else."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {re.split(r"[<>=!~;\[ ]", each)[0] for each in project["dependencies"]}
    needed |= {f"extra `{name}`" for name in project["optional-dependencies"] if name not in FOR_DEVELOPERS}
    table = CONTRIBUTING.read_text("utf-8").partition("## Dependencies")[2].partition("\n## ")[0]
    named = [each for cell in re.findall(r"^\| (.+?) \|", table, re.MULTILINE) for each in cell.split(", ")]
    assert sorted(named) == sorted(needed | {"package", "---"})


# -- every document --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_and_link_of_a_document_exists(document: Path) -> None:
    """Paths are given from the root of the repository, links from the folder of the document."""
    text = document.read_text("utf-8")
    missing = [path for path in sorted(paths_in(text)) if not (ROOT / path).exists()]
    missing += [link for link in sorted(links_in(text)) if not (document.parent / link).exists()]
    assert missing == []


# -- docs/decisions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_a_decision_has_the_four_headings(page: Path) -> None:
    """One title, then context, decision, rejected, cost; none of them empty."""
    text = page.read_text("utf-8")
    assert re.fullmatch(r"\d{4}-[a-z0-9-]+", page.stem)
    assert re.findall(r"^# .+", text, re.MULTILINE) == [text.splitlines()[0]]
    title, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    assert re.match(rf"# {int(page.stem[:4])}\. \S", title)
    assert [section.splitlines()[0] for section in sections] == HEADINGS
    assert all(section.partition("\n")[2].strip() for section in sections)


def test_the_index_lists_every_decision_once_and_in_order() -> None:
    """By the link and the title of its page."""
    shown = re.findall(r"^- \[(.+)\]\((.+\.md)\)$", (DECISIONS / "README.md").read_text("utf-8"), re.MULTILINE)
    assert shown == [(page.read_text("utf-8").splitlines()[0].removeprefix("# "), page.name) for page in PAGES]


def test_decisions_are_numbered_without_gaps() -> None:
    """The next page takes the next number."""
    assert [int(page.stem[:4]) for page in PAGES] == list(range(1, len(PAGES) + 1))


# -- CHANGELOG.md ----------------------------------------------------------------------------------------------------


def test_no_entry_of_the_changelog_has_more_than_two_lines() -> None:
    """Users skim it; how something works belongs to the documentation, why it does so to docs/decisions."""
    entries = list(entries_of(CHANGELOG.read_text("utf-8")))
    assert len(entries) > 10
    assert [entry for entry in entries if len(entry.splitlines()) > MOST_LINES_OF_AN_ENTRY] == []
    assert [line for entry in entries for line in entry.splitlines() if len(line) > LONGEST_LINE] == []


# -- planted breaches ------------------------------------------------------------------------------------------------


def test_planted_paths_links_steps_and_long_entries_are_found() -> None:
    """What the tests above look for is found where it stands, in code spans, tables and pictures."""
    text = "see `client/api/_run.py`, [page](0001-x.md) and\n    -> queueing/lanes/_lane.py: Lane.take   encoded\n"
    assert paths_in(text) == {"client/api/_run.py", "queueing/lanes/_lane.py"}
    assert links_in(text) == {"0001-x.md"}
    assert steps_in(text) == [("queueing/lanes/_lane.py", "Lane.take")]
    source = "class Lane:\n    size: int = 0\n    def __init__(self):\n        self.inbox = 0\n    def take(self): ...\nX = 1"
    assert defined_in(source) >= {"Lane", "Lane.size", "Lane.inbox", "Lane.take", "X"}
    assert [len(entry.splitlines()) for entry in entries_of("# A\n\n- one\n- two\n  2\n  3\n\n## B\n\n- three\n")] == [
        1,
        3,
        1,
    ]
