"""
The upload lanes of one run. Artifacts travel in lanes of their own, so that a long upload does not hold up the rest.

An upload lane is a lane whose parent and owner is the run's lane. There are several, so that the files of one run are
uploaded side by side.
"""

# Rules of this file: no I/O. All artifacts of one path go to the same upload lane, so that the last one logged is
# stored last. A final status comes after every artifact that was queued before it: the barrier of its window.

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

from runqueue.queueing.batches._batch import STATUS
from runqueue.queueing.batches._part import Slice
from runqueue.queueing.lanes._window import Window

MAX_UPLOAD_LANES: Final = 4
"""Upload lanes of one run."""


class UploadLane(Protocol):
    """The part of a `Lane` that is used here."""

    last_closed: int

    def queue_upload(self, artifact: Slice) -> None:
        """Queue one artifact."""

    def seal_window(self) -> None:
        """Let no more records into the last window."""


LaneT = TypeVar("LaneT", bound=UploadLane)


class UploadLanes(Generic[LaneT]):
    """Spreads the artifacts of one run over its upload lanes, which are made as they are needed."""

    def __init__(self) -> None:
        self.lanes: list[LaneT] = []

    def queue_from(self, window: Window, make_lane: Callable[[], LaneT]) -> int:
        """
        Move the artifacts of a window to the upload lanes.

        Args:
            window: The window.
            make_lane: Makes an upload lane. Not kept: it holds the owner, and a cycle would keep that in memory.

        Returns:
            The number of entries.
        """
        records, window.uploads = window.uploads, []
        count = 0
        for record in records:
            for at, path in enumerate(record[1]):
                number = hash(path) % MAX_UPLOAD_LANES
                while len(self.lanes) <= number:
                    self.lanes.append(make_lane())
                self.lanes[number].queue_upload(Slice(record, at, [b""]))
                count += 1
        return count

    def set_barrier(self, window: Window) -> None:
        """If the window holds a final status, it has to wait for the artifacts that are queued by now."""
        if self.lanes and window.queues[STATUS]:
            window.barrier = [(lane, lane.last_closed) for lane in self.lanes]
            for lane in self.lanes:  # later artifacts get windows of their own: the status does not wait for them
                lane.seal_window()
