"""
What the engine runs in its loop: the store, the creation of runs, the sender, the stream and the uploads.

`assembled` makes all of it for one engine, in the order in which each part needs the others, and ends it again.
"""

# Rules of this file: it is imported in the engine's thread only, as it loads anyio and tenacity. Every method runs in
# the engine's loop.

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from time import sleep
from typing import Any, Final

import anyio
import attrs
from anyio.abc import TaskGroup

from runqueue.artifacts._store import UPLOADS, Artifacts
from runqueue.engine import _progress
from runqueue.engine._creation import Creation
from runqueue.engine._delivery import Delivery, bounds_of
from runqueue.engine._reports import warn_of_dropped, warn_of_failures
from runqueue.http._upload import Meter
from runqueue.queueing import Accumulator, Failure, Lane, QueueFullError, Report, StoreError
from runqueue.queueing.batches._batch import STATUS
from runqueue.queueing.delivery._flush import Flush
from runqueue.queueing.delivery._retry import RetryPolicy
from runqueue.queueing.delivery._sender import Sender
from runqueue.queueing.delivery._stream import Stream
from runqueue.runtime import _fork, _notices
from runqueue.settings._config import Config
from runqueue.stores._protocol import Store, Traffic
from runqueue.stores._resolve import make_store

PAUSE_SECONDS: Final = 60e-6
"""
How long the engine's thread sleeps between two pieces of work. A training thread that waits for the interpreter's lock
needs half of that to wake up; without the pause, the engine's thread would take the lock again before it.
"""


class Assembly:
    """
    The parts of an engine that live in its loop; see `assembled`.

    Args:
        config: The client's settings.
        accumulator: Holds what is to be sent.
        meter: Counts the bytes of artifacts that are uploaded.
        store: Where runs are kept.
        artifacts: Where artifacts are stored.
        on_outage: Called with the first error of each outage.
    """

    def __init__(
        self,
        config: Config,
        accumulator: Accumulator,
        meter: Meter,
        store: Store,
        artifacts: Artifacts,
        on_outage: Callable[[StoreError], None],
    ) -> None:
        self._config = config
        self._accumulator = accumulator
        self._meter = meter
        self._creation = Creation(store, config.seconds_per_request(), artifacts.remember_root)
        delivery = Delivery(store, self._creation, accumulator, artifacts)
        self._sender = Sender(
            accumulator,
            delivery,
            check=delivery.check,
            bounds=bounds_of(config, store.limits),
            max_workers=config.max_workers,
            uploads=UPLOADS,
            upload_progress=lambda: meter.heartbeats,
            retry=RetryPolicy(**attrs.asdict(config.retry_settings())),
            on_outage=on_outage,
            streams=config.streams,
            pause=partial(sleep, PAUSE_SECONDS),
            patience=config.stall_timeout(),
        )
        self._stream: Stream | None = None
        if config.flush_interval is not None:
            self._stream = Stream(
                accumulator, self._sender, config.flush_interval, self._warn, releases_failures=config.only_warns
            )
        self._tasks: TaskGroup

    @property
    def outage_error(self) -> StoreError | None:
        """The error of the outage that lasts. None: the store takes data."""
        return self._sender.outage.error

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """Run the sender and, for a client that streams, the stream and the search for duplicate runs."""
        async with self._sender, anyio.create_task_group() as self._tasks:
            if self._stream is not None:
                self._tasks.start_soon(self._stream.run)
                self._tasks.start_soon(self._creation.watch, lambda: self._sender.outage.since is None)
            yield
            self._tasks.cancel_scope.cancel()

    def start(self, function: Callable[[], Any]) -> None:
        """Run a coroutine function beside all others."""
        self._tasks.start_soon(function)

    def wake(self) -> None:
        """Let the stream look at what is queued."""
        assert self._stream is not None
        self._stream.wake()

    async def drain(self) -> None:
        """
        Wait until there is room for another entry.

        Raises:
            QueueFullError: There is none, and the client does not stream: nothing is sent before `flush()`.
        """
        intake = self._accumulator.intake
        if self._stream is not None:
            await self._stream.drain()
        elif intake is not None and not intake.has_room:
            raise QueueFullError("the queue is full, and without flush_interval= nothing drains it but flush()")

    async def flush(
        self, lane: Lane | None, timeout: float | None, *, final: bool, on_begun: Callable[[], None]
    ) -> Report:
        """
        Send what is queued now.

        Args:
            lane: Only this run. None: all.
            timeout: Seconds; what is left by then stays queued. None: no bound but `retry_timeout`.
            final: Whether it is the client's last flush.
            on_begun: Called once what belongs to this flush is fixed.
        """
        deadline = None if timeout is None else anyio.current_time() + timeout
        flush = self._sender.begin(lane, last=final)
        on_begun()
        await self._completion(flush, timeout)
        if self._creation.doubtful and self._sender.outage.since is None:
            patience = self._config.seconds_per_request()
            if deadline is not None:
                patience = min(patience, max(0.0, deadline - anyio.current_time()))
            with anyio.move_on_after(patience):
                await self._creation.delete_duplicates()
        report = flush.report()  # after the last wait: each failure is reported by one flush only
        self._sender.tidy(flush)
        return report

    async def send_final_statuses(self, lanes: Iterable[Lane]) -> int:
        """
        Send the final status of each run, and nothing else of it, within `exit_timeout`.

        Returns:
            Entries that were given up.
        """
        lanes = list(lanes)
        given_up = sum(lane.keep_only(STATUS) for lane in lanes)
        flushes = [self._sender.begin(lane) for lane in lanes]
        with anyio.move_on_after(self._config.exit_timeout):
            for flush in flushes:
                await self._sender.completion(flush, None)
        left = [each for flush in flushes for each in flush.report().failures if each.kind == STATUS]
        if left:  # no count of entries shows a status
            text = "the final status of %d runs was not stored, such as that of %s: %s"
            _notices.warning(text, len(left), left[0].run, self.outage_error or left[0].error)
        return given_up

    async def _completion(self, flush: Flush, timeout: float | None) -> None:
        """Wait for the end of a flush, and show its progress if it takes long."""
        if not (self._config.progress and flush.open):
            await self._sender.completion(flush, timeout)
            return
        ledger = self._accumulator.ledger
        settled_before = ledger.stored + ledger.failed
        settled = lambda: min(flush.total, ledger.stored + ledger.failed - settled_before)
        uploaded = _progress.uploaded(flush, self._meter)
        async with _progress.Shown(self._tasks, flush.total, settled, uploaded):
            await self._sender.completion(flush, timeout)

    def _warn(self, failures: list[Failure], dropped: dict[Any, int]) -> None:
        warn_of_failures(failures)
        warn_of_dropped(dropped, self._config.pending_bound)


@asynccontextmanager
async def assembled(
    config: Config,
    uri: Callable[[], str],
    accumulator: Accumulator,
    *,
    traffic: Traffic,
    meter: Meter,
    on_outage: Callable[[StoreError], None],
) -> AsyncGenerator[Assembly, None]:
    """
    Connect to the store and run an assembly; at the end of the block it ends, and what runs in it is cancelled.

    Args:
        config: The client's settings.
        uri: Gives the tracking URI, resolved. It may hold a password, so no frame of a traceback holds it.
        accumulator: Holds what is to be sent.
        traffic: Counts the requests.
        meter: Counts the bytes of artifacts that are uploaded.
        on_outage: Called with the first error of each outage.

    Raises:
        Exception: The store cannot be made, e.g. because its database is out of reach.
    """
    with _fork.importing():
        store = make_store(config, uri(), traffic)
    artifacts = None
    try:
        artifacts = Artifacts(store, config, uri(), traffic, meter)
        assembly = Assembly(config, accumulator, meter, store, artifacts, on_outage)
        async with assembly.running():
            yield assembly
    finally:
        if artifacts is not None:
            await artifacts.aclose()
        await store.aclose()
