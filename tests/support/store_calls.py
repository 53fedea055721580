"""Calls of a store without a client: each makes one request, and its error reaches the test unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from runqueue.settings._config import Config
from runqueue.stores._protocol import LOG_BATCH, Traffic
from runqueue.stores._resolve import make_store


def call(uri: str, times: int = 1, make: Callable[..., Any] = make_store, **settings: Any) -> None:
    """
    Make a store, call it, and close it.

    Args:
        uri: The tracking URI.
        times: The number of calls.
        make: Makes the store.
        settings: Settings of the client.
    """

    async def main() -> None:
        store = make(Config(**settings), uri, Traffic())
        try:
            for _ in range(times):
                await store.call(LOG_BATCH, b"{}")
        finally:
            await store.aclose()

    anyio.run(main)
