"""
A store that keeps its runs in a list and fails by script, and the parts that an engine puts in front of a store,
without the engine's thread. Both run on any event loop.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import asynccontextmanager
from enum import Enum
from typing import Any

import anyio
import attrs
import orjson

from runqueue._run_id import PendingRunId, RunId
from runqueue.engine._creation import Creation
from runqueue.engine._delivery import Delivery
from runqueue.errors import NotFoundError, StoreError, UnavailableError, UnexpectedAnswerError
from runqueue.queueing import Accumulator, Bounds, Lane, Limits, RejectedError, Report
from runqueue.queueing.batches._batch import RUN, TAG, record_of
from runqueue.queueing.delivery._retry import RetryPolicy
from runqueue.queueing.delivery._sender import Sender
from runqueue.stores._protocol import CREATE_RUN, DELETE_RUN, LOG_BATCH, SEARCH_RUNS, UPDATE_RUN, Endpoint
from runqueue.wire._answer import error_of
from runqueue.wire._encoder import Encoder
from runqueue.wire._limits import ENVELOPE_BYTES, MAX_CREATE_TAG_BYTES, MAX_CREATE_TAGS, MLFLOW_LIMITS
from runqueue.wire._records import TOKEN_TAG, NewRun

BOUNDS = Bounds.of(
    MLFLOW_LIMITS, envelope=ENVELOPE_BYTES, create_tags=MAX_CREATE_TAGS, create_tag_bytes=MAX_CREATE_TAG_BYTES
)
ETERNITY = 1e9
"""Virtual seconds."""


class Outcome(Enum):
    """The outcome of a request to runs/create."""

    STORED = "committed and answered"
    ANSWER_LOST = "committed, the answer lost"
    ANSWERED_500 = "committed, and answered with 500"
    LOGIN_PAGE = "committed, and answered with something else"
    REQUEST_LOST = "never carried out, and never answered"
    FAILED_500 = "not committed, and answered with 500"
    BUSY = "not committed, and answered with 429"
    LATE = "answered with 504, and committed later"


COMMITS = (Outcome.STORED, Outcome.ANSWER_LOST, Outcome.ANSWERED_500, Outcome.LOGIN_PAGE)
DOUBTFUL = (*COMMITS[1:], Outcome.REQUEST_LOST, Outcome.FAILED_500, Outcome.LATE)


def _errors(outcome: Outcome) -> StoreError:
    if outcome is Outcome.LOGIN_PAGE:
        return UnexpectedAnswerError("200 without MLflow's answer", ambiguous=True)
    if outcome in (Outcome.ANSWERED_500, Outcome.FAILED_500):
        return error_of(500, "INTERNAL_ERROR", "a crash")
    if outcome is Outcome.BUSY:
        return error_of(429, None, "busy")
    return UnavailableError("no answer", ambiguous=True)


@attrs.define
class StoredRun:
    """One run of the store."""

    run_id: str
    body: dict[str, Any]
    tags: dict[str, str]
    active: bool = True


@attrs.define
class Call:
    """One call, with its outcome."""

    endpoint: Endpoint
    data: dict[str, Any]
    error: StoreError | None = None
    found: int = 0
    """The number of runs in the answer to a search."""

    @property
    def token(self) -> str:
        """The run that a call to runs/create or runs/search is about."""
        if self.endpoint is CREATE_RUN:
            return _tags(self.data)[TOKEN_TAG]
        return str(self.data["filter"].split("'")[1])


@attrs.define(eq=False)
class ListStore:
    """
    MLflow's API over a list. Each kind of request meets the faults in its script, one after another, and then none.
    """

    creates: list[Outcome] = attrs.field(factory=list[Outcome])
    searches: list[StoreError | None] = attrs.field(factory=list[StoreError | None])
    deletes: list[StoreError | None] = attrs.field(factory=list[StoreError | None])
    lateness: int = 1
    """Calls between a late request and its commit."""
    refused_tag: str = ""
    """A tag name that every request is rejected for."""
    runs: list[StoredRun] = attrs.field(factory=list[StoredRun])
    calls: list[Call] = attrs.field(factory=list[Call])
    _late: list[tuple[int, dict[str, Any]]] = attrs.field(factory=list[tuple[int, dict[str, Any]]])

    @property
    def limits(self) -> Limits:
        return MLFLOW_LIMITS

    async def aclose(self) -> None:
        pass

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `Store.call`."""
        await anyio.sleep(0.01)
        call = Call(endpoint, orjson.loads(body))
        self.calls.append(call)
        self.commit_late(len(self.calls))
        try:
            answer = self._handle(endpoint, call.data)
        except StoreError as error:
            call.error = error
            raise
        call.found = len(answer.get("runs", ()))
        return answer

    def commit_late(self, until: int | None = None) -> None:
        """Carry out the late requests that are due after *until* calls. None: all of them."""
        due = [data for at, data in self._late if until is None or at <= until]
        self._late = [(at, data) for at, data in self._late if until is not None and at > until]
        for data in due:
            self._commit(data)

    def count(self, endpoint: Endpoint) -> int:
        return sum(call.endpoint is endpoint for call in self.calls)

    def active(self) -> list[str]:
        return [run.run_id for run in self.runs if run.active]

    def run(self, run_id: str | None) -> StoredRun:
        (found,) = (run for run in self.runs if run.run_id == run_id)
        return found

    def names(self) -> list[str]:
        """The calls in short, e.g. ["create", "search"]."""
        return [call.endpoint.path.rpartition("/")[2] for call in self.calls]

    def _handle(self, endpoint: Endpoint, data: dict[str, Any]) -> dict[str, Any]:
        if self.refused_tag in _tags(data):
            raise RejectedError(f"no tag may be called {self.refused_tag}", code="INVALID_PARAMETER_VALUE")
        if endpoint is CREATE_RUN:
            return self._create(data)
        if endpoint is SEARCH_RUNS:
            _fail(self.searches)
            token = Call(endpoint, data).token
            hits = [run for run in self.runs if run.active and run.tags[TOKEN_TAG] == token]
            return {"runs": [{"info": {"run_id": run.run_id}} for run in hits]} if hits else {}
        run = next((each for each in self.runs if each.run_id == data["run_id"]), None)
        if run is None or not run.active:
            raise NotFoundError("no such run", code="RESOURCE_DOES_NOT_EXIST")
        if endpoint is DELETE_RUN:
            _fail(self.deletes)
            run.active = False
        else:
            assert endpoint in (LOG_BATCH, UPDATE_RUN)
            run.tags |= _tags(data)
        return {}

    def _create(self, data: dict[str, Any]) -> dict[str, Any]:
        outcome = self.creates.pop(0) if self.creates else Outcome.STORED
        if outcome is Outcome.LATE:
            self._late.append((len(self.calls) + self.lateness, data))
        run = self._commit(data) if outcome in COMMITS else None
        if run is None or outcome is not Outcome.STORED:
            raise _errors(outcome)
        return {"run": {"info": {"run_id": run.run_id}}}

    def _commit(self, data: dict[str, Any]) -> StoredRun:
        run = StoredRun(f"{len(self.runs):032x}", data, _tags(data))
        self.runs.append(run)
        return run


def _tags(data: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in data.get("tags", ())}


def _fail(script: list[StoreError | None]) -> None:
    error = script.pop(0) if script else None
    if error is not None:
        raise error


# -- the parts between a client and its store ------------------------------------------------------------------------


class Bench:
    """The parts of an engine that send to a store, without the engine's thread."""

    def __init__(self, store: ListStore, patience: float, timeout: float) -> None:
        self.store = store
        self.creation = Creation(store, patience)
        self.accumulator = Accumulator(Encoder().encode)
        self.sender = Sender(
            self.accumulator,
            Delivery(store, self.creation, self.accumulator),
            bounds=BOUNDS,
            retry=RetryPolicy(timeout=timeout),
        )

    def create_run(
        self, tags: dict[str, str] | None = None, parent: RunId | None = None, run_name: str | None = None
    ) -> PendingRunId:
        """As `Client.create_run`."""
        pending, own = PendingRunId(), tags or {}
        above = None if parent is None else self.accumulator.open(parent, run_exists=isinstance(parent, str))
        lane = self.accumulator.open(pending, run_exists=False, parent=above)
        lane.push(record_of(RUN, ("run",), tuple(own), NewRun("7", None, 1, run_name, parent, own)))
        return pending

    def set_tags(self, run: PendingRunId, tags: dict[str, str]) -> None:
        """As `Client.set_tags`."""
        self.lane(run).push(record_of(TAG, tags, True))

    def lane(self, run: PendingRunId) -> Lane:
        return self.accumulator.lanes[run]

    async def flush(self) -> Report:
        """As `Engine._flush`."""
        report = await self.sender.flush()
        if self.sender.outage.since is None:
            await self.creation.delete_duplicates()
        return report


@asynccontextmanager
async def bench(
    store: ListStore, *, patience: float = ETERNITY, timeout: float = ETERNITY
) -> AsyncGenerator[Bench, None]:
    """
    Args:
        store: The store that takes the requests.
        patience: See `Creation`.
        timeout: Seconds after the first failure at which retrying ends.
    """
    made = Bench(store, patience, timeout)
    async with made.sender:
        yield made


def assert_searched_before_creating_again(calls: Iterable[Call]) -> None:
    """After an ambiguous attempt, no run is created before a search has shown that it does not exist."""
    doubted: set[str] = set()
    for call in calls:
        if call.endpoint is SEARCH_RUNS and call.error is None and not call.found:
            doubted.discard(call.token)
        elif call.endpoint is CREATE_RUN:
            assert call.token not in doubted, "created again without a search"
            if call.error is not None and call.error.ambiguous:
                doubted.add(call.token)
