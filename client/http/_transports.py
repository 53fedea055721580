"""
What carries a request: a connection (`_connection`), a session of aiohttp's, or, where the environment names proxies,
httpx's client.

No client of httpx's where no proxy is set: what it adds (cookies, redirects, hooks, the choice of a proxy) is not
wanted here, and costs as much as the rest; nor are its requests, responses and transports. Among proxies the client
chooses as its users know it.

Rules of this file: it carries, and judges nothing; a response is closed when its block ends, whatever ends it.
"""

from __future__ import annotations

import importlib.util
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.request import getproxies

import anyio.lowlevel
import httpx

from runqueue.http._connection import KEPT, Connection, Content, connect
from runqueue.http._tls import default_context, verification
from runqueue.settings._config import Config

if TYPE_CHECKING:
    import aiohttp

PORTS: Final = {"http": 80, "https": 443}


class Reply:
    """
    An answer whose body is not read yet.

    Args:
        headers: By their names in lower case.
        chunks: Of the body, as they came.
    """

    __slots__ = ("chunks", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], chunks: AsyncIterable[bytes]) -> None:
        self.status = status
        self.headers = headers
        self.chunks = chunks


class Carrier(Protocol):
    """Sends requests, each once."""

    library: str
    """"httpx" or "aiohttp"."""

    def send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: Content
    ) -> AbstractAsyncContextManager[Reply]:
        """The answer; the request is given up when the block ends."""
        ...

    async def aclose(self) -> None: ...


def carrier(config: Config, url: httpx.URL, most: int, *, foreign: bool = False) -> Carrier:
    """
    Args:
        config: The client's.
        url: Of the server; requests go nowhere else.
        most: Connections at once.
        foreign: Not the tracking server: what MLflow's variables say of its certificate, and of ours, is not for it.

    Raises:
        Exception: Of httpx's, the ssl module's or the system's: the settings, or the environment, are not usable.
    """
    secured = url.scheme == "https"
    fast = config.transport != "httpx" and importlib.util.find_spec("httpx_aiohttp") is not None
    pool = httpx.Limits(max_connections=most, max_keepalive_connections=most)
    verify: Any = verification(url.host) if secured and not foreign else True
    if config.proxies and getproxies():
        return _ByClient(fast, verify=verify, limits=pool)
    if secured and verify is True:
        verify = default_context()  # once; and httpx, not to look at the environment, would pass over SSL_CERT_FILE
    # To plain http no certificate is shown, and loading those to compare it with takes 40 ms.
    context = verify if secured else None
    return _BySession(context, most) if fast else _ByConnections(url, context)


class _ByClient:
    def __init__(self, fast: bool, **settings: Any) -> None:
        self.library = "aiohttp" if fast else "httpx"
        kind: type[httpx.AsyncClient] = httpx.AsyncClient
        if fast:
            from httpx_aiohttp import HttpxAiohttpClient as kind
        self._client = kind(
            timeout=None, follow_redirects=False, event_hooks={"response": [_keep_location]}, **settings
        )

    @asynccontextmanager
    async def send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: Content
    ) -> AsyncGenerator[Reply, None]:
        # Not by `build_request`: with cookies, params and defaults to merge, it takes a quarter of the whole request.
        request = httpx.Request(method, url, headers=headers, content=body or None)
        response = await self._client.send(request, stream=True)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        try:
            kept = {name: value for name, value in response.extensions.items() if name == "location"}
            # Not by `aiter_raw`, whose accounts and chunks nobody wants.
            yield Reply(response.status_code, {**response.headers, **kept}, response.stream)
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()


class _BySession:
    """
    aiohttp's, whose parser and writer are in C.

    Args:
        context: For https.
        most: Connections at once.
    """

    library = "aiohttp"

    def __init__(self, context: ssl.SSLContext | None, most: int) -> None:
        import aiohttp
        import yarl

        self._refused = aiohttp.InvalidURL
        # Of text, aiohttp makes a URL that differs in what it quotes, and a signature may count.
        self._url = partial(yarl.URL, encoded=True)
        self._context = context
        self._most = most
        self._session: aiohttp.ClientSession | None = None

    def _begun(self) -> aiohttp.ClientSession:
        """In the running loop, which a session belongs to."""
        import aiohttp

        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._most, keepalive_timeout=KEPT, ssl=True if self._context is None else self._context
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(),  # none: one deadline guards the whole attempt
            auto_decompress=False,
        )
        # It would send what is idempotent (a PUT, say) a second time by itself, and nobody would know.
        session._retry_connection = False
        return session

    @asynccontextmanager
    async def send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: Content
    ) -> AsyncGenerator[Reply, None]:
        session = self._session
        if session is None:
            session = self._session = self._begun()
        _ascii(headers.items())
        try:
            target = self._url(str(url))
        except ValueError as error:  # stricter than httpx is
            raise httpx.InvalidURL(str(error)) from error
        try:
            async with session.request(
                method,
                target,
                headers=headers,
                skip_auto_headers=("Content-Type",),  # not said what it is, where nobody has said so
                data=body or None,
                allow_redirects=False,
            ) as answer:
                yield Reply(answer.status, _headers(answer.raw_headers), answer.content.iter_any())
        except self._refused as error:
            raise httpx.InvalidURL(str(error)) from error

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()


class _ByConnections:
    """
    Connections of our own, one for each request that is under way at once. httpcore's pool looks at every connection,
    and asks the system about it, twice a request: with eight, half of a request's CPU.

    Args:
        url: Of the server.
        context: For https.
    """

    library = "httpx"

    def __init__(self, url: httpx.URL, context: ssl.SSLContext | None) -> None:
        self._host, self._port = url.raw_host.decode("ascii"), url.port or PORTS[url.scheme]
        self._context = context
        self._idle: list[Connection] = []  # the one used last comes first: the others may close

    def __repr__(self) -> str:
        return f"<_ByConnections {self._host}:{self._port} idle={len(self._idle)}>"

    async def _connection(self) -> Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.fresh:
                return connection
            connection.abort()
        return await connect(self._host, self._port, self._context)

    @asynccontextmanager
    async def send(
        self, method: str, url: httpx.URL, headers: Mapping[str, str], body: Content
    ) -> AsyncGenerator[Reply, None]:
        fields = _ascii(headers.items())
        given = {name.lower() for name, _ in fields}
        if b"host" not in given:
            fields.insert(0, (b"Host", url.netloc))
        if isinstance(body, bytes) and (body or method != "GET") and b"content-length" not in given:
            fields.append((b"Content-Length", b"%d" % len(body)))
        connection = await self._connection()
        rests = False
        try:
            answer = await connection.send(method, url.raw_path, fields, body)
            yield Reply(answer.status_code, _headers(answer.headers), connection)
            rests = connection.rest()
        finally:
            if rests:
                self._idle.append(connection)
            else:
                connection.abort()

    async def aclose(self) -> None:
        while self._idle:
            self._idle.pop().abort()
        await anyio.lowlevel.checkpoint()  # in which the sockets are closed


def _ascii(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
    """
    Raises:
        UnicodeError: There is a header that is not.
    """
    return [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Those of an answer; of one that came more than once the values are joined, as RFC 9110, section 5.3, has it."""
    found: dict[str, str] = {}
    for name, value in raw:
        key, text = _text(name).lower(), _text(value)
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _text(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


async def _keep_location(response: httpx.Response) -> None:
    # Away from httpx, which would take a Location that it cannot read for a broken connection.
    if "location" in response.headers:
        response.extensions["location"] = response.headers.pop("location")
