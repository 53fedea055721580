"""
A small threaded HTTP/1.1 server on 127.0.0.1 that records every request. A subclass decides on the answer.

Rules of this file: a request is recorded when it has been read whole, before it is answered, and stays recorded.
`close` ends every socket and thread by handle, and raises a defect of the server itself, which would be lost in a
thread.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import attrs

from support.mlflow_server import HOST, free_port

if TYPE_CHECKING:
    from typing_extensions import Self

JOIN_TIMEOUT = 30.0


@attrs.define(eq=False, slots=False, kw_only=True)
class Request:
    """One request and its answer."""

    serial: int
    """0 for the first one that the server has read."""
    connection: int
    """The number of its connection, counted from 0."""
    method: str
    target: str
    """Path and query."""
    headers: dict[str, str]
    """Keys in lower case."""
    body: bytes = attrs.field(repr=False)
    read_at: float
    """Monotonic seconds when the request had been read whole."""
    answered_at: float | None = None
    """Monotonic seconds just before the answer was sent, or the connection cut."""
    status: int | None = None
    """Of the answer. None: there is none, or not yet."""
    answer: bytes = attrs.field(default=b"", repr=False)
    """The upstream's answer, also if the client did not get it."""

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.body)

    @cached_property
    def json(self) -> dict[str, Any]:
        """The body; empty where there is none."""
        data = json.loads(self.body) if self.body else {}
        assert isinstance(data, dict)
        return data

    def at(self, endpoint: str) -> bool:
        """Whether it went to this end point, e.g. "runs/log-batch"; "" stands for every one."""
        return endpoint == "" or self.path.endswith(f"/{endpoint.strip('/')}")


@attrs.frozen(kw_only=True)
class Reply:
    """An answer, as it is sent."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = attrs.field(default=b"", repr=False)
    cut_at: int | None = None
    """Bytes of the body after which the connection is cut. None: the body is sent whole."""


class _Responder(Protocol):
    def _record(self, handler: _Handler, connection: int) -> Request: ...
    def _respond(self, request: Request) -> Reply | None: ...
    def _answered(self, request: Request, reply: Reply | None) -> None: ...


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Listener

    def setup(self) -> None:
        super().setup()
        self._connection = self.server.next_connection()

    def _handle(self) -> None:
        request = self.server.responder._record(self, self._connection)
        reply = self.server.responder._respond(request)
        self.server.responder._answered(request, reply)
        if reply is None:
            self.close_connection = True
            return
        if not any(key.lower() == "content-length" for key, _ in reply.headers) and reply.status != 204:
            reply = attrs.evolve(reply, headers=(*reply.headers, ("Content-Length", str(len(reply.body)))))
        self.send_response(reply.status)
        for key, value in reply.headers:
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(reply.body[: reply.cut_at])
        if reply.cut_at is not None:
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_OPTIONS = _handle

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Listener(HTTPServer):
    """A listening socket with its connections and their threads."""

    request_queue_size = 64

    def __init__(self, port: int, responder: _Responder) -> None:
        self.responder = responder
        self.defects: list[BaseException] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._connections = 0
        super().__init__((HOST, port), _Handler)
        self._loop = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self._loop.start()

    def next_connection(self) -> int:
        with self._lock:
            self._connections += 1
            return self._connections - 1

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self._serve, args=(request, client_address), daemon=True)
        with self._lock:
            self._open.add(request)
            self._threads.append(thread)
        thread.start()

    def _serve(self, connection: socket.socket, address: Any) -> None:
        try:
            self.finish_request(connection, address)
        except ConnectionError:
            pass  # the client has closed the connection, or `close` has
        except Exception as error:  # noqa: BLE001  a defect of ours: raised by close()
            self.defects.append(error)
        finally:
            with self._lock:
                self._open.discard(connection)
            self.shutdown_request(connection)

    def close(self) -> None:
        """Refuse new connections, cut those that are open, and wait for their threads."""
        self.shutdown()
        self._loop.join(JOIN_TIMEOUT)
        self.server_close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it, and that closes it
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT)
            assert not thread.is_alive(), "a connection's thread does not end"


class RecordingServer:
    """
    Records and answers requests. A context manager: listens on entry, ends everything on exit.

    A subclass gives the answers, in `_respond`.
    """

    def __init__(self) -> None:
        self.port = free_port()
        self._changed = threading.Condition()
        self._requests: list[Request] = []
        self._listener: _Listener | None = None
        self._defects: list[BaseException] = []

    # -- life --------------------------------------------------------------------------------------------------------

    @property
    def uri(self) -> str:
        """What a client takes as its tracking URI."""
        return f"http://{HOST}:{self.port}"

    def listen_again(self) -> None:
        """Accept connections, on the same port as before."""
        assert self._listener is None, "it listens already"
        self._listener = _Listener(self.port, self)

    def stop_listening(self) -> None:
        """Refuse new connections and cut the open ones, as a server does that goes down."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            self._defects += listener.defects

    def close(self) -> None:
        """
        End everything.

        Raises:
            RuntimeError: This server itself had a defect while it handled a request.
        """
        self.stop_listening()
        if self._defects:
            raise RuntimeError(f"the test server failed: {self._defects!r}") from self._defects[0]

    def __enter__(self) -> Self:
        self.listen_again()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- record ------------------------------------------------------------------------------------------------------

    @property
    def requests(self) -> tuple[Request, ...]:
        """All requests so far, in the order in which they were read."""
        with self._changed:
            return tuple(self._requests)

    def to(self, endpoint: str) -> list[Request]:
        """The requests to one end point, e.g. "runs/log-batch"."""
        return [request for request in self.requests if request.at(endpoint)]

    def count(self, endpoint: str = "") -> int:
        """How many requests there were, of any kind or to one end point."""
        return len(self.to(endpoint))

    def wait_for(self, condition: Callable[[], bool], timeout: float = 20.0) -> None:
        """Wait until the condition holds. It is evaluated whenever a request has been read or answered."""
        with self._changed:
            assert self._changed.wait_for(condition, timeout), "what the test waits for did not happen"

    def __repr__(self) -> str:
        state = "closed" if self._listener is None else "listening"
        return f"<{type(self).__name__} {self.uri} {state} requests={len(self._requests)}>"

    # -- what the handler calls --------------------------------------------------------------------------------------

    def _respond(self, request: Request) -> Reply | None:
        """What to answer; None: cut the connection."""
        raise NotImplementedError

    def _record(self, handler: _Handler, connection: int) -> Request:
        headers = {key.lower(): value for key, value in handler.headers.items()}
        assert "transfer-encoding" not in headers, "a body without a length is not supported here"
        body = handler.rfile.read(int(headers.get("content-length", "0")))
        with self._changed:
            request = Request(
                serial=len(self._requests),
                connection=connection,
                method=handler.command,
                target=handler.path,
                headers=headers,
                body=body,
                read_at=time.monotonic(),
            )
            self._requests.append(request)
            self._changed.notify_all()
        return request

    def _answered(self, request: Request, reply: Reply | None) -> None:
        with self._changed:
            request.answered_at = time.monotonic()
            request.status = None if reply is None else reply.status
            if reply is not None and not request.answer:
                request.answer = reply.body
            self._changed.notify_all()
