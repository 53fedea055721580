"""
The protocol of a store: the calls of MLflow's REST API, taking bytes and returning dicts.
"""

# Rules of this file:
# - No implementation.
# - A store makes one attempt a call, checks the answer, and raises a StoreError for anything but success. Retries,
#   batching and order are the engine's.

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Final, Protocol

import attrs

from runqueue.queueing import Limits

SMALL: Final = 1_000_000
"""Answers are read up to this size, in bytes after decompression."""
LARGE: Final = 64_000_000
"""The same limit for answers that carry data."""


@attrs.frozen
class Endpoint:
    """
    One call of MLflow's REST API.

    Args:
        path: The path below `api/2.0/mlflow/`.
        method: The HTTP method.
        cap: The size up to which the answer is read, in bytes.
    """

    path: str
    method: str = "POST"
    cap: int = SMALL
    repeatable: bool = True
    """Whether it may be sent again at once, on a fresh connection, when the old one breaks before an answer comes."""


CREATE_RUN: Final = Endpoint("runs/create", repeatable=False)  # would make a second run; its tag settles the doubt
UPDATE_RUN: Final = Endpoint("runs/update")
DELETE_RUN: Final = Endpoint("runs/delete")
GET_RUN: Final = Endpoint("runs/get", "GET", LARGE)
SEARCH_RUNS: Final = Endpoint("runs/search", cap=LARGE)
LOG_BATCH: Final = Endpoint("runs/log-batch")
LOG_INPUTS: Final = Endpoint("runs/log-inputs")
GET_EXPERIMENT: Final = Endpoint("experiments/get-by-name", "GET")
CREATE_EXPERIMENT: Final = Endpoint("experiments/create", repeatable=False)  # is looked up by its name instead


class Traffic:
    """Counts the requests of a store, retries included, and the bytes of their bodies."""

    __slots__ = ("bytes_sent", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.bytes_sent = 0

    def count(self, body: Sized) -> None:
        self.requests += 1
        self.bytes_sent += len(body)


class Store(Protocol):
    """Stores runs: a server, a Databricks workspace, or one of MLflow's own stores."""

    @property
    def limits(self) -> Limits:
        """The store's own limits of a batch, with every field set."""
        ...

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """
        Make one attempt of a call.

        Args:
            endpoint: The call.
            body: The JSON body of a POST.
            query: The query of a GET.

        Returns:
            MLflow's JSON, after a check that it says "done".

        Raises:
            StoreError: The call failed. It may be repeated if the error is `retriable`.
        """
        ...

    async def aclose(self) -> None:
        """Close the connections. Requests in flight are cut off."""
        ...
