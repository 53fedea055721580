"""
Uploads the artifacts of runs, each to the place that the run's artifact URI names.

    mlflow-artifacts:, http(s):    to a server, see `_server`
    anything else, or a path       by MLflow's own repositories, see `_repositories`
"""

# Rule of this file: it only dispatches. A run's artifact URI comes from the answer to its create-run, or from one runs/get.

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

import anyio

from runqueue.artifacts._repositories import Repositories
from runqueue.artifacts._source import InMemory, Source
from runqueue.errors import UnexpectedAnswerError
from runqueue.http._upload import Meter
from runqueue.queueing import Scope, StoreError
from runqueue.runtime import _fork
from runqueue.settings._config import Config
from runqueue.stores._protocol import GET_RUN, Store, Traffic

if TYPE_CHECKING:
    from runqueue.artifacts._server import ArtifactServer

UPLOADS: Final = 4
"""Artifacts of one client that are uploaded at once."""
_MAX_ROOTS: Final = 1_000
"""The artifact URIs of the latest runs are kept; for older runs it is looked up again."""

_Origin: TypeAlias = tuple[str, "str | None", "int | None"]


class Artifacts:
    """
    The uploads of one client.

    Args:
        store: The store of the runs.
        config: The client's settings.
        uri: The tracking URI.
        traffic: Counts the requests.
        meter: Counts the bytes sent.
    """

    def __init__(self, store: Store, config: Config, uri: str, traffic: Traffic, meter: Meter) -> None:
        self._store = store
        self._config = config
        self._traffic = traffic
        self._uri = uri
        self._meter = meter
        self._roots: OrderedDict[str, str] = OrderedDict()
        self._servers: dict[_Origin, ArtifactServer] = {}
        self._repositories = Repositories(uri, UPLOADS, meter)
        self._looking_up = anyio.Lock()

    def __repr__(self) -> str:
        return f"<Artifacts runs={len(self._roots)} servers={len(self._servers)}>"

    async def aclose(self) -> None:
        for server in self._servers.values():
            await server.aclose()

    def remember_root(self, run_id: str, run: Any) -> None:
        """
        Keep the artifact URI of a run, if a store's answer holds it.

        Args:
            run_id: The run.
            run: The field `run` of the answer.
        """
        try:
            root = run["info"]["artifact_uri"]
        except (KeyError, TypeError):
            return
        if isinstance(root, str) and root:
            self._roots[run_id] = root
            while len(self._roots) > _MAX_ROOTS:
                self._roots.popitem(last=False)

    async def put(self, run_id: str, path: str, source: Source) -> None:
        """
        Upload one artifact.

        Args:
            run_id: A run that exists.
            path: The artifact's path among the run's artifacts.
            source: The artifact.

        Raises:
            StoreError: The artifact was not stored.
        """
        root = await self._root(run_id)
        try:
            if urlsplit(root).scheme in ("mlflow-artifacts", "http", "https"):
                await self._put_to_server(root, path, source)
            else:
                await self._repositories.put(root, path, source)
        except StoreError as error:
            if not error.retriable and error.scope in (Scope.ENTRY, Scope.BATCH) and isinstance(source, InMemory):
                source.release()
            raise

    async def _put_to_server(self, root: str, path: str, source: Source) -> None:
        with _fork.importing():  # not at the top: a client of a database needs no HTTP
            from runqueue.artifacts._server import ArtifactServer, origin, served_at
            from runqueue.stores._rest import HttpStore

        own = self._store if isinstance(self._store, HttpStore) else None
        url = served_at(root, own.root if own is not None else "")
        server = self._servers.get(origin(url))
        if server is None:
            if own is not None and origin(url) == origin(own.root):
                store = own.beside(UPLOADS)
            else:
                store = HttpStore.foreign(self._config, url, self._traffic, UPLOADS)
            server = self._servers[origin(url)] = ArtifactServer(store, self._meter)
        await server.put(url, path, source)

    async def _root(self, run_id: str) -> str:
        root = self._roots.get(run_id)
        if root is not None:
            return root
        async with self._looking_up:  # several artifacts of one run start at once, and one looks up for all
            if run_id not in self._roots:
                answer = await self._store.call(GET_RUN, query={"run_id": run_id})
                self.remember_root(run_id, answer.get("run"))
            if run_id not in self._roots:
                raise UnexpectedAnswerError("the answer to runs/get holds no artifact URI")
            return self._roots[run_id]
