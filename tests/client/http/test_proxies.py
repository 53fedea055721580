"""Which proxy a server is reached through, by the environment."""

from __future__ import annotations

import httpx
import pytest

from runqueue.http._proxies import proxy_for

PROXY = "http://proxy.invalid:3128"
HTTPS = "http://other.invalid:3128"


def chosen(url: str, **settings: str) -> str | None:
    """The URL of the proxy for this server."""
    proxy = proxy_for(httpx.URL(url), settings)
    return None if proxy is None else str(proxy.url)


@pytest.mark.parametrize(
    ("url", "settings", "expected"),
    [
        ("http://host", {}, None),
        ("http://host", {"http": PROXY, "https": HTTPS}, PROXY),
        ("https://host", {"http": PROXY, "https": HTTPS}, HTTPS),
        ("https://host", {"http": PROXY}, None),
        ("https://host", {"all": PROXY}, PROXY),
        ("https://host", {"https": HTTPS, "all": PROXY}, HTTPS),
        ("http://host", {"http": "", "all": PROXY}, PROXY),
        ("http://host", {"http": "proxy.invalid:3128"}, PROXY),
        ("http://host", {"all": "socks5://proxy.invalid:1080"}, "socks5://proxy.invalid:1080"),
        ("http://host", {"no": "*"}, None),
    ],
)
def test_the_servers_scheme_chooses_the_proxy(url: str, settings: dict[str, str], expected: str | None) -> None:
    """ALL_PROXY comes last; a proxy without a scheme is one of http."""
    assert chosen(url, **settings) == expected


@pytest.mark.parametrize(
    ("no_proxy", "excepted", "others"),
    [
        ("", [], ["http://host"]),
        (" , ,", [], ["http://host"]),
        ("*", ["http://host", "https://10.1.2.3:5000", "http://[::1]"], []),
        ("other, *", ["http://host"], []),
        ("host", ["http://host", "https://host:5000", "http://a.host"], ["http://ahost", "http://host.a"]),
        ("HOST", ["http://host"], []),
        ("example.com", ["http://example.com", "http://a.b.example.com"], ["http://badexample.com"]),
        (".example.com", ["http://a.example.com", "http://a.b.example.com"], ["http://example.com"]),
        ("a.invalid, example.com ,b.invalid", ["http://example.com", "http://b.invalid"], ["http://c.invalid"]),
        ("example.com:5000", ["http://example.com:5000", "http://a.example.com:5000"], ["http://example.com"]),
        (":5000", ["http://example.com:5000"], ["http://example.com"]),
        ("localhost", ["http://localhost:5000"], ["http://a.localhost"]),
        ("10.1.2.3", ["http://10.1.2.3", "https://10.1.2.3:5000"], ["http://10.1.2.4", "http://1.10.1.2.3.invalid"]),
        ("10.1.2.3:5000", ["http://10.1.2.3:5000"], ["http://10.1.2.3"]),
        ("10.0.0.0/8", ["http://10.0.0.0"], ["http://10.1.2.3"]),
        ("::1", ["http://[::1]:5000"], ["http://[::2]"]),
        ("[::1]", ["http://[::1]:5000"], ["http://[::2]"]),
        ("http://example.com", ["http://example.com"], ["https://example.com", "http://a.example.com"]),
        ("all://example.com", ["http://example.com", "https://example.com"], ["http://a.example.com"]),
        ("http://*.example.com", ["http://a.example.com"], ["http://example.com", "https://a.example.com"]),
        ("http://*example.com", ["http://a.example.com", "http://example.com"], ["http://badexample.com"]),
        ("http://", ["http://host"], ["https://host"]),
        ("https://10.1.2.3", ["https://10.1.2.3"], ["http://10.1.2.3"]),
    ],
)
def test_no_proxy_excepts_servers(no_proxy: str, excepted: list[str], others: list[str]) -> None:
    """By host, domain, port, scheme or `*`. Of a network in CIDR only the first address counts, as with httpx."""
    found = {url: chosen(url, all=PROXY, no=no_proxy) for url in (*excepted, *others)}
    assert found == dict.fromkeys(excepted) | dict.fromkeys(others, PROXY)


@pytest.mark.parametrize(
    ("proxy", "header"),
    [
        ("http://proxy.invalid", None),
        ("http://user:pass@proxy.invalid", "Basic dXNlcjpwYXNz"),
        ("user:p%40ss@proxy.invalid:80", "Basic dXNlcjpwQHNz"),
        ("http://user@proxy.invalid", "Basic dXNlcjo="),
        ("https://user:pass@proxy.invalid", "Basic dXNlcjpwYXNz"),
    ],
)
def test_user_info_becomes_a_header(proxy: str, header: str | None) -> None:
    """Neither the proxy's URL nor its text keeps the password."""
    found = proxy_for(httpx.URL("http://host"), {"all": proxy})
    assert found is not None
    assert found.headers.get("proxy-authorization") == header
    assert "user" not in str(found.url) and "pass" not in repr(found)


def test_socks_takes_user_info_in_a_way_of_its_own() -> None:
    """The protocol has no headers."""
    found = proxy_for(httpx.URL("http://host"), {"all": "socks5://user:pass@proxy.invalid"})
    assert found is not None and found.raw_auth == (b"user", b"pass")
    assert "pass" not in repr(found)


@pytest.mark.parametrize("proxy", ["foo://host", "http://host:port", "no:proxy:at:all"])
def test_a_proxy_that_is_no_url_is_an_error(proxy: str) -> None:
    """Which the constructor of a client reports with the names of the variables."""
    with pytest.raises((ValueError, httpx.InvalidURL)):
        chosen("http://host", all=proxy)


def test_the_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lower-case variables as well as upper-case ones."""
    monkeypatch.setenv("https_proxy", HTTPS)
    monkeypatch.setenv("NO_PROXY", "other.invalid")
    proxy = proxy_for(httpx.URL("https://host"))
    assert proxy is not None and str(proxy.url) == HTTPS
    assert proxy_for(httpx.URL("https://other.invalid")) is None
