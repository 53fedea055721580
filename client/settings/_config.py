"""
The settings of a client, and where each comes from: the constructor, MLflow's environment variables, a default.

Rules of this file: every bad value is a ConfigError at construction that names the setting; no value that may be a
secret is shown.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import attrs

from runqueue.errors import CallTypeError, ConfigError
from runqueue.queueing import Limits
from runqueue.settings import _environment as environment
from runqueue.settings._redaction import redact_uri, strip_secrets

Token: TypeAlias = str | Callable[[], str]
Transport: TypeAlias = Literal["auto", "httpx"]
OnFull: TypeAlias = Literal["block", "raise", "drop"]
OnFailure: TypeAlias = Literal["raise", "warn"]

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
"""Source: RFC 9110, 5.6.2, "token"."""

DEFAULT_REQUEST_TIMEOUT = 60.0
DEFAULT_RETRY_TIMEOUT = 300.0
DEFAULT_BACKOFF = 0.5
DEFAULT_MAX_PENDING = 1_000_000
STALL_MARGIN = 5.0
"""Seconds between the end of an attempt that is late, and the conclusion that there will be no end."""


def _masked(value: object) -> str:
    return "None" if value is None else "'***'"


def seconds(value: object, name: str) -> float | None:
    """
    A time-out.

    Raises:
        CallTypeError: It is neither a number nor None.
        ConfigError: It is negative or not finite.
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


def _some_seconds(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if seconds(value, field.name) == 0:
        raise ConfigError(f"{field.name}=0: more than no time at all")


def _whole(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is None and field.default is None:
        return
    if type(value) is not int:
        raise CallTypeError(f"{field.name}= takes a whole number, not {type(value).__name__}")
    if value < 1:
        raise ConfigError(f"{field.name}={value!r}: at least 1")


def _limits(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, Limits):
        raise CallTypeError(f"{field.name}= takes a runqueue.Limits or None, not {type(value).__name__}")


def _uri_is_text(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str):
        raise CallTypeError(f"{field.name}= takes a URI, a path or None, not {type(value).__name__}")
    if value == "":
        raise ConfigError(f"{field.name}='': a URI, a path or None")


def is_header_value(text: str) -> bool:
    """Whether the text can be the value of a header: visible ASCII and blanks (RFC 9110, 5.5, without obs-text)."""
    return text.isascii() and (text.isprintable() or text.replace("\t", " ").isprintable())


def is_header_name(text: str) -> bool:
    """Whether the text can be the name of a header."""
    return _HEADER_NAME.fullmatch(text) is not None


def _token(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, str) and not callable(value):
        raise CallTypeError(f"{field.name}= takes text, a callable that gives it, or None, not {type(value).__name__}")
    if value == "":
        raise ConfigError(f"{field.name}='': a token, a callable that gives it, or None")
    if isinstance(value, str) and not is_header_value(value):
        raise ConfigError(f"{field.name}= holds a character that no header can hold (the text is not shown)")


def _headers(value: Any) -> Mapping[str, str] | None:
    return dict(value) if isinstance(value, Mapping) else value  # anything else is the validator's to refuse


def _headers_are_text(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if value is None:
        return
    if not isinstance(value, dict):
        raise CallTypeError(f"{field.name}= takes a mapping or None, not {type(value).__name__}")
    for key, text in value.items():
        if not isinstance(key, str) or not isinstance(text, str):
            named = f"that of {key!r}" if isinstance(key, str) and is_header_name(key) else f"one of {len(value)}"
            raise CallTypeError(f"{field.name}= takes names and values of type str; {named} is not")
        if not is_header_name(key):  # it may be a whole header, with its secret
            raise ConfigError(f"{field.name}= holds what is no name of a header ({len(key)} characters, not shown)")
        if not is_header_value(text):
            raise ConfigError(f"the value of {key!r} in {field.name}= holds a character that no header can hold")


def _one_of(words: Any, *, optional: bool = False) -> Any:
    def check(_: object, field: attrs.Attribute[Any], value: object) -> None:
        if value not in get_args(words) and not (optional and value is None):
            raise ConfigError(f"{field.name}={value!r}: one of {', '.join(map(repr, get_args(words)))}")

    return check


def _yes_or_no(_: object, field: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise CallTypeError(f"{field.name}= takes True or False, not {type(value).__name__}")


def current_workspace() -> str | None:
    """
    The workspace that MLflow itself would name here and now: of its context, where it is imported, else
    MLFLOW_WORKSPACE.
    """
    asked = getattr(sys.modules.get("mlflow.utils.workspace_context"), "get_request_workspace", None)
    found = environment.text("MLFLOW_WORKSPACE") if asked is None else asked()
    return str(found or "").strip() or None


@attrs.frozen(kw_only=True)
class RetrySettings:
    """When to try again; see `runqueue.queueing.delivery._retry.RetryPolicy`, which is imported with the engine only."""

    timeout: float
    retries: int | None
    base: float
    jitter: float


@attrs.frozen(kw_only=True)
class Config:
    """
    The settings of a client; each but `workspace` is a keyword of its constructor. Times are in seconds.

    Raises:
        ConfigError: A value is out of range, or a variable of MLflow's holds one.
        CallTypeError: A value is of the wrong type.
    """

    tracking_uri: str | None = attrs.field(
        default=None, validator=_uri_is_text, repr=lambda uri: repr(uri and redact_uri(uri))
    )
    """Where runs are kept. None: as `mlflow` itself would resolve it."""
    max_workers: int = attrs.field(default=8, validator=_whole)
    """Requests under way at once."""
    limits: Limits | None = attrs.field(default=None, validator=_limits)
    """Bounds on a batch; None, or a field that is None: the store's own."""
    request_timeout: float | None = attrs.field(default=None, validator=_some_seconds)
    """For one attempt, from its start to the last byte of the answer. None: MLFLOW_HTTP_REQUEST_TIMEOUT, else 60."""
    retry_timeout: float | None = attrs.field(default=None, validator=_seconds)
    """From the first failure since the last success until retrying ends. None: 300."""
    token: Token | None = attrs.field(default=None, validator=_token, repr=_masked)
    """A bearer token, or a callable that gives a fresh one; called in the engine's thread, at first and on a 401."""
    headers: Mapping[str, str] | None = attrs.field(
        default=None, converter=_headers, validator=_headers_are_text, repr=_masked
    )
    """Sent with every request, in place of what would be sent by itself; but not Content-Type and Accept-Encoding."""
    transport: Transport = attrs.field(default="auto", validator=_one_of(Transport))
    """"auto" sends through aiohttp where `httpx-aiohttp` is importable (a third of the CPU a request), "httpx" never."""
    proxies: bool = attrs.field(default=True, validator=_yes_or_no)
    """Whether the proxies count that HTTP_PROXY, HTTPS_PROXY and ALL_PROXY name. Other variables count all the same."""
    workspace: str | None = attrs.field(init=False, factory=current_workspace)
    """
    Of MLflow's, to which the client's runs belong, whatever is set by the time they are sent. None: none was set when
    the client was made.
    """

    flush_interval: float | None = attrs.field(default=None, validator=_some_seconds)
    """
    Stream: send what is queued so often, in seconds, and full batches before that: at once, or in a steady flow a few
    together, within 0.25 s. None: only `flush()` sends, and the end.
    """
    max_pending: int | None = attrs.field(default=None, validator=_whole)
    """Entries that may be queued or in flight at once. None: 1,000,000 when streaming (about 80 MB), else no bound."""
    on_full: OnFull = attrs.field(default="block", validator=_one_of(OnFull))
    """What a log call does at that bound: wait for room, raise QueueFullError, or drop its entries, with counts."""
    block_timeout: float = attrs.field(default=60.0, validator=_seconds)
    """Waiting, in all, each time the queue becomes full; then calls raise, or drop with `on_failure="warn"`."""
    on_failure: OnFailure | None = attrs.field(default=None, validator=_one_of(OnFailure, optional=True))
    """Whether a flush and the end raise what was not stored, or log one warning. None: "warn" when streaming."""
    exit_timeout: float = attrs.field(default=20.0, validator=_seconds)
    """For sending what is queued when a block ends by an exception, or the interpreter ends, while streaming."""
    handle_signals: bool = attrs.field(default=True, validator=_yes_or_no)
    """While streaming: at SIGTERM, send what is queued, set unfinished runs KILLED, then end as the signal says."""
    progress: bool = attrs.field(default=True, validator=_yes_or_no)
    """Show how far a flush is that lasts: a bar on a terminal and in a notebook, else a line in the log."""

    def __reduce__(self) -> Any:
        raise TypeError("a Config may hold secrets, and is not pickled")

    def portable_settings(self, uri: str) -> dict[str, Any]:
        """The keywords of a client in another process, without secrets: those it finds there."""
        fields = {field.name for field in attrs.fields(type(self)) if field.init} - {"token", "headers"}
        settings = {name: getattr(self, name) for name in fields if hasattr(self, name)}
        return settings | {"tracking_uri": strip_secrets(uri)}

    @property
    def streams(self) -> bool:
        return self.flush_interval is not None

    @property
    def only_warns(self) -> bool:
        """Whether what was not stored is logged, and never raised."""
        return self.on_failure == "warn" or (self.on_failure is None and self.streams)

    @property
    def pending_bound(self) -> float:
        """Entries that may be pending."""
        if self.max_pending is not None:
            return self.max_pending
        return DEFAULT_MAX_PENDING if self.streams else math.inf

    def seconds_per_request(self) -> float:
        """
        Raises:
            ConfigError: MLFLOW_HTTP_REQUEST_TIMEOUT holds no number of seconds.
        """
        if self.request_timeout is not None:
            return self.request_timeout
        return environment.number("MLFLOW_HTTP_REQUEST_TIMEOUT", above=0) or DEFAULT_REQUEST_TIMEOUT

    def stall_timeout(self) -> float:
        """
        Seconds in which some attempt ends while the store works, or is out of reach in a way that it notices. A call
        of MLflow's own stores in a worker thread has no deadline that could end it.
        """
        return self.seconds_per_request() + self.retry_settings().timeout + STALL_MARGIN

    def retry_settings(self) -> RetrySettings:
        """
        Raises:
            ConfigError: MLFLOW_HTTP_REQUEST_MAX_RETRIES, _BACKOFF_FACTOR or _BACKOFF_JITTER hold no such number.
        """
        base = environment.number("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR")
        return RetrySettings(
            timeout=DEFAULT_RETRY_TIMEOUT if self.retry_timeout is None else self.retry_timeout,
            retries=environment.count("MLFLOW_HTTP_REQUEST_MAX_RETRIES"),
            base=DEFAULT_BACKOFF if base is None else base,
            jitter=environment.number("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER") or 0.0,
        )
