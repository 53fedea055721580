"""
A kept connection that the server closes just before it is used again, seen by a whole client over local sockets.

Rules of this file: `retry_timeout=0` ends a flush at its first outage, so a flush that succeeds has met none.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Literal

import pytest

import runqueue
from support.mlflow_server import HOST
from support.proxy import Fault, ScriptedServer

RUN = "a" * 32
CREATED = Fault.answer(200, {"run": {"info": {"run_id": RUN}}})

pytestmark = pytest.mark.parametrize("transport", ["aiohttp", "httpx"])


def log_one(client: runqueue.Client, step: int) -> None:
    """Log a point, and send it."""
    client.log_metric(RUN, "loss", 0.5, step=step)
    client.flush()


def test_log_batch_is_sent_again_at_once(
    server: ScriptedServer, transport: Literal["aiohttp", "httpx"], caplog: pytest.LogCaptureFixture
) -> None:
    """One more request on a fresh connection: no outage, no notice, no wait, no retry that is counted."""
    with runqueue.Client(server.uri, transport=transport, retry_timeout=0) as client:
        log_one(client, 1)
        server.fail("runs/log-batch", Fault.cut_before_commit())
        with caplog.at_level(logging.WARNING, "runqueue"):
            log_one(client, 2)
        statistics = client.statistics()
    assert [request.connection for request in server.requests] == [0, 0, 1]
    assert server.requests[1].body == server.requests[2].body
    assert (statistics.stored, statistics.failed, statistics.retried, statistics.requests) == (2, 0, 0, 3)
    assert caplog.records == []


def test_log_batch_whose_fresh_connection_breaks_too_meets_an_outage(
    server: ScriptedServer, transport: Literal["aiohttp", "httpx"]
) -> None:
    """One repetition a request; what it could not send stays queued, and the next flush sends it."""
    with runqueue.Client(server.uri, transport=transport, retry_timeout=0) as client:
        log_one(client, 1)
        server.fail("runs/log-batch", Fault.cut_before_commit(), times=2)
        with pytest.raises(runqueue.FlushError, match="the connection broke"):
            log_one(client, 2)
        assert (server.count(), client.statistics().pending) == (3, 1)
        client.flush()
        assert (server.count(), client.statistics().stored) == (4, 2)


def test_create_run_is_settled_by_its_tag(server: ScriptedServer, transport: Literal["aiohttp", "httpx"]) -> None:
    """Before it is sent again, the server is asked whether the run is there."""
    server.fail("runs/create", Fault.cut_before_commit())
    server.fail("runs/create", CREATED)
    with runqueue.Client(server.uri, transport=transport) as client:
        log_one(client, 1)
        client.create_run(experiment_id="0")
        client.flush()
    names = [request.path.rpartition("mlflow/")[2] for request in server.requests]
    assert names[:4] == ["runs/log-batch", "runs/create", "runs/search", "runs/create"]
    assert set(names[4:]) <= {"runs/search"}  # the last look for a twin


@contextlib.contextmanager
def hasty_server() -> Iterator[tuple[str, list[int]]]:
    """A server that closes each connection after its answer without saying so; and how many it has accepted."""
    listener = socket.create_server((HOST, 0))
    accepted: list[int] = []
    stopped = threading.Event()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                if stopped.is_set():
                    return
                accepted.append(len(accepted))
                connection.settimeout(10)
                request = b""
                while b'"metrics"' not in request or not request.rstrip().endswith(b"}"):
                    request += connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{listener.getsockname()[1]}", accepted
    finally:
        stopped.set()
        socket.create_connection(listener.getsockname(), 1).close()  # wakes accept()
        thread.join(10)
        listener.close()


def test_a_server_that_closes_idle_connections_costs_nothing(transport: Literal["aiohttp", "httpx"]) -> None:
    """Whether the client sees the end before it sends the next request, or only then."""
    with (
        hasty_server() as (uri, accepted),
        runqueue.Client(uri, transport=transport, retry_timeout=0) as client,
    ):
        for step in range(20):
            log_one(client, step)
        assert (client.statistics().stored, client.statistics().retried) == (20, 0)
        assert len(accepted) == 20
