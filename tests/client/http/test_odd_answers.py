"""Answers that servers and proxies send and that a parser of HTTP may stumble over, byte by byte over a socket."""

from __future__ import annotations

import threading
from typing import Literal

import pytest

import runqueue
from support.raw_server import RawServer, answer

RUN = "a" * 32

pytestmark = pytest.mark.parametrize("transport", ["aiohttp", "httpx"])
Library = Literal["aiohttp", "httpx"]


@pytest.mark.parametrize("status", [b"200 R\xe9ussi", b"200 \xf0\x9f", b"200 "])
def test_a_reason_phrase_in_any_bytes_counts_for_nothing(transport: Library, status: bytes) -> None:
    """Servers of other languages write it in latin-1. The points are stored, and sent once."""
    with (
        RawServer(lambda *_: answer(status=status)) as server,
        runqueue.Client(server.uri, transport=transport, retry_timeout=5) as client,
    ):
        client.log_metric(RUN, "loss", 0.5)
        client.flush()
        assert client.statistics().stored == 1
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "first",
    [
        answer(b"<p>bad gateway</p>", b"502 Passerelle d\xe9faillante"),
        answer(b"x" * 1_500_000, b"503 Service Unavailable"),
        answer(b"not brotli", b"502 Bad Gateway", b"Content-Encoding: br"),
        answer(b"not gzip", b"503 Service Unavailable", b"Content-Encoding: gzip"),
    ],
    ids=["latin-1", "large", "unknown coding", "no gzip"],
)
def test_a_page_of_a_gateway_that_cannot_be_read_is_retried_by_its_status(transport: Library, first: bytes) -> None:
    """The status says that the server is out of order; the page does not matter."""
    answers = [first]

    def respond(*_: object) -> bytes:
        return answers.pop() if answers else answer()

    with RawServer(respond) as server, runqueue.Client(server.uri, transport=transport, retry_timeout=5) as client:
        client.log_metric(RUN, "loss", 0.5)
        client.flush()
        assert (client.statistics().stored, client.statistics().failed) == (1, 0)
    assert len(server.requests) == 2


def test_long_headers_are_read(transport: Library) -> None:
    """Gateways send policies and tickets of tens of kilobytes."""
    long = b"Content-Security-Policy: " + b"x" * 30_000
    with (
        RawServer(lambda *_: answer(b"{}", b"200 OK", long)) as server,
        runqueue.Client(server.uri, transport=transport, retry_timeout=0) as client,
    ):
        client.log_metric(RUN, "loss", 0.5)
        client.flush()
        assert client.statistics().stored == 1


def test_user_info_in_a_redirect_is_not_sent(transport: Library) -> None:
    """A redirect to the same origin is followed; the credentials are those of the client."""

    def respond(_: int, request: bytes) -> bytes:
        if request.startswith(b"POST /moved"):
            return answer()
        return answer(
            b"", b"307 Temporary Redirect", b"Location: http://u:secret@" + server.uri[7:].encode() + b"/moved"
        )

    with (
        RawServer(respond) as server,
        runqueue.Client(server.uri, transport=transport, token="mine", retry_timeout=5) as client,
    ):
        client.log_metric(RUN, "loss", 0.5)
        client.flush()
        assert client.statistics().stored == 1
    assert [b"Bearer mine" in request for _, request in server.requests] == [True, True]


def test_all_idle_connections_that_a_load_balancer_has_forgotten_cost_no_retry(transport: Library) -> None:
    """The repetition goes by a new connection, not by the next one of those that are dead as well."""
    together = threading.Barrier(4)
    forgotten: set[int] = set()
    rounds = [4]

    def respond(number: int, _: bytes) -> bytes | None:
        if number in forgotten:
            return None
        if rounds[0] > 0:
            rounds[0] -= 1
            together.wait(20)  # so that four connections are open at once
        return answer()

    with RawServer(respond) as server, runqueue.Client(server.uri, transport=transport, retry_timeout=0) as client:
        for _ in range(2):
            for run in "abcd":
                client.log_metric(run * 32, "loss", 0.5)
            client.flush()
            forgotten |= {number for number, _ in server.requests}
        statistics = client.statistics()
    assert (statistics.stored, statistics.failed, statistics.retried) == (8, 0, 0)
