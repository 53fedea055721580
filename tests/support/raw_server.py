"""A server that answers each request with the very bytes that a test gives it, and counts connections and requests."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from support.mlflow_server import HOST

if TYPE_CHECKING:
    from typing_extensions import Self

_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")


def answer(body: bytes = b"{}", status: bytes = b"200 OK", *headers: bytes) -> bytes:
    """An answer of HTTP/1.1, with its length."""
    lines = [b"HTTP/1.1 " + status, b"Content-Type: application/json", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


class RawServer:
    """
    A context manager; a thread for each connection.

    Args:
        respond: Gets the number of the connection and the request's bytes. Returns the bytes to send. None: the connection
            is closed without an answer.
    """

    def __init__(self, respond: Callable[[int, bytes], bytes | None]) -> None:
        self._respond = respond
        self._listener = socket.create_server((HOST, 0))
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.requests: list[tuple[int, bytes]] = []
        """The number of the connection, and the bytes, of each request."""
        self.uri = f"http://{HOST}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end of the listener
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                self._start(self._serve, connection, len(self._connections) - 1)

    def _serve(self, connection: socket.socket, number: int) -> None:
        received = b""
        with contextlib.suppress(OSError), connection:  # the client, or the end of the test, has closed it
            while chunk := connection.recv(65_536):
                received += chunk
                head, ended, body = received.partition(b"\r\n\r\n")
                length = _LENGTH.search(head)
                if not ended or len(body) < (int(length[1]) if length else 0):
                    continue
                self.requests.append((number, received))
                reply = self._respond(number, received)
                received = b""
                if reply is None:
                    return
                connection.sendall(reply)
