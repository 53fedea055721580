"""
How an https server is verified: MLflow's variables, else those of requests, which it sends by, else the system's
certificates.

Rules of this file: verification is on unless a variable that can be read says otherwise, and then it is said aloud. A
file that cannot be read is an error of the constructor.
"""

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
"""Where MLflow's own variable is not set, the first of them that is; as requests reads them."""

_HASHED: Final = re.compile(r"[0-9a-f]{8}\.\d+")
"""What OpenSSL looks for in a folder of certificates."""

logger = logging.getLogger("runqueue")


def check() -> None:
    """
    Say at once what is wrong with the variables.

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

        _present(client, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # httpx, for the default, is not imported here


def named_certificates() -> tuple[str, str] | None:
    """The variable that names the certificates to trust, and the file or folder in it."""
    for name in (SERVER_CERT, *BUNDLES):
        path = environment.text(name)
        if path is not None:
            return name, path
    return None


def verification(host: str) -> ssl.SSLContext | bool:
    """
    What httpx takes as `verify`.

    Args:
        host: For the warning.
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
        _present(client, context)
    return context


def _context_of(variable: str, server: str) -> ssl.SSLContext:
    """That trusts the certificates of this file or folder, and no others."""
    import ssl

    folder = os.path.isdir(server)
    try:
        if folder and not any(_HASHED.fullmatch(name) for name in os.listdir(server)):
            # OpenSSL looks into it only when a server has shown its certificate, and would find nothing.
            raise OSError("no file in the folder is named by its hash, as `openssl rehash` does")
        return ssl.create_default_context(cafile=None if folder else server, capath=server if folder else None)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the environment variable {variable}={server!r} names no certificates: {error}") from None


def _present(client: str, context: ssl.SSLContext) -> None:
    """Show the certificate of this file to a server that asks for one."""
    import ssl

    if not Path(client).is_file():
        raise ConfigError(f"the environment variable {CLIENT_CERT}={client!r} names no file")
    try:
        context.load_cert_chain(client, password=_refuse_to_ask)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"the environment variable {CLIENT_CERT}={client!r} names no certificate with its key: {error}"
        ) from None


def default_context() -> ssl.SSLContext:
    """As httpx makes it: by SSL_CERT_FILE and SSL_CERT_DIR, else certifi's certificates."""
    import httpx

    return httpx.create_ssl_context()


def _refuse_to_ask() -> str:
    # OpenSSL would ask on the terminal, and training would stand still until somebody answered.
    raise ValueError("the key is encrypted")
