"""
Warns of entries that a client has not sent: those that were dropped, and those that came after its last flush.
"""

# Rule of this file: no entry is counted in two warnings. A loop that goes on logging at the end of the interpreter
# causes few of them, because each counts twice as many entries as the last.

from __future__ import annotations

from runqueue.engine._reports import warn_of_dropped
from runqueue.queueing import Accumulator
from runqueue.runtime import _notices
from runqueue.settings._redaction import redact_uri


class LateEntries:
    """
    The warnings of one client.

    Args:
        uri: The tracking URI.
        accumulator: Holds what is queued.
        max_pending: The bound of the queue.
    """

    def __init__(self, uri: str, accumulator: Accumulator, max_pending: float) -> None:
        self.reported = 0  # entries that the final flush, or the end of the process, has reported as not sent
        self._uri = uri
        self._accumulator = accumulator
        self._max_pending = max_pending
        self._warned = 0  # entries in the last warning about entries that were logged after the final flush
        self._warned_drops = 0  # of those, entries that were dropped, in all warnings

    def __repr__(self) -> str:
        return f"<LateEntries reported={self.reported} unsent={self.unsent()}>"

    def unsent(self) -> int:
        """Entries that are queued or in flight."""
        counts = self._accumulator.counts()
        return counts["pending"] + counts["in_flight"]

    def warn(self) -> None:
        """Warn of entries that were logged too late to be sent, if there are more than at the last warning."""
        self.warn_of_late_drops()
        late = self.unsent() - self.reported
        if late > 0 and late >= 2 * self._warned:
            self._warned = late
            text = "the interpreter ends: %d entries were logged too late for a client of %s, and were not sent"
            _notices.warning(text, late, redact_uri(self._uri))

    def warn_of_late_drops(self) -> None:
        """Warn of entries that were dropped since the last such warning, each time for a larger count."""
        intake = self._accumulator.intake
        if intake is not None and intake.unreported_drops >= max(1, self._warned_drops):
            self._warned_drops += intake.unreported_drops
            self.warn_of_drops()

    def warn_of_drops(self) -> None:
        """Warn of entries that were dropped since the last warning of any kind."""
        if self._accumulator.intake is not None:
            warn_of_dropped(self._accumulator.intake.take_dropped(), self._max_pending)

    def warn_of_lost(self, lost: int, *, flush_ended: bool) -> None:
        """
        Warn of entries that the end of the client has left, but for those that its last flush has reported.

        Args:
            lost: The entries that were still queued.
            flush_ended: Whether the last flush has ended.
        """
        if not flush_ended:
            if lost:
                text = "the client was closed before its last flush ended: %d entries were not sent"
                _notices.warning(text, lost)
        elif lost > self.reported:
            _notices.warning("%d entries came while the client was closed, and were not sent", lost - self.reported)
