"""
A scripted server without a socket: it answers through `httpx.MockTransport`, in memory.

    server = MemoryServer()
    server.fail("runs/log-batch", Fault.answer(503))
    runqueue.Client(server.uri, transport=server.transport)

Rules of this file: what a request meets is decided by the same scripts as in `support.proxy`. A connection that is cut
is the error that httpx's own transport raises.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import httpx

from support.proxy import ScriptedServer
from support.recorder import Reply, Request

URI = "http://mlflow.test:5000"


class MemoryServer(ScriptedServer):
    """Has no life to begin or to end; a script may not hold or delay a request."""

    def __init__(self, default: Reply | None = None) -> None:
        super().__init__(default)
        self.transport = httpx.MockTransport(self._answer)

    @property
    def uri(self) -> str:
        """What a client takes as its tracking URI."""
        return URI

    async def _answer(self, sent: httpx.Request) -> httpx.Response:
        with self._changed:
            request = Request(
                serial=len(self._requests),
                connection=0,
                method=sent.method,
                target=sent.url.raw_path.decode("ascii"),
                headers={name.lower(): value for name, value in sent.headers.items()},
                body=await sent.aread(),
                read_at=time.monotonic(),
            )
            self._requests.append(request)
        reply = self._respond(request)
        self._answered(request, reply)
        if reply is None:
            raise httpx.RemoteProtocolError("Server disconnected without sending a response.")
        headers = [*reply.headers, ("Content-Length", str(len(reply.body)))]
        # Bytes, as they are: httpx refuses in text what a server may well send.
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        return httpx.Response(reply.status, headers=raw, stream=_Body(reply))


class _Body(httpx.AsyncByteStream):
    def __init__(self, reply: Reply) -> None:
        self._reply = reply

    async def __aiter__(self) -> AsyncIterator[bytes]:
        sent = self._reply.body[: self._reply.cut_at]
        for at in range(0, len(sent), 65_536):
            yield sent[at : at + 65_536]
        if self._reply.cut_at is not None:
            raise httpx.RemoteProtocolError("peer closed connection without sending complete message body")
