"""
What stands in MLflow's places while its writes are queued, and who asked for it.

    everything is queued     `enable()`, or RUNQUEUE_MLFLOW=1 (which `runqueue run` sets)
    one tracking URI is      it was named somewhere with our prefix: `runqueue+http://host:5000`

A URI with our prefix is taken for the plain one wherever MLflow keeps it, so that artifacts, the registry, traces and
links go by what MLflow knows; that the plain one is queued is remembered here instead.

Rules of this file: what is put into MLflow are attributes of single objects, and descriptors of classes that have no
such attribute, so that to take them out restores exactly what was there. Nothing is put there before somebody asks.
It may be imported while MLflow is: MLflow's modules are looked up, at the time they are needed.
"""

from __future__ import annotations

import atexit
import importlib
import inspect
import os
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from runqueue.runtime import _fork
from runqueue.settings import _environment
from runqueue.settings._plain_uri import PREFIX, plain_uri

if TYPE_CHECKING:
    from typing_extensions import Self

    from runqueue.integrations.mlflow._queued_store import QueuedStore

VARIABLE: Final = "RUNQUEUE_MLFLOW"
"""Switches everything on where MLflow is imported: in the processes that a script starts, too."""
_UTILS: Final = "mlflow.tracking._tracking_service.utils"


class _Switch:
    """All the global state there is; what `enable` and the plugin change."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.always = False  # by the environment
        self.calls: set[Enabled] = set()  # of `enable()`, of each until its block begins
        self.blocks: set[Enabled] = set()
        self.uris: set[str] = set()  # plain ones, see `_alike`, as in the keys of the next
        self.stores: dict[tuple[str, str | None], QueuedStore] = {}
        self.places: list[tuple[Any, str]] = []
        self.registered = False

    @property
    def everything(self) -> bool:
        return self.always or bool(self.calls) or bool(self.blocks)

    def wants(self, uri: str) -> bool:
        return self.everything or _alike(uri) in self.uris

    def put(self, owner: Any, name: str, thing: Any) -> None:
        """Put something in front of an object's own."""
        if name not in vars(owner):
            setattr(owner, name, thing)
            self.places.append((owner, name))

    def _after_fork(self) -> None:
        """In a child: another thread may have held it."""
        self.lock = threading.RLock()

    def restore(self) -> None:
        while self.places:
            delattr(*self.places.pop())


_switch = _Switch()
_fork.register(_switch)


class Enabled:
    """What `enable` returns: leaving its block takes back that call, and no other."""

    def __enter__(self) -> Self:
        with _switch.lock:
            _switch.blocks.add(self)
            _switch.calls.discard(self)
            _install()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _switch.lock:
            _switch.blocks.discard(self)
        _settle()


def enable() -> Enabled:
    """
    From now on, MLflow queues what it logs, to whatever tracking URI; what is open already is queued too.

        runqueue.integrations.mlflow.enable()

    Also as a context manager, `with enable(): ...`, which ends with the block; blocks may be nested, and overlap.

    Environment:
        RUNQUEUE_STRICT: 1: what was not stored is raised at `end_run`, and not only warned of.
        RUNQUEUE_FLUSH_INTERVAL: Seconds between two looks at what is queued, 2 by default.

    Raises:
        ConfigError: One of these variables holds a bad value.
        ImportError: MLflow is not installed.

    Guarantees:
        A script reads its own writes: what concerns a read, a search or a deletion is sent before it. `end_run` returns
        when the run's data is stored, or has failed for good.
    """
    importlib.import_module("mlflow")
    from runqueue.integrations.mlflow._queue import Settings

    Settings()
    enabled = Enabled()
    with _switch.lock:
        _switch.calls.add(enabled)
        _install()
    return enabled


def disable() -> None:
    """
    End what `enable` began, all blocks of it included: what is queued is sent, and MLflow is as it was. Tracking URIs
    with our prefix go on being queued.
    """
    with _switch.lock:
        _switch.always = False
        _switch.calls.clear()
        _switch.blocks.clear()
    _settle()


def _settle() -> None:
    """Take out what nobody wants any more."""
    with _switch.lock:
        ended = {} if _switch.everything else {k: v for k, v in _switch.stores.items() if k[0] not in _switch.uris}
        for key in ended:
            del _switch.stores[key]
        if not _switch.everything and not _switch.uris:
            _switch.restore()
    # Without the lock, as it may last: what is logged meanwhile goes MLflow's own way already, or into a closed client.
    for store in ended.values():
        queue = store._detach()
        if queue is not None:
            queue.close()


# -- by the environment, and by URIs ---------------------------------------------------------------------------------


def follow_environment() -> None:
    """
    Called by the plugin, in the middle of the import of MLflow.

    Raises:
        ConfigError: RUNQUEUE_MLFLOW is none of true, false, 1, 0.
    """
    with _switch.lock:
        if _environment.switch(VARIABLE):
            _switch.always = True
        if _switch.always or os.environ.get("MLFLOW_TRACKING_URI", "").startswith(PREFIX):
            _install()


def tracking_store(store_uri: str, artifact_uri: str | None) -> Any:
    """MLflow's registry asks for the store of a URI with our prefix, as nothing of ours stands in its place yet."""
    uri, utils = plain_uri(store_uri), sys.modules[_UTILS]
    # Not by the registry's own call, which holds a lock around this one.
    plain = utils._tracking_store_registry.get_store_builder(uri)(store_uri=uri, artifact_uri=artifact_uri)
    if artifact_uri is not None:  # a server's, which answers others
        return plain
    with _switch.lock:
        _switch.uris.add(_alike(uri))
        _install()
        _keep_plain()
        _name_plain(utils)
    return _queued(uri, plain)


def model_registry_store(store_uri: str, tracking_uri: str | None) -> Any:
    """MLflow's own, for a URI with our prefix."""
    utils: Any = importlib.import_module("mlflow.tracking._model_registry.utils")
    uri = _registry_uri(store_uri)
    builder = utils._get_store_registry().get_store_builder(uri)
    if "tracking_uri" in inspect.signature(builder).parameters or any(
        each.kind is each.VAR_KEYWORD for each in inspect.signature(builder).parameters.values()
    ):
        return builder(store_uri=uri, tracking_uri=tracking_uri and plain_uri(tracking_uri))
    return builder(store_uri=uri)


def _registry_uri(uri: str) -> str:
    """The model registry that a tracking URI means without our prefix; a workspace keeps its models elsewhere."""
    if not uri.startswith(PREFIX):
        return uri
    utils: Any = importlib.import_module("mlflow.tracking._model_registry.utils")
    find = getattr(utils, "_get_default_registry_uri_for_tracking_uri", plain_uri)
    return str(find(plain_uri(uri)))


# -- in MLflow's places ----------------------------------------------------------------------------------------------


def _install() -> None:
    """Put ours in front of the registry of stores, and of the variable that names the tracking URI."""
    utils: Any = sys.modules[_UTILS]
    registry, variable = utils._tracking_store_registry, utils.MLFLOW_TRACKING_URI

    def get_store(store_uri: str | None = None, artifact_uri: str | None = None) -> Any:
        _name_plain(utils)
        resolved = utils._resolve_tracking_uri(store_uri)
        uri = _noted(resolved)
        if uri != resolved:
            _keep_plain()
        plain = type(registry).get_store(registry, uri, artifact_uri)
        return _queued(uri, plain) if artifact_uri is None and _switch.wants(uri) else plain

    def get_raw() -> str | None:
        found = type(variable).get_raw(variable)
        return None if found is None else _noted(found)

    _switch.put(registry, "get_store", get_store)
    _switch.put(variable, "get_raw", get_raw)


def _keep_plain() -> None:
    """What of MLflow was given a URI with our prefix, keeps the plain one."""
    tracking: Any = importlib.import_module("mlflow.tracking._tracking_service.client")
    tracing: Any = importlib.import_module("mlflow.tracing.client")
    models: Any = importlib.import_module("mlflow.tracking._model_registry.client")
    clients: Any = importlib.import_module("mlflow.tracking.client")
    for keeper, attribute in (
        (tracking.TrackingServiceClient, "tracking_uri"),
        (tracing.TracingClient, "tracking_uri"),
        (models.ModelRegistryClient, "tracking_uri"),
        (models.ModelRegistryClient, "registry_uri"),
        (clients.MlflowClient, "_registry_uri"),
        (clients.MlflowClient, "_workspace_store_uri"),
    ):
        _switch.put(keeper, attribute, _PlainAttribute(attribute))
    artifacts: Any = importlib.import_module("mlflow.store.artifact.artifact_repository_registry")
    registry = artifacts._artifact_repository_registry

    def get_artifact_repository(
        artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> Any:
        _name_plain(sys.modules[_UTILS])
        return type(registry).get_artifact_repository(
            registry,
            artifact_uri,
            tracking_uri and _noted(tracking_uri),
            registry_uri and _registry_uri(registry_uri),
        )

    _switch.put(registry, "get_artifact_repository", get_artifact_repository)


def _name_plain(utils: Any) -> None:
    """What `mlflow.set_tracking_uri` was given; the variable of the environment keeps our prefix, for children."""
    given = utils._tracking_uri
    if isinstance(given, str) and given.startswith(PREFIX):
        utils._tracking_uri = _noted(given)


def _noted(uri: str) -> str:
    """The plain URI; one that had our prefix is queued from now on."""
    found = plain_uri(uri)
    if found is not uri:
        _switch.uris.add(_alike(found))
    return found


def _alike(uri: str) -> str:
    """One of the spellings that lead to the same server: what is written by one is read by the other."""
    return uri.rstrip("/")


class _PlainAttribute:
    """An attribute that reads as the plain URI."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._plain = _registry_uri if "registry" in name else _noted

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None or self._name not in vars(instance):
            raise AttributeError(self._name)
        value = vars(instance)[self._name]
        return self._plain(value) if isinstance(value, str) else value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value

    def __delete__(self, instance: Any) -> None:
        del vars(instance)[self._name]


def _queued(uri: str, plain: Any) -> Any:
    """The queued store of a plain URI: one a process and workspace, as a client belongs to one workspace."""
    from runqueue.integrations.mlflow._queue import Queue
    from runqueue.integrations.mlflow._queued_store import QueuedStore
    from runqueue.settings._config import current_workspace

    key = (_alike(uri), current_workspace())
    store = _switch.stores.get(key)
    if store is None:
        with _switch.lock:
            store = _switch.stores.get(key)
            if store is None:
                store = _switch.stores[key] = QueuedStore(plain, Queue(uri), uri)
                if not _switch.registered:
                    _switch.registered = True
                    atexit.register(_at_exit)
    if store._plain is not plain:
        store._replace(plain)
    return store


def _at_exit() -> None:
    """
    Before the clients flush for the last time, and warn of what they find: tell what was found before. MLflow's own
    hook, which ends the active run, comes after both, as it was registered before them.
    """
    for store in list(_switch.stores.values()):
        if store._queue is not None:
            store._queue.expire()
