"""
Judges the answer to a request: returns MLflow's JSON, or raises the error that says how to go on.

    status                      body            error                 what follows
    200, 201                    JSON object     -                     stored
    200, 201                    other           UnexpectedAnswer      final for the batch
    2xx else, 3xx               any             UnexpectedAnswer      final for the batch
    400                         MLflow's JSON   Rejected              bisected; if it is about the run: final for the run
    400                         a race in SQL   Unavailable           retried; if the store works, bisected the third time
    400                         pool exhausted  Unavailable           retried
    401                         any             Auth                  the flush ends, all stays queued
    403                         any             Auth                  final for the run
    404                         any             NotFound              final for the run
    408 425 429 502 503 504     any             Unavailable           retried
    409                         ABORTED         Unavailable           retried; RESOURCE_CONFLICT likewise
    413                         any             Rejected              bisected, and later batches are smaller
    any from 400                INVALID_STATE   NotFound              final for the run
    500                         INTERNAL_ERROR  Unavailable           retried; if the store works, bisected the third time
    500                         other           Unavailable           retried
    other                       any             UnexpectedAnswer      final for the batch
"""

# Rules of this file:
# - No I/O, no clock.
# - A 200 proves nothing: login pages, caches and broken proxies answer 200, too. Only MLflow's own JSON means "stored".

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import timezone
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeAlias

import orjson

from runqueue.errors import AuthError, NotFoundError, UnavailableError, UnexpectedAnswerError
from runqueue.queueing import RejectedError, Scope, StoreError

Redact: TypeAlias = Callable[[str], str]
"""
Takes secrets out of a text. It has to be called before the text is cut or stripped: half a secret is not found any more.
"""

RETRIABLE: Final = frozenset((408, 425, 429, 500, 502, 503, 504))
UNPROCESSED: Final = frozenset((425, 429))
"""The retriable statuses that mean: the server has not processed the request."""

REJECTS_AFTER: Final = 3
"""
Attempts after which INTERNAL_ERROR counts as a rejection. MLflow's file store gives that code to one bad entry, and every
store gives it to all requests while its database is down; see `runqueue.queueing.batches._evidence`.
"""

_BAD_NAME: Final = re.compile(
    r"^Invalid value .* for parameter '(?:metrics|params|tags)\[\d+\]\.(?:name|key)' supplied"  # MLflow 2.15 and later
    r"|^Invalid (?:metric|parameter|tag) name",
    re.DOTALL,
)
_WHOLE_RUN: Final = re.compile(
    r"^The (?:run|experiment) \S+ must be in (?:the )?'active' |^Invalid value .* for parameter 'run_id' supplied"
)
_TAG: Final = re.compile(r"<[^>]*>|\s+")
_MAX_RETRY_AFTER: Final = 1e10
"""Seconds."""
_MAX_SHOWN: Final = 1_000
"""Characters of a server's message that are shown."""
_MAX_SEARCHED: Final = 200_000
"""Characters of an answer in which secrets are searched for; far more than are shown."""


def judge(
    status: int,
    body: bytes,
    *,
    content_type: str = "",
    retry_after: str = "",
    now: float = 0.0,
    redact: Redact = str,
) -> dict[str, Any]:
    """
    Return the JSON object of an answer by which MLflow says that it has done what was asked.

    Args:
        status: The HTTP status.
        body: The whole body, decompressed.
        content_type: The header Content-Type; only for messages.
        retry_after: The header Retry-After: seconds, or an HTTP date.
        now: The time, in seconds since the epoch, to compare that date with.
        redact: Applied to texts of the server, which may repeat secrets. It is called for errors only.

    Raises:
        StoreError: For any other answer, by the table at the head of this file.
    """
    data = _json_object(body)
    if status in (200, 201) and data is not None and "error_code" not in data:
        return data
    code, message = _mlflow_error(data)
    if status < 400:
        raise UnexpectedAnswerError(
            _printable(_unexpected(status, body, content_type, data, redact), redact), ambiguous=True, code=code
        )
    raise error_of(
        status,
        code,
        message if code is not None else f"{status}: {_excerpt(body, content_type, redact)}",
        retry_after=parse_retry_after(retry_after, now),
        redact=redact,
    )


def error_of(
    status: int, code: str | None, message: str, *, retry_after: float | None = None, redact: Redact = str
) -> StoreError:
    """
    Return the error for a status from 400 on.

    Args:
        status: The HTTP status of the answer, or the one that MLflow's server would answer.
        code: MLflow's `error_code`; None if the answer is not MLflow's.
        message: MLflow's message, or an excerpt of the answer.
        retry_after: Seconds that the server wants the client to wait.
        redact: Applied to the message before it is shown. It is judged as it came.
    """
    text = _printable(message if code is None else f"{code}: {message}", redact)
    if status == 401:
        return AuthError(f"the server refused the credentials ({text})", code=code)
    if status == 403:
        return AuthError(f"no permission ({text})", scope=Scope.LANE, code=code)
    if status == 404:
        return NotFoundError(text, code=code)
    if status == 413:
        return RejectedError(f"the server takes no body as large ({text})", too_large=True, code=code)
    if code == "INVALID_STATE":  # MLflow's file store answers 500 if the experiment is deleted
        return NotFoundError(text, code=code)
    if status == 409 and code in ("ABORTED", "RESOURCE_CONFLICT"):  # Databricks: a conflict with another request
        return UnavailableError(text, retry_after=retry_after, code=code)
    if status in RETRIABLE:
        internal = status == 500 and code == "INTERNAL_ERROR"
        return UnavailableError(
            text,
            retry_after=retry_after,
            rejects_after=REJECTS_AFTER if internal else None,
            scope=Scope.ENTRY if internal else None,
            ambiguous=status not in UNPROCESSED,
            code=code,
        )
    if status == 400 and code == "BAD_REQUEST" and ("IntegrityError)" in message or ".UniqueViolation)" in message):
        # Two requests raced inside the server to insert the same row, for example that of a dataset which two runs log.
        # The next attempt finds the row. PostgreSQL's drivers have a class for each kind of IntegrityError, and only
        # UniqueViolation is such a race.
        return UnavailableError(text, rejects_after=REJECTS_AFTER, scope=Scope.ENTRY, code=code)
    if status == 400 and code == "BAD_REQUEST" and message.startswith("QueuePool limit of"):
        return UnavailableError(text, code=code)  # the server is busy: no connection to its database was free
    if status == 400 and code is not None:
        if _WHOLE_RUN.search(message):
            return NotFoundError(text, code=code)
        return RejectedError(text, code=code, bars_key=_is_about_a_name(code, message))
    return UnexpectedAnswerError(text, code=code)


def parse_retry_after(value: str, now: float) -> float | None:
    """Return the seconds to wait by a Retry-After header (RFC 9110, 10.2.3); None if it is missing or not valid."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value), _MAX_RETRY_AFTER)
    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:  # HTTP dates are in UTC; one obsolete format does not name the zone
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _is_about_a_name(code: str, message: str) -> bool:
    return code == "INVALID_PARAMETER_VALUE" and _BAD_NAME.search(message) is not None


def _json_object(body: bytes) -> dict[str, Any] | None:
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return data if isinstance(data, dict) else None


def _mlflow_error(data: dict[str, Any] | None) -> tuple[str | None, str]:
    if data is None or not isinstance(data.get("error_code"), str):
        return None, ""
    return data["error_code"], str(data.get("message", ""))


def _unexpected(status: int, body: bytes, content_type: str, data: dict[str, Any] | None, redact: Redact) -> str:
    if data is not None:
        code, message = _mlflow_error(data)
        if code is not None:
            return f"{status} with an error in it: {code}: {message}"
    return f"{status} without MLflow's answer: {_excerpt(body, content_type, redact)}"


def _printable(text: str, redact: Redact) -> str:
    """Make one line of bounded length without control characters, as texts are logged and shown on terminals."""
    text = redact(text[:_MAX_SEARCHED])
    text = "".join(each if each.isprintable() else " " for each in text[: _MAX_SHOWN + 1])
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def _excerpt(body: bytes, content_type: str, redact: Redact) -> str:
    """Describe an answer that is not MLflow's. A proxy's page often says more than its status."""
    kind = redact(content_type).split(";")[0].strip()[:80] or "no content type"
    if not body:
        return f"an empty body ({kind})"
    text = _TAG.sub(" ", redact(body[:_MAX_SEARCHED].decode("utf-8", "replace"))[:2_000])
    text = " ".join(text.split())
    return f"{kind}, {len(body):,} bytes: {text[:200]}"
