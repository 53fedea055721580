"""
The prefix by which a tracking URI asks MLflow for the queued store: `runqueue+http://host:5000`.
"""

# Rule of this file: no imports but `typing`. Every `import mlflow` loads runqueue's plugin, and this module with it.

from __future__ import annotations

from typing import Final

PREFIX: Final = "runqueue+"


def plain_uri(uri: str) -> str:
    """
    Return the URI without the prefix, as MLflow's own store takes it.

    `runqueue+databricks://` names no profile, so it becomes `databricks`.
    """
    if not uri.startswith(PREFIX):
        return uri
    found = uri.removeprefix(PREFIX)
    return "databricks" if found == "databricks://" else found
