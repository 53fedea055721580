"""
The table of answers, end to end and in memory: status x body x header -> verdict, retries, number of requests.

    status        body                        verdict
    200, 201      MLflow's JSON               stored
    2xx, 3xx      anything else               failed; neither repeated nor halved
    400, 409 ...  MLflow's JSON               failed alone: a batch is bisected
    401, 403      anything                    refused; a 401 is asked once more with fresh credentials
    408, 425,     anything                    an outage: tried again, after Retry-After if the server says so
    429, 500, 502 - 504
    other         anything                    failed; neither repeated nor halved

Rules of this file: the public client over a router of respx; no socket. One point a batch, so that the number of
requests is that of one entry; the bisection of a batch has tests of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

import httpx
import pytest
import respx

import runqueue
from support.answers import LOGIN_PAGE, error

RUN: Final = "a" * 32
URI: Final = "http://mlflow.test"
JSON: Final = {"Content-Type": "application/json"}
HTML: Final = {"Content-Type": "text/html"}


def answer(status: int, body: Any = b"", **headers: str) -> httpx.Response:
    """An answer: dicts are JSON, text is a page."""
    if isinstance(body, bytes):
        return httpx.Response(
            status, content=body, headers={name.replace("_", "-"): text for name, text in headers.items()}
        )
    kind = HTML if isinstance(body, str) else JSON
    content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
    return httpx.Response(
        status, content=content, headers=kind | {name.replace("_", "-"): text for name, text in headers.items()}
    )


DONE: Final[dict[str, Any]] = {}


@pytest.fixture(autouse=True)
def _in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.000001")


@pytest.fixture
def router() -> Iterator[respx.MockRouter]:
    """The server; a test gives its routes."""
    yield respx.MockRouter(base_url=f"{URI}/api/2.0/mlflow/", assert_all_called=False)


def client_of(router: respx.MockRouter, **settings: Any) -> runqueue.Client:
    """A client whose server is the router."""
    return runqueue.Client(URI, transport=httpx.MockTransport(router.async_handler), **settings)


def log_one(router: respx.MockRouter, first: httpx.Response, **settings: Any) -> tuple[str, int, Any]:
    """
    Log one point to a server that answers so, and then is well.

    Returns:
        "stored", "failed" or "queued"; requests to log-batch; the error, if there was one.
    """
    route = router.post("runs/log-batch")
    route.side_effect = [first, *[answer(200, DONE)] * 9]
    client = client_of(router, **settings)
    client.log_metric(RUN, "loss", 0.5)
    found = None
    try:
        client.flush()
    except runqueue.FlushError as failed:
        found = failed.failures[0].error
    statistics = client.statistics()
    (verdict,) = (name for name in ("stored", "failed", "pending") if getattr(statistics, name))
    calls = route.call_count
    client.close()
    return ("queued" if verdict == "pending" else verdict), calls, found


NOT_MLFLOWS: Final[dict[str, Any]] = {
    "a page": LOGIN_PAGE,
    "nothing": b"",
    "cut JSON": b'{"run": {"in',
    "a list": [],
    "null": None,
    "a number": b"1",
    "text": b'"ok"',
    "no UTF-8": b"\xff\xfe{}",
}


@pytest.mark.parametrize("status", [200, 201])
@pytest.mark.parametrize("body", [{}, {"message": "fine"}, {"run": {"info": {}}}])
def test_mlflows_done_is_stored_at_once(router: respx.MockRouter, status: int, body: dict[str, Any]) -> None:
    """A JSON object without an error code."""
    assert log_one(router, answer(status, body)) == ("stored", 1, None)


@pytest.mark.parametrize("status", [200, 201])
@pytest.mark.parametrize("body", NOT_MLFLOWS.values(), ids=NOT_MLFLOWS)
def test_a_good_status_with_another_body_fails(router: respx.MockRouter, status: int, body: Any) -> None:
    """It proves nothing, and is not repeated."""
    verdict, requests, found = log_one(router, answer(status, body))
    assert (verdict, requests, type(found)) == ("failed", 1, runqueue.UnexpectedAnswerError)
    assert str(status) in str(found)


@pytest.mark.parametrize("body", [error("SOME_CODE"), {"error_code": 5}, {"error_code": None}])
def test_an_error_code_under_a_good_status_fails(router: respx.MockRouter, body: dict[str, Any]) -> None:
    """Whatever stands in it."""
    verdict, requests, found = log_one(router, answer(200, body))
    assert (verdict, requests, type(found)) == ("failed", 1, runqueue.UnexpectedAnswerError)


@pytest.mark.parametrize(
    "status", [202, 203, 204, 205, 206, 207, 226, 299, 300, 301, 302, 303, 304, 305, 306, 310, 399]
)
@pytest.mark.parametrize("body", [{}, b"", LOGIN_PAGE, error("SOME_CODE")], ids=["{}", "nothing", "a page", "an error"])
def test_every_other_status_below_400_fails(router: respx.MockRouter, status: int, body: Any) -> None:
    """Even with a body that would be good under a 200."""
    verdict, requests, found = log_one(router, answer(status, body))
    assert (verdict, requests, type(found)) == ("failed", 1, runqueue.UnexpectedAnswerError)
    assert str(status) in str(found)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_to_another_origin_fails(router: respx.MockRouter, status: int) -> None:
    """Nothing is sent there."""
    other = router.route(url__startswith="http://other.test").respond(json={})
    location = "http://other.test/api/2.0/mlflow/runs/log-batch"
    verdict, requests, found = log_one(router, answer(status, b"", Location=location))
    assert (verdict, requests, type(found)) == ("failed", 1, runqueue.UnexpectedAnswerError)
    assert "http://other.test:80" in str(found) and not other.called


@pytest.mark.parametrize("status", [307, 308])
def test_a_redirect_that_keeps_the_method_is_followed(router: respx.MockRouter, status: int) -> None:
    """Within the origin, with the same body."""
    moved = router.post(f"{URI}/moved").respond(json={})
    assert log_one(router, answer(status, b"", Location="/moved")) == ("stored", 1, None)
    assert moved.call_count == 1
    assert json.loads(moved.calls.last.request.content)["run_id"] == RUN


RETRIED: Final = [408, 425, 429, 500, 502, 503, 504]


@pytest.mark.parametrize("status", RETRIED)
@pytest.mark.parametrize("body", [LOGIN_PAGE, b"", b'{"detail": "no"}'], ids=["a page", "nothing", "JSON of others"])
def test_an_outage_is_tried_again(router: respx.MockRouter, status: int, body: Any) -> None:
    """Until it is over."""
    assert log_one(router, answer(status, body)) == ("stored", 2, None)


@pytest.mark.parametrize("status", RETRIED)
def test_an_outage_that_outlasts_retrying_leaves_all_queued(router: respx.MockRouter, status: int) -> None:
    """And is named."""
    verdict, requests, found = log_one(router, answer(status, "<h1>Busy</h1>"), retry_timeout=0)
    assert (verdict, requests, type(found)) == ("queued", 1, runqueue.UnavailableError)
    assert str(status) in str(found)


@pytest.mark.parametrize("status", RETRIED)
@pytest.mark.parametrize("wait", ["0", " 0 ", "Tue, 14 Nov 2023 22:13:30 GMT", "soon", "-5", "1.5", ""])
def test_a_retry_after_that_is_over_or_none_costs_no_time(router: respx.MockRouter, status: int, wait: str) -> None:
    """Dates of the past, and nonsense."""
    assert log_one(router, answer(status, b"", Retry_After=wait), retry_timeout=30) == ("stored", 2, None)


@pytest.mark.parametrize("wait", ["31", "3600", "1000000", "9" * 400], ids=lambda text: text[:9])
def test_a_retry_after_beyond_the_deadline_ends_the_flush(router: respx.MockRouter, wait: str) -> None:
    """At once, and all stays queued."""
    verdict, requests, found = log_one(router, answer(429, b"", Retry_After=wait), retry_timeout=30)
    assert (verdict, requests, type(found)) == ("queued", 1, runqueue.UnavailableError)


@pytest.mark.parametrize("status", [404, 405, 406, 410, 411, 415, 418, 501, 505, 507, 520, 599])
@pytest.mark.parametrize("body", [LOGIN_PAGE, b""], ids=["a page", "nothing"])
def test_every_other_status_fails(router: respx.MockRouter, status: int, body: Any) -> None:
    """What stands at the address is no MLflow; it is not repeated."""
    verdict, requests, found = log_one(router, answer(status, body))
    assert (verdict, requests) == ("failed", 1)
    assert isinstance(found, runqueue.StoreError) and str(status) in str(found)


@pytest.mark.parametrize("status", [400, 409, 422])
@pytest.mark.parametrize("code", ["INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "SOME_CODE"])
def test_what_mlflow_rejects_fails(router: respx.MockRouter, status: int, code: str) -> None:
    """Once, with its words."""
    verdict, requests, found = log_one(router, answer(status, error(code, "not this")))
    assert (verdict, requests) == ("failed", 1)
    assert isinstance(found, runqueue.StoreError) and "not this" in str(found)


@pytest.mark.parametrize("body", [error("PERMISSION_DENIED"), LOGIN_PAGE, b""], ids=["MLflow's", "a page", "nothing"])
def test_a_403_is_not_repeated(router: respx.MockRouter, body: Any) -> None:
    """Nobody who has no permission gains it by asking twice."""
    _, requests, found = log_one(router, answer(403, body))
    assert (requests, type(found)) == (1, runqueue.AuthError)


@pytest.mark.parametrize("body", [error("UNAUTHENTICATED"), LOGIN_PAGE, b""], ids=["MLflow's", "a page", "nothing"])
def test_a_401_is_asked_once_more_with_fresh_credentials(router: respx.MockRouter, body: Any) -> None:
    """A token may have expired just now."""
    tokens = iter(["old", "new"])
    assert log_one(router, answer(401, body), token=lambda: next(tokens)) == ("stored", 2, None)
    calls = router.calls
    assert [call.request.headers["authorization"] for call in calls] == ["Bearer old", "Bearer new"]


def test_a_401_that_lasts_leaves_all_queued(router: respx.MockRouter) -> None:
    """Two requests a flush: with the old credentials, and with fresh ones."""
    route = router.post("runs/log-batch").respond(401)
    client = client_of(router, token="t")
    client.log_metric(RUN, "loss", 0.5)
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    assert type(caught.value.failures[0].error) is runqueue.AuthError and not caught.value.failures[0].final
    assert (route.call_count, client.statistics().pending) == (2, 1)
    route.respond(json={})
    client.close()
    assert client.statistics().stored == 1


def test_a_batch_that_mlflow_rejects_is_bisected(router: respx.MockRouter) -> None:
    """Only the bad entry fails; the number of requests is that of a search by halves."""

    def judge(request: httpx.Request) -> httpx.Response:
        keys = {point["key"] for point in json.loads(request.content)["metrics"]}
        bad = answer(400, error("SOME_CODE", "not this one"))
        return bad if "bad" in keys else answer(200, DONE)

    route = router.post("runs/log-batch")
    route.side_effect = judge
    client = client_of(router)
    for step in range(64):
        client.log_metric(RUN, "bad" if step == 40 else "good", 0.5, step=step)
    with pytest.raises(runqueue.FlushError, match=r"^1 of 64 entries"):
        client.flush()
    assert (client.statistics().stored, client.statistics().failed) == (63, 1)
    assert route.call_count <= 1 + 2 * 6
    client.close()
