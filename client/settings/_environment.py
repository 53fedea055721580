"""
Values of MLflow's environment variables.

Rule of this file: a bad value is a ConfigError that names the variable; an empty one counts as not set.
"""

from __future__ import annotations

import os

from runqueue.errors import ConfigError

_LONGEST = 18
"""Digits of a number; Python refuses to read thousands of them, with an error of its own."""


def text(name: str) -> str | None:
    """The value as it is."""
    return os.environ.get(name) or None


def number(name: str, *, above: float | None = None, least: float = 0.0) -> float | None:
    """
    A finite number.

    Args:
        name: Of the variable.
        above: It has to be more than this.
        least: It has to be at least this.

    Raises:
        ConfigError: It is not.
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
    A whole number from 0 on.

    Raises:
        ConfigError: It is none.
    """
    value = text(name)
    if value is None:
        return None
    digits = value.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _LONGEST):
        raise ConfigError(f"the environment variable {name}={value[:99]!r} is no whole number from 0 on")
    return int(digits)


def switch(name: str) -> bool | None:
    """
    "true", "false", "1" or "0", in capitals too; the words that MLflow takes.

    Raises:
        ConfigError: It is something else; a typing error must not switch anything off in silence.
    """
    value = text(name)
    if value is None:
        return None
    if value.lower() not in ("true", "false", "1", "0"):
        raise ConfigError(f"the environment variable {name}={value!r} is none of true, false, 1, 0")
    return value.lower() in ("true", "1")
