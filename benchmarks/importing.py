"""
Import case: what `import` costs, by `python -X importtime` in processes of their own, and whether what only sending
needs is imported early.
"""

import re
import subprocess
import sys

from benchmarks.work import Work

HEAVY = ("httpx", "anyio")
TIMEOUT = 120.0  # seconds
_LINE = re.compile(r"import time:\s+\d+ \|\s+(?P<cumulative>\d+) \| (?P<indent> *)(?P<module>\S+)$")


def import_time(work: Work) -> dict[str, float]:
    """
    Return the milliseconds of the import; for runqueue also how many of httpx and anyio are imported once a client was
    made and has logged, but sent nothing.
    """
    _run("-c", work.peer.imports)  # once before, as the first import after an installation may compile
    figures = {"import": _sum_of_roots(_run("-X", "importtime", "-c", work.peer.imports)) / 1_000}
    if work.peer.name == "runqueue":
        figures["early"] = float(_run("-c", _EARLY.format(uri=work.tracking_uri)).splitlines()[-1])
    return figures


_EARLY = f"""
import sys
import runqueue
client = runqueue.Client({{uri!r}})
client.log_metrics(client.create_run("0"), {{{{"loss": 0.5}}}}, 1)
sys.stderr.write(str(sum(module in sys.modules for module in {HEAVY!r})) + "\\n")
sys.stderr.flush()
__import__("os")._exit(0)
"""


def _sum_of_roots(report: str) -> int:
    """
    Return the µs of all imports after `site`, with which the start of the interpreter ends: the sum of the lines
    without indentation, whose times include those of their own imports.
    """
    found = [match for match in map(_LINE.match, report.splitlines()) if match]
    roots = [match for match in found if not match["indent"]]
    start = max((number for number, match in enumerate(roots) if match["module"] == "site"), default=-1)
    return sum(int(match["cumulative"]) for match in roots[start + 1 :])


def _run(*arguments: str) -> str:
    """Return the standard error of a Python process."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, timeout=TIMEOUT, errors="replace"
    )
    return done.stderr
