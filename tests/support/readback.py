"""
Reads back what a server has stored, by plain HTTP: a comparison must not go through the code that it judges.

A run's content is compared whole: every param and tag, every point of every metric's history, every dataset input.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import attrs
import httpx

if TYPE_CHECKING:
    from typing_extensions import Self

_API = "/api/2.0/mlflow/"
_PAGE = 10_000


class Point(NamedTuple):
    """One point of a metric's history."""

    step: int
    timestamp: int
    """Milliseconds since the epoch."""
    value: float


class StoredInput(NamedTuple):
    """One dataset input of a run; a missing field is ""."""

    name: str
    digest: str
    source_type: str = ""
    source: str = ""
    schema: str = ""
    profile: str = ""
    tags: tuple[tuple[str, str], ...] = ()


@attrs.frozen(kw_only=True)
class Content:
    """The content of a run, sorted so that two can be compared. Make it by `content`."""

    params: dict[str, str]
    tags: dict[str, str]
    """Those of MLflow and runqueue themselves left out."""
    metrics: dict[str, list[Point]]
    inputs: list[StoredInput]


@attrs.frozen(kw_only=True)
class StoredRun:
    """One run as the server returns it."""

    run_id: str
    name: str
    experiment_id: str
    status: str
    start_time: int
    end_time: int | None
    lifecycle_stage: str
    tags: dict[str, str]
    """All of them."""
    content: Content


def content(
    *,
    params: dict[str, str] | None = None,
    tags: dict[str, str] | None = None,
    metrics: dict[str, list[Point]] | None = None,
    inputs: Iterable[StoredInput] = (),
) -> Content:
    """Return the content of one run."""
    return Content(
        params=params or {},
        tags=tags or {},
        metrics={key: sorted(points) for key, points in (metrics or {}).items()},
        inputs=sorted(inputs),
    )


class Readback:
    """A reader of one server, as a context manager. It raises `httpx.HTTPStatusError` for error answers."""

    def __init__(self, uri: str) -> None:
        # A server closes idle connections after five seconds, which is when httpx would just use one again.
        limits = httpx.Limits(keepalive_expiry=1)
        self._http = httpx.Client(base_url=uri + _API, trust_env=False, timeout=60, limits=limits)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._http.close()

    # -- setting the stage -------------------------------------------------------------------------------------------

    def new_experiment(self, name: str = "test", **more: str) -> str:
        """Create an experiment with a name of its own, and with more of MLflow's fields if given; return its id."""
        return str(self.post("experiments/create", {"name": f"{name} {uuid.uuid4().hex}", **more})["experiment_id"])

    def new_run(self, experiment_id: str, params: dict[str, str] | None = None) -> str:
        """Create a run, with params if given; return its id."""
        run_id = str(self.post("runs/create", {"experiment_id": experiment_id})["run"]["info"]["run_id"])
        if params:
            pairs = [{"key": key, "value": value} for key, value in params.items()]
            self.post("runs/log-batch", {"run_id": run_id, "params": pairs})
        return run_id

    def post(self, endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
        """Send a POST request to MLflow's API; return the answer's JSON."""
        return _checked(self._http.post(endpoint, json=body))

    def get(self, endpoint: str, params: dict[str, str]) -> dict[str, Any]:
        """Send a GET request to MLflow's API; return the answer's JSON."""
        return _checked(self._http.get(endpoint, params=params))

    def experiment_id(self, name: str) -> str:
        """Return the id of an experiment that exists."""
        return str(self.get("experiments/get-by-name", {"experiment_name": name})["experiment"]["experiment_id"])

    # -- reading -----------------------------------------------------------------------------------------------------

    def run(self, run_id: str | None) -> StoredRun:
        """Return all of one run."""
        assert run_id is not None, "the run has no real id yet"
        run = _checked(self._http.get("runs/get", params={"run_id": run_id}))["run"]
        info, data = run["info"], run.get("data", {})
        tags = _pairs(data.get("tags", []))
        keys = [metric["key"] for metric in data.get("metrics", [])]
        return StoredRun(
            run_id=info["run_id"],
            name=info["run_name"],
            experiment_id=info["experiment_id"],
            status=info["status"],
            start_time=int(info["start_time"]),
            end_time=int(info["end_time"]) if "end_time" in info else None,
            lifecycle_stage=info["lifecycle_stage"],
            tags=tags,
            content=content(
                params=_pairs(data.get("params", [])),
                tags={key: value for key, value in tags.items() if not key.startswith(("mlflow.", "runqueue."))},
                metrics={key: self.history(run_id, key) for key in keys},
                inputs=map(_input, run.get("inputs", {}).get("dataset_inputs", [])),
            ),
        )

    def content(self, run_id: str | None) -> Content:
        """What one run holds."""
        return self.run(run_id).content

    def history(self, run_id: str, key: str) -> list[Point]:
        """Return all points of one metric, in the server's order."""
        return [
            Point(int(point.get("step", 0)), int(point["timestamp"]), float(point["value"]))
            for page in self._pages("metrics/get-history", {"run_id": run_id, "metric_key": key})
            for point in page.get("metrics", [])
        ]

    def run_ids(self, experiment_id: str, view: str = "ACTIVE_ONLY") -> list[str]:
        """Return the runs of an experiment, with `view="ALL"` also the deleted ones."""
        found: list[str] = []
        token = ""
        while True:
            body = {"experiment_ids": [experiment_id], "run_view_type": view, "max_results": 1_000}
            page = self.post("runs/search", body | ({"page_token": token} if token else {}))
            found += [run["info"]["run_id"] for run in page.get("runs", [])]
            token = page.get("next_page_token", "")
            if not token:
                return found

    def _pages(self, endpoint: str, params: dict[str, str]) -> Iterator[dict[str, Any]]:
        params = params | {"max_results": str(_PAGE)}
        while True:
            page = _checked(self._http.get(endpoint, params=params))
            yield page
            if not page.get("next_page_token"):
                return
            params["page_token"] = page["next_page_token"]


def same_value(left: float, right: float) -> bool:
    """Return whether two metric values are equal; NaN equals itself."""
    return left == right or (math.isnan(left) and math.isnan(right))


def _checked(response: httpx.Response) -> dict[str, Any]:
    if response.is_error:
        raise httpx.HTTPStatusError(
            f"{response.status_code}: {response.text[:500]}", request=response.request, response=response
        )
    data = response.json()
    assert isinstance(data, dict)
    return data


def _pairs(items: list[dict[str, str]]) -> dict[str, str]:
    return {item["key"]: item.get("value", "") for item in items}


def _input(data: dict[str, Any]) -> StoredInput:
    dataset = data["dataset"]
    return StoredInput(
        dataset["name"],
        dataset["digest"],
        dataset.get("source_type", ""),
        dataset.get("source", ""),
        dataset.get("schema", ""),
        dataset.get("profile", ""),
        tuple(sorted(_pairs(data.get("tags", [])).items())),
    )
