"""
Proxies of the environment: which one a server is reached through, and https through the tunnel of one, over sockets.
http through a proxy is in `test_credentials`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from runqueue.errors import StoreError, UnavailableError
from runqueue.http import _tls
from runqueue.http._proxies import proxy_for
from support.mlflow_server import HOST, free_port
from support.store_calls import call
from support.tls_server import TlsServer
from support.tunnel import TunnelProxy

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
        ("//example.com", [], ["http://host", "http://example.com"]),
        ("?", [], ["http://host"]),
        ("u:p@example.com", [], ["http://example.com", "http://a.example.com"]),
        ("xn--a", [], ["http://host"]),
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


# -- https through a tunnel ------------------------------------------------------------------------------------------

NAME = "mlflow.invalid"
"""A host that only the proxy can reach."""
BOTH = pytest.mark.parametrize("transport", ["aiohttp", "httpx"])


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TlsServer]:
    """An https server of that name, whose authority the client trusts."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv(_tls.SERVER_CERT, str(tmp_path / "ca.pem"))
    with TlsServer(authority.issue_cert(NAME)) as server:
        yield server


def port_of(server: TlsServer) -> int:
    """Where the server listens."""
    return int(server.uri.rpartition(":")[2])


def failure(**settings: Any) -> UnavailableError:
    """The error of one call."""
    with pytest.raises(StoreError) as caught:
        call(f"https://{NAME}", **settings)
    assert type(caught.value) is UnavailableError
    return caught.value


@BOTH
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("user_info", ["", "user:p%40ss@"])
def test_https_goes_through_a_tunnel(
    secured: TlsServer, monkeypatch: pytest.MonkeyPatch, transport: str, variable: str, user_info: str
) -> None:
    """The proxy gets its own credentials and sees no other header; the server sees none of the proxy's."""
    with TunnelProxy(port_of(secured)) as proxy:
        monkeypatch.setenv(variable, f"http://{user_info}{proxy.netloc}")
        call(f"https://{NAME}", transport=transport, token="t0ken")
    ((first, *headers),) = proxy.requests
    assert first == f"CONNECT {NAME}:443 HTTP/1.1"
    given = [line.partition(": ")[2] for line in headers if line.lower().startswith("proxy-authorization:")]
    assert given == (["Basic dXNlcjpwQHNz"] if user_info else [])
    assert "t0ken" not in "".join(headers)
    (request,) = secured.requests
    assert request.startswith(b"POST /api/2.0/mlflow/runs/log-batch HTTP/1.1\r\n")
    assert b"t0ken" in request and b"proxy" not in request.lower()


@BOTH
@pytest.mark.parametrize("answer", ["407 Proxy Authentication Required", "403 Forbidden", "502 Bad Gateway"])
def test_a_proxy_that_opens_no_tunnel_has_sent_nothing(
    monkeypatch: pytest.MonkeyPatch, transport: str, answer: str
) -> None:
    """Nothing can have been stored; its status is named, its password is not."""
    with TunnelProxy(free_port(), answer) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://user:s3cret-word@{proxy.netloc}")
        error = failure(transport=transport)
    assert (error.retriable, error.ambiguous) == (True, False)
    assert "cannot connect" in str(error) and answer[:3] in str(error)
    assert "s3cret" not in str(error)


@BOTH
def test_a_proxy_that_is_down_is_an_outage(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    """It may come up again."""
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:s3cret-word@{HOST}:{free_port()}")
    error = failure(transport=transport)
    assert (error.retriable, error.ambiguous) == (True, False)
    assert "cannot connect" in str(error) and "s3cret" not in str(error)


@BOTH
def test_a_certificate_is_verified_through_the_tunnel(monkeypatch: pytest.MonkeyPatch, transport: str) -> None:
    """A proxy that answers in the server's place is found out."""
    with TlsServer(trustme.CA().issue_cert(NAME)) as other, TunnelProxy(port_of(other)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://{proxy.netloc}")
        error = failure(transport=transport)
    assert not error.retriable and "TLS" in str(error)


@BOTH
@pytest.mark.parametrize("excepted", ["settings", "NO_PROXY"])
def test_a_proxy_can_be_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transport: str, excepted: str
) -> None:
    """By `proxies=False`, and by NO_PROXY."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv(_tls.SERVER_CERT, str(tmp_path / "ca.pem"))
    monkeypatch.setenv("HTTPS_PROXY", f"http://{HOST}:{free_port()}")
    if excepted == "NO_PROXY":
        monkeypatch.setenv("NO_PROXY", HOST)
    with TlsServer(authority.issue_cert(HOST)) as server:
        call(server.uri, transport=transport, proxies=excepted == "NO_PROXY")
        assert server.connections == 1
