"""
Databricks: MLflow's REST API, on a host and with credentials that `databricks-sdk` finds.

"""

# Rules of this file:
# - The SDK reads files, asks servers and runs programs, and some of its requests have no time-out. So it is called in
#   worker threads, one call at a time. The wait for a call ends with the time-out of a request, and after that the SDK's
#   object is replaced by a new one.
# - The SDK's errors and their frames hold secrets. None of them leaves this file.
# - If the host cannot be found or reached, everything stays queued.

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
"""Threads with calls of the SDK: one that is waited for, the others abandoned (trio counts those, too)."""
_STATIC_KINDS: Final = frozenset(("pat", "basic"))
"""Kinds of credentials for which the SDK always returns the same headers, without blocking."""
_MAX_SECRETS: Final = 64
"""The latest secrets, which are redacted in messages. Tokens are renewed, so their number has to be bounded."""
_MAX_SHOWN: Final = 500
"""Characters of the SDK's messages that are shown."""

_EXPIRED: Final = re.compile(r"(?i)invalid (?:access )?token|token (?:is |has )?expir|ExpiredJwtException")
"""Databricks' texts about an expired token, in a 403 as JSON or HTML; for tokens of Entra it has also been a 400."""
_WORKSPACE_CLOSED: Final = re.compile(r"(?i)IP ACL|unauthorized access to org")
"""Texts of a 403 that is about the whole workspace, not about a run."""
_REDIRECT: Final = re.compile(r"3\d\d: a redirect ")
_SETTINGS: Final = re.compile(r"\.? (?:Config|Env): .*", re.DOTALL)
"""The end of the SDK's messages, which lists its whole configuration."""
_TOKEN_LATER: Final = re.compile(r"unknown: |temporarily_unavailable|server_error")
"""Answers of a token endpoint that are no OAuth error, or one that asks to retry (RFC 6749, 4.1.2.1)."""
_PERMANENT: Final = frozenset(("BadRequest", "Unauthenticated", "PermissionDenied", "NotFound"))
"""Errors of the SDK that a retry does not change."""


class DatabricksCredentials:
    """
    The host of a workspace and the credentials for it, found by databricks-sdk; a `Signer`.

    They are looked up at the first use, and again after a refusal, so that changed files and variables are picked up.
    The argument `token=` of the client wins over the credentials, not over the host.

    Args:
        uri: The tracking URI, for messages.
        profile: The section of ~/.databrickscfg. None: the SDK's variables, or its default profile.
        config: The client's settings.
    """

    def __init__(self, uri: str, profile: str | None, config: Config) -> None:
        self._uri = redact_uri(uri)
        self._profile = profile
        self._timeout = config.seconds_per_request()
        self._has_token = config.token is not None
        self._given = Credentials("", config.token)
        self._sdk: Any = None
        self._renewed_at = 0.0
        self._host: str | None = None
        self._headers: dict[str, str] | None = None  # set only for kinds of credentials that do not change
        self._secrets: tuple[str, ...] = (profile.partition("@")[0],) if profile and "@" in profile else ()
        self._lock = anyio.Lock()
        self._threads = anyio.CapacityLimiter(_THREADS)

    def __repr__(self) -> str:
        return f"<DatabricksCredentials {self._uri} ***>"

    @property
    def kind(self) -> str:
        """The kind of credentials in words, for the doctor; known as soon as the host is."""
        return "token, of token=" if self._has_token else f"{getattr(self._sdk, 'auth_type', None)}, by databricks-sdk"

    async def host(self) -> str:
        """
        Return the workspace's URI.

        Raises:
            StoreError: The SDK finds no host, or no credentials for it.
        """
        async with self._lock:
            if self._sdk is None:
                await self._renew()
            assert self._host is not None
            return self._host

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """See `Signer.sign`."""
        headers = self._headers
        if fresh or headers is None:
            headers = await self._look_up_headers(fresh=fresh)
        for name, value in headers.items():
            put(request.headers, name, value)
        if self._has_token:
            await self._given.sign(request, fresh=fresh)

    async def renew(self) -> None:
        """Look up the credentials again, as after a 401: Databricks refuses expired tokens with other statuses, too."""
        await self.sign(Outgoing("", "", b"", {}), fresh=True)

    def redact(self, text: str) -> str:
        """See `Signer.redact`."""
        return self._given.redact(redact(text, self._secrets))

    async def _look_up_headers(self, *, fresh: bool) -> dict[str, str]:
        asked_at = anyio.current_time()
        async with self._lock:
            # If many requests are refused at once, one of them renews the credentials for all.
            if self._sdk is None or (fresh and self._renewed_at < asked_at):
                await self._renew()
            return self._headers if self._headers is not None else await self._in_thread(self._authenticate, self._sdk)

    async def _renew(self) -> None:
        begin = anyio.current_time()
        sdk = await self._in_thread(self._make_sdk)
        host = sdk.host or ""
        parts = urlsplit(host)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self._no_host(f"databricks-sdk gives {redact_uri(host)!r}" if host else "")
        if self._host not in (None, host):
            raise AuthError(
                f"{self._uri!r} leads to another host now, {redact_uri(host)}; nothing was sent there, as the"
                " runs are not known to it"
            )
        static = self._has_token or sdk.auth_type in _STATIC_KINDS
        headers = self._authenticate(sdk) if static else None
        self._sdk, self._host, self._headers, self._renewed_at = sdk, host, headers, begin

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        try:
            return await in_thread(work, *args, limiter=self._threads)
        except anyio.get_cancelled_exc_class():
            # The SDK's object may hold a lock while it waits for ever. A new object has a lock of its own.
            self._sdk = self._headers = None
            raise

    def _make_sdk(self) -> Any:
        """Make the SDK's configuration, in a worker thread: it sends at least one request to the host."""
        settings: dict[str, Any] = {
            # For the request that looks for the host's OAuth server. Most kinds of credentials work without it.
            "http_timeout_seconds": self._timeout / 3,
            "retry_timeout_seconds": 1,
            "disable_async_token_refresh": True,  # it uses a thread that the interpreter waits for at its end
        }
        if self._profile is not None:
            settings["profile"] = self._profile
        if self._has_token:
            settings |= {"credentials_strategy": _NoCredentials(), "auth_type": _NoCredentials.NAME}
        config: Any = None
        failure: StoreError
        try:
            core: Any = importlib.import_module("databricks.sdk.core")
            # Not `core.Config(...)`: if it fails, its error may show secrets, and only the object knows them.
            config = core.Config.__new__(core.Config)
            config.__init__(**settings)
            self._remember(_secrets(config))
            return config
        except Exception as error:
            with suppress(Exception):
                self._remember(_secrets(config))
            failure = self._sdk_failed(error, getattr(config, "_inner", {}).get("host"))
        raise failure

    def _authenticate(self, sdk: Any) -> dict[str, str]:
        """Return the headers of a request. It may ask a server for a token, and then needs a worker thread."""
        failure: StoreError
        try:
            headers = {str(name): str(value) for name, value in sdk.authenticate().items()}
            if getattr(sdk, "workspace_id", None):  # for hosts with many workspaces, as mlflow does
                headers["x-databricks-org-id"] = str(sdk.workspace_id)
            self._remember(
                secret
                for name, value in headers.items()
                if re.search("(?i)authorization|token", name)
                for secret in secrets_in_header(value)
            )
            if all(map(is_header_value, headers.values())):
                return headers
            failure = AuthError("databricks-sdk gives a token with a character that no header can hold (not shown)")
        except Exception as error:
            failure = self._sdk_failed(error, sdk.host)
        raise failure

    def _remember(self, secrets: Iterator[str]) -> None:
        found = dict.fromkeys(secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH)
        self._secrets = (*found, *(each for each in self._secrets if each not in found))[:_MAX_SECRETS]

    def _sdk_failed(self, error: Exception, host: str | None) -> StoreError:
        """Convert an error of the SDK; whichever it is, everything stays queued."""
        if isinstance(error, ImportError):
            text = f"{self._uri!r} needs databricks-sdk: pip install 'runqueue[databricks]' ({type(error).__name__})"
            return StoreError(text, scope=Scope.STORE)
        text = self.redact(_message(error))[:_MAX_SHOWN]
        if not host:
            return self._no_host(text)
        if "Invalid URL 'None'" in text:
            text = "it does not say where its OAuth server is (/.well-known/databricks-config)"
        if _is_temporary(error):
            return UnavailableError(f"no credentials to be had for {redact_uri(host)}: {text}")
        return AuthError(f"{self._uri!r} has no credentials for {redact_uri(host)}: {text}")

    def _no_host(self, text: str) -> StoreError:
        return StoreError(
            f"no host is known for {self._uri!r}: set DATABRICKS_HOST, or name a profile of the file ~/.databrickscfg"
            f" by databricks://<profile>{f' ({text})' if text else ''}",
            scope=Scope.STORE,
        )


class _NoCredentials:
    """Replaces the SDK's credentials if `token=` is given."""

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
    for name, secret in (("client_id", "client_secret"), ("username", "password")):  # as they stand in a Basic header
        yield base64.b64encode(f"{settings.get(name)}:{settings.get(secret)}".encode()).decode()


def _message(error: Exception) -> str:
    """Return the message of an SDK error; only the class for others, such as a parser's, which quotes the file."""
    if isinstance(error, (ValueError, OSError, NotImplementedError)) or "DatabricksError" in _names(error):
        return " ".join(_SETTINGS.sub("", str(error)).split())
    return type(error).__name__


def _names(error: BaseException) -> set[str]:
    """Return the names of an error's classes. The SDK may not be imported, so the classes are not compared."""
    return {each.__name__ for each in type(error).__mro__}


def _is_temporary(error: BaseException | None) -> bool:
    """Tell if the error is about the state of a server, and not about the request."""
    while error is not None:
        if "DatabricksError" in _names(error):
            return not _names(error) & _PERMANENT
        if type(error).__module__.partition(".")[0] in ("requests", "urllib3") or isinstance(error, TimeoutError):
            return True
        if error.__cause__ is None and isinstance(error, ValueError):  # from the token endpoint: a page, or its error
            return isinstance(next(iter(error.args), None), bytes) or _TOKEN_LATER.match(str(error)) is not None
        error = error.__cause__
    return False


class DatabricksStore:
    """
    The store of a Databricks workspace. Its calls look for the host until it is found.

    Args:
        config: The client's settings.
        uri: The tracking URI.
        profile: The profile that the URI names, if it names one.
        traffic: Counts the requests, without those of the SDK.
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
        """See `Store.call`. If the token was refused, the call is repeated once with fresh credentials."""
        failure: StoreError
        try:
            store = await self.opened()
            try:
                return await store.call(endpoint, body, query)
            except StoreError as error:
                if not _is_expired_token(error):
                    raise
            await self._in_time(self.credentials.renew)
            return await store.call(endpoint, body, query)
        except StoreError as error:
            failure = _widened(error)
        failure.__cause__ = failure.__context__ = None
        raise failure.with_traceback(None)

    async def opened(self) -> HttpStore:
        """
        Return the store of the workspace's host.

        Raises:
            StoreError: There is no host, or there are no credentials; everything stays queued.
        """
        if self._inner is None:
            host = await self._in_time(self.credentials.host)
            if self._inner is None:  # another call may have been faster
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


def _is_expired_token(error: StoreError) -> bool:
    """Tell if the token was refused by a status other than 401."""
    if isinstance(error, AuthError):
        return error.scope is Scope.LANE and _EXPIRED.search(str(error)) is not None
    # Only in answers that are not MLflow's JSON, as that may quote what the user has logged.
    return isinstance(error, UnexpectedAnswerError) and error.code is None and "ExpiredJwtException" in str(error)


def _widened(error: StoreError) -> StoreError:
    """Turn a refusal that concerns the whole workspace into an AuthError, which leaves every run queued."""
    closed = isinstance(error, AuthError) and error.scope is Scope.LANE and _WORKSPACE_CLOSED.search(str(error))
    # Workspaces redirect strangers to a page, for example to log in, or about private links.
    redirected = isinstance(error, UnexpectedAnswerError) and _REDIRECT.match(str(error))
    if _is_expired_token(error) or closed or redirected:
        return AuthError(f"the workspace does not let us in ({error})", code=error.code)
    return error
