"""
A forward proxy on 127.0.0.1 that opens tunnels (CONNECT), as a proxy does for https.

Rules of this file: one tunnel a connection, to where the test says and not to where the client does, so that a name
that cannot be resolved is as good as any. The threads and the sockets are ended by handle.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import TYPE_CHECKING

from support.mlflow_server import HOST

if TYPE_CHECKING:
    from typing_extensions import Self


class TunnelProxy:
    """
    Opens tunnels. A context manager.

    Args:
        port: Where every tunnel leads to, on 127.0.0.1.
        answer: The status line in place of a tunnel, e.g. "407 Proxy Authentication Required".
    """

    def __init__(self, port: int, answer: str | None = None) -> None:
        self.requests: list[list[str]] = []
        """The lines of each CONNECT request."""
        self._port = port
        self._answer = answer
        self._listener = socket.create_server((HOST, 0))
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._open: list[socket.socket] = []

    @property
    def netloc(self) -> str:
        """Host and port."""
        return f"{HOST}:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()
        with contextlib.suppress(OSError):
            socket.create_connection(self._listener.getsockname(), 1).close()  # wakes accept()
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for connection in self._open:
            connection.close()

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            self._open.append(connection)
            if self._stopped.is_set():
                return
            with contextlib.suppress(OSError):
                self._open_tunnel(connection)

    def _open_tunnel(self, connection: socket.socket) -> None:
        connection.settimeout(10)
        head = b""
        while b"\r\n\r\n" not in head:
            received = connection.recv(65_536)
            if not received:
                return
            head += received
        self.requests.append(head.decode().strip().split("\r\n"))
        if self._answer is not None:
            connection.sendall(f"HTTP/1.1 {self._answer}\r\nContent-Length: 0\r\n\r\n".encode())
            connection.shutdown(socket.SHUT_RDWR)
            return
        server = socket.create_connection((HOST, self._port), 10)
        self._open.append(server)
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        for source, target in ((connection, server), (server, connection)):
            thread = threading.Thread(target=_pass_on, args=(source, target), daemon=True)
            self._threads.append(thread)
            thread.start()


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        source.settimeout(None)
        while received := source.recv(65_536):
            target.sendall(received)
        target.shutdown(socket.SHUT_WR)
