"""From a batch to the call that stores it. The one place where lanes and MLflow's end points meet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from runqueue._run_id import PendingRunId
from runqueue.artifacts._source import Source
from runqueue.queueing import Accumulator, Batch, Lane, Record
from runqueue.queueing.batches._batch import ARTIFACT, DATASET, STATUS
from runqueue.stores._protocol import GET_RUN, LOG_BATCH, LOG_INPUTS, UPDATE_RUN, Store
from runqueue.wire._bodies import log_batch_body, log_inputs_body, status_body

if TYPE_CHECKING:
    from runqueue.engine._creation import Creation


class ArtifactStore(Protocol):
    """Where artifacts go."""

    async def put(self, run_id: str, path: str, source: Source) -> None:
        """Store one, or raise a StoreError."""
        ...


class Delivery:
    """
    Stores batches; see `runqueue.queueing.delivery._dispatch.Deliver`.

    Args:
        store: Where to.
        creation: Creates the runs.
        accumulator: Learns the real id of a run that was created.
        artifacts: Where those go. None: there are none.
    """

    def __init__(
        self, store: Store, creation: Creation, accumulator: Accumulator, artifacts: ArtifactStore | None = None
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._creation = creation
        self._accumulator = accumulator

    async def __call__(self, lane: Lane, batch: Batch) -> Sequence[Record]:
        run = lane.run
        if batch.opens:
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
        """See `runqueue.queueing.delivery._dispatch.Check`."""
        run = lane.run
        if batch.opens:
            assert isinstance(run, PendingRunId)
            await self._creation.check(run, batch)
        else:
            run_id = run.run_id if isinstance(run, PendingRunId) else run
            await self._store.call(GET_RUN, query={"run_id": str(run_id)})


def _artifacts_in(batch: Batch) -> Iterator[tuple[str, Source]]:
    for part in batch.slices_of(ARTIFACT):
        paths: list[str] = part.keys()
        yield from ((path, part.record[1][path]) for path in paths)
