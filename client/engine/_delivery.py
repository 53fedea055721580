"""Turns each batch of a lane into the call that stores it. The one place where lanes and MLflow's end points meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from runqueue._run_id import PendingRunId
from runqueue.artifacts._source import Source
from runqueue.queueing import Accumulator, Batch, Bounds, Lane, Limits, Record
from runqueue.queueing.batches._batch import ARTIFACT, DATASET, STATUS
from runqueue.settings._config import Config
from runqueue.stores._protocol import GET_RUN, LOG_BATCH, LOG_INPUTS, UPDATE_RUN, Store
from runqueue.wire._bodies import log_batch_body, log_inputs_body, status_body
from runqueue.wire._limits import ENVELOPE_BYTES, MAX_CREATE_TAG_BYTES, MAX_CREATE_TAGS

if TYPE_CHECKING:
    from runqueue.engine._creation import Creation


class ArtifactStore(Protocol):
    """Stores artifacts."""

    async def put(self, run_id: str, path: str, source: Source) -> None:
        """
        Store one artifact.

        Raises:
            StoreError: It was not stored.
        """
        ...


class Delivery:
    """
    Stores batches: the sender's `Deliver` and `Check`, see `runqueue.queueing.delivery._dispatch`.

    Args:
        store: Where the runs are.
        creation: Creates runs.
        accumulator: Is given the real id of each run that was created.
        artifacts: Where artifacts are stored. None: no batch holds any.
    """

    def __init__(
        self, store: Store, creation: Creation, accumulator: Accumulator, artifacts: ArtifactStore | None = None
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._creation = creation
        self._accumulator = accumulator

    async def __call__(self, lane: Lane, batch: Batch) -> Sequence[Record]:
        """
        Store one batch.

        Returns:
            Records of the batch that are to be sent by another one.

        Raises:
            StoreError: It was not stored.
        """
        run = lane.run
        if batch.creates_run:
            assert isinstance(run, PendingRunId)
            leftovers = await self._creation.create(run, batch)
            self._accumulator.resolve(lane, run.run_id)
            return leftovers
        run_id = run.run_id if isinstance(run, PendingRunId) else run
        assert isinstance(run_id, str), "a lane is opened before it sends anything else"
        if ARTIFACT in batch.groups:
            assert self._artifacts is not None
            for path, source in _artifacts_in(batch):
                await self._artifacts.put(run_id, path, source)
        elif STATUS in batch.groups:
            (record,) = batch.records(STATUS)
            await self._store.call(UPDATE_RUN, status_body(run_id, record))
        elif DATASET in batch.groups:
            await self._store.call(LOG_INPUTS, log_inputs_body(run_id, batch))
        else:
            await self._store.call(LOG_BATCH, log_batch_body(run_id, batch))
        return ()

    async def check(self, lane: Lane, batch: Batch) -> None:
        """
        Ask the store whether it answers for this run, and change nothing.

        Raises:
            StoreError: It does not.
        """
        run = lane.run
        if batch.creates_run:
            assert isinstance(run, PendingRunId)
            await self._creation.check(run, batch)
        else:
            run_id = run.run_id if isinstance(run, PendingRunId) else run
            await self._store.call(GET_RUN, query={"run_id": str(run_id)})


def bounds_of(config: Config, limits: Limits) -> Bounds:
    """
    The bounds of a client's batches.

    Args:
        config: The client's settings, whose limits replace those of the store.
        limits: The store's own.
    """
    limits = limits if config.limits is None else config.limits.over(limits)
    return Bounds.of(
        limits, envelope=ENVELOPE_BYTES, create_tags=MAX_CREATE_TAGS, create_tag_bytes=MAX_CREATE_TAG_BYTES
    )


def _artifacts_in(batch: Batch) -> Iterator[tuple[str, Source]]:
    for part in batch.slices_of(ARTIFACT):
        paths: list[str] = part.keys()
        yield from ((path, part.record[1][path]) for path in paths)
