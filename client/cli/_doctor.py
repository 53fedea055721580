"""
The examination behind `runqueue doctor`: which store a client would use, with which credentials, and whether it works.
"""

# Rules of this file:
# - Values are shown without secrets and line breaks.
# - The store is asked by the same classes that a client uses.
# - Nothing is written, and nothing is created. (A plugin's store may do so when it is opened.)
# - A failure becomes one line of the `Diagnosis`, not an exception.
# - No wait lasts longer than a client's wait for a request.

from __future__ import annotations

import asyncio
import os
import re
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import anyio
import attrs
import orjson

from runqueue.cli import _findings as findings
from runqueue.cli._findings import NONE
from runqueue.cli._local_stores import DATABASES, missing_file, missing_in, unused_folder
from runqueue.cli._redactor import Redactor
from runqueue.errors import AuthError, NotFoundError, Scope, StoreError, UnavailableError, UnexpectedAnswerError
from runqueue.runtime._waiting import in_thread, resolve_names_in_threads
from runqueue.settings import _environment as environment
from runqueue.settings._config import Config
from runqueue.settings._redaction import redact_uri
from runqueue.settings._tracking_uri import resolve_tracking_uri
from runqueue.stores._protocol import GET_EXPERIMENT, SEARCH_RUNS, Endpoint, Store, Traffic
from runqueue.stores._resolve import DATABRICKS, check_uri, make_store, scheme_of

T = TypeVar("T")

REQUEST_TIMEOUT: Final = 15.0
"""Seconds for a request, unless a variable is set: less than a client's, as a user waits at a terminal."""
ROUND_TRIPS: Final = 5

_VERSION: Final = Endpoint("../../../version", "GET", 1_000)
"""The server's version, as plain text. Its path is beside the API, below the server's prefix."""
_LIKE_A_VERSION: Final = re.compile(r"\d+\.\d[0-9A-Za-z.+_-]{0,60}")
_SEARCH: Final = orjson.dumps({"experiment_ids": ["0"], "filter": "", "max_results": 1})
_NOT_YET: Final = "not yet: the first run will"


@attrs.define(eq=False)
class Diagnosis:
    """The result of an examination."""

    rows: list[tuple[str, str]] = attrs.field(factory=list)
    """Keys and values, in the order in which they were found."""
    fault: str | None = None
    """One line about what is wrong. None: all is well."""


class _Fault(Exception):
    """Ends the examination; its text becomes `Diagnosis.fault`."""


def examine(given: str | None) -> Diagnosis:
    """
    Find out whether a client with this tracking URI would work. It blocks while it waits for the store.

    Args:
        given: The tracking URI. None: the one that `Client()` would use.

    Returns:
        The findings. Failures are among them, and not raised.
    """
    found = Diagnosis()
    uri = given or ""
    try:
        config = Config(tracking_uri=given)
        uri = resolve_tracking_uri(given)
        found.rows += [("tracking uri", redact_uri(uri)), ("resolved from", findings.source_of(given))]
        check_uri(uri)
        _Examination(found, config, uri).run()
    except Exception as error:  # mlflow and its plugins may raise anything, and the user gets one line of it
        speaks_for_itself = isinstance(error, (_Fault, StoreError, ValueError, ImportError))
        text = str(error) if speaks_for_itself else f"{type(error).__name__}: {error}"
        found.fault = text or type(error).__name__
    redactor = Redactor(uri)
    found.rows = [(key, redactor.redact(value)) for key, value in found.rows]
    found.fault = found.fault and redactor.redact(found.fault)
    return found


class _Examination:
    """
    One examination.

    Args:
        found: Filled with the findings.
        config: The settings of the client.
        uri: The resolved tracking URI, accepted by `check_uri`.
    """

    def __init__(self, found: Diagnosis, config: Config, uri: str) -> None:
        self._found = found
        self._config = config
        self._uri = uri
        self._shown = redact_uri(uri)
        self._scheme = scheme_of(uri)
        self._http = self._scheme in findings.HTTP
        self._databricks = self._scheme in DATABRICKS
        self._database = self._scheme.partition("+")[0] in DATABASES
        self._traffic = Traffic()
        self._credentials = NONE
        self._headers = NONE

    def _row(self, key: str, value: str) -> None:
        self._found.rows.append((key, value))

    def run(self) -> None:
        """
        Fill in the findings.

        Raises:
            Exception: Something is wrong.
        """
        self._row("store", findings.kind_of(self._scheme))
        if not self._databricks:  # its credentials are known when its store is open
            self._credentials = findings.credentials_of(self._config, self._uri)
            self._row("credentials", self._credentials)
        if self._http:
            self._headers = findings.header_plugins()
            self._row("header plugins", self._headers)
            self._row("workspace", findings.workspace_of(self._config))
            self._network(self._scheme)
        self._timeouts()
        path, folder = missing_file(self._scheme, self._uri), unused_folder(self._scheme, self._uri)
        if path is not None:
            self._check_creatable(path)
        elif folder is not None:
            self._not_yet(f"make MLflow's folders in {folder}")
        else:
            _run(self._ask)

    def _network(self, scheme: str) -> None:
        self._row("tls", findings.tls_of(scheme))
        self._row("proxies", findings.proxies_of(scheme))

    def _timeouts(self) -> None:
        seconds, retrying = self._config.seconds_per_request(), self._config.retry_settings()
        tries = "" if retrying.retries is None else f", at most {retrying.retries} times"
        self._row("timeouts", f"{seconds:g} s a request, {retrying.timeout:g} s of retrying{tries}")
        if (self._http or self._databricks) and environment.text("MLFLOW_HTTP_REQUEST_TIMEOUT") is None:
            self._config = attrs.evolve(self._config, request_timeout=REQUEST_TIMEOUT)

    def _check_creatable(self, path: Path) -> None:
        """Check that the first run of a client will be able to create this local store."""
        above = next(each for each in path.absolute().parents if each.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise _Fault(f"{path} does not exist, and cannot be made in {above}")
        self._not_yet(f"make {path}")

    def _not_yet(self, action: str) -> None:
        self._row("reachable", f"{_NOT_YET} {action}")
        self._row("version", self._local_version())

    def _local_version(self) -> str:
        return f"mlflow {findings.version_of('mlflow', 'mlflow-skinny')}"

    async def _ask(self) -> None:
        store = make_store(self._config, self._uri, self._traffic)
        try:
            await self._examine(store)
        finally:
            await store.aclose()

    async def _examine(self, store: Store) -> None:
        try:
            if self._databricks:
                await self._open(store)
            self._row("transport", await self._transport(store))
            missing = await self._missing()
            accepted = missing is not None or await self._may_read(store)
        except StoreError as error:
            raise self._fault_of(error) from None
        self._row("reachable", "yes")
        if missing is not None:
            self._row("tables", f"{_NOT_YET} {missing}")
        self._row("version", await self._version(store))
        self._row("authentication", self._authentication(accepted))
        if missing is None:
            self._row("round trip", f"{await self._round_trip(store):.1f} ms (median of {ROUND_TRIPS})")
        bounds = attrs.asdict(store.limits)
        self._row("limits", ", ".join(f"{bound:,} {name}" for name, bound in bounds.items()) + " a request")

    async def _open(self, store: Any) -> None:
        """
        Let databricks-sdk find the host and credentials for it.

        Raises:
            StoreError: It does not find them.
        """
        await store.opened()
        host = urlsplit(await store.credentials.host())
        self._row("host", host.netloc.rpartition("@")[2])
        self._credentials = store.credentials.kind
        self._row("credentials", self._credentials)
        self._network(host.scheme)

    async def _missing(self) -> str | None:
        """Return what MLflow will do to a database before it stores the first run, if there is something to do."""
        if not self._database:
            return None
        try:
            return await _in_time(self._config, in_thread(missing_in, self._uri))
        except UnavailableError:
            raise
        except Exception:  # the store's own attempt fails in the same way, and its error is understood
            return None

    async def _may_read(self, store: Store) -> bool:
        """
        Tell if the credentials permit reading the default experiment.

        Raises:
            StoreError: The credentials are refused, or this is no MLflow store.
        """
        try:
            await _read(store, self._config)
        except AuthError as error:
            if error.scope is not Scope.LANE:
                raise
            # A 403 may mean: authenticated, but without permission for this experiment. `runs/search` needs no permission.
            await _answered(self._config, store, SEARCH_RUNS, _SEARCH)
            return False
        return True

    def _fault_of(self, error: StoreError) -> _Fault:
        """Convert a failure of the first call, and add rows that it explains."""
        remote = self._http or self._databricks
        if remote and not self._traffic.requests and isinstance(error, (AuthError, UnavailableError)):
            self._row("authentication", "no credentials to be had")
            return _Fault(str(error) if self._databricks else f"{self._shown}: {error}")
        if isinstance(error, AuthError):
            self._row("reachable", "yes")
            self._row("authentication", "refused")
            hint = f"credentials: {self._credentials}"
            if self._http and self._credentials == NONE:
                hint = f"none were found, set {findings.USERNAME} and {findings.PASSWORD}, or {findings.TOKEN}"
            return _Fault(f"{self._shown}: {error}; {hint}")
        if isinstance(error, UnavailableError):
            self._row("reachable", "no")
            return _Fault(f"{self._shown} is not available: {error}")
        if remote and isinstance(error, (NotFoundError, UnexpectedAnswerError)):
            self._row("reachable", "something answers")
            return _Fault(
                f"{self._shown} answers, but not as an MLflow server does below /api/2.0/mlflow/;"
                f" check host, port and path: {error}"
            )
        return _Fault(f"{self._shown}: {error}")

    def _authentication(self, accepted: bool) -> str:
        if not accepted:
            return "accepted, without permission to read the experiment 'Default'"
        if self._credentials.partition(";")[0] != NONE:
            return "accepted"
        return "not asked for" if self._headers == NONE else "not asked for, or of the header plugins"

    async def _transport(self, store: Any) -> str:
        if not (self._http or self._databricks):
            return "calls of mlflow in worker threads"
        http = await store.opened() if self._databricks else store
        return f"{http.transport} {findings.version_of(http.transport)}"

    async def _version(self, store: Any) -> str:
        if self._databricks:  # it has no /version
            return f"Databricks, by databricks-sdk {findings.version_of('databricks-sdk')}"
        if not self._http:
            return self._local_version()
        try:
            status, text = await store.text(_VERSION)
        except StoreError as error:
            return f"unknown ({type(error).__name__} at /version)"
        if status != 200 or _LIKE_A_VERSION.fullmatch(text.strip()) is None:
            return f"unknown (/version answers {status}, and names none)"
        return f"mlflow {text.strip()}"

    async def _round_trip(self, store: Store) -> float:
        """Return the median of round trips over an open connection, in milliseconds."""
        times: list[float] = []
        for _ in range(ROUND_TRIPS):
            begin = time.perf_counter()
            try:
                await _read(store, self._config)
            except AuthError:
                pass  # without permission, see `_may_read`, but still a round trip
            except StoreError as error:
                raise _Fault(f"{self._shown} answered at first, and then no longer: {error}") from None
            times.append(1_000 * (time.perf_counter() - begin))
        return statistics.median(times)


async def _read(store: Store, config: Config) -> None:
    """Look up the default experiment. The answer that there is none is as good."""
    answer = await _answered(config, store, GET_EXPERIMENT, query={"experiment_name": "Default"})
    if answer is not None and not isinstance(answer.get("experiment"), dict):
        raise UnexpectedAnswerError("an answer without the experiment that was asked for")


async def _answered(
    config: Config, store: Store, endpoint: Endpoint, body: bytes = b"", query: dict[str, str] | None = None
) -> dict[str, Any] | None:
    """Make a call; return None if MLflow answers that the object does not exist."""
    try:
        return await _in_time(config, store.call(endpoint, body, query))
    except NotFoundError as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


async def _in_time(config: Config, work: Awaitable[T]) -> T:
    """Bound the wait: MLflow's own stores would try for minutes to reach a database."""
    seconds = config.seconds_per_request()
    with anyio.move_on_after(seconds + 1):  # one second more: the time-out of HTTP comes first, and its error says more
        return await work
    raise UnavailableError(f"no answer within {seconds:g} s")


def _run(work: Callable[[], Awaitable[None]]) -> None:
    """
    Run an async function in a daemon thread with a loop of its own.

    The worker threads that it starts are daemons, too. So the program can end while mlflow, databricks-sdk or a name
    look-up still waits in one of them, and atexit handlers run, which `os._exit` would skip.
    """
    failures = list[Exception]()

    async def main() -> None:
        resolve_names_in_threads(asyncio.get_running_loop())
        await work()

    def target() -> None:
        try:
            anyio.run(main)
        except Exception as error:
            failures.append(error)
        except BaseException as error:  # for example a plugin's sys.exit
            failures.append(_Fault(f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=target, name="runqueue doctor", daemon=True)
    thread.start()
    thread.join()
    for failure in failures:
        raise failure
