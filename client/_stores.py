"""
What a store is, and which one a tracking URI means.

Rules of this file: a store speaks MLflow's REST API in bytes and dicts, whatever is behind it; it tries once, checks
the answer, and says by a StoreError what went wrong. Retrying, batching and order are the engine's.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import attrs

from runqueue._config import Config, without_secrets
from runqueue.errors import ConfigError
from runqueue.queueing import Limits

SMALL: Final = 1_000_000
"""Bytes of an answer that is read, after decompression."""
LARGE: Final = 64_000_000
"""The same for answers that carry data."""


@attrs.frozen
class Endpoint:
    """One call of MLflow's REST API, below `api/2.0/mlflow/`."""

    path: str
    method: str = "POST"
    cap: int = SMALL


CREATE_RUN: Final = Endpoint("runs/create")
UPDATE_RUN: Final = Endpoint("runs/update")
DELETE_RUN: Final = Endpoint("runs/delete")
GET_RUN: Final = Endpoint("runs/get", "GET", LARGE)
SEARCH_RUNS: Final = Endpoint("runs/search", cap=LARGE)
LOG_BATCH: Final = Endpoint("runs/log-batch")
LOG_INPUTS: Final = Endpoint("runs/log-inputs")
GET_EXPERIMENT: Final = Endpoint("experiments/get-by-name", "GET")
CREATE_EXPERIMENT: Final = Endpoint("experiments/create")


class Traffic:
    """Counts what a store sends: attempts, and bytes of their bodies."""

    __slots__ = ("bytes_sent", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.bytes_sent = 0

    def count(self, body: bytes) -> None:
        self.requests += 1
        self.bytes_sent += len(body)


class Store(Protocol):
    """Where runs are kept."""

    @property
    def limits(self) -> Limits:
        """Its own bounds on a batch, every field set."""
        ...

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """
        One attempt.

        Args:
            endpoint: What to call.
            body: JSON, of a POST.
            query: Of a GET.

        Returns:
            The answer, checked to be MLflow's own "done".

        Raises:
            StoreError: What went wrong; the request may be repeated if `retriable`.
        """
        ...

    async def aclose(self) -> None:
        """Close connections; what is under way is cut off."""
        ...


DELEGATED: Final = frozenset(("", "file", "sqlite", "postgresql", "mysql", "mssql"))
"""Schemes that MLflow's own stores take; `postgresql+psycopg` and the like count as what stands before the plus."""


def check_uri(uri: str) -> None:
    """
    Say at once whether there will be a store for this URI; neither httpx nor mlflow is imported for it.

    Raises:
        ConfigError: Nothing here knows the scheme, or what it needs is not installed.
    """
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        if not urlsplit(uri).hostname:
            raise ConfigError(f"the tracking URI {without_secrets(uri)!r} has no host")
        return
    if scheme.split("+")[0] not in DELEGATED and scheme not in _plugin_schemes():
        raise ConfigError(
            f"no store is known for the tracking URI {without_secrets(uri)!r}: its scheme is neither http(s), one of"
            " MLflow's databases, a path, nor that of an installed mlflow plugin"
        )
    missing = [name for name in ("mlflow", "sqlalchemy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the tracking URI {without_secrets(uri)!r} needs MLflow's own store: pip install 'runqueue[mlflow]'"
            f" (not installed: {', '.join(missing)})"
        )


def make_store(config: Config, uri: str, traffic: Traffic) -> Store:
    """The store of a URI that `check_uri` let pass. In the engine's thread: it imports what the store needs."""
    if _scheme(uri) in ("http", "https"):
        from runqueue._http_store import HttpStore

        return HttpStore(config, uri, traffic)
    from runqueue._mlflow_store import MlflowStore

    return MlflowStore(uri, traffic)


def _scheme(uri: str) -> str:
    scheme = urlsplit(uri).scheme.lower() if "://" in uri or uri.startswith("file:") else ""
    return scheme


def _plugin_schemes() -> set[str]:
    return {point.name for point in importlib.metadata.entry_points(group="mlflow.tracking_store")}
