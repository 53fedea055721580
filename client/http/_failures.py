"""What a transport's error means: whether the request may have reached the server, and whether waiting can help."""

# Rules of this file: no error's class is imported from aiohttp, which is not imported with transport="httpx"; classes
# are known by their names. httpx-aiohttp maps every lost connection to ConnectTimeout. aiohttp's own exception, the
# cause, tells whether the connection was ever established.

from __future__ import annotations

import re
import ssl
from typing import Final

import httpx

from runqueue.errors import UnavailableError
from runqueue.queueing import Scope, StoreError

_UNSENT: Final = (ConnectionRefusedError, httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
_UNSENT_BY_AIOHTTP: Final = frozenset(("ClientConnectorError", "ClientHttpProxyError"))
_BROKEN: Final = (ConnectionError, httpx.ReadError, httpx.WriteError, httpx.CloseError, httpx.RemoteProtocolError)
_REFUSAL: Final = re.compile(r"ALERT_(?:\w*CERTIFICATE|UNKNOWN_CA|ACCESS_DENIED|HANDSHAKE_FAILURE|DECRYPT_ERROR)")


def is_transport_failure(error: Exception) -> bool:
    """Whether it tells of a connection, as opposed to a defect."""
    # httpx lets errors of TLS pass that come while it reads, httpx-aiohttp those of aiohttp's parser, and a transport
    # of the user's own may let pass what a socket raises.
    members = getattr(error, "exceptions", ())  # an ExceptionGroup, which Python 3.10 does not have
    return (
        isinstance(error, (httpx.TransportError, OSError))
        or _is_aiohttps(error)
        or any(map(is_transport_failure, members))
    )


def describe(error: Exception) -> StoreError:
    """
    The same in the words and classes of a store.

    Args:
        error: Of which `is_transport_failure` holds.
    """
    text = str(error) or type(error).__name__
    unsent = _is_unsent(error)
    fault = _tls_fault(error)
    # A server that asks for a certificate refuses only after TLS 1.3's handshake, when the request is on its way.
    if fault is not None and (unsent or _REFUSAL.search(str(fault))):
        text = getattr(fault, "verify_message", None) or str(fault)
        return UnavailableError(f"TLS: {text}", retriable=False, scope=Scope.STORE)
    if unsent:
        return UnavailableError(f"cannot connect: {text}")
    return UnavailableError(f"the connection broke: {text}", ambiguous=True)


def is_broken_connection(error: Exception) -> bool:
    """Whether a connection that had been established ended, by itself or by what it brought."""
    own = _aiohttps_own(error)
    if own is None:
        return isinstance(error, _BROKEN)
    names = _class_names(own)
    return "ClientConnectionError" in names and not names & {*_UNSENT_BY_AIOHTTP, "ServerTimeoutError"}


def _is_unsent(error: Exception) -> bool:
    own = _aiohttps_own(error)
    return isinstance(error, _UNSENT) if own is None else bool(_class_names(own) & _UNSENT_BY_AIOHTTP)


def _aiohttps_own(error: Exception) -> BaseException | None:
    return next((each for each in (error, error.__cause__) if each is not None and _is_aiohttps(each)), None)


def _is_aiohttps(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] == "aiohttp"


def _class_names(error: BaseException) -> set[str]:
    return {each.__name__ for each in type(error).__mro__}


def _tls_fault(error: BaseException | None) -> ssl.SSLError | None:
    """What TLS complained of, if it was more than an end of the connection; waiting does not mend a certificate."""
    found = None
    while error is not None:
        # aiohttp's own classes only look like it; what they come from is further down.
        if isinstance(error, ssl.SSLError) and not _is_aiohttps(error):
            found = error
        error = error.__cause__ or error.__context__
    # A server that goes down in the middle of a handshake ends it so, and will be back.
    return None if isinstance(found, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)) else found
