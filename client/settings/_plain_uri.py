"""
The prefix by which a tracking URI asks MLflow for the queued store: `runqueue+http://host:5000`.

Rule of this file: it imports nothing, as MLflow loads it with each of its imports.
"""

from __future__ import annotations

from typing import Final

PREFIX: Final = "runqueue+"


def plain_uri(uri: str) -> str:
    """The URI that MLflow's own store goes by; `runqueue+databricks://`, which names no profile, is `databricks`."""
    if not uri.startswith(PREFIX):
        return uri
    found = uri.removeprefix(PREFIX)
    return "databricks" if found == "databricks://" else found
