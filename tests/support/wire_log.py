"""Order, limits and concurrency of the requests that a proxy has recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from support.recorder import Request

STAGES = ("runs/create", "runs/log-batch", "runs/log-inputs", "runs/update")
"""The order of one run's requests within a flush."""

BODY_LIMIT = 1_000_000


def stage(request: Request) -> int:
    """Return a request's position in the order of one run."""
    (found,) = (at for at, endpoint in enumerate(STAGES) if request.at(endpoint))
    return found


def of_run(requests: Iterable[Request], run_id: str | None) -> list[Request]:
    """Return the requests of one run: those that name it, and the one that created it."""
    return [request for request in requests if run_id in (request.json.get("run_id"), created(request))]


def created(request: Request) -> str | None:
    """Return the id of the run that a request to runs/create has created, or None."""
    if not request.at("runs/create") or not request.answer.startswith(b"{"):
        return None
    run_id = json.loads(request.answer).get("run", {}).get("info", {}).get("run_id")
    return run_id if isinstance(run_id, str) else None


def names(requests: Iterable[Request]) -> list[str]:
    """Return the end points in short, e.g. ["create", "log-batch", "update"]."""
    return [request.path.rpartition("/")[2] for request in requests]


def assert_in_order(requests: Sequence[Request]) -> None:
    """Assert that one run's requests are create, data, inputs, terminate, and never two at once."""
    assert sorted(requests, key=stage) == list(requests), f"out of order: {names(requests)}"
    for earlier, later in pairwise(requests):
        assert earlier.answered_at is not None and earlier.answered_at <= later.read_at, "two requests of a run at once"


def assert_within_limits(
    requests: Iterable[Request], *, metrics: int = 1_000, params: int = 100, tags: int = 100, entities: int = 1_000
) -> None:
    """Assert that no log-batch exceeds the server's counts, and no body its bytes."""
    for request in requests:
        assert request.size <= BODY_LIMIT, f"a body of {request.size} bytes"
        if request.at("runs/log-batch"):
            counts = [len(entries(request, kind)) for kind in ("metrics", "params", "tags")]
            assert all(have <= most for have, most in zip(counts, (metrics, params, tags), strict=True)), counts
            assert 1 <= sum(counts) <= entities, counts
        if request.at("runs/log-inputs"):
            assert 1 <= len(entries(request, "datasets")) <= 1_000


def entries(request: Request, kind: str) -> list[dict[str, Any]]:
    """Return the "metrics", "params", "tags" or "datasets" of one request, in their order."""
    found = request.json.get(kind, [])
    assert isinstance(found, list)
    return found


def most_at_once(requests: Iterable[Request]) -> int:
    """Return the largest number of requests that were under way at the same moment."""
    moments: list[tuple[float, int]] = []
    for request in requests:
        assert request.answered_at is not None
        moments += [(request.read_at, 1), (request.answered_at, -1)]
    most = now = 0
    for _, change in sorted(moments):
        now += change
        most = max(most, now)
    return most
