"""
What a request is before it is sent, and who adds to it what makes a server accept it.

Rules of this file: no implementation. Whatever may block (a token's callable, a plugin, a request for an OAuth token)
runs in a worker thread, so that no deadline of the loop waits for it.
"""

from __future__ import annotations

from typing import Protocol

import attrs


@attrs.define(eq=False)
class Outgoing:
    """One request; a signer changes `headers`, and may replace `url` by another of the same origin."""

    method: str
    url: str
    body: bytes = attrs.field(repr=False)
    headers: dict[str, str] = attrs.field(repr=False)


class Signer(Protocol):
    """One source of headers; a store asks its signers in turn, a later one has the last word."""

    async def sign(self, request: Outgoing, *, fresh: bool) -> None:
        """
        Add to the headers.

        Args:
            request: Changed in place.
            fresh: The server refused what was sent before: nothing that was kept from then is good enough.

        Raises:
            AuthError: There are no credentials to be had; says why, and shows none.
        """
        ...

    def redact(self, text: str) -> str:
        """The text with `***` for whatever of this signer's secrets a server has put into it."""
        ...
