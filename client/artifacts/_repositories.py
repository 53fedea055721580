"""
Artifacts that MLflow's own repositories store: object stores, folders, and whatever an installed plugin knows.

Rules of this file: every call of MLflow's runs in a worker thread, and is never repeated before it has returned. MLflow is
imported in the first of these threads. What a repository raises is said in words without its secrets; what passes by
itself is told from what does not by the error's kind, as each library has its own.
"""

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

from runqueue.artifacts._source import Source, as_file, rejected, size_of
from runqueue.errors import UnavailableError
from runqueue.http._body import kept_alive
from runqueue.http._upload import Meter
from runqueue.queueing import Scope, StoreError
from runqueue.runtime._fork import importing
from runqueue.runtime._waiting import in_thread
from runqueue.settings._redaction import redact_uri
from runqueue.wire._answer import RETRIABLE, error_of

PATIENCE: Final = 300.0
"""Seconds, beside those that its size takes, for which an upload that shows nothing of itself passes for one that goes on."""
SLOWEST: Final = 1_000_000
"""Bytes a second, as well."""
_KEPT: Final = 64
"""Repositories that are kept, the latest: each run has its own."""
_LASTING: Final = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
)
"""Errors of the system's that waiting does not mend."""
_PASSING: Final = frozenset(
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
    Args:
        tracking_uri: Of the client; some repositories ask that server for credentials.
        at_once: Calls.
        meter: Told what is sent.
    """

    def __init__(self, tracking_uri: str, at_once: int, meter: Meter) -> None:
        self._tracking_uri = tracking_uri
        self._threads = anyio.CapacityLimiter(at_once)
        self._meter = meter
        self._made: OrderedDict[str, Any] = OrderedDict()

    async def put(self, root: str, path: str, source: Source) -> None:
        """
        Store one artifact.

        Args:
            root: URI of the run's artifacts.
            path: Below it.
            source: What is stored.

        Raises:
            StoreError: It was not stored.
        """
        if importlib.util.find_spec("mlflow") is None:
            kind = f"in {urlsplit(root).scheme}:" if "://" in root else "in a folder"
            raise rejected(
                f"the artifacts of this run are kept {kind}, which takes MLflow: pip install 'runqueue[mlflow]'"
            )
        work = partial(in_thread, self._perform, root, path, source, limiter=self._threads)
        await kept_alive(work, self._meter, PATIENCE + size_of(source) / SLOWEST)
        self._meter.add(size_of(source))

    def _perform(self, root: str, path: str, source: Source) -> None:
        folder, name = posixpath.split(path)
        with as_file(source, name) as local:
            failure = self._failed(root, str(local), folder)
            if failure is not None:
                raise failure

    def _failed(self, root: str, local: str, folder: str) -> StoreError | None:
        try:
            self._of(root).log_artifact(local, folder or None)
        except Exception as error:  # noqa: BLE001  whatever a plugin raises concerns this artifact alone
            return _described(error, root)
        return None

    def _of(self, root: str) -> Any:
        found = self._made.get(root)
        if found is None:
            with importing():
                registry: Any = importlib.import_module("mlflow.store.artifact.artifact_repository_registry")
                uris: Any = importlib.import_module("mlflow.utils.uri")
            # Of a workspace that a profile names; what is no dbfs: stays.
            uri = uris.add_databricks_profile_info_to_artifact_uri(root, self._tracking_uri)
            get = registry.get_artifact_repository
            known = "tracking_uri" in inspect.signature(get).parameters
            found = get(uri, tracking_uri=self._tracking_uri) if known else get(uri)
        self._made[root] = found
        self._made.move_to_end(root)
        while len(self._made) > _KEPT:
            self._made.popitem(last=False)
        return found


def _described(error: Exception, root: str) -> StoreError:
    text = f"{type(error).__name__}: {_redacted(str(error), root)}"
    chain = list(_chain(error))
    for each in chain:
        status = _status(each)
        if status is not None and (status in RETRIABLE or status == 401):
            return UnavailableError(text)
        if isinstance(each, ImportError) and each.name:
            return rejected(f"the artifact repository needs a library: pip install {each.name} ({text})")
        if _PASSING & {kind.__name__ for kind in type(each).__mro__}:
            return UnavailableError(text)
        if isinstance(each, OSError) and type(each).__module__ == "builtins" and each.errno is not None:
            return rejected(text) if each.errno in _LASTING else UnavailableError(text)
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
    """Of HTTP, as requests', botocore's, google's and azure's errors keep it."""
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
