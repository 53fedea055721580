"""
The counting server: a raw HTTP/1.1 server for the delivery cases, in a process of its own. It does as little as it can,
so that on a small machine it leaves the cores to the client: it reads a request, counts, and answers from a table.

- `python -m benchmarks.server` prints its port as its first line, and ends when its standard input is closed, so that
  it never outlives a harness that was killed.
- `GET /counts` answers what it has counted, as JSON. Everything else is answered as MLflow's own server would: a run to
  `runs/create` and `runs/get`, `{"run_info": …}` to `runs/update`, `{}` to the rest.
- A metric is counted by its `"timestamp"` key: the bodies are not parsed.
- `--latency SECONDS` keeps each answer back for so long, on all connections at once: a slow network, not a busy server.
- A request without a Content-Length that has a body, or that it cannot read, is refused with 400 and counted as such.
"""

import argparse
import asyncio
import json
import selectors
import sys
from functools import partial
from typing import ClassVar

from attrs import Factory, asdict, define, field
from attrs.validators import ge

HOST = "127.0.0.1"


@define
class Counts:
    """What the server has received since it began."""

    requests: int = 0
    """Requests of any kind, `GET /counts` left out."""

    metrics: int = 0
    """Metric points in log-batch bodies."""

    created: int = 0
    """Requests to runs/create."""

    updated: int = 0
    """Requests to runs/update."""

    refused: int = 0
    """Requests answered with 400."""

    body_bytes: int = 0
    """Bytes of all request bodies."""


@define(eq=False)
class CountingServer:
    """Counts requests and answers them; knows nothing of sockets."""

    counts: Counts = Factory(Counts)
    latency: float = field(default=0.0, validator=ge(0.0))
    """Seconds between a request and its answer."""

    def answer(self, method: bytes, path: bytes, body: bytes | bytearray) -> bytes:
        """Count one request and return the JSON body of its answer."""
        if path == b"/counts":
            return json.dumps(asdict(self.counts)).encode()
        self.counts.requests += 1
        self.counts.body_bytes += len(body)
        if path.endswith(b"/runs/log-batch"):
            self.counts.metrics += body.count(b'"timestamp"')
            return b"{}"
        if path.endswith(b"/runs/create"):
            self.counts.created += 1
            return json.dumps({"run": _run(f"{self.counts.created:032x}", "RUNNING")}).encode()
        if path.endswith(b"/runs/update"):
            self.counts.updated += 1
            return json.dumps({"run_info": _run_info(json.loads(body)["run_id"], "FINISHED")}).encode()
        if path.endswith(b"/runs/get"):
            return json.dumps({"run": _run(f"{self.counts.created:032x}", "RUNNING")}).encode()
        return b"{}"


def _run_info(run_id: str, status: str) -> dict[str, object]:
    return {
        "run_id": run_id,
        "run_uuid": run_id,
        "run_name": "benchmark",
        "experiment_id": "0",
        "status": status,
        "start_time": 1,
        "artifact_uri": f"mlflow-artifacts:/0/{run_id}/artifacts",
        "lifecycle_stage": "active",
    }


def _run(run_id: str, status: str) -> dict[str, object]:
    return {"info": _run_info(run_id, status), "data": {}}


class HttpConnection(asyncio.BufferedProtocol):
    """
    One keep-alive connection: cuts the byte stream into requests and writes their answers in order.

    It reads into memory of its own. asyncio's usual way takes 256 kB of the system for each read and gives them back,
    or not, as its heap happens to lie: 25 page faults a batch, which cost a client on the same processor a twentieth.
    """

    _ANSWER: ClassVar[bytes] = (
        b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: %s\r\n\r\n%s"
    )

    def __init__(self, server: CountingServer) -> None:
        self._server = server
        self._chunk = memoryview(bytearray(256 * 1024))
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._chunk

    def buffer_updated(self, nbytes: int) -> None:
        self._received += self._chunk[:nbytes]
        while self._answer_next_request():
            pass

    def _answer_next_request(self) -> bool:
        """Answer the request at the head of what was received; False while it is not complete."""
        head_end = self._received.find(b"\r\n\r\n")
        if head_end < 0:
            return False
        request_line, *header_lines = bytes(self._received[:head_end]).split(b"\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (h.partition(b":") for h in header_lines)}
        try:
            method, path, _ = request_line.split(b" ")
            length = int(headers.get(b"content-length", b"0"))
            if b"transfer-encoding" in headers:
                raise ValueError("this server reads bodies by their Content-Length only")
        except ValueError:
            self._server.counts.refused += 1
            self._write(b"400 Bad Request", b"{}", close=True)
            return False
        body_start, body_end = head_end + 4, head_end + 4 + length
        if len(self._received) < body_end:
            return False
        body = self._received[body_start:body_end]
        del self._received[:body_end]
        close = headers.get(b"connection", b"").lower() == b"close"
        answer = self._server.answer(method, path.partition(b"?")[0], body)
        if self._server.latency and path != b"/counts":
            loop = asyncio.get_running_loop()
            loop.call_later(self._server.latency, partial(self._write, b"200 OK", answer, close=close))
        else:
            self._write(b"200 OK", answer, close=close)
        return True

    def _write(self, status: bytes, body: bytes, *, close: bool) -> None:
        assert self._transport is not None
        if self._transport.is_closing():
            return
        self._transport.write(self._ANSWER % (status, len(body), b"close" if close else b"keep-alive", body))
        if close:
            self._received.clear()
            self._transport.close()


async def serve(latency: float) -> None:
    """Serve on a free port of the loopback interface until standard input is closed."""
    loop = asyncio.get_running_loop()
    counting = CountingServer(latency=latency)
    listener = await loop.create_server(lambda: HttpConnection(counting), HOST, 0)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    listener.close()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server", description="The counting server.")
    parser.add_argument("--latency", type=float, default=0.0, metavar="SECONDS", help="keep each answer back")
    options = parser.parse_args()
    # epoll waits in whole milliseconds, rounded up: 2 % of a latency of 50 ms. select waits in microseconds.
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector()) if options.latency else asyncio.new_event_loop()
    try:
        loop.run_until_complete(serve(options.latency))
    finally:
        loop.close()


if __name__ == "__main__":
    main()
