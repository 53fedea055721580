"""
MLflow's own stores (SQLite and other databases, files, plugins), behind the same calls as the REST API.

Where MLflow's file store differs from a database:

    one param in a batch conflicts    those before it are stored; repeating an equal param, or tag, is harmless
    a metric point fails              those before it are stored; a retry looks them up before it writes them again
    the same point, logged twice      it is stored twice
    `a` and `a/b` of one kind         the second is rejected, as one file cannot be inside of another
"""

# Rules of this file:
# - MLflow is called in worker threads only, and imported in the first of them, as its import takes seconds.
# - A call is never repeated before it has returned.
# - Results and errors are those of a server: `error_of` judges MLflow's errors as it judges answers.
# - There is one retry layer. A store of MLflow that retries by itself is not retried by the engine.

from __future__ import annotations

import errno
import importlib
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import anyio
import orjson

from runqueue.errors import AuthError, RejectedError, UnavailableError
from runqueue.queueing import Limits, Scope, StoreError
from runqueue.runtime._fork import importing
from runqueue.runtime._waiting import in_thread
from runqueue.settings._redaction import SECRET_QUERY_ITEM, redact_uri
from runqueue.stores._file_lock import locked
from runqueue.stores._mlflow_calls import CALLS, FileStoreLogger, load_mlflow, log_batch
from runqueue.stores._protocol import GET_EXPERIMENT, GET_RUN, SEARCH_RUNS, Endpoint, Traffic
from runqueue.wire._answer import REJECTS_AFTER, error_of
from runqueue.wire._limits import MLFLOW_LIMITS

THREADS: Final = 8
"""Calls at once, to a database that takes more than one writer."""

_DRIVERS: Final = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""Packages whose name is not that of their module."""

_REFUSED: Final = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|role \".*\" does not exist"
    r"|permission denied for|Access denied for user|Login failed for user"
)
_NO_DATABASE: Final = re.compile(r"database \".*\" does not exist|Unknown database|file is not a database")
_ROLLED_BACK: Final = frozenset(("40001", "40P01", "55P03", "1205", "1213"))
"""Codes of a conflict with another transaction: SQLSTATEs, and numbers of MySQL and SQL Server."""
_BAD_FILE_NAME: Final = frozenset((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG))
"""Errors of the file system when a key cannot be the name of a file beside the files that exist."""

_READS: Final = frozenset((GET_EXPERIMENT, GET_RUN, SEARCH_RUNS))

_slots: Final[dict[str, threading.Semaphore]] = {}
"""By tracking URI, for stores that take one call at a time."""
if hasattr(os, "register_at_fork"):  # in a child, the thread that holds a slot does not exist
    os.register_at_fork(after_in_child=_slots.clear)


_UNAVAILABLE: Final = frozenset(("OperationalError", "InterfaceError", "TimeoutError"))
"""Errors of SQLAlchemy that are about the database's state, and not about the statement."""


class MlflowStore:
    """
    A store on one of MLflow's own. It is opened by its first call.

    Args:
        uri: The tracking URI.
        traffic: Counts the calls.
    """

    def __init__(self, uri: str, traffic: Traffic) -> None:
        self._uri = uri
        self._traffic = traffic
        self._store: Any = None  # MLflow's own store, which is untyped
        self._retries = False  # whether that store retries by itself
        scheme = urlsplit(uri).scheme.lower().split("+")[0]
        self._on_server, self._on_sqlite = scheme in ("postgresql", "mysql", "mssql"), scheme == "sqlite"
        self._file_logger = FileStoreLogger() if scheme == "file" or "://" not in uri else None
        # SQLite takes one writer at a time, and the others may fail after a while; MLflow's file store is not
        # thread-safe. For both, one call at a time is as fast, and avoids these failures.
        single = self._on_sqlite or self._file_logger is not None
        self._threads = anyio.CapacityLimiter(1 if single else THREADS)
        # The threads need a limit of their own: a call whose caller was cancelled goes on running. Clients of this
        # process that have the same URI share it.
        slots = threading.Semaphore(1 if single else THREADS)
        self._slots = _slots.setdefault(uri, slots) if single else slots
        self._opening = threading.Lock()

    @property
    def limits(self) -> Limits:
        return MLFLOW_LIMITS

    def __repr__(self) -> str:
        return f"<MlflowStore {redact_uri(self._uri)}>"

    async def aclose(self) -> None:
        """Do nothing: MLflow keeps its store of each URI for the life of the process."""

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `Store.call`."""
        self._traffic.count(body)
        data = orjson.loads(body) if body else dict(query or {})
        # Cancellation ends the wait, not the call. The engine sends nothing for the same lane while it waits.
        return await in_thread(self._perform, endpoint, data, limiter=self._threads)

    def _perform(self, endpoint: Endpoint, data: dict[str, Any]) -> dict[str, Any]:
        call = CALLS[endpoint]
        failure: StoreError
        with self._slots:
            try:
                store = self._opened()
            except Exception as error:
                failure = self._opening_failed(error)
            else:
                try:
                    if call is log_batch and self._file_logger is not None:
                        return self._file_logger.log_batch(store, data)
                    return call(store, data)
                except Exception as error:
                    failure = self._call_failed(error)
                    if self._retries and failure.retriable and hasattr(error, "get_http_status_code"):
                        failure = _without_retries(failure, reads=endpoint in _READS)
        raise failure

    def _opened(self) -> Any:
        if self._store is None:
            with self._opening:
                with importing():  # here, with all that the calls need: a fork must not happen during an import
                    load_mlflow()
                # The registry is private to MLflow, but no public call returns its one store of a URI.
                utils: Any = importlib.import_module("mlflow.tracking._tracking_service.utils")
                # The first use of a database runs MLflow's migrations, which two processes must not do at once.
                with locked(self._uri) if self._on_sqlite else nullcontext():
                    if self._on_server or self._on_sqlite:
                        self._try_to_connect()
                    # The class's method, not the instance's: `runqueue.integrations.mlflow` overrides the instance's to
                    # return a store that queues, and queueing twice would never store anything.
                    registry: Any = utils._tracking_store_registry
                    store = type(registry).get_store(registry, self._uri)
                self._retries = any(each.__name__ == "RestStore" for each in type(store).__mro__)
                self._store = store
        return self._store

    def _try_to_connect(self) -> None:
        """Fail at once if the database is down: MLflow's store would retry for 100 s, in a thread that nothing can stop."""
        utils: Any = importlib.import_module("mlflow.store.db.utils")
        engine = utils.create_sqlalchemy_engine(self._uri)
        try:
            if self._on_server or os.path.isfile(engine.url.database or ""):
                with engine.connect() as connection:
                    connection.exec_driver_sql("SELECT 1" if self._on_server else "PRAGMA schema_version")
        finally:
            engine.dispose()

    def _opening_failed(self, error: Exception) -> StoreError:
        """
        Convert an error of opening the store, which concerns all that is queued.

        Most of them pass: the database is down, or another process is just migrating it.
        """
        text = f"the store cannot be opened: {type(error).__name__}: {self._redacted(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            return StoreError(f"{text}: pip install '{_DRIVERS.get(error.name, error.name)}'", scope=Scope.STORE)
        if _REFUSED.search(str(error)):
            return AuthError(text)
        # An MlflowException, for example because the file store is switched off.
        refused = getattr(error, "get_http_status_code", lambda: 500)() < 500
        unknown = "ArgumentError" in _names(error) or _NO_DATABASE.search(str(error))
        if refused or unknown or isinstance(error, (ImportError, TypeError, ValueError)):
            return StoreError(text, scope=Scope.STORE)
        return UnavailableError(text)

    def _call_failed(self, error: Exception) -> StoreError:
        """Convert an error of a call."""
        text = self._redacted(error)
        database = error if _names(error) or error.__cause__ is None else error.__cause__
        if _rolled_back(database):
            return UnavailableError(f"{type(database).__name__}: {text}", code=getattr(error, "error_code", None))
        if "IntegrityError" in _names(database):  # as `error_of` does, by the class: not all texts name it
            return UnavailableError(text, rejects_after=REJECTS_AFTER, scope=Scope.ENTRY, code="BAD_REQUEST")
        if getattr(database, "connection_invalidated", False) or _UNAVAILABLE & _names(database):
            return UnavailableError(f"{type(database).__name__}: {text}", ambiguous=True)
        if getattr(error, "get_http_status_code", None) is not None:  # an MlflowException
            return self._mlflow_error(error, text)
        if isinstance(error, OSError):
            return _file_error(error, text)
        return StoreError(f"{type(error).__name__}: {text}")

    def _mlflow_error(self, error: Any, text: str) -> StoreError:
        inner: Any = (
            error.__context__ if self._file_logger is not None and error.get_http_status_code() == 500 else None
        )
        if isinstance(inner, OSError):
            return _file_error(inner, text)
        if getattr(inner, "get_http_status_code", None) is not None:  # MLflow hides the store's error by INTERNAL_ERROR
            return self._mlflow_error(inner, self._redacted(inner))
        return error_of(error.get_http_status_code(), str(getattr(error, "error_code", "")), text)

    def _redacted(self, error: BaseException) -> str:
        text = str(error).replace(self._uri, redact_uri(self._uri))
        for secret in _secrets(self._uri):
            # A short secret is replaced as a whole word only, else no message would be readable.
            boundary = r"\b" if len(secret) < 6 and secret.isalnum() else ""
            text = re.sub(boundary + re.escape(secret) + boundary, "***", text)
        return text


def _names(error: BaseException) -> set[str]:
    """Return the names of an error's SQLAlchemy classes. SQLAlchemy may not be imported, so they are not compared."""
    return {each.__name__ for each in type(error).__mro__ if each.__module__.startswith("sqlalchemy")}


def _rolled_back(error: BaseException) -> bool:
    """Tell if the transaction failed because of another one: a deadlock, or a serialization failure."""
    origin = getattr(error, "orig", None)  # the driver's error
    codes = [getattr(origin, name, None) for name in ("sqlstate", "pgcode")] + list(getattr(origin, "args", ())[:1])
    return any(str(code) in _ROLLED_BACK for code in codes)


def _file_error(error: OSError, text: str) -> StoreError:
    if error.errno in _BAD_FILE_NAME:
        return RejectedError(f"this key cannot be kept in a file beside the others: {text}")
    return UnavailableError(f"{type(error).__name__}: {text}", ambiguous=True)


def _without_retries(failure: StoreError, *, reads: bool) -> StoreError:
    """
    Adapt the failure of a store that has already retried, for as long as its own settings say.

    If the code may mean a rejection, one more refusal is enough, provided that the store works. Otherwise the store is
    out of reach: the flush ends, and everything stays queued.
    """
    if failure.rejects_after is not None and not reads:
        failure.rejects_after = 1
        return failure
    failure.retriable, failure.scope = False, Scope.STORE
    return failure


def _secrets(uri: str) -> Iterator[str]:
    """Yield the secrets in the URI, the longest first, as one may contain another."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    found = {password, *(each.group()[len(each.group(1)) :] for each in SECRET_QUERY_ITEM.finditer(parts.query))}
    found |= {f"{quote}{name}{quote}" for name in (user, unquote(user)) if name for quote in "'\""}
    found |= {unquote(each) for each in found}
    yield from sorted(found - {""}, key=len, reverse=True)
