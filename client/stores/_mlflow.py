"""
MLflow's own stores (SQLite and other databases, files, plugins), behind the same calls as the REST API.

Rules of this file: every call of MLflow's runs in a worker thread, and is never repeated before it has returned; what
a server would answer is what is returned or raised, by the same table. MLflow is imported in the first of these
threads: it takes seconds. Nobody tries twice: MLflow's own ways to are kept from it, or left to it alone.

What MLflow's file store does otherwise than a database, and what is made of it here:

    one param in a batch conflicts    the ones before it are stored: an equal param, or tag, is harmless the second time
    a metric point fails              the ones before it are appended: looked for before they are written once more
    the same point, logged twice      is stored twice, as that store does
    `a` and `a/b` of one kind         cannot both be: the second is rejected
"""

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
from runqueue.stores._mlflow_calls import CALLS, Appended, load_mlflow, log_batch
from runqueue.stores._protocol import GET_EXPERIMENT, GET_RUN, SEARCH_RUNS, Endpoint, Traffic
from runqueue.wire._answer import REJECTS_AFTER, error_of
from runqueue.wire._limits import MLFLOW_LIMITS

THREADS: Final = 8
"""Calls at once to a database that takes more than one writer."""

_DRIVERS: Final = {"psycopg": "psycopg[binary]", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
"""What to install for a module, where it has another name."""

_REFUSED: Final = re.compile(
    r"authentication failed|no password supplied|no pg_hba\.conf entry|role \".*\" does not exist"
    r"|permission denied for|Access denied for user|Login failed for user"
)
_NO_DATABASE: Final = re.compile(r"database \".*\" does not exist|Unknown database|file is not a database")
_ROLLED_BACK: Final = frozenset(("40001", "40P01", "55P03", "1205", "1213"))
"""SQLSTATEs and numbers (of MySQL and SQL Server) of a transaction that another one was in the way of."""
_UNFIT_FOR_FILES: Final = frozenset((errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG))
"""What a key that cannot be a file's name, beside those that are there, ends with."""

_READS: Final = frozenset((GET_EXPERIMENT, GET_RUN, SEARCH_RUNS))

_turns: Final[dict[str, threading.Semaphore]] = {}
if hasattr(os, "register_at_fork"):  # what a thread held has no holder in the child
    os.register_at_fork(after_in_child=_turns.clear)


_PASSING: Final = frozenset(("OperationalError", "InterfaceError", "TimeoutError"))
"""Errors of SQLAlchemy that tell of the database's state, and not of what it was asked."""


class MlflowStore:
    """
    Args:
        uri: What `mlflow.set_tracking_uri` would take.
        traffic: Counts the calls.
    """

    def __init__(self, uri: str, traffic: Traffic) -> None:
        self._uri = uri
        self._traffic = traffic
        self._store: Any = None  # MLflow's own; as untyped as its entities
        self._retries = False  # whether MLflow's store does so itself
        scheme = urlsplit(uri).scheme.lower().split("+")[0]
        self._on_server, self._on_sqlite = scheme in ("postgresql", "mysql", "mssql"), scheme == "sqlite"
        self._appended = Appended() if scheme == "file" or "://" not in uri else None
        # SQLite takes one writer at a time and makes the others fail in the end; MLflow's file store is not
        # thread-safe. One call at a time is as fast for both, and cannot fail so.
        single = self._on_sqlite or self._appended is not None
        self._threads = anyio.CapacityLimiter(1 if single else THREADS)
        # The same once more for the threads themselves: a call that nobody waits for any longer holds its turn; and
        # for whoever else in this process has a client of the same store.
        turns = threading.Semaphore(1 if single else THREADS)
        self._turns = _turns.setdefault(uri, turns) if single else turns
        self._opening = threading.Lock()

    @property
    def limits(self) -> Limits:
        return MLFLOW_LIMITS

    def __repr__(self) -> str:
        return f"<MlflowStore {redact_uri(self._uri)}>"

    async def aclose(self) -> None:
        """Nothing to do: MLflow keeps one store a URI for the life of the process."""

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `Store.call`."""
        self._traffic.count(body)
        data = orjson.loads(body) if body else dict(query or {})
        # Cancelling ends the waiting. The engine never sends for this lane again before then.
        return await in_thread(self._perform, endpoint, data, limiter=self._threads)

    def _perform(self, endpoint: Endpoint, data: dict[str, Any]) -> dict[str, Any]:
        call = CALLS[endpoint]
        failure: StoreError
        with self._turns:
            try:
                store = self._opened()
            except Exception as error:
                failure = self._unopened(error)
            else:
                try:
                    if call is log_batch and self._appended is not None:
                        return self._appended.log_batch(store, data)
                    return call(store, data)
                except Exception as error:
                    failure = self._describe(error)
                    if self._retries and failure.retriable and hasattr(error, "get_http_status_code"):
                        failure = _without_retries(failure, reads=endpoint in _READS)
        raise failure

    def _opened(self) -> Any:
        if self._store is None:
            with self._opening:
                with importing():  # all that the calls below need, too: a fork must not come in the middle of it
                    load_mlflow()
                # Private to MLflow, but the only way that asks its registry and keeps one store a URI.
                utils: Any = importlib.import_module("mlflow.tracking._tracking_service.utils")
                # The first use of a database runs MLflow's migrations, which two processes cannot do at once.
                with locked(self._uri) if self._on_sqlite else nullcontext():
                    if self._on_server or self._on_sqlite:
                        self._knock()
                    # Of its class: in the registry's own place stands ours where MLflow's writes are queued, and what it
                    # would give is what queues them.
                    registry: Any = utils._tracking_store_registry
                    store = type(registry).get_store(registry, self._uri)
                self._retries = any(each.__name__ == "RestStore" for each in type(store).__mro__)
                self._store = store
        return self._store

    def _knock(self) -> None:
        """Look once whether there is a database: MLflow's store would try for 100 s, in a thread nothing can stop."""
        utils: Any = importlib.import_module("mlflow.store.db.utils")
        engine = utils.create_sqlalchemy_engine(self._uri)
        try:
            if self._on_server or os.path.isfile(engine.url.database or ""):
                with engine.connect() as connection:
                    connection.exec_driver_sql("SELECT 1" if self._on_server else "PRAGMA schema_version")
        finally:
            engine.dispose()

    def _unopened(self, error: Exception) -> StoreError:
        """
        Nothing can be stored, and nothing that is queued is at fault. Most of it passes: a database that is down, or
        that another process is just migrating.
        """
        text = f"the store cannot be opened: {type(error).__name__}: {self._redacted(error)}"
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            return StoreError(f"{text}: pip install '{_DRIVERS.get(error.name, error.name)}'", scope=Scope.STORE)
        if _REFUSED.search(str(error)):
            return AuthError(text)
        refused = (
            getattr(error, "get_http_status_code", lambda: 500)() < 500
        )  # an MlflowException: a file store without its switch, say
        unknown = "ArgumentError" in _names(error) or _NO_DATABASE.search(str(error))
        if refused or unknown or isinstance(error, (ImportError, TypeError, ValueError)):
            return StoreError(text, scope=Scope.STORE)
        return UnavailableError(text)

    def _describe(self, error: Exception) -> StoreError:
        text = self._redacted(error)
        database = error if _names(error) or error.__cause__ is None else error.__cause__
        if _rolled_back(database):
            return UnavailableError(f"{type(database).__name__}: {text}", code=getattr(error, "error_code", None))
        if "IntegrityError" in _names(database):  # PostgreSQL's text has another name for it; see `error_of`
            return UnavailableError(text, rejects_after=REJECTS_AFTER, scope=Scope.ENTRY, code="BAD_REQUEST")
        if getattr(database, "connection_invalidated", False) or _PASSING & _names(database):
            return UnavailableError(f"{type(database).__name__}: {text}", ambiguous=True)
        if getattr(error, "get_http_status_code", None) is not None:  # an MlflowException
            return self._described(error, text)
        generic = StoreError(f"{type(error).__name__}: {text}")
        return _of_the_system(error, text) if isinstance(error, OSError) else generic

    def _described(self, error: Any, text: str) -> StoreError:
        inner: Any = error.__context__ if self._appended is not None and error.get_http_status_code() == 500 else None
        if isinstance(inner, OSError):
            return _of_the_system(inner, text)
        if getattr(inner, "get_http_status_code", None) is not None:  # INTERNAL_ERROR hides what the store said
            return self._described(inner, self._redacted(inner))
        return error_of(error.get_http_status_code(), str(getattr(error, "error_code", "")), text)

    def _redacted(self, error: BaseException) -> str:
        text = str(error).replace(self._uri, redact_uri(self._uri))
        for secret in _secrets(self._uri):
            whole = r"\b" if len(secret) < 6 and secret.isalnum() else ""  # else no message would be readable
            text = re.sub(whole + re.escape(secret) + whole, "***", text)
        return text


def _names(error: BaseException) -> set[str]:
    """Of its classes: SQLAlchemy's are not imported for this."""
    return {each.__name__ for each in type(error).__mro__ if each.__module__.startswith("sqlalchemy")}


def _rolled_back(error: BaseException) -> bool:
    """Whether another transaction was in the way of this one: a dead-lock, a failure to serialise."""
    origin = getattr(error, "orig", None)  # the driver's own
    codes = [getattr(origin, name, None) for name in ("sqlstate", "pgcode")] + list(getattr(origin, "args", ())[:1])
    return any(str(code) in _ROLLED_BACK for code in codes)


def _of_the_system(error: OSError, text: str) -> StoreError:
    if error.errno in _UNFIT_FOR_FILES:
        return RejectedError(f"this key cannot be kept in a file beside the others: {text}")
    return UnavailableError(f"{type(error).__name__}: {text}", ambiguous=True)


def _without_retries(failure: StoreError, *, reads: bool) -> StoreError:
    """
    Of a store that has tried again already, for as long as its own settings say. What may be a rejection is one at
    once, if the store works; where it cannot even be read, the flush ends, with everything queued.
    """
    if failure.rejects_after is not None and not reads:
        failure.rejects_after = 1
        return failure
    failure.retriable, failure.scope = False, Scope.STORE
    return failure


def _secrets(uri: str) -> Iterator[str]:
    """What of the URI no message may show; the longest first, as one may hold another."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    found = {password, *(each.group()[len(each.group(1)) :] for each in SECRET_QUERY_ITEM.finditer(parts.query))}
    found |= {f"{quote}{name}{quote}" for name in (user, unquote(user)) if name for quote in "'\""}
    found |= {unquote(each) for each in found}
    yield from sorted(found - {""}, key=len, reverse=True)
