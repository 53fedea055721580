"""Calls of the store that a client would make, without a client: one request each, and its error as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from runqueue.settings._config import Config
from runqueue.stores._protocol import LOG_BATCH, Traffic
from runqueue.stores._resolve import make_store


def call(uri: str, times: int = 1, make: Callable[..., Any] = make_store, **settings: Any) -> None:
    """So many calls to one store, which is closed after them; `make` makes it."""

    async def main() -> None:
        store = make(Config(**settings), uri, Traffic())
        try:
            for _ in range(times):
                await store.call(LOG_BATCH, b"{}")
        finally:
            await store.aclose()

    anyio.run(main)
