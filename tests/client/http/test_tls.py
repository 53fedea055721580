"""
What an https server is asked to prove, and what it may ask of us: real TLS on sockets of 127.0.0.1, with certificates
made for the test, through httpx and through aiohttp.
"""

from __future__ import annotations

import datetime
import logging
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

import runqueue
from runqueue.errors import ConfigError, StoreError, UnavailableError
from runqueue.http import _tls
from runqueue.settings._config import Config
from runqueue.stores._protocol import LOG_BATCH, Traffic
from runqueue.stores._rest import HttpStore
from support.mlflow_server import HOST
from support.tls_server import TlsServer

SERVER, CLIENT, INSECURE = _tls.SERVER_CERT, _tls.CLIENT_CERT, _tls.INSECURE
BOTH = pytest.mark.parametrize("transport", ["httpx", "auto"])
DAY = datetime.timedelta(days=1)


@pytest.fixture(autouse=True)
def _own_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the machine's away."""
    for name in _tls.BUNDLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    """The authority that the tests' servers are certified by."""
    return trustme.CA()


@pytest.fixture(scope="module")
def certificate(ca: trustme.CA) -> trustme.LeafCert:
    """A good one of this host."""
    return ca.issue_cert(HOST)


@pytest.fixture
def ca_file(ca: trustme.CA, tmp_path: Path) -> Path:
    """The authority's certificate, as an administrator hands it out."""
    path = tmp_path / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def trusting(ca_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable names the authority's file."""
    monkeypatch.setenv(SERVER, str(ca_file))


@pytest.fixture
def secured(certificate: trustme.LeafCert) -> Iterator[TlsServer]:
    """A server that is in order."""
    with TlsServer(certificate) as server:
        yield server


def call(uri: str, **settings: Any) -> None:
    """One call of one store."""

    async def main() -> None:
        store = HttpStore(Config(**settings), uri, Traffic())
        try:
            await store.call(LOG_BATCH, b"{}")
        finally:
            await store.aclose()

    anyio.run(main)


def failure(uri: str, **settings: Any) -> UnavailableError:
    """The error of one call."""
    with pytest.raises(StoreError) as caught:
        call(uri, **settings)
    assert type(caught.value) is UnavailableError
    return caught.value


def refused(uri: str = f"https://{HOST}:1") -> str:
    """What the constructor says; both faces say the same."""
    texts = set()
    for face in (runqueue.Client, runqueue.AsyncClient):
        with pytest.raises(ConfigError) as caught:
            face(uri)
        texts.add(str(caught.value))
    (text,) = texts
    return text


# -- the server's certificate ----------------------------------------------------------------------------------------


@BOTH
@pytest.mark.usefixtures("trusting")
def test_a_server_of_an_own_authority_is_trusted_by_a_file(secured: TlsServer, transport: str) -> None:
    """The request arrives over TLS."""
    call(secured.uri, transport=transport)
    (request,) = secured.requests
    assert request.startswith(b"POST /api/2.0/mlflow/runs/log-batch ")


@BOTH
@pytest.mark.skipif(shutil.which("openssl") is None, reason="nothing here names a file by its hash")
def test_a_server_of_an_own_authority_is_trusted_by_a_folder(
    secured: TlsServer, ca_file: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """Its files are named by their hashes, as `openssl rehash` does."""
    digest = subprocess.run(
        ["openssl", "x509", "-noout", "-subject_hash", "-in", str(ca_file)], capture_output=True, text=True, check=True
    )
    ca_file.rename(ca_file.with_name(f"{digest.stdout.strip()}.0"))
    monkeypatch.setenv(SERVER, str(ca_file.parent))
    call(secured.uri, transport=transport)
    assert len(secured.requests) == 1


@BOTH
@pytest.mark.parametrize("proxies", [True, False])
def test_the_systems_certificates_can_be_named_by_openssls_variable(
    secured: TlsServer, ca_file: Path, monkeypatch: pytest.MonkeyPatch, transport: str, proxies: bool
) -> None:
    """SSL_CERT_FILE holds where MLflow's variable is not set; also where the proxies' are passed over."""
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_file))
    call(secured.uri, transport=transport, proxies=proxies)
    assert len(secured.requests) == 1


@BOTH
def test_the_variables_of_requests_count_where_mlflows_is_not_set(
    secured: TlsServer, ca_file: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """In its order; what the first of them names is all that is trusted. It does not know of OpenSSL's."""
    other = ca_file.with_name("other.pem")
    trustme.CA().cert_pem.write_to_path(other)
    monkeypatch.setenv("SSL_CERT_FILE", str(other))
    monkeypatch.setenv("CURL_CA_BUNDLE", str(ca_file))
    call(secured.uri, transport=transport)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(other))
    assert "certificate" in str(failure(secured.uri, transport=transport))
    monkeypatch.setenv(SERVER, str(ca_file))
    call(secured.uri, transport=transport)
    assert len(secured.requests) == 2


def issued(ca: trustme.CA, kind: str) -> trustme.LeafCert:
    """A certificate with a fault."""
    now = datetime.datetime.now(datetime.timezone.utc)
    if kind == "expired":
        return ca.issue_cert(HOST, not_before=now - 2 * DAY, not_after=now - DAY)
    if kind == "wrong host":
        return ca.issue_cert("other.invalid")
    return trustme.CA().issue_cert(HOST)


@BOTH
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("expired", "certificate has expired"),
        ("wrong host", f"certificate is not valid for '{HOST}'"),
        ("unknown authority", "unable to get local issuer certificate"),
    ],
)
@pytest.mark.usefixtures("trusting")
def test_a_certificates_fault_is_named_and_not_retried(ca: trustme.CA, transport: str, kind: str, words: str) -> None:
    """Nothing was sent; waiting does not mend it."""
    with TlsServer(issued(ca, kind)) as server:
        error = failure(server.uri, transport=transport)
    assert "TLS" in str(error) and words in str(error)
    assert (error.retriable, error.ambiguous) == (False, False)
    assert server.requests == []


@BOTH
def test_a_server_of_an_own_authority_is_not_trusted_by_default(secured: TlsServer, transport: str) -> None:
    """Verification is on where no variable says otherwise."""
    error = failure(secured.uri, transport=transport)
    assert "issuer" in str(error) and not error.retriable


@BOTH
@pytest.mark.usefixtures("trusting")
def test_a_client_gives_up_at_once_and_says_why(ca: trustme.CA, transport: Any) -> None:
    """One connection, although there are 300 s for retries; the error names the fault, and everything stays queued."""
    with TlsServer(issued(ca, "expired")) as server:
        client = runqueue.Client(server.uri, transport=transport)
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError, match="certificate has expired") as caught:
            client.flush(timeout=20)
        assert server.connections == 1
        assert [failure.final for failure in caught.value.failures] == [False]
        with pytest.raises(runqueue.FlushError, match="certificate has expired"):
            client.close(timeout=20)


@BOTH
@pytest.mark.usefixtures("trusting")
def test_a_server_that_does_not_speak_tls_is_named(transport: str) -> None:
    """The scheme of the URI is wrong; waiting does not mend it."""
    with TlsServer(None) as server:
        server.after_hello = lambda connection: connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        error = failure(server.uri, transport=transport)
    assert "TLS" in str(error) and not error.retriable


@BOTH
@pytest.mark.usefixtures("trusting")
def test_a_connection_that_ends_in_the_handshake_is_no_certificates_fault(secured: TlsServer, transport: str) -> None:
    """Servers that restart behind a balancer do that: nothing was sent, and it is tried again."""
    secured.after_hello = lambda _: None
    error = failure(secured.uri, transport=transport)
    assert (error.retriable, error.ambiguous) == (True, False)


@BOTH
@pytest.mark.usefixtures("trusting")
def test_tls_that_breaks_after_the_request_is_ambiguous(secured: TlsServer, transport: str) -> None:
    """What comes cannot be decrypted; the request may have been carried out, and is tried again."""

    def garble(connection: ssl.SSLSocket) -> None:
        with socket.socket(fileno=connection.detach()) as plain:
            plain.sendall(b"\x17\x03\x03\x00\x20" + b"x" * 32)

    secured.after_request = garble
    error = failure(secured.uri, transport=transport)
    assert (error.retriable, error.ambiguous) == (True, True)


# -- the client's certificate ----------------------------------------------------------------------------------------


@pytest.fixture
def identity(ca: trustme.CA, tmp_path: Path) -> Path:
    """A client's certificate with its key."""
    path = tmp_path / "client.pem"
    ca.issue_cert("me@example.invalid", common_name="trainer").private_key_and_cert_chain_pem.write_to_path(path)
    return path


@BOTH
@pytest.mark.usefixtures("trusting")
def test_a_clients_certificate_is_shown(
    ca: trustme.CA, certificate: trustme.LeafCert, identity: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """To a server that asks for one."""
    monkeypatch.setenv(CLIENT, str(identity))
    with TlsServer(certificate, asks_for=ca) as server:
        call(server.uri, transport=transport)
    assert server.subjects == ["trainer"]


@BOTH
@pytest.mark.usefixtures("trusting")
def test_a_clients_certificate_that_is_missing_is_no_success(
    ca: trustme.CA, certificate: trustme.LeafCert, transport: str
) -> None:
    """
    The server's refusal may come after the request was written (TLS 1.3), or be lost in the connection's end: no
    request got through, and where the alert arrived it is named and not retried.
    """
    with TlsServer(certificate, asks_for=ca) as server:
        error = failure(server.uri, transport=transport)
    assert server.requests == []
    assert error.retriable is ("CERTIFICATE_REQUIRED" not in str(error))


@BOTH
def test_a_clients_certificate_goes_with_a_server_that_is_not_verified(
    ca: trustme.CA, certificate: trustme.LeafCert, identity: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    """The two variables do not exclude each other."""
    monkeypatch.setenv(CLIENT, str(identity))
    monkeypatch.setenv(INSECURE, "true")
    with TlsServer(certificate, asks_for=ca) as server:
        call(server.uri, transport=transport)
    assert server.subjects == ["trainer"]


# -- files that cannot be used ---------------------------------------------------------------------------------------


def encrypted(path: Path, leaf: trustme.LeafCert) -> None:
    """A key that only a password opens, with its certificate."""
    key = serialization.load_pem_private_key(leaf.private_key_pem.bytes(), None)
    sealed = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"s3cret"),
    )
    path.write_bytes(sealed + leaf.cert_chain_pems[0].bytes())


@pytest.mark.parametrize("variable", [SERVER, CLIENT, *_tls.BUNDLES])
@pytest.mark.parametrize("kind", ["missing", "empty", "garbage", "empty folder"])
def test_a_file_that_cannot_be_used_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, kind: str
) -> None:
    """The variable and the path are named; http has no use for it and does not mind."""
    path = tmp_path / "file.pem"
    if kind == "empty folder":
        path.mkdir()
    elif kind != "missing":
        path.write_text("garbage" if kind == "garbage" else "")
    monkeypatch.setenv(variable, str(path))
    text = refused()
    assert variable in text and str(path) in text
    runqueue.Client(f"http://{HOST}:1").close()


@pytest.mark.parametrize("kind", ["encrypted", "no key", "no certificate", "another's key"])
def test_a_clients_certificate_without_a_usable_key_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, certificate: trustme.LeafCert, kind: str
) -> None:
    """Nobody is asked for a password on the terminal."""
    path = tmp_path / "client.pem"
    shown, key = certificate.cert_chain_pems[0].bytes(), certificate.private_key_pem.bytes()
    if kind == "encrypted":
        encrypted(path, certificate)
    elif kind == "another's key":
        path.write_bytes(shown + trustme.CA().issue_cert(HOST).private_key_pem.bytes())
    else:
        path.write_bytes(shown if kind == "no key" else key)
    monkeypatch.setenv(CLIENT, str(path))
    text = refused()
    assert CLIENT in text and SERVER not in text
    assert ("encrypted" in text) is (kind == "encrypted")


# -- no verification -------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("value", ["true", "TRUE", "1"])
def test_verification_can_be_switched_off_and_one_warning_says_so(
    ca: trustme.CA, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, transport: Any, value: str
) -> None:
    """One record for a client, however many requests it makes; it names the host."""
    monkeypatch.setenv(INSECURE, value)
    caplog.set_level(logging.DEBUG)
    with TlsServer(issued(ca, "expired")) as server, runqueue.Client(server.uri, transport=transport) as client:
        for _ in range(3):
            client.log_metric("r", "m", 1.0)
            client.flush()
    assert len(server.requests) == 3
    (record,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert (record.name, record.levelno) == ("runqueue", logging.WARNING)
    assert INSECURE in record.getMessage() and HOST in record.getMessage()


@BOTH
@pytest.mark.parametrize("value", ["false", "False", "0", ""])
def test_verification_stays_on(
    secured: TlsServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, transport: str, value: str
) -> None:
    """And nothing is warned of."""
    monkeypatch.setenv(INSECURE, value)
    assert not failure(secured.uri, transport=transport).retriable
    assert [record for record in caplog.records if record.name == "runqueue"] == []


@pytest.mark.parametrize("value", ["yes", "on", "ture", "true ", "2", "-"])
def test_a_typing_error_switches_nothing_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """It is refused at once."""
    monkeypatch.setenv(INSECURE, value)
    text = refused()
    assert INSECURE in text and repr(value) in text


@pytest.mark.usefixtures("trusting")
def test_a_contradiction_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """To verify by a file, and not at all: both variables are named."""
    monkeypatch.setenv(INSECURE, "true")
    text = refused()
    assert INSECURE in text and SERVER in text
    monkeypatch.setenv(INSECURE, "false")
    runqueue.Client(f"https://{HOST}:1").close()
    monkeypatch.delenv(SERVER)
    monkeypatch.setenv(INSECURE, "true")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "missing")  # of the machine; requests does not look at it then, either
    runqueue.Client(f"https://{HOST}:1").close()
