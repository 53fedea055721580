"""Both event loops, each with a clock that jumps instead of waiting."""

from __future__ import annotations

from typing import Any

import pytest
import trio.testing

from support.virtual_time import VirtualTimeLoop


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A loop of the test's own; overrides the fixture of anyio's pytest plugin."""
    if request.param == "trio":
        return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}
    return "asyncio", {"loop_factory": VirtualTimeLoop}
