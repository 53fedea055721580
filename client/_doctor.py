"""
What a client would do with a tracking URI, tried out: where it leads, as whom, and whether the store there answers.

Rules of this file: every value shown is free of secrets and of line breaks; the store is asked through the very class
that a client sends by, and nothing is written to it, nor made where there is none yet; whatever goes wrong ends as one
line of a `Diagnosis`, never as an exception.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import anyio
import attrs
import orjson

from runqueue import _environment as environment
from runqueue import _tls
from runqueue._config import Config, resolve_tracking_uri, without_secrets
from runqueue._credentials import read_file
from runqueue._store import GET_EXPERIMENT, SEARCH_RUNS, Endpoint, Store, Traffic
from runqueue._stores import DELEGATED, check_uri, make_store
from runqueue.errors import AuthError, NotFoundError, Scope, StoreError, UnavailableError, UnexpectedAnswerError

PATIENCE: Final = 15.0
"""Seconds for a request to a server, where no variable says otherwise: somebody is waiting at a terminal."""
ROUND_TRIPS: Final = 5

_VERSION: Final = Endpoint("../../../version", "GET", 1_000)
"""Beside the API, below the server's prefix; answered in plain text."""
_LIKE_A_VERSION: Final = re.compile(r"\d+\.\d[0-9A-Za-z.+_-]{0,60}")
_LIKE_A_HOST: Final = re.compile(r"[A-Za-z0-9.-]+:\d+(/.*)?")
_SEARCH: Final = orjson.dumps({"experiment_ids": ["0"], "filter": "", "max_results": 1})
_PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
_USERNAME: Final = "MLFLOW_TRACKING_USERNAME"
_PASSWORD: Final = "MLFLOW_TRACKING_PASSWORD"
_TOKEN: Final = "MLFLOW_TRACKING_TOKEN"
_SHORTEST: Final = 4
"""Characters of a secret that is veiled; one of a letter would leave no message readable."""


@attrs.define(eq=False)
class Diagnosis:
    """What was found, in the order in which it was looked for."""

    rows: list[tuple[str, str]] = attrs.field(factory=list)
    """Key and value."""
    fault: str | None = None
    """One line that says what is wrong; None when all is well."""


class _Fault(Exception):
    """Ends an examination with its text."""


def examine(given: str | None) -> Diagnosis:
    """
    Find out what a client with this tracking URI would meet; takes as long as the store does, and raises nothing.

    Args:
        given: The tracking URI; None: as `Client()` resolves it.
    """
    found = Diagnosis()
    uri = given or ""
    try:
        config = Config(tracking_uri=given)
        uri = resolve_tracking_uri(given)
        found.rows += [("tracking uri", without_secrets(uri)), ("resolved from", source_of(given))]
        check_uri(uri)
        _Examination(found, config, uri).run()
    except Exception as error:  # of mlflow's, of its plugins: the user is told in one line all the same
        ours = isinstance(error, (_Fault, StoreError, ValueError, ImportError))
        text = str(error) if ours else f"{type(error).__name__}: {error}"
        found.fault = _line(text or type(error).__name__)
    secrets = list(_secrets(uri))
    found.rows = [(key, _veil(_line(value), uri, secrets)) for key, value in found.rows]
    found.fault = found.fault and _veil(found.fault, uri, secrets)
    return found


def source_of(given: str | None) -> str:
    """Which of the places that `resolve_tracking_uri` looks at has the URI."""
    if given is not None:
        return "the argument --tracking-uri"
    if getattr(sys.modules.get("mlflow"), "get_tracking_uri", None) is not None:
        return "mlflow.get_tracking_uri()"
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return "the environment variable MLFLOW_TRACKING_URI"
    return "MLflow's default, as no URI is given and MLFLOW_TRACKING_URI is not set"


class _Examination:
    """
    Args:
        found: Filled.
        config: Of the client that would be made.
        uri: Resolved, and passed by `check_uri`.
    """

    def __init__(self, found: Diagnosis, config: Config, uri: str) -> None:
        self._found = found
        self._config = config
        self._uri = uri
        self._shown = without_secrets(uri)
        self._scheme = urlsplit(uri).scheme.lower() if "://" in uri or uri.startswith("file:") else ""
        self._http = self._scheme in ("http", "https")
        self._credentials = "none"

    def _row(self, key: str, value: str) -> None:
        self._found.rows.append((key, value))

    def run(self) -> None:
        """Fill in the diagnosis; what is wrong is raised."""
        self._row("store", _kind(self._scheme))
        self._credentials = _credentials(self._uri, http=self._http)
        self._row("credentials", self._credentials)
        if self._http:
            self._row("tls", _tls_settings() if self._scheme == "https" else "none, it is plain http")
            proxies = [name for name in os.environ if name.upper() in _PROXIES and os.environ[name]]
            self._row("proxy variables", ", ".join(sorted(proxies)) or "none")
        self._timeouts()
        missing = _not_there_yet(self._scheme, self._uri)
        if missing is None:
            anyio.run(self._ask, self._uri)
        else:
            self._can_be_made(missing)

    def _timeouts(self) -> None:
        seconds, retrying = self._config.seconds_per_request(), self._config.retrying()
        tries = "" if retrying.retries is None else f", at most {retrying.retries} times"
        self._row("timeouts", f"{seconds:g} s a request, {retrying.timeout:g} s of retrying{tries}")
        if self._http and environment.text("MLFLOW_HTTP_REQUEST_TIMEOUT") is None:
            self._config = attrs.evolve(self._config, request_timeout=PATIENCE)

    def _can_be_made(self, path: Path) -> None:
        """Say so of a local store that the first run would make; only a client's use makes it."""
        if not self._scheme and _LIKE_A_HOST.fullmatch(self._uri):
            raise _Fault(f"{self._uri!r} counts as a path; the URI of a server begins with http:// or https://")
        above = next(each for each in path.absolute().parents if each.exists())
        if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
            raise _Fault(f"{path} does not exist, and cannot be made in {above}")
        if self._scheme != "sqlite":  # MLflow may refuse to keep runs in files at all
            with tempfile.TemporaryDirectory() as folder:
                elsewhere = Path(folder).as_uri()
                store = make_store(self._config, elsewhere, Traffic())
                try:
                    anyio.run(self._first_call, store)
                except _Fault as fault:
                    raise _Fault(str(fault).replace(elsewhere, self._shown).replace(folder, str(path))) from None
        self._row("reachable", f"not yet: the first run will make {path}")
        self._row("version", f"mlflow {_mlflow_version()}")

    async def _ask(self, uri: str) -> None:
        store = make_store(self._config, uri, Traffic())
        try:
            self._row("transport", _transport(store, http=self._http))
            accepted = await self._first_call(store)
            self._row("reachable", "yes")
            self._row("version", await self._version(store) if self._http else f"mlflow {_mlflow_version()}")
            self._row("authentication", accepted)
            self._row("round trip", f"{await self._round_trip(store):.1f} ms (median of {ROUND_TRIPS})")
            bounds = attrs.asdict(store.limits if self._config.limits is None else self._config.limits)
            self._row("limits", ", ".join(f"{bound:,} {name}" for name, bound in bounds.items()) + " a request")
        finally:
            await store.aclose()

    async def _first_call(self, store: Store) -> str:
        """
        Whether the store takes the credentials, by reading the default experiment.

        Raises:
            _Fault: It does not, or it is none.
        """
        try:
            try:
                await _read(store, self._config)
            except AuthError as error:
                if error.scope is not Scope.LANE:
                    raise
                # Known, but not let to see that experiment: searches are open to everybody who is known.
                await _limited(self._config, store, SEARCH_RUNS, _SEARCH)
                return "accepted, without permission to read the experiment 'Default'"
        except AuthError as error:
            self._row("reachable", "yes")
            self._row("authentication", "refused")
            hint = f"credentials: {self._credentials}"
            if self._credentials == "none":
                hint = f"none were found, set {_USERNAME} and {_PASSWORD}, or {_TOKEN}"
            raise _Fault(f"{self._shown}: {error}; {hint}") from None
        except UnavailableError as error:
            self._row("reachable", "no")
            raise _Fault(f"{self._shown} is not available: {error}") from None
        except (NotFoundError, UnexpectedAnswerError) as error:
            self._row("reachable", "something answers")
            raise _Fault(
                f"{self._shown} answers, but not as an MLflow server does below /api/2.0/mlflow/;"
                f" check host, port and path: {error}"
            ) from None
        except StoreError as error:
            raise _Fault(f"{self._shown}: {error}") from None
        return "accepted" if self._credentials != "none" else "not asked for"

    async def _version(self, store: Any) -> str:
        try:
            answer = await store._exchange(_VERSION, b"", None, fresh=False)
        except StoreError as error:
            return f"unknown ({type(error).__name__} at /version)"
        text = bytes(answer.body).decode(errors="replace").strip()
        if answer.status != 200 or _LIKE_A_VERSION.fullmatch(text) is None:
            return f"unknown (/version answers {answer.status}, and names none)"
        return f"mlflow {text}"

    async def _round_trip(self, store: Store) -> float:
        """Milliseconds, over a connection that stands."""
        times: list[float] = []
        for _ in range(ROUND_TRIPS):
            begin = time.perf_counter()
            try:
                await _read(store, self._config)
            except AuthError:
                pass  # without permission, see above: a round trip all the same
            except StoreError as error:
                raise _Fault(f"{self._shown} answered at first, and then no longer: {error}") from None
            times.append(1_000 * (time.perf_counter() - begin))
        return statistics.median(times)


async def _read(store: Store, config: Config) -> None:
    """Look up the default experiment; that there is none is as good an answer."""
    try:
        answer = await _limited(config, store, GET_EXPERIMENT, query={"experiment_name": "Default"})
    except NotFoundError as error:
        if error.code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return
    if not isinstance(answer.get("experiment"), dict):
        raise UnexpectedAnswerError("an answer without the experiment that was asked for")


async def _limited(
    config: Config, store: Store, endpoint: Endpoint, body: bytes = b"", query: dict[str, str] | None = None
) -> dict[str, Any]:
    """One call; MLflow's own stores would try for minutes to reach a database."""
    seconds = config.seconds_per_request()
    with anyio.move_on_after(seconds + 1):  # a server's store has given up before, and says more
        return await store.call(endpoint, body, query)
    raise UnavailableError(f"no answer within {seconds:g} s")


def _kind(scheme: str) -> str:
    if scheme in ("http", "https"):
        return "MLflow's REST API"
    if scheme.startswith("databricks"):
        return "Databricks' REST API"
    if scheme in ("", "file"):
        return "MLflow's own, in files"
    if scheme.split("+")[0] in DELEGATED:
        return f"MLflow's own, in a database ({scheme})"
    return f"MLflow's own, by the plugin for {scheme}"


def _credentials(uri: str, *, http: bool) -> str:
    """Kind and source of what `Credentials` would send; the same order."""
    if urlsplit(uri).username is not None:
        return "user and password, of the URI's user info"
    if not http:
        return "none"
    names = (_USERNAME, _PASSWORD)
    file = (None, None) if all(map(environment.text, names)) else read_file()
    sources = [
        name if environment.text(name) else "~/.mlflow/credentials" if kept else None
        for name, kept in zip(names, file, strict=True)
    ]
    if all(sources):
        return f"user and password, of {' and '.join(dict.fromkeys(filter(None, sources)))}"
    if environment.text(_TOKEN):
        return f"token, of {_TOKEN}"
    return "none"


def _tls_settings() -> str:
    server, client = environment.text(_tls.SERVER_CERT), environment.text(_tls.CLIENT_CERT)
    system = next(
        (f"{name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ), ""
    )
    if environment.switch(_tls.INSECURE):
        text = f"the server's certificate is NOT verified ({_tls.INSECURE})"
    elif server:
        text = f"verified by {_tls.SERVER_CERT}={server}"
    else:
        text = f"verified by {system or 'the usual certificates'}"
    return text + (f", client certificate {_tls.CLIENT_CERT}={client}" if client else "")


def _transport(store: Any, *, http: bool) -> str:
    if not http:
        return "calls of mlflow in worker threads"
    name = "aiohttp" if type(store._client).__module__.startswith("httpx_aiohttp") else "httpx"
    return f"{name} {importlib.metadata.version(name)}"


def _mlflow_version() -> str:
    for name in ("mlflow", "mlflow-skinny"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _not_there_yet(scheme: str, uri: str) -> Path | None:
    """The file or folder of a local store that does not exist; MLflow would make it at a mere look."""
    parts = urlsplit(uri)
    if scheme == "sqlite":
        raw = parts.path.removeprefix("/")
        if not raw or raw == ":memory:" or raw.startswith("file:"):
            return None
        path = Path(raw)
        return None if path.exists() or Path(unquote(raw)).exists() else path
    if scheme in ("", "file"):
        path = Path(url2pathname(parts.path) if scheme else uri)
        return None if path.exists() else path
    return None


def _secrets(uri: str) -> Iterator[str]:
    password = urlsplit(uri).password if _is_readable(uri) else None
    for secret in (password, password and unquote(password), os.environ.get(_PASSWORD), os.environ.get(_TOKEN)):
        if secret is not None and len(secret.strip()) >= _SHORTEST:
            yield secret.strip()
    try:
        kept = read_file()[1]
    except AuthError:
        kept = None
    if kept is not None and len(kept) >= _SHORTEST:
        yield kept


def _is_readable(uri: str) -> bool:
    try:
        urlsplit(uri)
    except ValueError:
        return False
    return True


def _veil(text: str, uri: str, secrets: list[str]) -> str:
    if uri:
        text = text.replace(uri, without_secrets(uri))
    for secret in secrets:
        text = text.replace(secret, "***")
    return text


def _line(text: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())
