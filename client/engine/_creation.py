"""
Exactly one run for each `create_run`.

runs/create is not idempotent, and a server may commit without our hearing of it. So every run carries a unique tag;
after an attempt whose outcome is unknown, the run is looked for by that tag before it is created again. A slow server
may commit later still: when a flush ends there is a last look, and surplus runs are deleted and logged. Flushes go on
looking until the doubtful attempt is older than a request may last. A client that streams may not flush for days, so
there is a look then too, in a task of its own.
"""

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
"""Seconds beyond the time that a request may last: by then, what it has done is to be seen."""
LONGEST_PAUSE: Final = 3_600.0
"""Seconds between two looks that fail, at most; each says so."""

logger = logging.getLogger("runqueue")


class Creation:
    """
    Creates runs in a store, and remembers which of them may exist twice.

    Args:
        store: Where to.
        patience: Seconds after which a request that was not answered is not expected to be carried out any more.
        made: Told the id of a run that was created, and what the store says of it.
    """

    def __init__(
        self, store: Store, patience: float, made: Callable[[str, Any], None] = lambda run_id, run: None
    ) -> None:
        self._store = store
        self._made = made
        self._patience = patience
        self._experiments = Experiments(store)
        self._without_tags: set[PendingRunId] = set()  # asked for without their own tags
        self._looking = anyio.Lock()
        self._doubtful: dict[PendingRunId, tuple[str, float]] = {}  # with the experiment's id, and since when
        self._doubted = anyio.Event()

    async def create(self, pending: PendingRunId, batch: Batch) -> Sequence[Record]:
        """
        Create the run of this batch, and resolve its placeholder.

        Returns:
            Records of tags that the request could not carry after all.

        Raises:
            StoreError: There is no run; or none that we know of, and the next attempt looks for one first.
        """
        (record,) = batch.records(RUN)
        new: NewRun = record[3]
        if new.created_elsewhere:
            await self._seek(pending, new)
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
            # The run's own tags may be at fault. As entries of a log batch they are isolated like any other.
            if not new.tags or TAG in batch.groups or error.scope is not Scope.ENTRY:
                raise
            self._without_tags.add(pending)
            await self._post(pending, new, experiment_id, ())
            return [record_of(TAG, new.tags, False)]
        return ()

    async def check(self, pending: PendingRunId, batch: Batch) -> None:
        """
        Look for the run, or for its experiment, and change nothing.

        Raises:
            StoreError: The store does not answer even that.
        """
        (record,) = batch.records(RUN)
        new: NewRun = record[3]
        if new.experiment_id is not None:
            await self._find(pending, new.experiment_id)
        elif new.experiment_name is not None:
            await self._experiments.find(new.experiment_name)

    async def _seek(self, pending: PendingRunId, new: NewRun) -> None:
        """Find a run that another process creates."""
        experiment_id = new.experiment_id
        if experiment_id is None and new.experiment_name is not None:
            experiment_id = await self._experiments.find(new.experiment_name)
        found = [] if experiment_id is None else await self._find(pending, experiment_id)
        if len(found) != 1 and pending.run_id is None:  # of two, its maker will delete one
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
        except BaseException:  # we were cancelled: the request may be on its way
            self._doubt(pending, experiment_id)
            raise
        self._made(run_id, answer.get("run"))
        pending._resolve(run_id)

    def _doubt(self, pending: PendingRunId, experiment_id: str) -> None:
        self._doubtful[pending] = (experiment_id, anyio.current_time())
        self._doubted.set()

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
        """Whether there is anything to have a last look at."""
        return bool(self._doubtful)

    async def last_look(self) -> None:
        """Delete what a slow server has created beyond the one run; a look that fails is repeated after the next flush."""
        async with self._looking:
            await self._look(self._doubtful)

    async def watch(self, healthy: Callable[[], bool]) -> None:
        """
        Have a last look at each doubtful run without being asked to, once its time is over. Until cancelled.

        Args:
            healthy: Whether the store can be asked now.
        """
        pause, failed = 0.0, 0
        while True:
            if not self._doubtful:
                self._doubted = anyio.Event()
                await self._doubted.wait()
            since = min(since for _, since in self._doubtful.values())
            await anyio.sleep(max(pause, since + self._patience + MARGIN - anyio.current_time()))
            pause = self._patience + MARGIN
            if not healthy():
                continue
            async with self._looking:
                over = [pending for pending, (_, since) in self._doubtful.items() if self._is_over(since)]
                try:
                    seen = await self._look(over)
                except Exception as error:
                    logger.warning("cannot tell whether runs exist twice: %s: %s", type(error).__name__, error)
                    seen = False
            failed = 0 if seen else failed + 1
            pause = min(pause * 2**failed, max(pause, LONGEST_PAUSE))

    def _is_over(self, since: float) -> bool:
        """Whether what was asked for then is not expected to be carried out any more."""
        return anyio.current_time() - since > self._patience

    async def _look(self, doubts: Iterable[PendingRunId]) -> bool:
        """Whether there was an answer for all of them."""
        for pending in list(doubts):
            if pending.run_id is None:
                continue  # not created yet, as far as we know: the next attempt looks first
            experiment_id, since = self._doubtful[pending]
            over = self._is_over(since)
            try:
                for surplus in await self._find(pending, experiment_id):
                    if surplus != pending.run_id:
                        await self._store.call(DELETE_RUN, orjson.dumps({"run_id": surplus}))
                        logger.warning("deleted the run %s, a duplicate of %s", surplus, pending.run_id)
            except StoreError as error:
                logger.warning("cannot tell whether the run %s exists twice: %s", pending.run_id, error)
                return False  # nor of the others, most likely; the next flush looks again
            else:
                if over:
                    del self._doubtful[pending]
        return True


def _run_id(run: Any) -> str | None:
    try:
        run_id = run["info"]["run_id"]
    except (KeyError, TypeError):
        return None
    return run_id if isinstance(run_id, str) and run_id else None
