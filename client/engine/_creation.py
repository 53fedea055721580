"""
Creates exactly one run for each `create_run`.
"""

# runs/create is not idempotent: a server may have created a run although its answer was lost. So every run carries a
# unique tag, and after an attempt with an unknown outcome the run is searched for by that tag before it is created
# again. The lost request may still be carried out later, by a slow server. So runs with such an attempt are searched
# once more at the end of a flush, and duplicates are deleted, with a warning; that is repeated until the attempt is
# older than a request may last. A client that streams may not flush for days: for it, a task of its own does the same.

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import anyio
import orjson

from runqueue._run_id import PendingRunId
from runqueue.engine._experiments import Experiments
from runqueue.errors import UnexpectedAnswerError
from runqueue.queueing import Batch, Record, RejectedError, Scope, StoreError
from runqueue.queueing.batches._batch import RUN, TAG, record_of
from runqueue.stores._protocol import CREATE_RUN, DELETE_RUN, SEARCH_RUNS, Store
from runqueue.wire._bodies import create_run_body
from runqueue.wire._records import PARENT_TAG, TOKEN_TAG, NewRun

MARGIN: Final = 1.0
"""Seconds beyond the longest time of a request. After that a search finds the run that the request has created."""
MAX_PAUSE: Final = 3_600.0
"""Seconds between two searches that fail, at most. Each of them logs a warning."""

logger = logging.getLogger("runqueue")


class Creation:
    """
    Creates runs in a store, and remembers which of them may exist twice.

    Args:
        store: Where the runs are.
        patience: Seconds after which the store will not carry out a request any more that it has not answered.
        on_created: Called with the id of each new run, and with the store's description of it.
    """

    def __init__(
        self, store: Store, patience: float, on_created: Callable[[str, Any], None] = lambda run_id, run: None
    ) -> None:
        self._store = store
        self._on_created = on_created
        self._patience = patience
        self._experiments = Experiments(store)
        self._without_tags: set[PendingRunId] = set()  # whose last attempt left the run's own tags out
        self._search_lock = anyio.Lock()
        # Runs that may exist twice, with the experiment's id and the time of the last attempt with an unknown outcome.
        self._doubtful: dict[PendingRunId, tuple[str, float]] = {}
        self._doubt_added = anyio.Event()

    async def create(self, pending: PendingRunId, batch: Batch) -> Sequence[Record]:
        """
        Create the run of a batch, and resolve its placeholder.

        Returns:
            Records of tags that the request did not carry; other batches send them.

        Raises:
            StoreError: No run was created, or the outcome is unknown; then the next attempt searches for the run first.
        """
        (record,) = batch.records(RUN)
        new: NewRun = record[3]
        if new.created_elsewhere:
            await self._await_creation(pending, new)
            return ()
        experiment_id = new.experiment_id
        if experiment_id is None:
            assert new.experiment_name is not None
            experiment_id = await self._experiments.id_of(new.experiment_name)
        if pending in self._doubtful:
            found = await self._find(pending, experiment_id)
            if found:
                pending._resolve(found[0])
                return [record_of(TAG, new.tags, False)] if pending in self._without_tags else ()
        tags = [*batch.pieces(RUN), *batch.pieces(TAG)]
        try:
            await self._post(pending, new, experiment_id, tags)
        except RejectedError as error:
            # The run's own tags may be at fault. In a log-batch, a bad tag is isolated as any other entry is.
            if not new.tags or TAG in batch.groups or error.scope is not Scope.ENTRY:
                raise
            self._without_tags.add(pending)
            await self._post(pending, new, experiment_id, ())
            return [record_of(TAG, new.tags, False)]
        return ()

    async def check(self, pending: PendingRunId, batch: Batch) -> None:
        """
        Ask the store for the run, or for its experiment, and change nothing.

        Raises:
            StoreError: The store does not answer.
        """
        (record,) = batch.records(RUN)
        new: NewRun = record[3]
        if new.experiment_id is not None:
            await self._find(pending, new.experiment_id)
        elif new.experiment_name is not None:
            await self._experiments.find(new.experiment_name)

    async def _await_creation(self, pending: PendingRunId, new: NewRun) -> None:
        """Find a run that another process creates. Raises a retriable error as long as it does not exist."""
        experiment_id = new.experiment_id
        if experiment_id is None and new.experiment_name is not None:
            experiment_id = await self._experiments.find(new.experiment_name)
        found = [] if experiment_id is None else await self._find(pending, experiment_id)
        if len(found) != 1 and pending.run_id is None:  # the process that creates the run deletes one of two
            how = "exists twice, and one will be deleted" if found else "was not created yet"
            text = f"the run {pending!r} {how} by the process that has made this placeholder"
            raise StoreError(text, retriable=True, scope=Scope.LANE)
        if pending.run_id is None:
            pending._resolve(found[0])

    async def _post(self, pending: PendingRunId, new: NewRun, experiment_id: str, tags: Sequence[bytes]) -> None:
        system = {TOKEN_TAG: pending._token}
        if new.parent is not None:
            parent = new.parent.run_id if isinstance(new.parent, PendingRunId) else new.parent
            assert parent is not None, "the parent's lane is opened first"
            system[PARENT_TAG] = parent
        try:
            answer = await self._store.call(CREATE_RUN, create_run_body(new, experiment_id, system, tags))
            run_id = _run_id(answer.get("run"))
            if run_id is None:
                raise UnexpectedAnswerError("the answer to runs/create holds no run id", ambiguous=True)
        except StoreError as error:
            if error.ambiguous:
                self._doubt(pending, experiment_id)
            raise
        except BaseException:  # cancelled: the store may have received the request
            self._doubt(pending, experiment_id)
            raise
        self._on_created(run_id, answer.get("run"))
        pending._resolve(run_id)

    def _doubt(self, pending: PendingRunId, experiment_id: str) -> None:
        self._doubtful[pending] = (experiment_id, anyio.current_time())
        self._doubt_added.set()

    async def _find(self, pending: PendingRunId, experiment_id: str) -> list[str]:
        query = {
            "experiment_ids": [experiment_id],
            "filter": f"tags.`{TOKEN_TAG}` = '{pending._token}'",
            "max_results": 100,
        }
        answer = await self._store.call(SEARCH_RUNS, orjson.dumps(query))
        runs: Any = answer.get("runs", [])
        if not isinstance(runs, list):
            raise UnexpectedAnswerError("the answer to runs/search holds no list of runs")
        found: list[Any] = runs
        return [run_id for run_id in map(_run_id, found) if run_id is not None]

    @property
    def doubtful(self) -> bool:
        """Whether any run may exist twice."""
        return bool(self._doubtful)

    async def delete_duplicates(self) -> None:
        """Search for duplicates of the doubtful runs, and delete them. The next flush repeats a search that fails."""
        async with self._search_lock:
            await self._search_duplicates(self._doubtful)

    async def watch(self, healthy: Callable[[], bool]) -> None:
        """
        Search for duplicates of each doubtful run once its `patience` is over, until cancelled.

        Args:
            healthy: Returns whether the store takes requests now.
        """
        pause, failed = 0.0, 0
        while True:
            if not self._doubtful:
                self._doubt_added = anyio.Event()
                await self._doubt_added.wait()
            since = min(since for _, since in self._doubtful.values())
            await anyio.sleep(max(pause, since + self._patience + MARGIN - anyio.current_time()))
            pause = self._patience + MARGIN
            if not healthy():
                continue
            async with self._search_lock:
                due = [pending for pending, (_, since) in self._doubtful.items() if self._is_settled(since)]
                try:
                    answered = await self._search_duplicates(due)
                except Exception as error:
                    logger.warning("cannot tell whether runs exist twice: %s: %s", type(error).__name__, error)
                    answered = False
            failed = 0 if answered else failed + 1
            pause = min(pause * 2**failed, max(pause, MAX_PAUSE))

    def _is_settled(self, since: float) -> bool:
        """Whether the store will not carry out a request of that time any more."""
        return anyio.current_time() - since > self._patience

    async def _search_duplicates(self, runs: Iterable[PendingRunId]) -> bool:
        """Search for duplicates of these runs, and delete them. False: the store has not answered for all of them."""
        for pending in list(runs):
            if pending.run_id is None:
                continue  # the next attempt to create it searches first
            experiment_id, since = self._doubtful[pending]
            settled = self._is_settled(since)
            try:
                for found in await self._find(pending, experiment_id):
                    if found != pending.run_id:
                        await self._store.call(DELETE_RUN, orjson.dumps({"run_id": found}))
                        logger.warning("deleted the run %s, a duplicate of %s", found, pending.run_id)
            except StoreError as error:
                logger.warning("cannot tell whether the run %s exists twice: %s", pending.run_id, error)
                return False  # the others would most likely fail too; the next flush searches again
            else:
                if settled:
                    del self._doubtful[pending]
        return True


def _run_id(run: Any) -> str | None:
    try:
        run_id = run["info"]["run_id"]
    except (KeyError, TypeError):
        return None
    return run_id if isinstance(run_id, str) and run_id else None
