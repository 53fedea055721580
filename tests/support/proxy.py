"""
A reverse proxy that counts requests and fails them by script, and a server that only answers by script.

    with FaultyProxy(mlflow_server.uri) as proxy:
        proxy.fail("runs/create", Fault.cut_after_commit(), times=3)
        ...
        assert proxy.count("runs/create") == 1

Rules of this file: a request goes upstream at most once, also if its answer is lost. The fault of a request is chosen
when the request has been read, in the order of the script; a request without a fault is passed on.
"""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from support.recorder import RecordingServer, Reply, Request

UPSTREAM_TIMEOUT = 60.0
_HOP_BY_HOP = {"connection", "keep-alive", "host", "transfer-encoding", "content-length", "te", "trailer", "upgrade"}


@attrs.frozen(kw_only=True)
class Fault:
    """What happens to one request. Made by the class methods below; times are in seconds."""

    reply: Reply | None = None
    """The answer, in place of the upstream's."""
    forwards: bool = True
    """Whether the request goes upstream before it is answered."""
    cuts: bool = False
    """Whether the connection is cut in place of an answer."""
    cuts_body: bool = False
    """Whether the connection is cut in the middle of the answer's body."""
    delay: float = 0.0
    """Seconds to wait before anything else is done."""
    held: bool = False
    """Whether to wait, before anything else is done, until `FaultyProxy.let_go`."""
    commits_after: float | None = None
    """Seconds after its answer until the request goes upstream."""
    commits_before: str | None = None
    """The end point whose next request this request goes upstream just before."""

    @classmethod
    def passed(cls) -> Fault:
        """No fault: lets requests through before a fault begins."""
        return cls()

    @classmethod
    def cut_after_commit(cls) -> Fault:
        """The request goes upstream; the connection is cut without an answer."""
        return cls(cuts=True)

    @classmethod
    def cut_before_commit(cls) -> Fault:
        """The connection is cut; nothing goes upstream."""
        return cls(cuts=True, forwards=False)

    @classmethod
    def cut_in_body(cls) -> Fault:
        """The request goes upstream; the connection is cut in the middle of the answer's body."""
        return cls(cuts_body=True)

    @classmethod
    def answer_after_commit(
        cls, status: int, body: bytes | str | Mapping[str, Any] = b"", headers: Mapping[str, str] | None = None
    ) -> Fault:
        """The request goes upstream; this is the answer, in place of the upstream's."""
        return cls(reply=reply(status, body, headers))

    @classmethod
    def answer(
        cls,
        status: int,
        body: bytes | str | Mapping[str, Any] = b"",
        headers: Mapping[str, str] | None = None,
        *,
        cut_at: int | None = None,
    ) -> Fault:
        """This is the answer; nothing goes upstream. With `cut_at`, only so many bytes of the body are sent."""
        return cls(reply=attrs.evolve(reply(status, body, headers), cut_at=cut_at), forwards=False)

    @classmethod
    def delayed(cls, seconds: float) -> Fault:
        """The request goes upstream and is answered, after this time."""
        return cls(delay=seconds)

    @classmethod
    def hold(cls) -> Fault:
        """The request waits for `proxy.let_go()`."""
        return cls(held=True)

    @classmethod
    def late_commit(cls, seconds: float, status: int = 504) -> Fault:
        """The answer is 504, at once; the request goes upstream so many seconds later."""
        return cls(reply=reply(status), forwards=False, commits_after=seconds)

    @classmethod
    def late_commit_before(cls, endpoint: str, status: int = 504) -> Fault:
        """The answer is 504, at once; the request goes upstream just before the next one to `endpoint`."""
        return cls(reply=reply(status), forwards=False, commits_before=endpoint)


def reply(status: int, body: bytes | str | Mapping[str, Any] = b"", headers: Mapping[str, str] | None = None) -> Reply:
    """
    Args:
        status: The HTTP status.
        body: A mapping is sent as JSON and text as HTML, with their content types; bytes are sent as they are.
        headers: More headers; a content type among them stays.
    """
    fields = dict(headers or {})
    if isinstance(body, str):
        fields.setdefault("Content-Type", "text/html; charset=utf-8")
        body = body.encode()
    elif not isinstance(body, bytes):
        fields.setdefault("Content-Type", "application/json")
        body = json.dumps(body).encode()
    return Reply(status=status, headers=tuple(fields.items()), body=body)


@attrs.define(eq=False)
class _Script:
    endpoint: str
    fault: Fault
    left: int | None
    when: Callable[[Request], bool] | None

    def fits(self, request: Request) -> bool:
        return self.left != 0 and request.at(self.endpoint) and (self.when is None or self.when(request))


class FaultyProxy(RecordingServer):
    """
    Passes requests on to a server, and fails some.

    Args:
        upstream: Its URI, `http://host:port`.
    """

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self.upstream = upstream
        self._scripts: list[_Script] = []
        self._held: list[tuple[str, Request]] = []
        self._late: list[threading.Thread] = []
        self._going = threading.Event()
        self._closing = threading.Event()

    def fail(
        self,
        endpoint: str,
        fault: Fault,
        *,
        times: int | None = 1,
        when: Callable[[Request], bool] | None = None,
    ) -> None:
        """
        Script a fault.

        Args:
            endpoint: The requests concerned, e.g. "runs/log-batch"; "" is any.
            fault: What happens to these requests.
            times: How many requests it happens to. None: all from now on.
            when: Only requests for which this is true.
        """
        with self._changed:
            self._scripts.append(_Script(endpoint, fault, times, when))

    def mend(self) -> None:
        """Remove all faults that have not happened yet."""
        with self._changed:
            self._scripts.clear()

    def let_go(self) -> None:
        """Pass on the requests that `hold` has stopped."""
        self._going.set()

    def commit_held(self) -> None:
        """Pass on the requests of `late_commit_before` now, and wait for those of `late_commit`."""
        for thread in self._late:
            thread.join()
        self._release(lambda _: True)

    def close(self) -> None:
        self._closing.set()
        self._going.set()
        super().close()
        for thread in self._late:
            thread.join()

    def _respond(self, request: Request) -> Reply | None:
        self._release(request.at)
        fault = self._choose(request)
        if fault.held:
            self._going.wait()
        if self._closing.wait(fault.delay):
            return None
        answer = self._forward(request) if fault.forwards else None
        if answer is not None:
            request.answer = answer.body
        if fault.commits_after is not None:
            self._commit_later(request, fault.commits_after)
        if fault.commits_before is not None:
            with self._changed:
                self._held.append((fault.commits_before, request))
        if fault.cuts:
            return None
        chosen = fault.reply or answer
        assert chosen is not None
        return attrs.evolve(chosen, cut_at=len(chosen.body) // 2) if fault.cuts_body else chosen

    def _choose(self, request: Request) -> Fault:
        with self._changed:
            for script in self._scripts:
                if script.fits(request):
                    if script.left is not None:
                        script.left -= 1
                    return script.fault
        return Fault.passed()

    def _forward(self, request: Request) -> Reply:
        host = self.upstream.removeprefix("http://")
        # Each request has a connection of its own. A kept connection may have been closed, and a request that is sent
        # twice would be stored twice.
        connection = http.client.HTTPConnection(host, timeout=UPSTREAM_TIMEOUT)
        try:
            headers = {key: value for key, value in request.headers.items() if key not in _HOP_BY_HOP}
            connection.request(request.method, request.target, request.body or None, headers)
            answer = connection.getresponse()
            return Reply(
                status=answer.status,
                headers=tuple((key, value) for key, value in answer.getheaders() if key.lower() not in _HOP_BY_HOP),
                body=answer.read(),
            )
        finally:
            connection.close()

    def _commit_later(self, request: Request, seconds: float) -> None:
        def commit() -> None:
            if not self._closing.wait(seconds):
                self._forward(request)

        thread = threading.Thread(target=commit, daemon=True)
        self._late.append(thread)
        thread.start()

    def _release(self, due: Callable[[str], bool]) -> None:
        with self._changed:
            released = [request for endpoint, request in self._held if due(endpoint)]
            self._held = [(endpoint, request) for endpoint, request in self._held if not due(endpoint)]
        for request in released:
            self._forward(request)


class ScriptedServer(FaultyProxy):
    """
    Answers by script, without an upstream; all other requests get the same answer.

    Args:
        default: That answer. None: `{}`, MLflow's "done".
    """

    def __init__(self, default: Reply | None = None) -> None:
        super().__init__("http://nothing.invalid")
        self._default = default or reply(200, {})

    def _forward(self, request: Request) -> Reply:
        return self._default
