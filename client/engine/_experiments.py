"""
From an experiment's name to its id: looked up, created when it does not exist, read again when somebody else was
faster. Never another experiment instead.
"""

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
    Args:
        store: Where they are.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ids: dict[str, str] = {}
        self._locks: dict[str, anyio.Lock] = {}

    async def id_of(self, name: str) -> str:
        """
        The id of the experiment of this name.

        Raises:
            StoreError: It is deleted, or can be neither found nor created.
        """
        async with self._locks.setdefault(name, anyio.Lock()):
            if name not in self._ids:
                self._ids[name] = await self.find(name) or await self._create(name)
            return self._ids[name]

    async def find(self, name: str) -> str | None:
        """The same without creating it; None: there is none."""
        try:
            answer = await self._store.call(GET_EXPERIMENT, query={"experiment_name": name})
        except NotFoundError as error:
            if error.code is None:  # not MLflow's word: a wrong path, a proxy
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
                error.scope = Scope.LANE  # it is not the run's entries that are at fault
                raise
            return found
        if not answer.get("experiment_id"):
            raise UnexpectedAnswerError("the answer to experiments/create holds no experiment_id")
        return str(answer["experiment_id"])
