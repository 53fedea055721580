"""
Databricks: MLflow's REST API, on a host and with credentials that `databricks-sdk` finds.

Rules of this file: the SDK reads files, asks servers and runs programs, and some of its requests have no time-out. So
it is called in worker threads, one call at a time, and nobody waits for one longer than for a request; what was not
waited for is not asked again, but made anew. Its errors and their frames hold secrets: they end here. Whatever keeps us
from the host leaves everything queued.
"""

from __future__ import annotations

import base64
import importlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import anyio

from runqueue.errors import AuthError, ConfigError, UnavailableError, UnexpectedAnswerError
from runqueue.http._credentials import Credentials
from runqueue.http._plugins import put
from runqueue.http._signing import Outgoing
from runqueue.queueing import Limits, Scope, StoreError
from runqueue.runtime._waiting import in_thread
from runqueue.settings._config import Config, is_header_value
from runqueue.settings._redaction import MIN_SECRET_LENGTH, redact, redact_uri, secrets_in_header
from runqueue.stores._protocol import Endpoint, Traffic
from runqueue.stores._rest import HttpStore
from runqueue.wire._limits import MLFLOW_LIMITS

T = TypeVar("T")

LIMITS: Final = MLFLOW_LIMITS
"""
Source: Databricks' REST API, "Log Batch" (docs.databricks.com/api/experiments/v1/log-batch): 1 MB of JSON, 1,000
metrics, 100 params, 100 tags, 1,000 of all three. Its "Log Inputs" names no bound on datasets; MLflow's own is kept.
"""

_THREADS: Final = 8
"""Calls of the SDK, all but one of them abandoned; a bound where the backend counts those (trio does)."""
_UNCHANGING: Final = frozenset(("pat", "basic"))
"""Kinds of credentials for which the SDK gives the same headers for ever, without blocking."""
_KEPT: Final = 64
"""Secrets that are redacted, the latest: tokens come and go."""
_LONGEST: Final = 500
"""Characters of the SDK's words that are shown."""

_OUTDATED: Final = re.compile(r"(?i)invalid (?:access )?token|token (?:is |has )?expir|ExpiredJwtException")
"""What Databricks says of a token with 403, as JSON or as a page; of Entra's, it once did so with 400."""
_SHUT_OUT: Final = re.compile(r"(?i)IP ACL|unauthorized access to org")
"""A 403 that concerns the whole workspace, and no run of it."""
_REDIRECT: Final = re.compile(r"3\d\d: a redirect ")
_SETTINGS: Final = re.compile(r"\.? (?:Config|Env): .*", re.DOTALL)
"""What the SDK adds to its messages: all that it is configured with."""
_TOKEN_LATER: Final = re.compile(r"unknown: |temporarily_unavailable|server_error")
"""Of a token's end point: an answer without an OAuth error, or one that says "later" (RFC 6749, 4.1.2.1)."""
_REFUSALS: Final = frozenset(("BadRequest", "Unauthenticated", "PermissionDenied", "NotFound"))
"""Errors of the SDK's that waiting does not mend."""


class DatabricksCredentials:
    """
    A host, and what a request to it authenticates itself with; looked for when first asked for, and again after a
    refusal, so that a file or a variable that was changed meanwhile is taken over. `token=` of the constructor comes
    before whatever the SDK would find; the host is the SDK's all the same.

    Args:
        uri: The tracking URI; for messages.
        profile: The section of the SDK's file; None: by its variables, or its default one.
        config: The client's.
    """

    def __init__(self, uri: str, profile: str | None, config: Config) -> None:
        self._uri = redact_uri(uri)
        self._profile = profile
        self._timeout = config.seconds_per_request()
        self._has_token = config.token is not None
        self._given = Credentials("", config.token)
        self._sdk: Any = None
        self._since = 0.0
        self._host: str | None = None
        self._headers: dict[str, str] | None = None  # where they do not change
        self._secrets: tuple[str, ...] = (profile.partition("@")[0],) if profile and "@" in profile else ()
        self._turn = anyio.Lock()
        self._threads = anyio.CapacityLimiter(_THREADS)

    def __repr__(self) -> str:
        return f"<DatabricksCredentials {self._uri} ***>"

    @property
    def kind(self) -> str:
        """In words, for a diagnosis; known once the host is."""
        return "token, of token=" if self._has_token else f"{getattr(self._sdk, 'auth_type', None)}, by databricks-sdk"

    async def host(self) -> str:
        """
        The workspace's URI.

        Raises:
            StoreError: The SDK finds none, or no credentials for it.
        """
        async with self._turn:
            if self._sdk is None:
                await self._renew()
            assert self._host is not None
            return self._host

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """See `Signer.sign`."""
        headers = self._headers
        if fresh or headers is None:
            headers = await self._found(fresh=fresh)
        for name, value in headers.items():
            put(request.headers, name, value)
        if self._has_token:
            await self._given.sign(request, fresh=fresh)

    async def renew(self) -> None:
        """As after a 401: for a refusal that its status does not tell."""
        await self.sign(Outgoing("", "", b"", {}), fresh=True)

    def redact(self, text: str) -> str:
        """See `Signer.redact`."""
        return self._given.redact(redact(text, self._secrets))

    async def _found(self, *, fresh: bool) -> dict[str, str]:
        asked = anyio.current_time()
        async with self._turn:
            # Of many requests that were refused at once, one looks again for all.
            if self._sdk is None or (fresh and self._since < asked):
                await self._renew()
            return self._headers if self._headers is not None else await self._in_thread(self._ask, self._sdk)

    async def _renew(self) -> None:
        begin = anyio.current_time()
        sdk = await self._in_thread(self._make)
        host = sdk.host or ""
        parts = urlsplit(host)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self._nowhere(f"databricks-sdk gives {redact_uri(host)!r}" if host else "")
        if self._host not in (None, host):
            raise AuthError(
                f"{self._uri!r} leads to another host now, {redact_uri(host)}; nothing was sent there, as the"
                " runs are not known to it"
            )
        unchanging = self._has_token or sdk.auth_type in _UNCHANGING
        headers = self._ask(sdk) if unchanging else None
        self._sdk, self._host, self._headers, self._since = sdk, host, headers, begin

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return await in_thread(work, *args, limiter=self._threads)
        except anyio.get_cancelled_exc_class():
            # The SDK may wait for ever, and holds a lock while it does. A new one does not wait for that lock.
            self._sdk = self._headers = None
            raise

    def _make(self) -> Any:
        """In a worker thread: what the SDK finds, which takes it a request to the host at least."""
        settings: dict[str, Any] = {
            # Of the request that looks for the host's OAuth server, without which most go on. Seconds, whole ones.
            "http_timeout_seconds": self._timeout / 3,
            "retry_timeout_seconds": 1,
            "disable_async_token_refresh": True,  # else in a thread that an interpreter at its end waits for
        }
        if self._profile is not None:
            settings["profile"] = self._profile
        if self._has_token:
            settings |= {"credentials_strategy": _NoCredentials(), "auth_type": _NoCredentials.NAME}
        config: Any = None
        failure: StoreError
        try:
            core: Any = importlib.import_module("databricks.sdk.core")
            config = core.Config.__new__(core.Config)  # one that fails has the secrets that its error may show
            config.__init__(**settings)
            self._keep(_secrets(config))
            return config
        except Exception as error:
            with suppress(Exception):
                self._keep(_secrets(config))
            failure = self._unfound(error, getattr(config, "_inner", {}).get("host"))
        raise failure

    def _ask(self, sdk: Any) -> dict[str, str]:
        """The headers; in a worker thread where they may have to be asked for."""
        failure: StoreError
        try:
            headers = {str(name): str(value) for name, value in sdk.authenticate().items()}
            if getattr(sdk, "workspace_id", None):  # as mlflow does, for hosts of many workspaces
                headers["x-databricks-org-id"] = str(sdk.workspace_id)
            self._keep(
                secret
                for name, value in headers.items()
                if re.search("(?i)authorization|token", name)
                for secret in secrets_in_header(value)
            )
            if all(map(is_header_value, headers.values())):
                return headers
            failure = AuthError("databricks-sdk gives a token with a character that no header can hold (not shown)")
        except Exception as error:
            failure = self._unfound(error, sdk.host)
        raise failure

    def _keep(self, secrets: Iterator[str]) -> None:
        found = dict.fromkeys(secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH)
        self._secrets = (*found, *(each for each in self._secrets if each not in found))[:_KEPT]

    def _unfound(self, error: Exception, host: str | None) -> StoreError:
        """What an error of the SDK's means; everything stays queued."""
        if isinstance(error, ImportError):
            text = f"{self._uri!r} needs databricks-sdk: pip install 'runqueue[databricks]' ({type(error).__name__})"
            return StoreError(text, scope=Scope.STORE)
        text = self.redact(_words(error))[:_LONGEST]
        if not host:
            return self._nowhere(text)
        if "Invalid URL 'None'" in text:
            text = "it does not say where its OAuth server is (/.well-known/databricks-config)"
        if _passes(error):
            return UnavailableError(f"no credentials to be had for {redact_uri(host)}: {text}")
        return AuthError(f"{self._uri!r} has no credentials for {redact_uri(host)}: {text}")

    def _nowhere(self, text: str) -> StoreError:
        return StoreError(
            f"no host is known for {self._uri!r}: set DATABRICKS_HOST, or name a profile of the file ~/.databrickscfg"
            f" by databricks://<profile>{f' ({text})' if text else ''}",
            scope=Scope.STORE,
        )


class _NoCredentials:
    """For the SDK, in place of its credentials where `token=` is given."""

    NAME: Final = "token-of-the-constructor"

    def auth_type(self) -> str:
        return self.NAME

    def __call__(self, _: Any) -> Callable[[], dict[str, str]]:
        return dict


def _secrets(config: Any) -> Iterator[str]:
    settings = config.as_dict()
    for attribute in type(config).attributes():
        if attribute.sensitive and settings.get(attribute.name):
            yield str(settings[attribute.name])
    for name, secret in (("client_id", "client_secret"), ("username", "password")):  # as HTTP's basic scheme has them
        yield base64.b64encode(f"{settings.get(name)}:{settings.get(secret)}".encode()).decode()


def _words(error: Exception) -> str:
    """Of an error of the SDK's; not those of a parser, which quotes the file."""
    if isinstance(error, (ValueError, OSError, NotImplementedError)) or "DatabricksError" in _names(error):
        return " ".join(_SETTINGS.sub("", str(error)).split())
    return type(error).__name__


def _names(error: BaseException) -> set[str]:
    """Of its classes: the SDK is not imported for this."""
    return {each.__name__ for each in type(error).__mro__}


def _passes(error: BaseException | None) -> bool:
    """Whether it tells of a server's state, and not of what it was asked."""
    while error is not None:
        if "DatabricksError" in _names(error):
            return not _names(error) & _REFUSALS
        if type(error).__module__.partition(".")[0] in ("requests", "urllib3") or isinstance(error, TimeoutError):
            return True
        if error.__cause__ is None and isinstance(error, ValueError):  # of the token's end point: a page, or its error
            return isinstance(next(iter(error.args), None), bytes) or _TOKEN_LATER.match(str(error)) is not None
        error = error.__cause__
    return False


class DatabricksStore:
    """
    Looks for the host at its first call, and at every one until there is one.

    Args:
        config: The client's.
        uri: The tracking URI.
        profile: That it names.
        traffic: Counts the requests; those of the SDK are not among them.
    """

    def __init__(self, config: Config, uri: str, profile: str | None, traffic: Traffic) -> None:
        self._config = config
        self._uri = uri
        self._traffic = traffic
        self._timeout = config.seconds_per_request()
        self.credentials = DatabricksCredentials(uri, profile, config)
        self._inner: HttpStore | None = None

    @property
    def limits(self) -> Limits:
        return LIMITS

    def __repr__(self) -> str:
        return f"<DatabricksStore {redact_uri(self._uri)} {self._inner or 'not opened'}>"

    async def aclose(self) -> None:
        if self._inner is not None:
            await self._inner.aclose()

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `Store.call`. A token that is refused is answered once, with what there is by then."""
        failure: StoreError
        try:
            store = await self.opened()
            try:
                return await store.call(endpoint, body, query)
            except StoreError as error:
                if not _is_outdated(error):
                    raise
            await self._in_time(self.credentials.renew)
            return await store.call(endpoint, body, query)
        except StoreError as error:
            failure = _of_workspace(error)
        failure.__cause__ = failure.__context__ = None
        raise failure.with_traceback(None)

    async def opened(self) -> HttpStore:
        """
        The store that the URI leads to.

        Raises:
            StoreError: No host is known, or nothing to authenticate with; everything stays queued.
        """
        if self._inner is None:
            host = await self._in_time(self.credentials.host)
            if self._inner is None:  # else another call was faster
                try:
                    self._inner = HttpStore(
                        self._config, host, self._traffic, signers=[self.credentials], limits=LIMITS
                    )
                except ConfigError as error:
                    raise StoreError(str(error), scope=Scope.STORE) from None
        return self._inner

    async def _in_time(self, work: Callable[[], Any]) -> Any:
        with anyio.move_on_after(self._timeout):
            return await work()
        raise UnavailableError(f"no host and credentials to be had from databricks-sdk within {self._timeout:g} s")


def _is_outdated(error: StoreError) -> bool:
    """Whether it is the token that was refused, where MLflow's API would have said 401."""
    if isinstance(error, AuthError):
        return error.scope is Scope.LANE and _OUTDATED.search(str(error)) is not None
    # Not MLflow's JSON, which could quote what was logged.
    return isinstance(error, UnexpectedAnswerError) and error.code is None and "ExpiredJwtException" in str(error)


def _of_workspace(error: StoreError) -> StoreError:
    """What concerns every run leaves all of them queued."""
    shut_out = isinstance(error, AuthError) and error.scope is Scope.LANE and _SHUT_OUT.search(str(error))
    # Workspaces send whoever they do not let in to a page of theirs: to log in, or about a private link.
    led_away = isinstance(error, UnexpectedAnswerError) and _REDIRECT.match(str(error))
    if _is_outdated(error) or shut_out or led_away:
        return AuthError(f"the workspace does not let us in ({error})", code=error.code)
    return error
