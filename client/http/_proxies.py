"""
Which proxy a server is reached through: that of the environment, as httpx, curl and requests read it.

    HTTP_PROXY, HTTPS_PROXY, ALL_PROXY      a proxy for servers of this scheme, or for all
    NO_PROXY                                servers that are reached without one, separated by commas
"""

# Rules of this file: the environment is read as httpx reads it, whose own function is private. Every row of that
# reading is in the table of tests/client/http/test_proxies.py. A URL here may hold a password: no text of an error
# quotes it.

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from urllib.request import getproxies

import httpx


def proxy_for(url: httpx.URL, settings: Mapping[str, str] | None = None) -> httpx.Proxy | None:
    """
    The proxy for requests to a server.

    Args:
        url: Of the server.
        settings: Proxies by "http", "https" and "all", and "no" for NO_PROXY. None: those of the environment, of the
            registry on Windows, of the system's settings on macOS.

    Returns:
        The proxy, its user info moved to the header Proxy-Authorization. None: the server is reached without one.

    Raises:
        ValueError, httpx.InvalidURL: The proxy's URL cannot be used.
    """
    found = getproxies() if settings is None else settings
    text = found.get(url.scheme) or found.get("all")
    if not text or _is_excepted(url, found.get("no", "")):
        return None
    given = httpx.Proxy(text if "://" in text else f"http://{text}")
    if given.auth is None or given.url.scheme.startswith("socks"):
        return given
    # Both transports send a header as it is; aiohttp's parameter for user and password is deprecated.
    user_info = base64.b64encode(":".join(given.auth).encode()).decode()
    return httpx.Proxy(given.url, headers={"Proxy-Authorization": f"Basic {user_info}"})


def _is_excepted(url: httpx.URL, no_proxy: str) -> bool:
    return any(name == "*" or _matches(url, name) for name in (each.strip() for each in no_proxy.split(",")) if name)


def _matches(url: httpx.URL, name: str) -> bool:
    """Whether an entry of NO_PROXY names the server: a URL's beginning, an address, or a domain."""
    scheme, separator, place = name.rpartition("://")
    address = _address(place)
    if address is not None:
        return scheme in ("", "all", url.scheme) and url.host == address
    try:
        entry = httpx.URL(f"{scheme or 'all'}://{place}")
        host = entry.host
    except (httpx.InvalidURL, UnicodeError):  # idna's, of what is no name
        return False
    if entry.userinfo or not (host or separator or entry.port):
        return False  # no entry in any form
    if entry.scheme not in ("all", url.scheme) or entry.port not in (None, url.port):
        return False
    # "example.com" means the domain and what is below it, ".example.com" only what is below it.
    pattern = host if separator or place.lower() == "localhost" else f"*{host}"
    if pattern in ("", "*"):
        return True
    if pattern.startswith("*."):
        return url.host.endswith(pattern[1:])
    if pattern.startswith("*"):
        return url.host == pattern[1:] or url.host.endswith("." + pattern[1:])
    return url.host == pattern


def _address(text: str) -> str | None:
    """The IP address that an entry is; of a network (10.0.0.0/8) only the address before the slash counts."""
    try:
        return str(ipaddress.ip_address(text.split("/")[0]))
    except ValueError:
        return None
