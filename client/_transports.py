"""
What carries a request: a connection of httpcore's, aiohttp's transport, or, where the environment names proxies, httpx's
client.

Bare connections where no proxy is set: what the client adds (cookies, redirects, hooks, the choice of a proxy) is not
wanted here, and costs as much as the rest; nor is httpcore's pool, with httpx's transport around it. Among proxies the
client chooses as its users know it.

Rules of this file: it carries, and judges nothing; a response is closed when its block ends, whatever ends it.
"""

from __future__ import annotations

import importlib.util
import ssl
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol, TypeAlias
from urllib.request import getproxies

import anyio
import httpcore
import httpx

from runqueue._asyncio_network import connect
from runqueue._config import Config
from runqueue._tls import default_context, verification

_KEPT: Final = 5.0
"""Seconds for which an idle connection is used again; httpx's own default, below what servers keep them for."""
PORTS: Final = {"http": 80, "https": 443}
_FAULTS: Final = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
)

_Connection: TypeAlias = httpcore.AsyncHTTPConnection | httpcore.AsyncHTTP11Connection


class Carrier(Protocol):
    """Sends requests, each once."""

    library: str
    """"httpx" or "aiohttp"."""

    def send(self, request: httpx.Request) -> AbstractAsyncContextManager[httpx.Response]:
        """The answer, its body not read yet; the request is given up when the block ends."""
        ...

    async def aclose(self) -> None: ...


def carrier(config: Config, url: httpx.URL) -> Carrier:
    """
    Args:
        config: The client's.
        url: Of the server; requests go nowhere else.

    Raises:
        Exception: Of httpx's, the ssl module's or the system's: the settings, or the environment, are not usable.
    """
    secured = url.scheme == "https"
    fast = config.transport != "httpx" and importlib.util.find_spec("httpx_aiohttp") is not None
    pool = httpx.Limits(max_connections=config.max_workers, max_keepalive_connections=config.max_workers)
    verify: Any = verification(url.host) if secured else True
    if config.proxies and getproxies():
        return _ByClient(fast, verify=verify, limits=pool)
    if secured and verify is True:
        verify = default_context()  # once; and httpx, not to look at the environment, would pass over SSL_CERT_FILE
    # To plain http no certificate is shown, and loading those to compare it with takes 40 ms.
    if not fast:
        return _ByConnections(url, verify if secured else None)
    from httpx_aiohttp import AiohttpTransport

    return _ByOne(AiohttpTransport(limits=pool, verify=verify if secured else False, trust_env=config.proxies))


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
    async def send(self, request: httpx.Request) -> AsyncGenerator[httpx.Response, None]:
        response = await self._client.send(request, stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()


class _ByOne:
    """aiohttp's, whose pool finds a connection at once."""

    library = "aiohttp"

    def __init__(self, transport: httpx.AsyncBaseTransport) -> None:
        self._transport = transport

    @asynccontextmanager
    async def send(self, request: httpx.Request) -> AsyncGenerator[httpx.Response, None]:
        response = await self._transport.handle_async_request(request)
        try:
            await _keep_location(response)
            yield response
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        await self._transport.aclose()


class _ByConnections:
    """
    httpcore's connections, one for each request that is under way at once. Its pool looks at every connection, and asks
    the system about it, twice a request: with eight, half of a request's CPU.
    """

    library = "httpx"

    def __init__(self, url: httpx.URL, context: ssl.SSLContext | None) -> None:
        self._origin = httpcore.Origin(url.raw_scheme, url.raw_host, url.port or PORTS[url.scheme])
        self._context = context
        self._idle: list[_Connection] = []  # the one used last comes first: the others may close

    def __repr__(self) -> str:
        return f"<_ByConnections {self._origin} idle={len(self._idle)}>"

    async def _connection(self, host: str) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.has_expired():  # the server may have closed it meanwhile
                return connection
            await connection.aclose()
        if self._context is not None:
            return httpcore.AsyncHTTPConnection(self._origin, self._context, _KEPT)
        return httpcore.AsyncHTTP11Connection(self._origin, await connect(host, self._origin.port), _KEPT)

    @asynccontextmanager
    async def send(self, request: httpx.Request) -> AsyncGenerator[httpx.Response, None]:
        connection: _Connection | None = None
        url = request.url
        try:
            connection = await self._connection(url.host)
            answer = await connection.handle_async_request(
                httpcore.Request(
                    request.method,
                    httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=request.headers.raw,
                    content=request.stream,
                )
            )
            try:
                response = httpx.Response(answer.status, headers=answer.headers, stream=_Body(answer))
                await _keep_location(response)
                yield response
            finally:
                await answer.aclose()
        except _FAULTS as error:
            raise getattr(httpx, type(error).__name__)(str(error)) from error  # the names are the same
        finally:
            if connection is not None and connection.is_idle() and not connection.is_closed():
                self._idle.append(connection)
            elif connection is not None:
                with anyio.CancelScope(shield=True):
                    await connection.aclose()

    async def aclose(self) -> None:
        while self._idle:
            await self._idle.pop().aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._answer.aiter_stream()


async def _keep_location(response: httpx.Response) -> None:
    # Away from httpx, which would take a Location that it cannot read for a broken connection.
    if "location" in response.headers:
        response.extensions["location"] = response.headers.pop("location")
