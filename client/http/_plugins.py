"""
Signers for what MLflow and its plugins add to requests, so that plugins work as they do with MLflow's own client.

    entry points `mlflow.request_header_provider`,
    or those registered with an mlflow that is imported     headers of theirs
    (here stand the credentials)                            Authorization
    MLFLOW_WORKSPACE, `mlflow.set_workspace`                X-MLFLOW-WORKSPACE
    MLFLOW_TRACKING_AWS_SIGV4, else MLFLOW_TRACKING_AUTH    what the named authentication plugin does
"""

# Rules of this file: the order is MLflow's, and a later signer may replace the headers of earlier ones. Importing this
# file imports nothing heavy: mlflow is imported when a plugin has to be called, in a worker thread, because both may
# take long. An exception of a plugin ends the request with an AuthError that names the exception's class and nothing
# else; everything stays queued.

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from runqueue.errors import AuthError, ConfigError
from runqueue.http._signing import Outgoing, Signer
from runqueue.runtime._waiting import in_thread
from runqueue.settings import _environment as environment
from runqueue.settings._config import Config, current_workspace, is_header_name, is_header_value
from runqueue.settings._redaction import MIN_SECRET_LENGTH, SECRET_HEADER_NAME, redact, secrets_in_header

if TYPE_CHECKING:
    import anyio

T = TypeVar("T")

AUTH: Final = "MLFLOW_TRACKING_AUTH"
SIGV4: Final = "MLFLOW_TRACKING_AWS_SIGV4"
WORKSPACE: Final = "MLFLOW_WORKSPACE"
WORKSPACE_HEADER: Final = "X-MLFLOW-WORKSPACE"
"""Source: `mlflow.utils.workspace_utils.WORKSPACE_HEADER_NAME`."""

_HEADERS_GROUP: Final = "mlflow.request_header_provider"
_KUBERNETES: Final = frozenset(("kubernetes", "kubernetes-namespaced"))
"""Ways of authentication that add nothing where there is an Authorization already; MLflow sends them no password."""
_MLFLOWS_AGENT: Final = re.compile(r"mlflow-python-client/\S+\s*")
_FRAMING: Final = frozenset(("content-length", "transfer-encoding", "content-encoding", "connection"))
"""Headers that say where a body ends; the transport sets them."""
_AS_THEY_ARE: Final = "/?:@!$'()*,"
"""Characters of a query that aiohttp never quotes. A signature may cover the URL letter by letter."""
_PUBLIC: Final = frozenset(("host", "date", "x-amz-date", "x-amz-content-sha256", WORKSPACE_HEADER.lower()))
_KEPT: Final = 256
"""How many secrets are kept for redaction: more than all requests in flight use."""

logger = logging.getLogger("runqueue")


def check() -> None:
    """
    Check the variables, at construction; imports nothing.

    Raises:
        ConfigError: A variable holds a bad value, or needs a package that is not installed.
    """
    if environment.switch(SIGV4):
        if importlib.util.find_spec("requests_auth_aws_sigv4") is None:
            raise ConfigError(
                f"the environment variable {SIGV4} needs what is not installed: pip install requests-auth-aws-sigv4"
            )
    elif (name := environment.text(AUTH)) is not None and importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            f"the environment variable {AUTH}={name!r} names a plugin of mlflow, which is not installed:"
            " pip install 'runqueue[mlflow]'"
        )
    if not is_header_value(current_workspace() or ""):
        raise ConfigError(f"the environment variable {WORKSPACE} holds a character that no header can hold")


def signers(config: Config, uri: str) -> tuple[Signer, ...]:
    """
    The signers of requests to an http(s) server, in their order.

    Args:
        config: The client's settings.
        uri: The tracking URI.
    """
    from runqueue.http._credentials import Credentials  # imports anyio

    name, auth = environment.text(AUTH), _request_auth(config)
    # requests reads ~/.netrc only if no authentication is given.
    found: list[Signer] = [
        Credentials(uri, config.token, passwords=name not in _KUBERNETES, netrc=auth is None),
        Workspace(config.workspace),
    ]
    providers = header_plugins()
    if providers and importlib.util.find_spec("mlflow") is None:
        logger.warning("the request headers of %s are not sent, as mlflow is not installed", ", ".join(providers))
    elif providers:
        found.insert(0, RequestHeaders(config))
    return (*found, auth) if auth is not None else tuple(found)


def source(config: Config, uri: str) -> str:
    """
    The kind of the credentials and the place where they were found, in words, for a diagnosis.

    Raises:
        AuthError: MLflow's file of credentials cannot be read.
    """
    from runqueue.http._credentials import Credentials

    found = signers(config, uri)
    plugin = next((each.source for each in found if isinstance(each, RequestAuth)), None)
    if plugin is not None and (environment.switch(SIGV4) or environment.text(AUTH) not in _KUBERNETES):
        return plugin  # replaces all other credentials
    given = next(each.source() for each in found if isinstance(each, Credentials))
    if plugin is None:
        return given
    return plugin if given == "none" else f"{given}, and {plugin}"


def header_plugins() -> list[str]:
    """Names of the plugins that add headers: the installed ones, and those registered with an imported mlflow."""
    registered = getattr(
        sys.modules.get("mlflow.tracking.request_header.registry"), "_request_header_provider_registry", ()
    )
    kinds = [type(each) for each in registered]
    own = [kind.__name__ for kind in kinds if not kind.__module__.startswith("mlflow.")]
    return [*_installed(tuple(sys.path)), *own]


@lru_cache(maxsize=1)
def _installed(_: tuple[str, ...]) -> tuple[str, ...]:
    """
    Names of the entry points of this path. Looked up once a process, as in mlflow: it takes longer than everything else
    at the start of an engine, and autologging starts one engine for each fit.
    """
    from importlib.metadata import entry_points  # with what it imports, a tenth of `import runqueue`

    return tuple(point.name for point in entry_points(group=_HEADERS_GROUP))


def _request_auth(config: Config) -> RequestAuth | None:
    if environment.switch(SIGV4):
        return RequestAuth(config, "signature", SIGV4, _fetch_sigv4)
    name = environment.text(AUTH)
    if name is None:
        return None
    return RequestAuth(config, f"plugin {name!r}", AUTH, partial(_fetch_plugin, name))


def _fetch_sigv4() -> Any:
    return importlib.import_module("requests_auth_aws_sigv4").AWSSigV4("execute-api")


def _fetch_plugin(name: str) -> Any:
    registry: Any = importlib.import_module("mlflow.tracking.request_auth.registry")
    known = getattr(registry, "_request_auth_provider_registry", None)
    # For an unknown name MLflow only warns, and sends the request without authentication; the run might then be stored
    # for another user.
    auth = None
    if known is None or any(each.get_name() == name for each in known):
        auth = registry.fetch_auth(name)
    if auth is None:
        raise AuthError(f"no plugin of mlflow gives the authentication {name!r} that {AUTH} names")
    return auth


class _PluginSigner:
    """
    Base of the signers that call a plugin's code, in worker threads.

    Args:
        config: The client's settings. There are as many threads as workers, so that a slow plugin delays one request.
        what: Names the plugin, for errors.
    """

    def __init__(self, config: Config, what: str) -> None:
        self._what = what
        self._workers = config.max_workers
        self._threads: anyio.CapacityLimiter | None = None
        self._secrets: deque[str] = deque(maxlen=_KEPT)
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._what}>"

    def redact(self, text: str) -> str:
        """See `Signer.redact`."""
        return redact(text, self._secrets)

    async def _ask(self, function: Callable[..., T], *args: object) -> T:
        import anyio

        if self._threads is None:
            self._threads = anyio.CapacityLimiter(self._workers)
        return await in_thread(partial(self._guarded, function, *args), limiter=self._threads)

    def _guarded(self, function: Callable[..., T], *args: object) -> T:
        failed = None
        try:
            return function(*args)
        except AuthError as error:
            failed = str(error)
        except BaseException as error:
            failed = f"{self._what} raised {type(error).__name__}"
        raise AuthError(failed)

    def _keep(self, value: str) -> None:
        """Keep a header's value for redaction, whole and in its parts."""
        for secret in secrets_in_header(value):
            if len(secret) >= MIN_SECRET_LENGTH and secret not in self._secrets:
                self._secrets.append(secret)

    def _warn_once(self, message: str, *args: object) -> None:
        text = message % args
        if text not in self._warned:
            self._warned.add(text)
            logger.warning("%s", text)


class RequestHeaders(_PluginSigner):
    """
    Adds the headers of MLflow's providers of request headers, which are called for every request.

    Headers that the request already has stay: the constructor's `headers=`, and those that describe the body. MLflow's
    description of its own client is left out; a plugin that extends MLflow's User-Agent extends runqueue's instead.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config, "a provider of request headers")
        self._agent_is_given = any(name.lower() == "user-agent" for name in config.headers or ())

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """See `Signer.sign`."""
        found, mlflows = await self._ask(_resolve_headers)
        taken = {name.lower() for name in request.headers}
        for name, value in found.items():
            text = _text(name, value)
            if value is None:  # requests leaves such headers out, too
                continue
            if text is None:
                self._warn_once("the request header %.99r of a plugin is left out: no header can hold it", name)
            elif name.lower() == "user-agent":
                more = _MLFLOWS_AGENT.sub("", text, count=1)
                if more and not self._agent_is_given:
                    request.headers["User-Agent"] += f" {more}"
            elif name.lower() not in taken and mlflows.get(name) != value:
                put(request.headers, name, text)
                if SECRET_HEADER_NAME.search(name):
                    self._keep(text)


def _resolve_headers() -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The headers of all providers, and among them those of MLflow's own default provider."""
    own: Any = importlib.import_module("mlflow.tracking.request_header.default_request_header_provider")
    registry: Any = importlib.import_module("mlflow.tracking.request_header.registry")
    return dict(registry.resolve_request_headers()), dict(own.DefaultRequestHeaderProvider().request_headers())


class Workspace:
    """
    Adds the header that names the MLflow workspace of the runs.

    Args:
        given: The workspace when the client was made. None: the variable is read for each request.
    """

    def __init__(self, given: str | None) -> None:
        self._given = given

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """See `Signer.sign`."""
        workspace = self._given or (environment.text(WORKSPACE) or "").strip()
        if not workspace or WORKSPACE_HEADER.lower() in map(str.lower, request.headers):
            return
        if not is_header_value(workspace):  # without the header the runs would be stored in another workspace
            raise AuthError(f"the environment variable {WORKSPACE} holds a character that no header can hold")
        request.headers[WORKSPACE_HEADER] = workspace

    def redact(self, text: str) -> str:
        """See `Signer.redact`."""
        return text


class RequestAuth(_PluginSigner):
    """
    An authentication of `requests`: a callable that gets the prepared request, and changes it.

    Args:
        config: The client's settings.
        what: Names the authentication, for errors.
        variable: The variable that chose it.
        fetch: Returns the callable. Called for every request, as MLflow does, because a callable may be good for one
            request only, and a refusal need not be a 401 (Amazon's gateway answers 403 to an expired token).
    """

    def __init__(self, config: Config, what: str, variable: str, fetch: Callable[[], Any]) -> None:
        super().__init__(config, f"the {what} of {variable}")
        self.source = f"{what}, of {variable}"
        self._fetch = fetch

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """See `Signer.sign`."""
        # The thread gets a copy: it may still run when the request has been given up.
        copy = Outgoing(request.method, request.url, request.body, dict(request.headers))
        request.url, changed, gone = await self._ask(self._signed, copy)
        _drop(request.headers, gone)
        for name, value in changed.items():
            put(request.headers, name, value)
            if name.lower() not in _PUBLIC:
                self._keep(value)

    def _signed(self, request: Outgoing) -> tuple[str, dict[str, str], list[str]]:
        """The URL, the new or changed headers, and the names of removed headers. Runs in a worker thread."""
        requests: Any = importlib.import_module("requests")
        auth = self._fetch()
        prepared = requests.Request(
            request.method, _canonical(request.url), headers=request.headers, data=request.body or None
        ).prepare()
        before, origin = prepared.headers.copy(), urlsplit(prepared.url)[:2]
        prepared.prepare_auth(auth, prepared.url)
        if urlsplit(prepared.url)[:2] != origin:
            raise AuthError(f"{self._what} turned the request to another origin; nothing was sent there")
        if (prepared.method, prepared.body or b"") != (request.method, request.body):
            raise AuthError(f"{self._what} changed more than the headers and the URL of the request")
        if prepared.hooks.get("response"):
            self._warn_once("%s wants to see the server's answers, which it is not shown here", self._what)
        changed: dict[str, str] = {}
        for name, value in prepared.headers.items():
            if before.get(name) == value or name.lower() in _FRAMING:
                continue
            text = _text(name, value)
            if text is None:
                raise AuthError(f"{self._what} made a header that no header can be")
            changed[name] = text
        gone = [name for name in before if name not in prepared.headers and name.lower() not in _FRAMING]
        return prepared.url, changed, gone


def _canonical(url: str) -> str:
    parts = urlsplit(url)
    fields = parse_qsl(parts.query, keep_blank_values=True)
    return urlunsplit(parts._replace(query=urlencode(fields, safe=_AS_THEY_ARE))) if fields else url


def _text(name: Any, value: Any) -> str | None:
    """The value as text. None: no header can have this name and value."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if not isinstance(name, str) or not isinstance(value, str):
        return None
    return value.strip() if is_header_name(name) and name.lower() not in _FRAMING and is_header_value(value) else None


def put(headers: dict[str, str], name: str, value: str) -> None:
    """Set a header, in place of one whose name differs in capitals only."""
    if name not in headers:
        _drop(headers, (name,))
    headers[name] = value


def _drop(headers: dict[str, str], names: Iterable[str]) -> None:
    lower = {name.lower() for name in names}
    for name in [each for each in headers if each.lower() in lower]:
        del headers[name]
