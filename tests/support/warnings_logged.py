"""What the library has logged during a test."""

from __future__ import annotations

import logging
import re
from collections import Counter

import pytest


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the texts of runqueue's warnings and errors."""
    found = [record for record in caplog.records if record.name == "runqueue" and record.levelno >= logging.WARNING]
    return [record.getMessage() for record in found]


def dropped_by_run(caplog: pytest.LogCaptureFixture) -> Counter[str]:
    """Return how many entries were reported as dropped, by run; a run may be reported in several warnings."""
    found: Counter[str] = Counter()
    for text in warnings_of(caplog):
        if match := re.match(r"(\d+) entries of run (.*) were dropped: ", text):
            found[match[2]] += int(match[1])
    return found
