"""The interface of signers: a signer adds to a request what makes the server accept it."""

# Rules of this file: no implementation. A signer runs what may block (a token's callable, a plugin, a request for an
# OAuth token) in a worker thread, so that it delays no deadline of the loop.

from __future__ import annotations

from typing import Protocol

import attrs


@attrs.define(eq=False)
class Outgoing:
    """A request before it is sent. A signer changes `headers`, and may replace `url` by one of the same origin."""

    method: str
    url: str
    body: bytes = attrs.field(repr=False)
    headers: dict[str, str] = attrs.field(repr=False)


class Signer(Protocol):
    """A source of headers. The signers of a store run one after the other; a later one may replace earlier headers."""

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """
        Add to the headers.

        Args:
            request: Changed in place.
            fresh: Whether the server has refused the last credentials, so that none may come from a cache.

        Raises:
            AuthError: No credentials can be found. The text gives the reason, and no secret.
        """
        ...

    def redact(self, text: str) -> str:
        """The text with `***` in place of this signer's secrets, which a server may have echoed."""
        ...
