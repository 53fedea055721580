"""
Reads environment variables as text, numbers and switches.
"""

# Rules of this file:
# - A bad value raises a ConfigError that names the variable.
# - An empty variable counts as not set.

from __future__ import annotations

import os

from runqueue.errors import ConfigError

_MAX_DIGITS = 18
"""Above some thousand digits, Python's `int()` raises an error of its own."""


def text(name: str) -> str | None:
    """Return the value as it is; None if it is not set."""
    return os.environ.get(name) or None


def number(name: str, *, above: float | None = None, least: float = 0.0) -> float | None:
    """
    Return the value as a finite number; None if it is not set.

    Args:
        name: The variable's name.
        above: The number has to be greater than this. None: no such bound.
        least: The number has to be at least this.

    Raises:
        ConfigError: The value is not such a number.
    """
    value = text(name)
    if value is None:
        return None
    try:
        found = float(value)
    except ValueError:
        found = float("nan")
    bound = f"above {above:g}" if above is not None else f"from {least:g} on"
    if not (least <= found < float("inf")) or (above is not None and found <= above):
        raise ConfigError(f"the environment variable {name}={value!r} is no number {bound}")
    return found


def count(name: str) -> int | None:
    """
    Return the value as a whole number from 0 on; None if it is not set.

    Raises:
        ConfigError: The value is not such a number.
    """
    value = text(name)
    if value is None:
        return None
    digits = value.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MAX_DIGITS):
        raise ConfigError(f"the environment variable {name}={value[:99]!r} is no whole number from 0 on")
    return int(digits)


def switch(name: str) -> bool | None:
    """
    Return the value as a bool; None if it is not set. Like MLflow, it takes "true", "false", "1" and "0" in any case.

    Raises:
        ConfigError: The value is another word. A typing error must not silently switch anything off.
    """
    value = text(name)
    if value is None:
        return None
    if value.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(f"the environment variable {name}={value!r} is none of true, false, 1, 0")
    return value.lower() in ("true", "1")
