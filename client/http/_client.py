"""
Sends requests to one server: signed, each within one deadline, its redirects followed, its answer read.

    sign -> send -> (the reused connection broke: send again) -> (redirect: send there) -> read the answer
         -> (401: once more, with fresh credentials)
"""

# Rules of this file: one attempt a call; one deadline an attempt; nothing is sent to another origin. An error that
# leaves this file carries neither the library's own error nor its frames, because those hold the request's headers.
#
# A connection that has served a request before may be closed by the server just when the next one is sent. No transport
# says whether a connection was used before, so the rule is: once this server has answered anything, a connection that
# breaks before the head of an answer is taken for a used one, and the request is sent once more at once, unless a
# repetition could do harm (create-run). The second break counts. To repeat one that broke for another reason costs one
# request at the beginning of an outage.

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence, Sized
from importlib.metadata import PackageNotFoundError, version
from typing import Final

import anyio
import httpx

from runqueue.errors import ConfigError, UnavailableError, UnexpectedAnswerError
from runqueue.http._body import Body, Streamed
from runqueue.http._failures import describe, is_broken_connection, is_transport_failure
from runqueue.http._response import Answer, origin, read_answer, redirect_target, stream_of
from runqueue.http._signing import Outgoing, Signer
from runqueue.http._transports import Route, make_route
from runqueue.queueing import StoreError
from runqueue.settings._config import Config
from runqueue.settings._redaction import SECRET_HEADER_NAME, proxy_user_info, redact, redact_uri, secrets_in_header

MAX_REDIRECTS: Final = 5
"""As many in a row are followed, if they keep method, body and origin."""
_KEPT_URLS: Final = 64
"""Parsing one takes longer than the rest of a request's preparation; those with a query come and go."""
_NETWORK_VARIABLES: Final = frozenset(
    ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
)


class HttpClient:
    """
    Args:
        config: The client's settings.
        root: The server's URL, without user info.
        signers: Add what the server asks for, in this order; the last one has the last word.
        count: Called with the body of each request that is sent.
        connections: Requests at once, at most.
        foreign: Whether it is another server than the tracking server: nothing that identifies us there is sent to it.
        borrows: Whether a transport of the user's own is left open by `aclose`.

    Raises:
        ConfigError: No transport can be made of the settings and the environment.
    """

    def __init__(
        self,
        config: Config,
        root: str,
        signers: Sequence[Signer],
        count: Callable[[Sized], None],
        *,
        connections: int,
        foreign: bool = False,
        borrows: bool = False,
    ) -> None:
        self._signers = tuple(signers)
        self._count = count
        self._timeout = config.seconds_per_request()
        self._urls: dict[str, httpx.URL] = {}
        self._given_headers = {} if foreign else config.headers or {}
        self._headers = _merged(self._given_headers)
        self._has_answered = False
        self._replaced: list[Route] = []  # with requests under way; closed when the last of them ends
        self._closes = not borrows or isinstance(config.transport, str)
        try:
            self._route = make_route(config, httpx.URL(root), connections, foreign=foreign)
        except ConfigError:
            raise
        except Exception as error:  # of httpx's, of the ssl module's, of the operating system's
            named = sorted(name for name in os.environ if name.upper() in _NETWORK_VARIABLES)
            # The words of another error may quote a URI that cannot be read, and its password.
            words = f": {redact_uri(self.redact(str(error)))}" if isinstance(error, OSError) else ""
            raise ConfigError(
                f"no HTTP client can be made; a variable of the environment ({', '.join(named)}) may be at fault:"
                f" {type(error).__name__}{words}"
            ) from None

    def __repr__(self) -> str:
        return f"<HttpClient by {self._route.library}>"

    @property
    def library(self) -> str:
        """The library that sends: "aiohttp" or "httpx", or the name of the class of the user's own transport."""
        return self._route.library

    async def aclose(self) -> None:
        """Close the connections; a request under way is cut off."""
        routes, self._replaced = [self._route, *self._replaced], []
        if self._closes:
            for route in routes:
                await route.transport.aclose()

    async def exchange(
        self,
        method: str,
        url: str,
        body: Body = b"",
        *,
        cap: int,
        headers: Mapping[str, str | None] | None = None,
        repeatable: bool | None = None,
        renews: bool = True,
    ) -> Answer:
        """
        Send one request, and read its answer.

        Args:
            method: Of HTTP.
            url: Of this server.
            body: A stream is bounded by the time that each of its pieces takes, not by that of all of them.
            cap: Bytes of the answer, decompressed.
            headers: In place of those that go with every request; None: not that one.
            repeatable: Whether the server may get the request twice. None: unless it is a POST.
            renews: Whether a 401 is answered once with fresh credentials.

        Raises:
            StoreError: No answer came, or one that cannot be read.
        """
        failure: StoreError
        given = headers or {}
        repeats = method != "POST" if repeatable is None else repeatable
        try:
            answer = await self._attempt(method, url, body, cap, given, fresh=False, repeats=repeats)
            if answer.status == 401 and self._signers and renews:
                answer = await self._attempt(method, url, body, cap, given, fresh=True, repeats=repeats)
            return answer
        except StoreError as error:
            failure = self.bare(error)
        except (anyio.get_cancelled_exc_class(), KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            # A defect, here, in a library or in the user's own transport, such as `pytest.fail()`, which is no Exception.
            # The frames of the error hold the request's headers.
            failure = self.bare(StoreError(f"the request failed unexpectedly: {_place(error)}: {error}"))
        raise failure

    def bare(self, error: StoreError) -> StoreError:
        """The error without frames and causes, and without the secrets of ours that a server has echoed."""
        error.args = (self.redact(str(error)),)
        error.code = error.code and self.redact(error.code)
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)

    def redact(self, text: str) -> str:
        """The text without our secrets. Takes its time: for errors only."""
        # Known secrets come first: a pattern may match only a part of one.
        names, secrets = proxy_user_info(os.environ.items())
        for name, value in self._given_headers.items():
            secrets += secrets_in_header(value) if SECRET_HEADER_NAME.search(name) else (value,)
        text = redact(text, secrets, names)
        for signer in self._signers:
            text = signer.redact(text)
        return text

    async def _attempt(
        self,
        method: str,
        url: str,
        body: Body,
        cap: int,
        headers: Mapping[str, str | None],
        *,
        fresh: bool,
        repeats: bool,
    ) -> Answer:
        failure: StoreError
        signed = False
        try:
            # Not `fail_after`, a generator that costs a tenth of what is ours in a request.
            with anyio.move_on_after(self._timeout) as scope:

                def extend_deadline(more: float) -> None:
                    scope.deadline = anyio.current_time() + self._timeout + more

                if isinstance(body, Streamed):
                    body.on_progress = extend_deadline
                request = await self._signed(method, url, body, headers, fresh=fresh)
                signed = True
                return await self._follow(request, body, cap, repeats)
            what = "no answer" if signed else "no credentials to be had"
            failure = UnavailableError(f"{what} within {self._timeout:g} s", ambiguous=signed)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            failure = UnavailableError(f"no request can be made of it: {error}", retriable=False)
        except Exception as error:
            if not is_transport_failure(error):
                raise
            failure = describe(error)
        # Raised outside of the handlers, so that the cause and its frames do not go with it.
        raise body.file_error if isinstance(body, Streamed) and body.file_error is not None else failure

    async def _signed(
        self, method: str, url: str, body: Body, headers: Mapping[str, str | None], *, fresh: bool
    ) -> Outgoing:
        merged = {**self._headers, **headers} if headers else self._headers
        if isinstance(body, Streamed):
            merged = {**merged, "Content-Length": str(len(body))}
        # Signers do not see a file: they would read all of it.
        shown = body if isinstance(body, bytes) else body.in_memory
        request = Outgoing(method, url, shown, {name: value for name, value in merged.items() if value is not None})
        for signer in self._signers:
            await signer.sign(request, fresh=fresh)
        return request

    async def _follow(self, outgoing: Outgoing, body: Body, cap: int, repeats: bool) -> Answer:
        url = self._parsed(outgoing.url)
        redirects = 0
        while redirects < MAX_REDIRECTS:
            route = self._route
            route.under_way += 1
            try:
                try:
                    response = await self._send(route, outgoing, url, body)
                except Exception as error:
                    if not (repeats and self._has_answered and is_broken_connection(error)):
                        raise
                    repeats = False
                    self._replace(route)
                    continue
                self._has_answered = True
                try:
                    target = redirect_target(response, url, outgoing.method)
                    if target is None:
                        return await read_answer(response, cap)
                finally:
                    await stream_of(response).aclose()
                url = target
                redirects += 1
            finally:
                route.under_way -= 1
                if route in self._replaced and not route.under_way:
                    self._replaced.remove(route)
                    with anyio.CancelScope(shield=True):
                        await route.transport.aclose()
        raise UnexpectedAnswerError(f"more than {MAX_REDIRECTS} redirects, the last to {origin(url)}")

    async def _send(self, route: Route, outgoing: Outgoing, url: httpx.URL, body: Body) -> httpx.Response:
        headers = [(name.encode("ascii"), value.encode("ascii")) for name, value in outgoing.headers.items()]
        headers += route.headers
        # `httpx.Request` would add these two, at the cost of three looks into its headers.
        names = {name.lower() for name, _ in headers}
        if b"host" not in names:
            headers.insert(0, (b"Host", url.netloc))
        if b"content-length" not in names and (body or outgoing.method != "GET"):
            headers.append((b"Content-Length", b"%d" % len(body)))
        self._count(body)
        if isinstance(body, bytes):
            request = httpx.Request(outgoing.method, url, headers=headers, stream=httpx.ByteStream(body))
            request.read()  # so that a transport finds the content in memory
        else:
            request = httpx.Request(outgoing.method, url, headers=headers, content=body)
        try:
            return await route.transport.handle_async_request(request)
        except UnicodeError as error:  # of a library that cannot read the answer's head
            raise UnavailableError(f"the answer cannot be read: {error}", ambiguous=True) from None

    def _replace(self, route: Route) -> None:
        """
        Let further requests go by new connections: a server or proxy that has closed one idle connection has mostly closed
        the others, too. Requests that are under way by the old ones end there. A transport of the user's own stays.
        """
        if self._route is route and route.make is not None:
            self._route = route.renewed()
            self._replaced.append(route)

    def _parsed(self, text: str) -> httpx.URL:
        url = self._urls.get(text)
        if url is None:
            url = httpx.URL(text)
            if len(self._urls) < _KEPT_URLS:
                self._urls[text] = url
        return url


def _place(error: BaseException) -> str:
    """The class of an error, and where it was raised: what is left of a traceback that is not passed on."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + where


def _merged(given: Mapping[str, str]) -> dict[str, str]:
    """The headers of every request: the user's before ours, except for those that say how the body is written."""
    ours = {
        "Content-Type": "application/json",
        # A server that compresses all the same is understood, but asked not to: see `read_answer`.
        "Accept-Encoding": "identity",
    }
    names = {name.lower(): name for name in (*given, *ours)}  # names that differ in capitals only are one
    found = {"User-Agent": _user_agent()} if "user-agent" not in names else {}
    return found | {name: value for name, value in {**given, **ours}.items() if names[name.lower()] == name}


def _user_agent() -> str:
    try:
        return f"runqueue/{version('runqueue')}"
    except PackageNotFoundError:  # vendored, or run from a zip file
        return "runqueue"
