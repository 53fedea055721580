"""
MLflow's REST API over httpx.

Rules of this file: one attempt a call; one deadline an attempt; an answer is read up to a cap, counted after
decompression; nothing is ever sent to another origin. An error that leaves this file carries neither the library's own
error nor its frames, because those hold the request's headers.
"""

from __future__ import annotations

import os
import re
import ssl
import time
import traceback
import zlib
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final
from urllib.parse import urlencode, urlsplit, urlunsplit

import anyio
import httpx

from runqueue.errors import ConfigError, UnavailableError, UnexpectedAnswerError
from runqueue.http._body import Body, Streamed
from runqueue.http._credentials import Credentials
from runqueue.http._signing import Outgoing, Signer
from runqueue.http._transports import PORTS, Reply, carrier
from runqueue.queueing import Limits, Scope, StoreError
from runqueue.settings._config import Config
from runqueue.settings._redaction import SECRET_HEADER_NAME, proxy_user_info, redact, redact_uri, secrets_in_header
from runqueue.stores._protocol import SMALL, Endpoint, Traffic
from runqueue.wire._answer import judge
from runqueue.wire._limits import MLFLOW_LIMITS

_NETWORK_VARIABLES: Final = frozenset(
    ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
)

MAX_REDIRECTS: Final = 5
"""As many in a row are followed, if they keep method, body and origin."""
_KEPT_URLS: Final = 64
"""Parsing one takes longer than the rest of a request's preparation; those with a query come and go."""
_KEEPS_METHOD: Final = frozenset((307, 308))
_REFUSAL: Final = re.compile(r"ALERT_(?:\w*CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED|HANDSHAKE_FAILURE|DECRYPT_ERROR)")
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class HttpStore:
    """
    Args:
        config: The client's.
        uri: http(s), with or without a path; user info in it is moved to the header.
        traffic: Counts the requests.
        signers: Add what the server asks for, in this order. None: MLflow's credentials, see `Credentials`.
        limits: Of the server.
        connections: Requests at once. None: `max_workers`.
        foreign: Not the tracking server: nothing of what identifies us there is sent to it.
    """

    def __init__(
        self,
        config: Config,
        uri: str,
        traffic: Traffic,
        *,
        signers: Sequence[Signer] | None = None,
        limits: Limits = MLFLOW_LIMITS,
        connections: int | None = None,
        foreign: bool = False,
    ) -> None:
        parts = urlsplit(uri)
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
        self.root = bare.rstrip("/")
        """What the URI of every request to it begins with."""
        self._base = self.root + "/api/2.0/mlflow/"
        self._config = config
        self._signers = (Credentials(uri, config.token),) if signers is None else tuple(signers)
        if foreign:
            self._signers = ()
        self._limits = limits
        self._timeout = config.seconds_per_request()
        self._traffic = traffic
        self._urls: dict[str, httpx.URL] = {}
        self._given_headers = {} if foreign else config.headers or {}
        self._headers = _merged(self._given_headers)
        try:
            self._carrier = carrier(config, httpx.URL(self._base), connections or config.max_workers, foreign=foreign)
        except Exception as error:  # of httpx's, of the ssl module's, of the operating system's
            named = sorted(name for name in os.environ if name.upper() in _NETWORK_VARIABLES)
            # Of a URI that cannot be read, as a proxy's may be, the words of others quote the pieces.
            words = f": {redact_uri(self._redact(str(error)))}" if isinstance(error, OSError) else ""
            raise ConfigError(
                f"no HTTP client can be made; a variable of the environment ({', '.join(named)}) may be at fault:"
                f" {type(error).__name__}{words}"
            ) from None

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def transport(self) -> str:
        """The library that sends: "aiohttp" or "httpx"."""
        return self._carrier.library

    def __repr__(self) -> str:
        return f"<HttpStore {self._base}>"

    async def aclose(self) -> None:
        await self._carrier.aclose()

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `Store.call`. A 401 is answered once, with fresh credentials."""
        url = self._base + endpoint.path
        if query:
            url += "?" + urlencode(query)
        return await self.judged(endpoint.method, url, body, cap=endpoint.cap)

    async def judged(
        self,
        method: str,
        url: str,
        body: Body = b"",
        *,
        cap: int = SMALL,
        headers: Mapping[str, str | None] | None = None,
        empty: bool = False,
    ) -> dict[str, Any]:
        """
        One attempt, and MLflow's answer.

        Args:
            method: Of HTTP.
            url: Of this server.
            body: A stream is bounded by the time that each of its pieces takes, not by that of all of them.
            cap: Bytes of the answer.
            headers: In place of those that go with every request; None: not that one.
            empty: Whether a 200 with nothing in it is an answer, too.

        Raises:
            StoreError: See `Store.call`.
        """
        answer = await self.exchange(method, url, body, cap=cap, headers=headers)
        return {} if empty and answer.status == 200 and not answer.body else self.judge(answer)

    def judge(self, answer: Answer) -> dict[str, Any]:
        """
        MLflow's answer, if it is one that says "done".

        Raises:
            StoreError: It is not.
        """
        failure: StoreError
        try:
            return judge(
                answer.status,
                answer.body,
                content_type=answer.headers.get("content-type", ""),
                retry_after=answer.headers.get("retry-after", ""),
                now=time.time(),
                redact=self._redact,
            )
        except StoreError as error:
            failure = self._bare(error)
        raise failure

    async def exchange(
        self,
        method: str,
        url: str,
        body: Body = b"",
        *,
        cap: int = SMALL,
        headers: Mapping[str, str | None] | None = None,
    ) -> Answer:
        """The same, and whatever answer comes."""
        failure: StoreError
        given = headers or {}
        try:
            answer = await self._exchange(method, url, body, cap, given, fresh=False)
            if answer.status == 401 and self._signers:
                answer = await self._exchange(method, url, body, cap, given, fresh=True)
            return answer
        except StoreError as error:
            failure = self._bare(error)
        except Exception as error:  # a defect, here or in a library: its frames hold the request's headers
            failure = self._bare(StoreError(f"the request failed unexpectedly: {_place(error)}: {error}"))
        raise failure

    def beside(self, connections: int) -> HttpStore:
        """Another one of the same server, with connections of its own and the same credentials."""
        return HttpStore(self._config, self.root, self._traffic, signers=self._signers, connections=connections)

    def elsewhere(self, url: str, connections: int) -> HttpStore:
        """See `foreign`."""
        return HttpStore.foreign(self._config, url, self._traffic, connections)

    @classmethod
    def foreign(cls, config: Config, url: str, traffic: Traffic, connections: int) -> HttpStore:
        """Of the server of this URL, which is not to know who we are."""
        place = urlsplit(url)
        return cls(config, f"{place.scheme}://{place.netloc}", traffic, connections=connections, foreign=True)

    async def text(self, endpoint: Endpoint) -> tuple[int, str]:
        """Status and text of what is not MLflow's JSON, for a diagnosis. Raises a StoreError where nothing came."""
        failure: StoreError
        try:
            answer = await self._exchange(
                endpoint.method, self._base + endpoint.path, b"", endpoint.cap, {}, fresh=False
            )
            return answer.status, answer.body.decode(errors="replace")
        except StoreError as error:
            failure = self._bare(error)
        raise failure

    def _bare(self, error: StoreError) -> StoreError:
        """The error without the frames and causes it came with, and without what a server has echoed of our secrets."""
        error.args = (self._redact(str(error)),)
        error.code = error.code and self._redact(error.code)
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)

    def _redact(self, text: str) -> str:
        """For errors only: it takes its time. What is known as a whole comes first, then what only looks like it."""
        names, secrets = proxy_user_info(os.environ.items())
        for name, value in self._given_headers.items():
            secrets += secrets_in_header(value) if SECRET_HEADER_NAME.search(name) else (value,)
        text = redact(text, secrets, names)
        for signer in self._signers:
            text = signer.redact(text)
        return text

    async def _exchange(
        self, method: str, url: str, body: Body, cap: int, headers: Mapping[str, str | None], *, fresh: bool
    ) -> Answer:
        failure: StoreError
        signed = False
        try:
            with anyio.fail_after(self._timeout) as scope:

                def beat(more: float) -> None:
                    scope.deadline = anyio.current_time() + self._timeout + more

                if isinstance(body, Streamed):
                    body.beat = beat
                request = await self._signed(method, url, body, headers, fresh=fresh)
                signed = True
                return await self._follow(request, body, cap)
        except TimeoutError:
            what = "no answer" if signed else "no credentials to be had"
            failure = UnavailableError(f"{what} within {self._timeout:g} s", ambiguous=signed)
        except (httpx.TransportError, ssl.SSLError) as error:  # httpx lets those pass that come while it reads
            failure = _describe(error)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, UnicodeError) as error:
            failure = UnavailableError(f"no request can be made of it: {error}", retriable=False)
        except Exception as error:
            if not _from_aiohttp(error):
                raise
            failure = _describe(error)
        # Outside of the handlers: neither the cause nor its frames go with it.
        raise body.fault if isinstance(body, Streamed) and body.fault is not None else failure

    async def _signed(
        self, method: str, url: str, body: Body, headers: Mapping[str, str | None], *, fresh: bool
    ) -> Outgoing:
        merged = {**self._headers, **headers} if headers else self._headers
        if isinstance(body, Streamed):
            merged = {**merged, "Content-Length": str(len(body))}
        # A file is not shown to those who sign: they would read all of it.
        shown = body if isinstance(body, bytes) else body.held
        request = Outgoing(method, url, shown, {name: value for name, value in merged.items() if value is not None})
        for signer in self._signers:
            await signer.sign(request, fresh=fresh)
        return request

    async def _follow(self, outgoing: Outgoing, body: Body, cap: int) -> Answer:
        url = self._urls.get(outgoing.url)
        if url is None:
            url = httpx.URL(outgoing.url)
            if len(self._urls) < _KEPT_URLS:
                self._urls[outgoing.url] = url
        for _ in range(MAX_REDIRECTS):
            self._traffic.count(body)
            async with self._carrier.send(outgoing.method, url, outgoing.headers, body) as reply:
                if 300 <= reply.status < 400:
                    url = _redirected(reply, url, outgoing.method)
                    continue
                return Answer(reply.status, reply.headers, await _read(reply, cap))
        raise UnexpectedAnswerError(f"more than {MAX_REDIRECTS} redirects, the last to {_origin(url)}")


class Answer:
    """What came, whatever it is."""

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


def _place(error: Exception) -> str:
    """The class of an error, and where it was raised: what is left of a traceback that is not passed on."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + where


def _merged(given: Mapping[str, str]) -> dict[str, str]:
    """The headers of every request: the user's before ours, but for those that say what the body is, and may be."""
    ours = {
        "Content-Type": "application/json",
        # A server that compresses all the same is understood, but asked not to: see `_read`.
        "Accept-Encoding": "identity",
    }
    names = {name.lower(): name for name in (*given, *ours)}  # those that differ in capitals only are one
    found = {"User-Agent": _user_agent()} if "user-agent" not in names else {}
    return found | {name: value for name, value in {**given, **ours}.items() if names[name.lower()] == name}


def _user_agent() -> str:
    try:
        return f"runqueue/{version('runqueue')}"
    except PackageNotFoundError:  # vendored, or run from a zip file
        return "runqueue"


def _redirected(reply: Reply, url: httpx.URL, method: str) -> httpx.URL:
    """
    Where a redirect leads, if it may be followed.

    Raises:
        UnexpectedAnswerError: It would turn the POST into a GET, or carry headers and body to another origin.
    """
    status = reply.status
    try:
        target = url.join(reply.headers["location"])
    except (KeyError, httpx.InvalidURL):
        raise UnexpectedAnswerError(f"{status}: a redirect that does not say where to") from None
    if _origin(target) != _origin(url):
        raise UnexpectedAnswerError(
            f"{status}: a redirect to another origin, {_origin(target)}; nothing was sent there."
            " If that is the server, set the tracking URI to it"
        )
    if status not in _KEEPS_METHOD and method != "GET":
        raise UnexpectedAnswerError(f"{status}: a redirect to {target.path}, which would turn the request into a GET")
    return target


def _origin(url: httpx.URL) -> str:
    return f"{url.scheme}://{url.host}:{url.port or PORTS.get(url.scheme)}"


async def _read(reply: Reply, cap: int) -> bytes:
    """
    The body, decompressed, up to `cap` bytes.

    Not by httpx's own decoders: they inflate whatever one read brings, a thousandfold where somebody means it.

    Raises:
        UnexpectedAnswerError: It is larger, or encoded in a way that was not asked for.
        UnavailableError: It was cut.
    """
    coding = reply.headers.get("content-encoding", "identity").strip().lower() or "identity"
    if coding not in ("identity", "gzip", "deflate"):
        raise UnexpectedAnswerError(f"{reply.status}: an answer in the coding {coding!r}", ambiguous=True)
    inflate = None if coding == "identity" else zlib.decompressobj(47 if coding == "gzip" else 15)
    body = bytearray()
    async for chunk in reply.chunks:
        try:
            body += chunk if inflate is None else inflate.decompress(chunk, cap + 1 - len(body))
        except zlib.error as error:
            raise UnexpectedAnswerError(f"an answer that is no {coding}: {error}", ambiguous=True) from None
        if len(body) > cap:
            raise UnexpectedAnswerError(f"{reply.status}: an answer too large, more than {cap:,} bytes", ambiguous=True)
    if inflate is not None and not inflate.eof:
        raise UnavailableError(f"the answer was cut after {len(body):,} bytes", ambiguous=True)
    return bytes(body)


def _describe(error: Exception) -> StoreError:
    text = str(error) or type(error).__name__
    origin = error if _from_aiohttp(error) else error.__cause__  # the cause where httpx's client carries over aiohttp
    if origin is not None and _from_aiohttp(origin):
        # httpx-aiohttp calls every lost connection a ConnectTimeout; only aiohttp's own class tells if it ever stood.
        unsent = any(each.__name__ == "ClientConnectorError" for each in type(origin).__mro__)
    else:
        unsent = isinstance(error, _UNSENT)
    fault = _tls_fault(error)
    # A server that asks for a certificate refuses only after TLS 1.3's handshake, when the request is on its way.
    if fault is not None and (unsent or _REFUSAL.search(str(fault))):
        text = getattr(fault, "verify_message", None) or str(fault)
        return UnavailableError(f"TLS: {text}", retriable=False, scope=Scope.STORE)
    if unsent:
        return UnavailableError(f"cannot connect: {text}")
    return UnavailableError(f"the connection broke: {text}", ambiguous=True)


def _from_aiohttp(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "aiohttp"


def _tls_fault(error: BaseException | None) -> ssl.SSLError | None:
    """What TLS complained of, if it was more than an end of the connection; waiting does not mend a certificate."""
    found = None
    while error is not None:
        # Not aiohttp's own classes, which only look like it: what they come from is further down.
        if isinstance(error, ssl.SSLError) and not _from_aiohttp(error):
            found = error
        error = error.__cause__ or error.__context__
    # Servers that go down in the middle of a handshake end so; they come back.
    return None if isinstance(found, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) else found
