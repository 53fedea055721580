"""
Transports: what sends one HTTP request and gives its answer, under the interface of `httpx.AsyncBaseTransport`.

    "aiohttp", "auto"   httpx-aiohttp's transport: aiohttp parses and writes HTTP in C
    "httpx"             httpx's own transport, over httpcore
    the user's own      any `httpx.AsyncBaseTransport`: a MockTransport, a Unix socket, a recorder
"""

# Rules of this file: transports are made here and nowhere else; each leads to one server, or through one proxy. A
# transport sends a request once: it repeats nothing, follows no redirect, keeps no cookie, sets no time-out.

from __future__ import annotations

import asyncio
import os
import ssl
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx

from runqueue.errors import ConfigError
from runqueue.http._proxies import proxy_for
from runqueue.http._tls import default_context, verification
from runqueue.settings._config import Config

if TYPE_CHECKING:
    import aiohttp

PORTS: Final = {"http": 80, "https": 443}
"""Default ports, by scheme."""

_KEEP_ALIVE: Final = 5.0
"""Seconds for which an idle connection is used again; httpx's own default, below what servers keep them for."""

_LONGEST_LINE: Final = 65_536
"""Bytes of a header, or of an answer's first line. aiohttp's own 8,190 are too few for some proxies' headers."""

_WITHOUT_CONNECTIONS: Final = (httpx.MockTransport, httpx.ASGITransport)
"""Transports that any number of clients, loops and processes may share."""

_users: dict[int, tuple[weakref.ref[httpx.AsyncBaseTransport], int, Any]] = {}
"""Of each transport of a user's own, by its id: the process and the event loop that use it."""


class Route:
    """
    How requests reach a server.

    Args:
        transport: Sends them.
        library: The library behind it, or the name of the user's own class.
        headers: What each request carries for the proxy, and not for the server.
        make: Makes another transport like it. None: the transport is the user's own.
    """

    __slots__ = ("headers", "library", "make", "transport", "under_way")

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        library: str,
        headers: list[tuple[bytes, bytes]] | None = None,
        make: Callable[[], httpx.AsyncBaseTransport] | None = None,
    ) -> None:
        self.transport = transport
        self.library = library
        self.headers = headers or []
        self.make = make
        self.under_way = 0
        """Requests that use the transport now."""

    def __repr__(self) -> str:
        return f"<Route {self.library} under_way={self.under_way}>"

    def renewed(self) -> Route:
        """The same route by a transport without connections."""
        assert self.make is not None, "a transport of the user's own cannot be made again"
        return Route(self.make(), self.library, self.headers, self.make)


def make_route(config: Config, url: httpx.URL, connections: int, *, foreign: bool = False) -> Route:
    """
    The route that the settings and the environment choose.

    Args:
        config: The client's settings.
        url: Of the server; requests go to no other.
        connections: At once, at most.
        foreign: Whether it is another server than the tracking server. MLflow's variables for certificates and the
            user's own transport are not for it, and a URL is sent to it letter by letter, as it may be signed: aiohttp
            would quote it anew.

    Raises:
        ConfigError: The user's own transport belongs to another process.
        Exception: Of httpx's, the ssl module's or the system's: the settings, or the environment, are not usable.
    """
    if not isinstance(config.transport, str) and not foreign:
        return _users_own(config.transport)
    proxy = proxy_for(url) if config.proxies else None
    context = _tls_context(url, proxy, foreign=foreign)
    socks = proxy is not None and proxy.url.scheme.startswith("socks")  # which aiohttp does not speak
    if config.transport == "httpx" or foreign or socks:
        limits = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        over_httpcore = partial(httpx.AsyncHTTPTransport, verify=context, limits=limits, proxy=proxy)
        return Route(over_httpcore(), "httpx", make=over_httpcore)
    from httpx_aiohttp import AiohttpTransport

    over_aiohttp = partial(
        AiohttpTransport, verify=context, proxy=proxy, client=partial(_session, context, connections)
    )
    # aiohttp shows a proxy's headers to the proxy of an https server alone.
    headers = proxy.headers.raw if proxy is not None and url.scheme == "http" else None
    return Route(over_aiohttp(), "aiohttp", headers, over_aiohttp)


def _users_own(transport: httpx.AsyncBaseTransport) -> Route:
    """
    Raises:
        ConfigError: A parent of this process has used the transport: an answer to one process would reach the other. Or
            another client uses it: its connections belong to that client's event loop.
    """
    name = type(transport).__qualname__
    if isinstance(transport, _WITHOUT_CONNECTIONS):
        return Route(transport, name)
    loop = asyncio.get_running_loop()
    reference, process, user = _users.get(id(transport), (None, 0, loop))
    if reference is not None and reference() is transport:
        if process != os.getpid():
            raise ConfigError(
                f"the transport of transport= ({name}) was used by the process that this one was forked from; make a"
                " client with a transport of its own here"
            )
        if user is not loop and not user.is_closed():
            raise ConfigError(
                f"the transport of transport= ({name}) is in use by another client; give each client one of its own"
            )
    forget = partial(_users.pop, id(transport), None)
    _users[id(transport)] = (weakref.ref(transport, lambda _: forget()), os.getpid(), loop)
    return Route(transport, name)


def _tls_context(url: httpx.URL, proxy: httpx.Proxy | None, *, foreign: bool) -> ssl.SSLContext:
    if url.scheme == "https":
        verify = True if foreign else verification(url.host)
        if isinstance(verify, ssl.SSLContext):
            return verify
    elif proxy is None or proxy.url.scheme != "https":
        # No TLS is spoken. The transports would load the certificates all the same, which takes 40 ms.
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return default_context()


def _session(context: ssl.SSLContext, connections: int) -> aiohttp.ClientSession:
    """For httpx-aiohttp's transport, which calls this in the loop that the session belongs to."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=connections, keepalive_timeout=_KEEP_ALIVE, ssl=context),
        cookie_jar=aiohttp.DummyCookieJar(),
        max_line_size=_LONGEST_LINE,
        max_field_size=_LONGEST_LINE,
        skip_auto_headers=("Content-Type",),
        middlewares=(_send_once,),
    )


async def _send_once(
    request: aiohttp.ClientRequest, send: Callable[[aiohttp.ClientRequest], Awaitable[aiohttp.ClientResponse]]
) -> aiohttp.ClientResponse:
    """
    Keep aiohttp from sending a GET or PUT a second time by itself after its connection broke: it would be counted
    nowhere. aiohttp repeats after two classes of errors, which become their common base here.
    """
    import aiohttp

    try:
        response = await send(request)
    except aiohttp.ClientConnectorError:  # never repeated, and a kind of ClientOSError
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError(str(error)) from error
    if response.reason is not None and not response.reason.isascii():
        # A server may write it in latin-1. httpx-aiohttp encodes it as UTF-8, and would fail. Nothing here reads it.
        response.reason = None
    return response
