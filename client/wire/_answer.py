"""
Judges an answer: what MLflow gives when it has stored something, or the error that says what came instead.

A 200 proves nothing: login pages, caches and half-broken proxies give it too. Rules of this file: no I/O; what is not
positively MLflow's own "done" is an error, and the table below says what follows from it.

    status                      body            error                 then
    200, 201                    JSON object     -                     stored
    200, 201                    other           UnexpectedAnswer      final for the batch
    2xx else, 3xx               any             UnexpectedAnswer      final for the batch
    400                         MLflow's JSON   Rejected              halved; of the run's state: final for the run
    400                         a race in SQL   Unavailable           retried; if the store works, the third time halved
    400                         pool exhausted  Unavailable           retried
    401                         any             Auth                  the flush ends, all stays queued
    403                         any             Auth                  final for the run
    404                         any             NotFound              final for the run
    408 425 429 502 503 504     any             Unavailable           retried
    409                         ABORTED         Unavailable           retried; RESOURCE_CONFLICT likewise
    413                         any             Rejected              halved, and later batches are smaller
    any from 400                INVALID_STATE   NotFound              final for the run
    500                         INTERNAL_ERROR  Unavailable           retried; if the store works, the third time halved
    500                         other           Unavailable           retried
    other                       any             UnexpectedAnswer      final for the batch
"""

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
"""Takes secrets out of what is shown. Before it is cut or stripped: a part of a secret is none that could be found."""

RETRIABLE: Final = frozenset((408, 425, 429, 500, 502, 503, 504))
UNPROCESSED: Final = frozenset((425, 429))
"""Of these, the ones that say the request was not worked on."""

REPEATS: Final = 3
"""
MLflow's file store answers INTERNAL_ERROR to one bad entry, any store to everything while its database is down: so often,
and such an answer is a rejection, unless the store is found not to work (see `runqueue.queueing.batches._evidence`).
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
_FOR_EVER: Final = 1e10
"""Seconds."""
_LONGEST: Final = 1_000
"""Characters of a message of the server's that are shown."""
_SEARCHED: Final = 200_000
"""Characters of what a server says in which secrets are looked for; what is shown is far less."""


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
    Args:
        status: The HTTP status.
        body: Decompressed, whole.
        content_type: Header of that name; only for messages.
        retry_after: Header of that name: seconds or an HTTP date.
        now: Seconds since the epoch, for such a date.
        redact: What a server may echo; called for errors only.

    Returns:
        The JSON object of an answer that says "done".

    Raises:
        StoreError: Any other answer; by the table at the head of this file.
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
    The error of a status from 400 on.

    Args:
        status: The HTTP status, or the one that MLflow would give.
        code: MLflow's `error_code`, None where the answer was not MLflow's.
        message: MLflow's, or an excerpt of what came.
        retry_after: Seconds.
        redact: For what is shown of the message; it is judged as it came.
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
    if code == "INVALID_STATE":  # MLflow's file store says 500 to an experiment that is deleted
        return NotFoundError(text, code=code)
    if status == 409 and code in ("ABORTED", "RESOURCE_CONFLICT"):  # Databricks: another request was in the way
        return UnavailableError(text, retry_after=retry_after, code=code)
    if status in RETRIABLE:
        internal = status == 500 and code == "INTERNAL_ERROR"
        return UnavailableError(
            text,
            retry_after=retry_after,
            rejects_after=REPEATS if internal else None,
            scope=Scope.ENTRY if internal else None,
            ambiguous=status not in UNPROCESSED,
            code=code,
        )
    if status == 400 and code == "BAD_REQUEST" and ("IntegrityError)" in message or ".UniqueViolation)" in message):
        # Two requests of other runs' raced inside the server, over the row of a dataset that both log: asked again, it
        # finds the row there. PostgreSQL's drivers name each kind of IntegrityError; the others are no race.
        return UnavailableError(text, rejects_after=REPEATS, scope=Scope.ENTRY, code=code)
    if status == 400 and code == "BAD_REQUEST" and message.startswith("QueuePool limit of"):
        return UnavailableError(text, code=code)  # no connection to its database was free: it is busy
    if status == 400 and code is not None:
        if _WHOLE_RUN.search(message):
            return NotFoundError(text, code=code)
        return RejectedError(text, code=code, bars_key=_faults_name(code, message))
    return UnexpectedAnswerError(text, code=code)


def parse_retry_after(value: str, now: float) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3); None where it is missing or nonsense."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return min(float(value), _FOR_EVER)
    try:
        date = parsedate_to_datetime(value)
        if date.tzinfo is None:  # HTTP dates are in UTC, also in the obsolete form that does not say so
            date = date.replace(tzinfo=timezone.utc)
        return max(0.0, date.timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _faults_name(code: str, message: str) -> bool:
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
    """On one line, without control characters, and not endless: it goes into logs and onto terminals."""
    text = redact(text[:_SEARCHED])
    text = "".join(each if each.isprintable() else " " for each in text[: _LONGEST + 1])
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _excerpt(body: bytes, content_type: str, redact: Redact) -> str:
    """What came, in short: a proxy's page says more than its status."""
    kind = redact(content_type).split(";")[0].strip()[:80] or "no content type"
    if not body:
        return f"an empty body ({kind})"
    text = _TAG.sub(" ", redact(body[:_SEARCHED].decode("utf-8", "replace"))[:2_000])
    text = " ".join(text.split())
    return f"{kind}, {len(body):,} bytes: {text[:200]}"
