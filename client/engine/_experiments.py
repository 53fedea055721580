"""
Finds the id of an experiment by its name, and creates the experiment if it does not exist.
"""

# Rule of this file: a run never goes to another experiment than the one that is named. If another client creates the
# experiment at the same time, its id is read again.

from __future__ import annotations

from typing import Any

import anyio
import orjson

from runqueue.errors import NotFoundError, UnexpectedAnswerError
from runqueue.queueing import RejectedError, Scope
from runqueue.stores._protocol import CREATE_EXPERIMENT, GET_EXPERIMENT, Store

EXISTS = "RESOURCE_ALREADY_EXISTS"


class Experiments:
    """
    Knows the ids of the experiments that a client has named.

    Args:
        store: Where the experiments are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ids: dict[str, str] = {}
        self._locks: dict[str, anyio.Lock] = {}

    async def id_of(self, name: str) -> str:
        """
        Return the id of the experiment of this name, which is created if it does not exist.

        Raises:
            StoreError: The experiment is deleted, or can be neither found nor created.
        """
        async with self._locks.setdefault(name, anyio.Lock()):
            if name not in self._ids:
                self._ids[name] = await self.find(name) or await self._create(name)
            return self._ids[name]

    async def find(self, name: str) -> str | None:
        """Return the id of the experiment of this name. None: it does not exist."""
        try:
            answer = await self._store.call(GET_EXPERIMENT, query={"experiment_name": name})
        except NotFoundError as error:
            if error.code is None:  # not an answer of MLflow's, but of a proxy or at a wrong path
                raise
            return None
        experiment: dict[str, Any] = answer.get("experiment") or {}
        if not experiment.get("experiment_id"):
            raise UnexpectedAnswerError("the answer to experiments/get-by-name holds no experiment")
        if experiment.get("lifecycle_stage") == "deleted":
            raise RejectedError(f"the experiment {name!r} is deleted; restore it or use another name", scope=Scope.LANE)
        return str(experiment["experiment_id"])

    async def _create(self, name: str) -> str:
        try:
            answer = await self._store.call(CREATE_EXPERIMENT, orjson.dumps({"name": name}))
        except RejectedError as error:
            found = await self.find(name) if error.code == EXISTS else None
            if found is None:
                error.scope = Scope.LANE  # the entries of the run are not at fault
                raise
            return found
        if not answer.get("experiment_id"):
            raise UnexpectedAnswerError("the answer to experiments/create holds no experiment_id")
        return str(answer["experiment_id"])
