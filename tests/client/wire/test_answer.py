"""What is made of an answer: the table at the head of `_answer`, row by row, and the words that users read."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from datetime import datetime, timezone
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue.errors import (
    AuthError,
    NotFoundError,
    RejectedError,
    Scope,
    StoreError,
    UnavailableError,
    UnexpectedAnswerError,
)
from runqueue.wire._answer import error_of, judge, parse_retry_after

PAGE = b"<html><head><title>Sign in</title></head><body>Please <b>sign in</b></body></html>"
MLFLOW = json.dumps({"error_code": "SOME_CODE", "message": "some words"}).encode()
INTERNAL = json.dumps({"error_code": "INTERNAL_ERROR", "message": "some words"}).encode()
CUT = b'{"run": {"info": {"run_'

NOT_MLFLOWS = {
    "page": PAGE,
    "empty": b"",
    "cut": CUT,
    "array": b"[]",
    "null": b"null",
    "string": b'"ok"',
    "number": b"1",
    "json of others": b'{"detail": "no"}',
    "bad utf-8": b"\xff\xfe{}",
    "code that is no text": b'{"error_code": 5}',
}
NOT_OBJECTS = {key: body for key, body in NOT_MLFLOWS.items() if key not in ("json of others", "code that is no text")}


def refusal(status: int, body: bytes = b"", **headers: Any) -> StoreError:
    """The error of an answer."""
    with pytest.raises(StoreError) as caught:
        judge(status, body, **headers)
    return caught.value


@pytest.mark.parametrize("code", ["BAD_REQUEST", None])
@pytest.mark.parametrize("status", [200, 400, 401, 500])
@pytest.mark.parametrize("before", [*range(0, 260, 7), *range(900, 1010, 7), 1990])
def test_secrets_are_taken_out_before_a_text_is_cut(status: int, code: str | None, before: int) -> None:
    """Of half a secret nobody would know that it is one; nor of one whose tags were stripped."""
    text = "x" * before + "abc<def>ghi" + "x" * 2_000
    body = json.dumps({"error_code": code, "message": text}).encode() if code else text.encode()
    shown = str(refusal(status, body, redact=lambda text: text.replace("abc<def>ghi", "***")))
    assert "abc" not in shown and "def" not in shown and "ghi" not in shown


def test_an_answer_is_judged_by_what_came_and_not_by_what_is_shown() -> None:
    """A user may be called as a word of MLflow's messages."""
    body = json.dumps(
        {"error_code": "INVALID_PARAMETER_VALUE", "message": "The run r must be in the 'active' state"}
    ).encode()
    error = refusal(400, body, redact=lambda text: text.replace("active", "***"))
    assert isinstance(error, NotFoundError) and "'***'" in str(error)


# -- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [200, 201])
@pytest.mark.parametrize("body", [{}, {"run": {"info": {"run_id": "1"}}}, {"message": "fine"}])
def test_only_mlflows_own_done_is_done(status: int, body: dict[str, Any]) -> None:
    """A JSON object without `error_code`."""
    assert judge(status, json.dumps(body).encode()) == body


@pytest.mark.parametrize("status", [200, 201])
@pytest.mark.parametrize("body", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_a_good_status_proves_nothing(status: int, body: bytes) -> None:
    """Without MLflow's body nothing counts as stored; and it may have been stored all the same."""
    error = refusal(status, body, content_type="text/html; charset=utf-8")
    assert type(error) is UnexpectedAnswerError
    assert (error.scope, error.retriable, error.ambiguous) == (Scope.BATCH, False, True)
    assert str(status) in str(error)


@pytest.mark.parametrize("body", [MLFLOW, b'{"error_code": 5}', b'{"error_code": null}'])
def test_an_error_code_under_a_good_status_is_an_error(body: bytes) -> None:
    """Whatever stands in it."""
    error = refusal(200, body)
    assert type(error) is UnexpectedAnswerError
    if body is MLFLOW:
        assert "SOME_CODE" in str(error) and "some words" in str(error)
        assert error.code == "SOME_CODE"


@pytest.mark.parametrize("status", [202, 203, 204, 205, 206, 207, 226, 299, 300, 301, 302, 303, 304, 307, 308, 399])
@pytest.mark.parametrize("body", [b"{}", b"", PAGE, MLFLOW])
def test_other_statuses_below_400_are_final_for_the_batch(status: int, body: bytes) -> None:
    """Even with a body that would be good under a 200."""
    error = refusal(status, body)
    assert type(error) is UnexpectedAnswerError
    assert (error.scope, error.retriable, error.ambiguous) == (Scope.BATCH, False, True)
    assert str(status) in str(error)


def test_a_400_of_mlflow_is_halved() -> None:
    """It refuses entries for what they are."""
    error = refusal(400, MLFLOW)
    assert type(error) is RejectedError
    assert (error.scope, error.retriable, error.ambiguous, error.code) == (Scope.ENTRY, False, False, "SOME_CODE")
    assert str(error) == "SOME_CODE: some words"


TRIPPED = {
    "sqlite": "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name",
    "mysql": "(pymysql.err.IntegrityError) (1062, \"Duplicate entry '1-shared-1' for key 'PRIMARY'\")",
    "psycopg2": '(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint "datasets_pk"\n',
    "psycopg": '(psycopg.errors.UniqueViolation) duplicate key value violates unique constraint "datasets_pk"\n',
}


@pytest.mark.parametrize("message", TRIPPED.values(), ids=TRIPPED)
def test_a_constraint_that_the_server_tripped_over_is_asked_again(message: str) -> None:
    """Two runs raced for one row inside the server: retried, and the third time taken for a rejection."""
    error = error_of(400, "BAD_REQUEST", f"(raised as a result of Query-invoked autoflush) {message}")
    assert type(error) is UnavailableError
    assert (error.retriable, error.rejects_after, error.scope) == (True, 3, Scope.ENTRY)
    assert not error_of(400, "INVALID_PARAMETER_VALUE", message).retriable
    assert not error_of(409, "BAD_REQUEST", message).retriable


def test_a_server_without_a_free_connection_to_its_database_is_busy() -> None:
    """MLflow calls it a bad request; it is one that the server had no means to try."""
    message = "QueuePool limit of size 5 overflow 10 reached, connection timed out, timeout 30.00"
    error = error_of(400, "BAD_REQUEST", message)
    assert (type(error), error.retriable, error.rejects_after, error.ambiguous) == (UnavailableError, True, None, False)
    assert type(error_of(400, "BAD_REQUEST", f"The key is named {message}")) is RejectedError


@pytest.mark.parametrize(
    "message",
    [
        "(psycopg.errors.StringDataRightTruncation) value too long for type character varying(36)",
        "(psycopg2.errors.NumericValueOutOfRange) bigint out of range",
        "(psycopg.errors.ForeignKeyViolation) insert or update on table violates foreign key constraint",
        "A value that speaks of a UniqueViolation is none",
    ],
)
def test_what_a_database_refuses_for_what_it_is_is_not_asked_again(message: str) -> None:
    """The row would be the same the next time; the batch is halved at once."""
    error = error_of(400, "BAD_REQUEST", message)
    assert (type(error), error.scope, error.retriable) == (RejectedError, Scope.ENTRY, False)


@pytest.mark.parametrize("body", NOT_MLFLOWS.values(), ids=NOT_MLFLOWS)
def test_a_400_of_others_is_not_halved(body: bytes) -> None:
    """A proxy's 400 would be the same for every half."""
    error = refusal(400, body)
    assert type(error) is UnexpectedAnswerError
    assert (error.scope, error.retriable) == (Scope.BATCH, False)


BODIES = {"mlflow": MLFLOW, "internal": INTERNAL, **NOT_MLFLOWS}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize(
    ("status", "kind", "scope"),
    [
        (401, AuthError, Scope.STORE),
        (403, AuthError, Scope.LANE),
        (404, NotFoundError, Scope.LANE),
        (413, RejectedError, Scope.ENTRY),
    ],
)
def test_these_mean_the_same_whoever_answers(status: int, kind: type[StoreError], scope: Scope, body: bytes) -> None:
    """Credentials, permission, what is unknown, what is too large."""
    error = refusal(status, body)
    assert type(error) is kind
    assert (error.scope, error.retriable, error.ambiguous, error.bars_key) == (scope, False, False, False)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_these_are_retried_whoever_answers(status: int, body: bytes) -> None:
    """After Retry-After where it is given; only a 500 of MLflow's own becomes a rejection, the third time."""
    error = refusal(status, body, retry_after="7")
    assert type(error) is UnavailableError
    assert (error.retriable, error.retry_after) == (True, 7.0)
    assert error.ambiguous is (status not in (425, 429))
    if status == 500 and body is INTERNAL:
        assert (error.rejects_after, error.scope) == (3, Scope.ENTRY)
    else:
        assert (error.rejects_after, error.scope) == (None, Scope.BATCH)
    assert refusal(status, body).retry_after is None


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize(
    "status", [402, 405, 406, 407, 409, 410, 411, 412, 414, 415, 422, 426, 431, 451, 501, 505, 511]
)
def test_every_other_status_is_final_for_the_batch(status: int, body: bytes) -> None:
    """Neither retried nor halved."""
    error = refusal(status, body)
    assert type(error) is UnexpectedAnswerError
    assert (error.scope, error.retriable) == (Scope.BATCH, False)


@given(status=st.integers(100, 999), body=st.binary(max_size=50), kind=st.text(), wait=st.text())
def test_any_answer_is_either_done_or_a_store_error(status: int, body: bytes, kind: str, wait: str) -> None:
    """Nothing that a server sends makes the judge fail."""
    try:
        assert isinstance(judge(status, body, content_type=kind, retry_after=wait), dict)
    except StoreError as error:
        assert pickle.loads(pickle.dumps(error)).__dict__ == error.__dict__
        str(error).encode()


# -- the words -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (200, PAGE, "text/html; charset=utf-8", ["200", "text/html", "Please sign in", f"{len(PAGE)} bytes"]),
        (200, b"", "", ["200", "an empty body", "no content type"]),
        (200, CUT, "application/json", ["200", "application/json", '{"run": {"info"']),
        (204, b"", "", ["204", "an empty body"]),
        (206, b"{}", "application/json", ["206", "{}"]),
        (200, MLFLOW, "application/json", ["200", "SOME_CODE", "some words"]),
        (502, PAGE, "text/html", ["502", "Please sign in"]),
        (400, PAGE, "text/html", ["400", "Please sign in"]),
        (401, PAGE, "text/html", ["401", "credentials"]),
        (403, MLFLOW, "", ["permission", "SOME_CODE", "some words"]),
        (404, b"", "", ["404", "empty"]),
        (413, b"", "", ["413", "large"]),
        (418, b"teapot", "text/plain", ["418", "teapot"]),
    ],
)
def test_the_message_names_what_came(status: int, body: bytes, kind: str, words: list[str]) -> None:
    """Status, content type, the beginning of the text without its tags."""
    text = str(refusal(status, body, content_type=kind))
    assert [word for word in words if word not in text] == []
    assert "<" not in text


@given(text=st.text(max_size=5_000))
def test_the_message_is_short_and_one_line(text: str) -> None:
    """Whatever a proxy sends, nobody's log is flooded or broken."""
    message = str(refusal(200, b"<p>" + text.encode("utf-8", "replace"), content_type=text))
    assert len(message) < 600
    assert len(message.splitlines()) == 1


@given(body=st.binary(max_size=3_000), status=st.sampled_from([200, 302, 400, 500, 502]))
def test_the_message_can_be_printed(body: bytes, status: int) -> None:
    """No control characters of a stranger's reach a terminal."""
    try:
        judge(status, body)
    except StoreError as error:
        assert all(character.isprintable() for character in str(error))


# -- names that MLflow refuses ---------------------------------------------------------------------------------------


def mlflow_message(check: Callable[[], object]) -> tuple[str, str, int]:
    """Code, message and status of what MLflow's own validation raises."""
    from mlflow.exceptions import MlflowException

    with pytest.raises(MlflowException) as caught:
        check()
    error = caught.value
    return str(error.error_code), str(error.message), int(error.get_http_status_code())  # type: ignore[no-untyped-call]


BAD_NAMES = ["a$b", "a//b", "../a", "/a", ".", "a/../b", "a\nb", "it's", 'x"y', "ä'b]", "$" * 300]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_fault_in_a_name_bars_the_name(name: str) -> None:
    """By MLflow's own words, for metrics and tags; so it is not sent again."""
    from mlflow.utils import validation

    def of_metric() -> None:
        validation._validate_metric(name, 1.0, 1, 1, path="metrics[12]")  # type: ignore[no-untyped-call]

    def of_tag() -> None:
        validation._validate_tag(name, "v", path="tags[3]")  # type: ignore[no-untyped-call]

    for check in (of_metric, of_tag):
        code, message, status = mlflow_message(check)
        error = error_of(status, code, message)
        assert isinstance(error, RejectedError) and error.bars_key, message


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_fault_in_a_params_name_is_a_rejection(name: str) -> None:
    """Params are write-once, so there is nothing to bar; it is halved like any other."""
    from mlflow.utils import validation

    code, message, status = mlflow_message(
        lambda: validation._validate_param(name, "v", path="params[0]")  # type: ignore[no-untyped-call]
    )
    assert error_of(status, code, message).scope is Scope.ENTRY


def _faults_of_values() -> list[Callable[[], object]]:
    from mlflow.entities import Param
    from mlflow.utils import validation

    checks: Any = validation
    return [
        lambda: checks._validate_metric("good", "no number", 1, 1, path="metrics[0]"),
        lambda: checks._validate_metric("good", None, 1, 1, path="metrics[0]"),
        lambda: checks._validate_metric("good", 1.0, -1, 1, path="metrics[0]"),
        lambda: checks._validate_metric("good", 1.0, 1, "x", path="metrics[0]"),
        lambda: checks._validate_metric("name", "tags[0].key", 1, 1, path="metrics[0]"),
        lambda: checks._validate_length_limit("Metric name", 250, "k" * 251),
        lambda: checks._validate_param_keys_unique([Param("a", "1"), Param("a", "2")]),
        lambda: checks._validate_batch_log_limits([None] * 1_001, [], []),
        lambda: checks._validate_batch_log_limits([], [None] * 101, []),
        lambda: checks._validate_batch_log_limits([None] * 1_000, [None], []),
    ]


@pytest.mark.parametrize("at", range(10))
def test_a_fault_in_a_value_bars_no_name(at: int) -> None:
    """The same key with another value, or in another batch, is fine; it stays the entry's own fault."""
    code, message, status = mlflow_message(_faults_of_values()[at])
    error = error_of(status, code, message)
    assert isinstance(error, RejectedError), message
    assert not error.bars_key, message
    assert error.scope is Scope.ENTRY


@pytest.mark.parametrize(
    "message",
    [
        "The run 0123abcd must be in the 'active' state. Current state is deleted.",
        "The experiment 12 must be in the 'active' state. Current state is deleted.",
        "The run 0123abcd must be in 'active' lifecycle_stage.",
        "The experiment 12 must be in the 'active' lifecycle_stage.",
    ],
)
def test_what_concerns_the_whole_run_is_not_halved(message: str) -> None:
    """A deleted run or experiment refuses every entry alike."""
    error = error_of(400, "INVALID_PARAMETER_VALUE", message)
    assert (type(error), error.scope, error.retriable) == (NotFoundError, Scope.LANE, False)


def test_a_run_id_that_mlflow_refuses_concerns_the_whole_run() -> None:
    """By MLflow's own words."""
    from mlflow.utils import validation

    for bad in ("a b", "x" * 300, ""):
        code, message, status = mlflow_message(
            lambda bad=bad: validation._validate_run_id(bad)  # type: ignore[misc,no-untyped-call]
        )
        assert error_of(status, code, message).scope is Scope.LANE, message


@pytest.mark.parametrize(
    "text",
    [
        "The run x must be in the 'active' state",
        "Invalid value 'x' for parameter 'metrics[0].name' supplied: Names may only contain",
    ],
)
def test_mlflows_words_in_a_users_value_mean_nothing(text: str) -> None:
    """A param whose value quotes such a message is refused alone, and bars nothing."""
    message = f"Changing param values is not allowed. Params were already logged='[{{'key': 'p', 'old': '{text}'}}]'"
    error = error_of(400, "INVALID_PARAMETER_VALUE", message)
    assert (type(error), error.scope, error.bars_key) == (RejectedError, Scope.ENTRY, False)


# -- Retry-After -----------------------------------------------------------------------------------------------------

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("1", 1.0),
        (" 120 ", 120.0),
        ("", None),
        ("   ", None),
        ("soon", None),
        ("-5", None),
        ("1.5", None),
        ("1e3", None),
        ("inf", None),
        ("nan", None),
        ("٣", None),
        ("Tue, 14 Nov 2023 22:13:30 GMT", 10.0),
        ("Tue, 14 Nov 2023 22:13:20 GMT", 0.0),
        ("Tue, 14 Nov 2023 22:13:00 GMT", 0.0),
        ("Wednesday, 15-Nov-23 00:00:00 GMT", 6_400.0),
        ("Wed, 15 Nov 2023 00:13:20 +0200", 0.0),
        ("Wed, 15 Nov 2023 00:13:30 +0200", 10.0),
        ("Tue, 99 Nov 2023 22:13:30 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    """What is neither counts as missing; a date that is over means now."""
    assert parse_retry_after(value, NOW) == seconds


def test_a_date_without_zone_is_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP dates are in GMT by definition, wherever the client stands (RFC 9110, 5.6.7)."""
    import time

    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        for text in ("Tue Nov 14 22:13:30 2023", "Tue, 14 Nov 2023 22:13:30 -0000", "Tue, 14 Nov 2023 22:13:30 GMT"):
            assert parse_retry_after(text, NOW) == 10.0, text
    finally:
        monkeypatch.undo()
        time.tzset()


@given(ahead=st.integers(0, 10**8))
def test_every_http_date_is_read(ahead: int) -> None:
    """In the form that servers must send (RFC 9110, 5.6.7)."""
    moment = datetime.fromtimestamp(NOW + ahead, timezone.utc)
    assert parse_retry_after(format_datetime(moment, usegmt=True), NOW) == ahead


@given(value=st.text())
def test_no_retry_after_makes_the_client_fail(value: str) -> None:
    """Nonsense is ignored, and what is read is a number that can be waited for."""
    seconds = parse_retry_after(value, NOW)
    assert seconds is None or 0 <= seconds < float("inf")


@pytest.mark.parametrize("digits", [308, 309, 400, 5_000])
def test_a_retry_after_of_many_digits_does_no_harm(digits: int) -> None:
    """It is beyond any deadline, or counts as missing; a clock cannot reckon with infinity."""
    seconds = parse_retry_after("9" * digits, NOW)
    assert seconds is None or 1e9 < seconds < float("inf")
