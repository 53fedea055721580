"""
Uploads artifacts by MLflow's own repositories: to object stores, folders, and places that an installed plugin knows.
"""

# Rules of this file:
# - MLflow is called in worker threads only, and imported in the first of them. A call is never repeated before it has
#   returned.
# - The messages of errors lose their secrets here. Which errors are retriable is decided by their classes' names, as each
#   library has classes of its own.

from __future__ import annotations

import errno
import importlib
import importlib.util
import inspect
import posixpath
from collections import OrderedDict
from functools import partial
from typing import Any, Final
from urllib.parse import urlsplit

import anyio

from runqueue.artifacts._reading import as_file, rejected
from runqueue.artifacts._source import Source, size_of
from runqueue.errors import UnavailableError
from runqueue.http._body import with_heartbeats
from runqueue.http._upload import Meter
from runqueue.queueing import Scope, StoreError
from runqueue.runtime._fork import importing
from runqueue.runtime._waiting import in_thread
from runqueue.settings._redaction import redact_uri
from runqueue.wire._answer import RETRIABLE, error_of

STALL_TIMEOUT: Final = 300.0
"""Seconds, besides those for its size, for which an upload counts as alive although a repository shows no progress."""
MIN_BYTES_PER_SECOND: Final = 1_000_000
"""The speed by which a file's size extends that time."""
_MAX_REPOSITORIES: Final = 64
"""The latest repositories are kept for reuse. Each run has its own."""
_PERMANENT: Final = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
)
"""Errors of the operating system that a retry does not change."""
_TEMPORARY: Final = frozenset(
    (
        "ConnectionError",  # requests', and Python's own
        "Timeout",
        "TimeoutError",
        "HTTPClientError",  # botocore's: no connection, no answer, a broken one
        "ServiceRequestError",  # azure's
        "ServiceResponseError",
        "RetryError",
        "TransportError",  # google's
        "SSHException",
    )
)


class Repositories:
    """
    MLflow's repositories by the artifact URIs of runs.

    Args:
        tracking_uri: The client's; some repositories ask that server for credentials.
        max_uploads: Uploads at once.
        meter: Counts the bytes sent.
    """

    def __init__(self, tracking_uri: str, max_uploads: int, meter: Meter) -> None:
        self._tracking_uri = tracking_uri
        self._threads = anyio.CapacityLimiter(max_uploads)
        self._meter = meter
        self._repositories: OrderedDict[str, Any] = OrderedDict()

    async def put(self, root: str, path: str, source: Source) -> None:
        """
        Upload one artifact.

        Args:
            root: The artifact URI of the run.
            path: The artifact's path below it.
            source: The artifact.

        Raises:
            StoreError: The artifact was not stored.
        """
        if importlib.util.find_spec("mlflow") is None:
            kind = f"in {urlsplit(root).scheme}:" if "://" in root else "in a folder"
            raise rejected(
                f"the artifacts of this run are kept {kind}, which takes MLflow: pip install 'runqueue[mlflow]'"
            )
        work = partial(in_thread, self._upload, root, path, source, limiter=self._threads)
        await with_heartbeats(work, self._meter, STALL_TIMEOUT + size_of(source) / MIN_BYTES_PER_SECOND)
        self._meter.add(size_of(source))

    def _upload(self, root: str, path: str, source: Source) -> None:
        folder, name = posixpath.split(path)
        with as_file(source, name) as local:
            failure: StoreError
            try:
                self._repository(root).log_artifact(str(local), folder or None)
                return
            except Exception as error:  # noqa: BLE001  a plugin may raise anything, and only this artifact fails
                failure = _store_error(error, root)
            raise failure  # outside of the handler: its context would hold the original error, with its secrets

    def _repository(self, root: str) -> Any:
        found = self._repositories.get(root)
        if found is None:
            with importing():
                registry: Any = importlib.import_module("mlflow.store.artifact.artifact_repository_registry")
                uris: Any = importlib.import_module("mlflow.utils.uri")
            # It adds the profile of the tracking URI to dbfs: URIs, and leaves others as they are.
            uri = uris.add_databricks_profile_info_to_artifact_uri(root, self._tracking_uri)
            get = registry.get_artifact_repository
            takes_tracking_uri = "tracking_uri" in inspect.signature(get).parameters  # newer versions of MLflow
            found = get(uri, tracking_uri=self._tracking_uri) if takes_tracking_uri else get(uri)
        self._repositories[root] = found
        self._repositories.move_to_end(root)
        while len(self._repositories) > _MAX_REPOSITORIES:
            self._repositories.popitem(last=False)
        return found


def _store_error(error: Exception, root: str) -> StoreError:
    text = f"{type(error).__name__}: {_redacted(str(error), root)}"
    chain = list(_chain(error))
    for each in chain:
        status = _status(each)
        if status is not None and (status in RETRIABLE or status == 401):
            return UnavailableError(text)
        if isinstance(each, ImportError) and each.name:
            return rejected(f"the artifact repository needs a library: pip install {each.name} ({text})")
        if _TEMPORARY & {kind.__name__ for kind in type(each).__mro__}:
            return UnavailableError(text)
        if isinstance(each, OSError) and type(each).__module__ == "builtins" and each.errno is not None:
            return rejected(text) if each.errno in _PERMANENT else UnavailableError(text)
    code, status_of = getattr(error, "error_code", None), getattr(error, "get_http_status_code", lambda: None)
    if isinstance(code, str) and status_of() == 400:  # an MlflowException
        return error_of(400, code, _redacted(str(error), root))
    return StoreError(text, scope=Scope.BATCH)


def _chain(error: BaseException | None) -> Any:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _status(error: Any) -> int | None:
    """Return the HTTP status that an error of requests, botocore, google or azure holds, if it holds one."""
    response = getattr(error, "response", None)
    found = getattr(response, "status_code", None)
    if found is None and isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if found is None:
        found = getattr(error, "status_code", None)
    if found is None:
        found = getattr(error, "code", None)
    return found if isinstance(found, int) else None


def _redacted(text: str, root: str) -> str:
    text = text.replace(root, redact_uri(root))
    password = urlsplit(root).password if "://" in root else None
    return text.replace(password, "***") if password else text
