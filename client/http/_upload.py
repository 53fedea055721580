"""The types that uploads share: what is sent, and how much of it has been sent."""

# Rules of this file: it imports the standard library alone. The artifact calls load it in the caller's thread, where
# anyio and httpx are not loaded.

from __future__ import annotations

from typing import Final, Protocol

CHUNK: Final = 256 * 1024
"""Bytes that are read at once; a file that is no larger is sent whole, without a stream."""


class Meter:
    """Counts what is uploaded, for the progress bar; and shows that an upload is alive."""

    __slots__ = ("heartbeats", "sent")

    def __init__(self) -> None:
        self.sent = 0
        """Bytes, without those that will be sent again."""
        self.heartbeats = 0

    def add(self, count: int) -> None:
        """Count bytes as sent; the call is a heartbeat, too."""
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
