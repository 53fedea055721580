"""Fixtures of the pure and the transport ring: a server that answers by script, and clients that reach nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeAlias

import pytest

import runqueue
from support.mlflow_server import free_port
from support.proxy import ScriptedServer
from support.recorder import Reply, Request

NewClient: TypeAlias = Callable[..., runqueue.Client]


def discard(client: runqueue.Client) -> None:
    """End a client as a block does that raised: what is still queued is not sent."""
    error = RuntimeError("the test is over")
    client.__exit__(RuntimeError, error, None)


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """Answers `{}` to all that no script says otherwise of."""
    with ScriptedServer() as server:
        yield server


@pytest.fixture
def gate(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, the scripted server records requests and answers none."""
    event, respond = threading.Event(), server._respond

    def respond_later(request: Request) -> Reply | None:
        event.wait(20)
        return respond(request)

    monkeypatch.setattr(server, "_respond", respond_later)
    yield event
    event.set()


@pytest.fixture
def new_client(server: ScriptedServer) -> Iterator[NewClient]:
    """Makes clients of the scripted server, and ends them with the test."""
    clients: list[runqueue.Client] = []

    def make(uri: str | None = None, **settings: object) -> runqueue.Client:
        client = runqueue.Client(uri or server.uri, **settings)  # type: ignore[arg-type]
        clients.append(client)
        return client

    yield make
    for client in clients:
        discard(client)


@pytest.fixture
def client(new_client: NewClient) -> runqueue.Client:
    """A client of the scripted server."""
    return new_client()


@pytest.fixture
def offline(new_client: NewClient) -> runqueue.Client:
    """A client of a server that is not there, and that gives up at the first failure."""
    return new_client(f"http://127.0.0.1:{free_port()}", retry_timeout=0, request_timeout=5)
