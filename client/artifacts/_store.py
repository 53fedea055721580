"""
Where a run's artifacts go: its artifact URI alone says so.

    mlflow-artifacts:, http(s):    a server takes them, see `_server`
    anything else, or a path       MLflow's own repositories, see `_repositories`

Rules of this file: it decides, and hands on. The URI is known from the answer that has created the run, or asked for once.
"""

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
_KNOWN: Final = 1_000
"""Runs whose URI is kept, the latest; of others it is asked for again."""

_Origin: TypeAlias = tuple[str, "str | None", "int | None"]


class Artifacts:
    """
    Args:
        store: Where the runs are.
        config: The client's.
        uri: The tracking URI.
        traffic: Counts the requests.
        meter: Told what is sent.
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
        self._asking = anyio.Lock()

    def __repr__(self) -> str:
        return f"<Artifacts runs={len(self._roots)} servers={len(self._servers)}>"

    async def aclose(self) -> None:
        for server in self._servers.values():
            await server.aclose()

    def know(self, run_id: str, run: Any) -> None:
        """What the answer of a store says of a run."""
        try:
            root = run["info"]["artifact_uri"]
        except (KeyError, TypeError):
            return
        if isinstance(root, str) and root:
            self._roots[run_id] = root
            while len(self._roots) > _KNOWN:
                self._roots.popitem(last=False)

    async def put(self, run_id: str, path: str, source: Source) -> None:
        """
        Store one artifact.

        Args:
            run_id: Of a run that exists.
            path: Among its artifacts.
            source: What is stored.

        Raises:
            StoreError: It was not stored.
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
        with _fork.importing():  # not sooner: a client of a database has no use for HTTP
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
        async with self._asking:  # several artifacts of one run come at once
            if run_id not in self._roots:
                answer = await self._store.call(GET_RUN, query={"run_id": run_id})
                self.know(run_id, answer.get("run"))
            if run_id not in self._roots:
                raise UnexpectedAnswerError("the answer to runs/get holds no artifact URI")
            return self._roots[run_id]
