"""
What an upload is, for the code that sends it and for the code that shows how far it is.

Rules of this file: no import but of the standard library. The artifacts' calls load it in the caller's thread, where
anyio and httpx are not loaded.
"""

from __future__ import annotations

from typing import Final, Protocol

CHUNK: Final = 256 * 1024
"""Bytes that are read at once; a file of no more is sent as it is, without a stream."""


class Meter:
    """What is uploaded: for showing it, and as a sign of life."""

    __slots__ = ("heartbeats", "sent")

    def __init__(self) -> None:
        self.sent = 0
        """Bytes, without those that will be sent again."""
        self.heartbeats = 0

    def add(self, count: int) -> None:
        self.sent += count
        self.heartbeats += 1


class Readable(Protocol):
    """An open file. `read` blocks, and may be called from any thread."""

    def read(self, offset: int, count: int) -> bytes:
        """
        Exactly *count* bytes from *offset* on.

        Raises:
            StoreError: The file cannot be read, or has changed since it was opened.
        """
        ...
