"""
TLS: how an https server's certificate is verified, and which certificate the client shows.

MLflow's variables come first, then those of requests (the library that MLflow sends by), then SSL_CERT_FILE and
SSL_CERT_DIR, then certifi's certificates.
"""

# Rules of this file: verification is on unless a variable turns it off, and then a warning is logged. A file that
# cannot be read is an error of the constructor.

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runqueue.errors import ConfigError
from runqueue.settings import _environment as environment

if TYPE_CHECKING:
    import ssl

SERVER_CERT: Final = "MLFLOW_TRACKING_SERVER_CERT_PATH"
CLIENT_CERT: Final = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
INSECURE: Final = "MLFLOW_TRACKING_INSECURE_TLS"

BUNDLES: Final = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")
"""The first one that is set counts, as in requests, unless MLflow's own variable is set."""

_HASHED_NAME: Final = re.compile(r"[0-9a-f]{8}\.\d+")
"""The names by which OpenSSL finds a certificate in a folder."""

logger = logging.getLogger("runqueue")


def check() -> None:
    """
    Check the variables, at construction.

    Raises:
        ConfigError: One of them holds a bad value, names a file that cannot be used, or contradicts another.
    """
    insecure = environment.switch(INSECURE)
    client = environment.text(CLIENT_CERT)
    if insecure and environment.text(SERVER_CERT):
        raise ConfigError(f"the environment variables {INSECURE} and {SERVER_CERT} contradict each other; set only one")
    trusted = None if insecure else named_certificates()
    if trusted is not None:
        _context_of(*trusted)
    if client is not None:
        import ssl

        _load_client_certificate(
            client, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        )  # not httpx's, which is not imported here


def named_certificates() -> tuple[str, str] | None:
    """The variable that names the certificates to trust, and the file or folder in it."""
    for name in (SERVER_CERT, *BUNDLES):
        path = environment.text(name)
        if path is not None:
            return name, path
    return None


def verification(host: str) -> ssl.SSLContext | bool:
    """
    How to verify a server.

    Args:
        host: The server's, for the warning.

    Returns:
        A context, if a variable is set; else True, for the default.
    """
    insecure = bool(environment.switch(INSECURE))
    trusted, client = None if insecure else named_certificates(), environment.text(CLIENT_CERT)
    if insecure:
        logger.warning("%s is set: the certificate of %s is not verified", INSECURE, host)
    if not insecure and trusted is None and not client:
        return True
    context = _context_of(*trusted) if trusted is not None else default_context()
    if insecure:
        import ssl

        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if client is not None:
        _load_client_certificate(client, context)
    return context


def _context_of(variable: str, server: str) -> ssl.SSLContext:
    """A context that trusts the certificates of this file or folder, and no others."""
    import ssl

    folder = os.path.isdir(server)
    try:
        if folder and not any(_HASHED_NAME.fullmatch(name) for name in os.listdir(server)):
            # OpenSSL would report nothing now, and find no certificate once a server shows its own.
            raise OSError("no file in the folder is named by its hash, as `openssl rehash` does")
        return ssl.create_default_context(cafile=None if folder else server, capath=server if folder else None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the environment variable {variable}={server!r} names no certificates: {error}") from None


def _load_client_certificate(client: str, context: ssl.SSLContext) -> None:
    """Load the certificate that is shown to a server which asks for one."""
    import ssl

    if not Path(client).is_file():
        raise ConfigError(f"the environment variable {CLIENT_CERT}={client!r} names no file")
    try:
        context.load_cert_chain(client, password=_refuse_password)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"the environment variable {CLIENT_CERT}={client!r} names no certificate with its key: {error}"
        ) from None


def default_context() -> ssl.SSLContext:
    """httpx's own context: SSL_CERT_FILE and SSL_CERT_DIR, else certifi's certificates."""
    import httpx

    return httpx.create_ssl_context()


def _refuse_password() -> str:
    # OpenSSL would ask for the password on the terminal, and the training would wait for an answer.
    raise ValueError("the key is encrypted")
