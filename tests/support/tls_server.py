"""
A server that speaks TLS on 127.0.0.1, with a certificate of the test's: one request a connection, answered "done".

Rules of this file: an error of a handshake is not raised here, because tests provoke it; the thread and the sockets are
ended by handle.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

import trustme

from support.mlflow_server import HOST

if TYPE_CHECKING:
    from typing_extensions import Self

DONE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class TlsServer:
    """
    Answers "done" to one request a connection. A context manager.

    Args:
        certificate: The server's own. None: it has none, and fails in the handshake.
        asks_for: The authority whose clients it accepts. None: it asks clients for no certificate.
    """

    def __init__(self, certificate: trustme.LeafCert | None, asks_for: trustme.CA | None = None) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.subjects: list[str] = []
        """Common names of the clients' certificates."""
        self.after_hello: Callable[[socket.socket], None] | None = None
        """Called in place of the handshake."""
        self.after_request: Callable[[ssl.SSLSocket], None] | None = None
        """Called in place of the answer."""
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if certificate is not None:
            certificate.configure_cert(self._context)
        if asks_for is not None:
            self._context.verify_mode = ssl.CERT_REQUIRED
            asks_for.configure_trust(self._context)
        self._listener = socket.create_server((HOST, 0))
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    @property
    def uri(self) -> str:
        """What a client takes as its tracking URI."""
        return f"https://{HOST}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), 1).close()  # wakes accept()
        self._thread.join(10)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection, contextlib.suppress(OSError):
                if self._stopped.is_set():
                    return
                connection.settimeout(10)
                self.connections += 1
                self._talk(connection)

    def _talk(self, connection: socket.socket) -> None:
        if self.after_hello is not None:
            connection.recv(65_536)
            self.after_hello(connection)
            return
        with self._context.wrap_socket(connection, server_side=True) as secured:
            shown: Any = secured.getpeercert()
            if shown:
                self.subjects += [value for part in shown["subject"] for key, value in part if key == "commonName"]
            self.requests.append(_read_request(secured))
            if self.after_request is not None:
                self.after_request(secured)
            else:
                secured.sendall(DONE)


def _read_request(connection: ssl.SSLSocket) -> bytes:
    """The whole request: closing a connection with unread bytes resets it, and the answer is lost."""
    request = b""
    while True:
        head, end, body = request.partition(b"\r\n\r\n")
        if end:
            (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            if len(body) >= int(length.partition(b":")[2]):
                return request
        received = connection.recv(65_536)
        if not received:
            raise ConnectionError("the request was cut")
        request += received
