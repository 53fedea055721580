"""
What a store is: MLflow's REST API in bytes and dicts, whatever is behind it.

Rules of this file: no implementation. A store tries once, checks the answer, and says by a StoreError what went wrong;
retrying, batching and order are the engine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Final, Protocol

import attrs

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

    def count(self, body: Sized) -> None:
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
