"""
What a client that streams has to say while nobody waits for it: failures, and entries dropped at the bound.

Rule of this file: few lines, whatever happens: each cause once, each run once, and of many runs only the first by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any, Final

from runqueue.engine._reports import grouped
from runqueue.queueing import Failure
from runqueue.runtime import _notices

NAMED: Final = 10
"""Runs that dropped entries, said by name at a time; the others are counted."""


def tell_failures(news: list[Failure]) -> None:
    """Of each cause the first; the flushes report all."""
    for failure in grouped(news):
        fate = "failed; `failures` holds all" if failure.final else "is still queued"
        try:
            what = failure.summary()
        except Exception as error:  # of a key's repr, which is foreign code
            what = f"{failure.operation} (it cannot be shown: {type(error).__name__})"
        text = "%s of run %s %s, as others may for the same cause: %s"
        _notices.warning(text, what, failure.run_id, fate, failure.error)


def tell_dropped(dropped: Mapping[Any, int], max_pending: float) -> None:
    """
    Args:
        dropped: Entries, by run, since this was said last.
        max_pending: The bound they met.
    """
    for run, count in islice(dropped.items(), NAMED):
        _notices.warning("%d entries of run %s were dropped: max_pending=%d", count, run, max_pending)
    if others := list(islice(dropped.values(), NAMED, None)):
        text = "%d entries of %d other runs were dropped: max_pending=%d"
        _notices.warning(text, sum(others), len(others), max_pending)
