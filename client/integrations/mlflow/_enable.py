"""
Queues the writes of MLflow's own API, by patches of MLflow's objects, until `disable()` takes the patches out.

    all tracking URIs     after `enable()`, or with RUNQUEUE_MLFLOW=1 (which `runqueue run` sets)
    one tracking URI      once it was named somewhere with the prefix `runqueue+`: `runqueue+http://host:5000`

Wherever MLflow keeps a URI with the prefix, the plain URI is put in its place: MLflow finds artifacts, the model
registry, traces and links by it. This module remembers that the plain URI is queued.
"""

# Rules of this file: a patch is an attribute of a single object, or a descriptor of a class that has no such attribute.
# So `delattr` takes it out, and restores exactly what was there. Nothing is patched without a request. The
# file may be imported in the middle of the import of MLflow, so MLflow's modules are looked up when they are needed.

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
"""The variable that queues everything wherever MLflow is imported, also in the processes that a script starts."""
_UTILS: Final = "mlflow.tracking._tracking_service.utils"


class _State:
    """The state of this module: what is queued, by whose request, and the patches."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.enabled_by_environment = False
        self.calls: set[Enabled] = set()  # of `enable()`; a call whose block has begun is in `blocks` instead
        self.blocks: set[Enabled] = set()
        self.uris: set[str] = set()  # the plain URIs that were named with the prefix, normalized
        self.stores: dict[tuple[str, str | None], QueuedStore] = {}  # by normalized URI and workspace
        self.patches: list[tuple[Any, str]] = []  # owner and name of each attribute that was added
        self.has_exit_hook = False

    @property
    def is_everything_queued(self) -> bool:
        return self.enabled_by_environment or bool(self.calls) or bool(self.blocks)

    def is_queued(self, uri: str) -> bool:
        return self.is_everything_queued or _normalized(uri) in self.uris

    def patch(self, owner: Any, name: str, value: Any) -> None:
        """Add an attribute that hides the one of the owner's class, or that the owner's class did not have."""
        if name not in vars(owner):
            setattr(owner, name, value)
            self.patches.append((owner, name))

    def remove_patches(self) -> None:
        while self.patches:
            delattr(*self.patches.pop())

    def _after_fork(self) -> None:
        self.lock = threading.RLock()  # a thread of the parent may have held the old one


_state = _State()
_fork.register(_state)


class Enabled:
    """The context manager that `enable` returns. Leaving the block takes back this call, and no other one."""

    def __enter__(self) -> Self:
        with _state.lock:
            _state.blocks.add(self)
            _state.calls.discard(self)
            _patch_stores()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with _state.lock:
            _state.blocks.discard(self)
        _close_unwanted()


def enable() -> Enabled:
    """
    Queue what MLflow logs, to whatever tracking URI, from now on. Runs and clients that are open already are included.

        runqueue.integrations.mlflow.enable()

    It is a context manager too: `with enable(): ...` ends with the block. Blocks may be nested, and may overlap.

    Environment:
        RUNQUEUE_STRICT: 1: `end_run` raises an error if data was not stored. Default: a warning.
        RUNQUEUE_FLUSH_INTERVAL: Seconds between two flushes in the background. Default: 2.

    Raises:
        ConfigError: One of these variables holds a bad value.
        ImportError: MLflow is not installed.

    Guarantees:
        A script reads its own writes: before a read, a search or a deletion, the data that it concerns is sent.
        `end_run` returns when the run's data is stored, or has failed for good.
    """
    importlib.import_module("mlflow")
    from runqueue.integrations.mlflow._queue import Settings

    Settings()
    enabled = Enabled()
    with _state.lock:
        _state.calls.add(enabled)
        _patch_stores()
    return enabled


def disable() -> None:
    """
    Take back all calls of `enable`, their blocks included: send what is queued, and restore MLflow.

    Tracking URIs with the prefix `runqueue+` go on being queued.
    """
    with _state.lock:
        _state.enabled_by_environment = False
        _state.calls.clear()
        _state.blocks.clear()
    _close_unwanted()


def _close_unwanted() -> None:
    """Close the stores that are not to be queued any more. If no URI is to be queued, take the patches out."""
    with _state.lock:
        ended = (
            {} if _state.is_everything_queued else {k: v for k, v in _state.stores.items() if k[0] not in _state.uris}
        )
        for key in ended:
            del _state.stores[key]
        if not _state.is_everything_queued and not _state.uris:
            _state.remove_patches()
    # Outside the lock: closing may wait for the server. Log calls meanwhile go to the plain store.
    for store in ended.values():
        queue = store._detach()
        if queue is not None:
            queue.close()


# -- entry points of the plugin --------------------------------------------------------------------------------------


def follow_environment() -> None:
    """
    Queue what the environment asks for. The plugin calls this in the middle of the import of MLflow.

    Raises:
        ConfigError: RUNQUEUE_MLFLOW is none of true, false, 1, 0.
    """
    with _state.lock:
        if _environment.switch(VARIABLE):
            _state.enabled_by_environment = True
        if _state.enabled_by_environment or os.environ.get("MLFLOW_TRACKING_URI", "").startswith(PREFIX):
            _patch_stores()


def tracking_store(store_uri: str, artifact_uri: str | None) -> Any:
    """Return the queued store of a URI with the prefix. MLflow's registry asks for it before it is patched."""
    uri, utils = plain_uri(store_uri), sys.modules[_UTILS]
    # `registry.get_store` would block: it holds a lock around this call.
    plain = utils._tracking_store_registry.get_store_builder(uri)(store_uri=uri, artifact_uri=artifact_uri)
    if artifact_uri is not None:  # the store of a server, whose writes others wait for
        return plain
    with _state.lock:
        _state.uris.add(_normalized(uri))
        _patch_stores()
        _patch_uri_attributes()
        _strip_current_uri(utils)
    return _queued_store(uri, plain)


def model_registry_store(store_uri: str, tracking_uri: str | None) -> Any:
    """Return MLflow's own model registry for a URI with the prefix."""
    utils: Any = importlib.import_module("mlflow.tracking._model_registry.utils")
    uri = _registry_uri(store_uri)
    builder = utils._get_store_registry().get_store_builder(uri)
    if "tracking_uri" in inspect.signature(builder).parameters or any(
        each.kind is each.VAR_KEYWORD for each in inspect.signature(builder).parameters.values()
    ):
        return builder(store_uri=uri, tracking_uri=tracking_uri and plain_uri(tracking_uri))
    return builder(store_uri=uri)


def _registry_uri(uri: str) -> str:
    """Return the registry's URI for a tracking URI. It can differ: Databricks has its models in Unity Catalog."""
    if not uri.startswith(PREFIX):
        return uri
    utils: Any = importlib.import_module("mlflow.tracking._model_registry.utils")
    find = getattr(utils, "_get_default_registry_uri_for_tracking_uri", plain_uri)
    return str(find(plain_uri(uri)))


# -- patches of MLflow -----------------------------------------------------------------------------------------------


def _patch_stores() -> None:
    """Patch MLflow's registry of stores, and its object for the variable MLFLOW_TRACKING_URI."""
    utils: Any = sys.modules[_UTILS]
    registry, variable = utils._tracking_store_registry, utils.MLFLOW_TRACKING_URI

    def get_store(store_uri: str | None = None, artifact_uri: str | None = None) -> Any:
        _strip_current_uri(utils)
        resolved = utils._resolve_tracking_uri(store_uri)
        uri = _without_prefix(resolved)
        if uri != resolved:
            _patch_uri_attributes()
        plain = type(registry).get_store(registry, uri, artifact_uri)
        return _queued_store(uri, plain) if artifact_uri is None and _state.is_queued(uri) else plain

    def get_raw() -> str | None:
        found = type(variable).get_raw(variable)
        return None if found is None else _without_prefix(found)

    _state.patch(registry, "get_store", get_store)
    _state.patch(variable, "get_raw", get_raw)


def _patch_uri_attributes() -> None:
    """Patch the attributes in which MLflow keeps a URI: they read as the plain URI."""
    tracking: Any = importlib.import_module("mlflow.tracking._tracking_service.client")
    tracing: Any = importlib.import_module("mlflow.tracing.client")
    models: Any = importlib.import_module("mlflow.tracking._model_registry.client")
    clients: Any = importlib.import_module("mlflow.tracking.client")
    for owner, attribute in (
        (tracking.TrackingServiceClient, "tracking_uri"),
        (tracing.TracingClient, "tracking_uri"),
        (models.ModelRegistryClient, "tracking_uri"),
        (models.ModelRegistryClient, "registry_uri"),
        (clients.MlflowClient, "_registry_uri"),
        (clients.MlflowClient, "_workspace_store_uri"),
    ):
        _state.patch(owner, attribute, _PlainAttribute(attribute))
    artifacts: Any = importlib.import_module("mlflow.store.artifact.artifact_repository_registry")
    registry = artifacts._artifact_repository_registry

    def get_artifact_repository(
        artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None
    ) -> Any:
        _strip_current_uri(sys.modules[_UTILS])
        return type(registry).get_artifact_repository(
            registry,
            artifact_uri,
            tracking_uri and _without_prefix(tracking_uri),
            registry_uri and _registry_uri(registry_uri),
        )

    _state.patch(registry, "get_artifact_repository", get_artifact_repository)


def _strip_current_uri(utils: Any) -> None:
    """
    Make the URI of `mlflow.set_tracking_uri` plain. The environment variable keeps the prefix, for child processes.
    """
    given = utils._tracking_uri
    if isinstance(given, str) and given.startswith(PREFIX):
        utils._tracking_uri = _without_prefix(given)


def _without_prefix(uri: str) -> str:
    """Return the plain URI. If the given one has the prefix, queue the plain one from now on."""
    plain = plain_uri(uri)
    if plain is not uri:
        _state.uris.add(_normalized(plain))
    return plain


def _normalized(uri: str) -> str:
    """
    Return the same text for spellings of one server's URI: they share a queue, so that each reads what was written.
    """
    return uri.rstrip("/")


class _PlainAttribute:
    """A descriptor of an attribute that holds a URI; it reads as the plain URI."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._as_plain = _registry_uri if "registry" in name else _without_prefix

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None or self._name not in vars(instance):
            raise AttributeError(self._name)
        value = vars(instance)[self._name]
        return self._as_plain(value) if isinstance(value, str) else value

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = value

    def __delete__(self, instance: Any) -> None:
        del vars(instance)[self._name]


def _queued_store(uri: str, plain: Any) -> Any:
    """
    Return the queued store of a plain URI. There is one for each workspace, since a client belongs to a workspace.
    """
    from runqueue.integrations.mlflow._queue import Queue
    from runqueue.integrations.mlflow._queued_store import QueuedStore
    from runqueue.settings._config import current_workspace

    key = (_normalized(uri), current_workspace())
    store = _state.stores.get(key)
    if store is None:
        with _state.lock:
            store = _state.stores.get(key)
            if store is None:
                store = _state.stores[key] = QueuedStore(plain, Queue(uri), uri)
                if not _state.has_exit_hook:
                    _state.has_exit_hook = True
                    atexit.register(_report_at_exit)
    if store._plain is not plain:
        store._replace(plain)
    return store


def _report_at_exit() -> None:
    """
    Report the failures that are known, before the clients' last flush warns of those that it finds.

    MLflow's own hook ends the active run. It runs after both, as it was registered first.
    """
    for store in list(_state.stores.values()):
        if store._queue is not None:
            store._queue.begin_exit()
