"""
How an https server is verified: MLflow's variables, else the system's certificates.

Rules of this file: verification is on unless a variable that can be read says otherwise, and then it is said aloud. A
file that cannot be read is an error of the constructor.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runqueue import _environment as environment
from runqueue.errors import ConfigError

if TYPE_CHECKING:
    import ssl

SERVER_CERT: Final = "MLFLOW_TRACKING_SERVER_CERT_PATH"
CLIENT_CERT: Final = "MLFLOW_TRACKING_CLIENT_CERT_PATH"
INSECURE: Final = "MLFLOW_TRACKING_INSECURE_TLS"

logger = logging.getLogger("runqueue")


def check() -> None:
    """
    Say at once what is wrong with the variables.

    Raises:
        ConfigError: One of them holds a bad value, names a file that cannot be used, or contradicts another.
    """
    insecure = environment.switch(INSECURE)
    server, client = environment.text(SERVER_CERT), environment.text(CLIENT_CERT)
    if insecure and server:
        raise ConfigError(f"the environment variables {INSECURE} and {SERVER_CERT} contradict each other; set only one")
    if server or client:
        _context(insecure=bool(insecure), server=server, client=client)


def verification(host: str) -> ssl.SSLContext | bool:
    """
    What httpx takes as `verify`.

    Args:
        host: For the warning.
    """
    insecure = bool(environment.switch(INSECURE))
    server, client = environment.text(SERVER_CERT), environment.text(CLIENT_CERT)
    if insecure:
        logger.warning("%s is set: the certificate of %s is not verified", INSECURE, host)
    if not insecure and not server and not client:
        return True
    return _context(insecure=insecure, server=server, client=client)


def _context(*, insecure: bool, server: str | None, client: str | None) -> ssl.SSLContext:
    import ssl

    try:
        if server is not None:
            folder = os.path.isdir(server)
            context = ssl.create_default_context(cafile=None if folder else server, capath=server if folder else None)
        else:
            context = _default_context()
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the environment variable {SERVER_CERT}={server!r} names no certificates: {error}") from None
    if insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if client is not None:
        if not Path(client).is_file():
            raise ConfigError(f"the environment variable {CLIENT_CERT}={client!r} names no file")
        try:
            context.load_cert_chain(client, password=_refuse_to_ask)
        except (OSError, ssl.SSLError, ValueError) as error:
            raise ConfigError(
                f"the environment variable {CLIENT_CERT}={client!r} names no certificate with its key: {error}"
            ) from None
    return context


def _default_context() -> ssl.SSLContext:
    """As httpx makes it: by SSL_CERT_FILE and SSL_CERT_DIR, else certifi's certificates."""
    import httpx

    return httpx.create_ssl_context()


def _refuse_to_ask() -> str:
    # OpenSSL would ask on the terminal, and training would stand still until somebody answered.
    raise ValueError("the key is encrypted")
