"""
What carries a request: a bare transport of httpx or aiohttp, or, where the environment names proxies, httpx's client.

A bare transport where no proxy is set: what the client adds (cookies, redirects, hooks, the choice of a proxy) is not
wanted here, and costs as much as the transport itself. Among proxies the client chooses as its users know it.

Rules of this file: it carries, and judges nothing; a response is closed when its block ends, whatever ends it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Final, Protocol
from urllib.request import getproxies

import httpx

from runqueue._config import Config
from runqueue._tls import default_context, verification


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
    settings: dict[str, Any] = {"verify": verify if secured else False, "trust_env": config.proxies}
    if not fast:
        return _ByTransports(**settings)
    from httpx_aiohttp import AiohttpTransport

    return _ByOne(AiohttpTransport(limits=pool, **settings))


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


class _ByTransports:
    """
    httpx's: one for each request that is under way at once, each of one connection. httpcore looks at every connection
    of a pool, and asks the system about it, twice a request: with eight, half of a request's CPU.
    """

    library = "httpx"
    _ONE: Final = httpx.Limits(max_connections=1, max_keepalive_connections=1)

    def __init__(self, **settings: Any) -> None:
        self._settings = settings
        self._free: list[httpx.AsyncHTTPTransport] = []  # the one used last comes first: the others may close
        self._all: list[httpx.AsyncHTTPTransport] = []
        self._free.append(self._new())  # at once, for what is wrong with the settings

    def _new(self) -> httpx.AsyncHTTPTransport:
        transport = httpx.AsyncHTTPTransport(limits=self._ONE, **self._settings)
        self._all.append(transport)
        return transport

    @asynccontextmanager
    async def send(self, request: httpx.Request) -> AsyncGenerator[httpx.Response, None]:
        transport = self._free.pop() if self._free else self._new()
        try:
            response = await transport.handle_async_request(request)
            try:
                await _keep_location(response)
                yield response
            finally:
                await response.aclose()
        finally:
            self._free.append(transport)

    async def aclose(self) -> None:
        for transport in self._all:
            await transport.aclose()


async def _keep_location(response: httpx.Response) -> None:
    # Away from httpx, which would take a Location that it cannot read for a broken connection.
    if "location" in response.headers:
        response.extensions["location"] = response.headers.pop("location")
