"""
The settings of a client: the constructor's arguments, completed by MLflow's environment variables and by defaults.
"""

# Rules of this file:
# - A bad value raises at construction, with the name of the setting.
# - A value that may be a secret appears in no message and in no repr.

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, Union, get_args

import attrs

from runqueue.errors import CallTypeError, ConfigError
from runqueue.queueing import Limits
from runqueue.settings import _environment as environment
from runqueue.settings._redaction import redact_uri, strip_secrets

if TYPE_CHECKING:
    import httpx  # noqa: TID251 - for the type of a transport alone

Token: TypeAlias = str | Callable[[], str]
TransportName: TypeAlias = Literal["auto", "aiohttp", "httpx"]
Transport: TypeAlias = Union[TransportName, "httpx.AsyncBaseTransport"]  # httpx is not imported with this module
OnFull: TypeAlias = Literal["block", "raise", "drop"]
OnFailure: TypeAlias = Literal["raise", "warn"]

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""Source: RFC 9110, 5.6.2, "token"."""

DEFAULT_REQUEST_TIMEOUT = 60.0
DEFAULT_RETRY_TIMEOUT = 300.0
DEFAULT_BACKOFF = 0.5
DEFAULT_MAX_PENDING = 1_000_000
STALL_MARGIN = 5.0
"""Seconds added to the time-outs before a call that has not returned counts as stuck."""


def _masked(value: object) -> str:
    return "None" if value is None else "'***'"


def seconds(value: object, name: str) -> float | None:
    """
    Check a time-out, in seconds, and return it as a float; None stays None.

    Args:
        value: What the user passed.
        name: The argument's name, for messages.

    Raises:
        CallTypeError: The value is neither a number nor None.
        ConfigError: The value is negative or not finite.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CallTypeError(f"{name}= takes a number of seconds or None, not {type(value).__name__}")
    if not 0 <= value < float("inf"):
        raise ConfigError(f"{name}={value!r}: seconds from 0 on, and finite")
    return float(value)


def _seconds(_: object, field: attrs.Attribute[Any], value: object) -> None:
    seconds(value, field.name)


def _positive_seconds(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if seconds(value, field.name) == 0:
        raise ConfigError(f"{field.name}=0: more than no time at all")


def _positive_int(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is None and field.default is None:
        return
    if type(value) is not int:
        raise CallTypeError(f"{field.name}= takes a whole number, not {type(value).__name__}")
    if value < 1:
        raise ConfigError(f"{field.name}={value!r}: at least 1")


def _limits_or_none(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, Limits):
        raise CallTypeError(f"{field.name}= takes a runqueue.Limits or None, not {type(value).__name__}")


def _uri(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise CallTypeError(f"{field.name}= takes a URI, a path or None, not {type(value).__name__}")
    if value == "":
        raise ConfigError(f"{field.name}='': a URI, a path or None")


def is_header_value(text: str) -> bool:
    """Tell if the text can be a header's value: visible ASCII and blanks (RFC 9110, 5.5, without obs-text)."""
    return text.isascii() and (text.isprintable() or text.replace("\t", " ").isprintable())


def is_header_name(text: str) -> bool:
    """Tell if the text can be a header's name (RFC 9110, 5.6.2)."""
    return _HEADER_NAME.fullmatch(text) is not None


def _token(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str) and not callable(value):
        raise CallTypeError(f"{field.name}= takes text, a callable that gives it, or None, not {type(value).__name__}")
    if value == "":
        raise ConfigError(f"{field.name}='': a token, a callable that gives it, or None")
    if isinstance(value, str) and not is_header_value(value):
        raise ConfigError(f"{field.name}= holds a character that no header can hold (the text is not shown)")


def _copied(value: Any) -> Mapping[str, str] | None:
    return dict(value) if isinstance(value, Mapping) else value  # the validator rejects anything else


def _headers(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise CallTypeError(f"{field.name}= takes a mapping or None, not {type(value).__name__}")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            named = f"that of {key!r}" if isinstance(key, str) and is_header_name(key) else f"one of {len(value)}"
            raise CallTypeError(f"{field.name}= takes names and values of type str; {named} is not")
        if not is_header_name(key):  # not shown: the user may have passed a whole header, secret included
            raise ConfigError(f"{field.name}= holds what is no name of a header ({len(key)} characters, not shown)")
        if not is_header_value(text):
            raise ConfigError(f"the value of {key!r} in {field.name}= holds a character that no header can hold")


def _transport(_: object, field: attrs.Attribute[Any], value: object) -> None:
    # A transport of httpx's can exist only where httpx has been imported; it is not imported for this check.
    kind = getattr(sys.modules.get("httpx"), "AsyncBaseTransport", None)
    names = get_args(TransportName)
    if kind is not None and isinstance(value, kind):  # first: a transport may compare itself in a way of its own
        return
    if isinstance(value, str):
        if value in names:
            return
        raise ConfigError(f"{field.name}={value!r}: one of {', '.join(map(repr, names))}, or an httpx transport")
    found = f"the class {value.__qualname__}" if isinstance(value, type) else type(value).__name__
    raise CallTypeError(
        f"{field.name}= takes {', '.join(map(repr, names))} or an instance of httpx.AsyncBaseTransport, not {found}"
    )


def _one_of(words: Any, *, optional: bool = False) -> Any:
    def check(_: object, field: attrs.Attribute[Any], value: object) -> None:
        if value not in get_args(words) and not (optional and value is None):
            raise ConfigError(f"{field.name}={value!r}: one of {', '.join(map(repr, get_args(words)))}")

    return check


def _bool(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise CallTypeError(f"{field.name}= takes True or False, not {type(value).__name__}")


def current_workspace() -> str | None:
    """
    Return the workspace that MLflow would use for a request made now.

    If mlflow is imported, its context decides (`mlflow.set_workspace()`), else MLFLOW_WORKSPACE.
    """
    get_workspace = getattr(sys.modules.get("mlflow.utils.workspace_context"), "get_request_workspace", None)
    found = environment.text("MLFLOW_WORKSPACE") if get_workspace is None else get_workspace()
    return str(found or "").strip() or None


@attrs.frozen(kw_only=True)
class RetrySettings:
    """
    The arguments of `runqueue.queueing.delivery._retry.RetryPolicy`, which is imported only with the engine.
    """

    timeout: float
    retries: int | None
    base: float
    jitter: float


@attrs.frozen(kw_only=True)
class Config:
    """
    The settings of a client. Every field except `workspace` is a keyword of its constructor. Times are in seconds.

    Raises:
        ConfigError: A value is out of range.
        CallTypeError: A value is of the wrong type.
    """

    tracking_uri: str | None = attrs.field(default=None, validator=_uri, repr=lambda uri: repr(uri and redact_uri(uri)))
    """Where runs are stored. None: the URI that `mlflow` itself would use."""
    max_workers: int = attrs.field(default=8, validator=_positive_int)
    """Requests in flight at once, at most."""
    limits: Limits | None = attrs.field(default=None, validator=_limits_or_none)
    """Limits of a batch. None, or a field that is None: the store's own limit."""
    request_timeout: float | None = attrs.field(default=None, validator=_positive_seconds)
    """
    Time-out of one attempt, from its start to the last byte of the answer. None: MLFLOW_HTTP_REQUEST_TIMEOUT, else 60.
    """
    retry_timeout: float | None = attrs.field(default=None, validator=_seconds)
    """How long a flush goes on retrying, counted from the first failure after the last success. None: 300."""
    token: Token | None = attrs.field(default=None, validator=_token, repr=_masked)
    """
    A bearer token, or a callable that returns one. The engine's thread calls it before the first request and after a 401.
    """
    headers: Mapping[str, str] | None = attrs.field(default=None, converter=_copied, validator=_headers, repr=_masked)
    """Sent with every request. They replace the client's own headers, except Content-Type and Accept-Encoding."""
    transport: Transport = attrs.field(default="auto", validator=_transport)
    """
    What sends the requests: "aiohttp" (httpx-aiohttp's transport), "httpx" (httpcore, three times the CPU a request),
    "auto" ("aiohttp"), or a transport of the user's own.
    """
    proxies: bool = attrs.field(default=True, validator=_bool)
    """Whether requests go through the proxies in HTTP_PROXY, HTTPS_PROXY and ALL_PROXY."""
    workspace: str | None = attrs.field(init=False, factory=current_workspace)
    """
    The MLflow workspace of the client's runs, as it was when the client was made. None: no workspace was set.
    """

    flush_interval: float | None = attrs.field(default=None, validator=_positive_seconds)
    """
    How often the client sends what is queued. Full batches are sent sooner: at once, or, in a steady flow, a few
    together within 0.25 s. None: nothing is sent before `flush()` or the end of the block.
    """
    max_pending: int | None = attrs.field(default=None, validator=_positive_int)
    """Entries that may be queued or in flight at once. None: 1,000,000 (about 80 MB) when streaming, else no bound."""
    on_full: OnFull = attrs.field(default="block", validator=_one_of(OnFull))
    """What a log call does when `max_pending` is reached: wait for room, raise QueueFullError, or drop its entries."""
    block_timeout: float = attrs.field(default=60.0, validator=_seconds)
    """
    How long log calls wait, in total, each time the queue becomes full. After that they raise QueueFullError, or drop
    their entries with `on_failure="warn"`.
    """
    on_failure: OnFailure | None = attrs.field(default=None, validator=_one_of(OnFailure, optional=True))
    """
    Whether `flush()`, `close()` and the end of a block raise FlushError for what was not stored, or log one warning.
    None: "warn" when streaming, else "raise".
    """
    exit_timeout: float = attrs.field(default=20.0, validator=_seconds)
    """How long a streaming client goes on sending after an exception has ended its block, or at the interpreter's end."""
    handle_signals: bool = attrs.field(default=True, validator=_bool)
    """
    Whether a streaming client handles SIGTERM and SIGHUP where they have their default action: it sends what is queued,
    sets unfinished runs to KILLED, and then lets the signal end the process.
    """
    progress: bool = attrs.field(default=True, validator=_bool)
    """Whether a long flush shows its progress: as a bar on a terminal and in a notebook, else as lines in the log."""

    def __reduce__(self) -> Any:
        raise TypeError("a Config may hold secrets, and is not pickled")

    def portable_settings(self, uri: str) -> dict[str, Any]:
        """
        Return the keywords that make the same client in another process.

        Secrets are left out: the other process has to find them in its own environment. So is a transport of the user's
        own, whose connections belong to this process: the other one sends by "auto".

        Args:
            uri: The resolved tracking URI.
        """
        fields = {field.name for field in attrs.fields(type(self)) if field.init} - {"token", "headers"}
        settings = {name: getattr(self, name) for name in fields if hasattr(self, name)}
        if not isinstance(self.transport, str):
            del settings["transport"]
        return settings | {"tracking_uri": strip_secrets(uri)}

    @property
    def streams(self) -> bool:
        """Whether the client sends by itself, without a flush."""
        return self.flush_interval is not None

    @property
    def only_warns(self) -> bool:
        """Whether entries that were not stored lead to warnings instead of exceptions."""
        return self.on_failure == "warn" or (self.on_failure is None and self.streams)

    @property
    def pending_bound(self) -> float:
        """Entries that may be pending: `max_pending`, or its default, which may be infinite."""
        if self.max_pending is not None:
            return self.max_pending
        return DEFAULT_MAX_PENDING if self.streams else math.inf

    def seconds_per_request(self) -> float:
        """
        Return the time-out of one attempt.

        Raises:
            ConfigError: MLFLOW_HTTP_REQUEST_TIMEOUT holds no number of seconds.
        """
        if self.request_timeout is not None:
            return self.request_timeout
        return environment.number("MLFLOW_HTTP_REQUEST_TIMEOUT", above=0) or DEFAULT_REQUEST_TIMEOUT

    def stall_timeout(self) -> float:
        """
        Return the seconds after which a store counts as stuck if no attempt has ended meanwhile.

        Requests end by their own time-out. A call of MLflow's own stores runs in a worker thread, and nothing can end it.
        """
        return self.seconds_per_request() + self.retry_settings().timeout + STALL_MARGIN

    def retry_settings(self) -> RetrySettings:
        """
        Return when and how long failed requests are retried.

        Raises:
            ConfigError: MLFLOW_HTTP_REQUEST_MAX_RETRIES, _BACKOFF_FACTOR or _BACKOFF_JITTER is out of range.
        """
        base = environment.number("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR")
        return RetrySettings(
            timeout=DEFAULT_RETRY_TIMEOUT if self.retry_timeout is None else self.retry_timeout,
            retries=environment.count("MLFLOW_HTTP_REQUEST_MAX_RETRIES"),
            base=DEFAULT_BACKOFF if base is None else base,
            jitter=environment.number("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER") or 0.0,
        )
