"""What a server answers: its body, read up to a cap, and where a redirect leads."""

# Rules of this file: the cap counts after decompression. httpx's own decoders are not used, because they inflate all
# that one read brings, a thousandfold where somebody means it. A redirect never leads to another origin.

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Final

import httpx

from runqueue.errors import UnavailableError, UnexpectedAnswerError
from runqueue.http._transports import PORTS
from runqueue.queueing import StoreError
from runqueue.wire._answer import RETRIABLE

_KEEPS_METHOD: Final = frozenset((307, 308))


class Answer:
    """
    A complete answer, whatever its status.

    Args:
        status: Of HTTP.
        headers: By their names in lower case.
        body: Decompressed.
    """

    __slots__ = ("body", "headers", "status")

    def __init__(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body


async def read_answer(response: httpx.Response, cap: int) -> Answer:
    """
    Read a response to its end.

    Args:
        response: Its body is not read yet.
        cap: Bytes of the body, decompressed.

    Raises:
        UnexpectedAnswerError: The body is larger, or encoded in a way that was not asked for.
        UnavailableError: The body was cut; or it cannot be read, and the status says that the server is out of order.
    """
    status, headers = response.status_code, _plain(response.headers)
    coding = headers.get("content-encoding", "identity").strip().lower() or "identity"
    if coding not in ("identity", "gzip", "deflate"):
        raise _unreadable(status, f"an answer in the coding {coding!r}")
    inflate = None if coding == "identity" else zlib.decompressobj(47 if coding == "gzip" else 15)
    body = bytearray()
    # The stream itself: `aiter_raw` counts and chunks what it yields, and refuses a body that is in memory already.
    async for chunk in stream_of(response):
        try:
            body += chunk if inflate is None else inflate.decompress(chunk, cap + 1 - len(body))
        except zlib.error as error:
            raise _unreadable(status, f"an answer that is no {coding}: {error}") from None
        if len(body) > cap:
            raise _unreadable(status, f"an answer too large, more than {cap:,} bytes")
    if inflate is not None and not inflate.eof:
        raise UnavailableError(f"the answer was cut after {len(body):,} bytes", ambiguous=True)
    return Answer(status, headers, bytes(body))


def _unreadable(status: int, text: str) -> StoreError:
    kind = UnavailableError if status in RETRIABLE else UnexpectedAnswerError
    return kind(f"{status}: {text}", ambiguous=True)


def redirect_target(response: httpx.Response, url: httpx.URL, method: str) -> httpx.URL | None:
    """
    Where a redirect leads.

    Args:
        response: The answer.
        url: Of the request.
        method: Of the request.

    Returns:
        The URL. None: the answer is no redirect.

    Raises:
        UnexpectedAnswerError: The redirect would turn a POST into a GET, or carry headers and body to another origin.
    """
    status = response.status_code
    if not 300 <= status < 400:
        return None
    try:
        target = url.join(response.headers["location"]).copy_with(userinfo=b"")  # credentials are the signers' to add
    except (KeyError, httpx.InvalidURL):
        raise UnexpectedAnswerError(f"{status}: a redirect that does not say where to") from None
    if origin(target) != origin(url):
        raise UnexpectedAnswerError(
            f"{status}: a redirect to another origin, {origin(target)}; nothing was sent there."
            " If that is the server, set the tracking URI to it"
        )
    if status not in _KEEPS_METHOD and method != "GET":
        raise UnexpectedAnswerError(f"{status}: a redirect to {target.path}, which would turn the request into a GET")
    return target


def origin(url: httpx.URL) -> str:
    """Scheme, host and port of a URL, without user info."""
    return f"{url.scheme}://{url.host}:{url.port or PORTS.get(url.scheme)}"


def _plain(headers: httpx.Headers) -> dict[str, str]:
    """
    The headers decoded once: each look into `httpx.Headers` decodes all of them. Values of a name that came more than
    once are joined, as RFC 9110, section 5.3, has it.
    """
    encoding = headers.encoding
    found: dict[str, str] = {}
    for raw_name, raw_value in headers.raw:
        name, value = raw_name.decode(encoding).lower(), raw_value.decode(encoding)
        found[name] = f"{found[name]}, {value}" if name in found else value
    return found


def stream_of(response: httpx.Response) -> httpx.AsyncByteStream:
    """The body as it comes. It has to be closed, whatever ends the reading."""
    assert isinstance(response.stream, httpx.AsyncByteStream), "an asynchronous transport gave a synchronous stream"
    return response.stream
