"""The face for scripts: waits in the caller's thread for what the engine does in its own."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

from runqueue._run_id import RunId
from runqueue.api._log_calls import LogCalls
from runqueue.api._run_operations import RunOperations
from runqueue.runtime import _notices
from runqueue.settings._config import seconds

if TYPE_CHECKING:
    from typing_extensions import Self


class Client(LogCalls):
    """
    Queues what a training script logs, and sends it in few, large, ordered requests.

        with runqueue.Client() as client:
            run = client.create_run(experiment_id="0")
            client.log_metrics(run, {"loss": 0.7}, step=1)
            client.set_terminated(run)

    Nothing is sent before `flush()`, `close()` or the end of the block. Leaving the block by an exception sends nothing
    that is still queued, and never hides the exception; `SystemExit` with 0 or None counts as a clean end.

    Args:
        tracking_uri: Where runs are kept. None: as `mlflow` itself would resolve it.
        max_workers: Requests under way at once.
        limits: Bounds on a batch, instead of the store's own.
        request_timeout: Seconds for one attempt. None: MLFLOW_HTTP_REQUEST_TIMEOUT, else 60.
        retry_timeout: Seconds from the first failure since the last success until retrying ends. None: 300.
        token: A bearer token, or a callable that gives a fresh one.
        headers: Sent with every request.
        transport: What sends the requests: "aiohttp" (which "auto" means), "httpx" (pure Python: three times the CPU a
            request), or an `httpx.AsyncBaseTransport` of your own. Your own sends all that goes to the tracking server,
            and no proxy, certificate or connection setting of the environment counts for it. The client closes it at
            its end, as httpx's clients do; it is not pickled with the client, and a forked process does not use it
            once its parent has.
        proxies: False: no HTTP proxy, whatever HTTP_PROXY, HTTPS_PROXY and ALL_PROXY say.

    Raises:
        ConfigError: A value is bad, or the tracking URI needs something that is not installed.

    Guarantees:
        Order: one run's operations reach the server as create, then params, tags and metrics, then inputs, then the
        final status, within a flush, and flush after flush. Isolation: a rejected entry costs only itself. What is not
        stored is in a `FlushError`, in `failures`, or in a logged warning with counts.
    """

    def flush(
        self, synchronous: bool = True, *, run_id: RunId | None = None, timeout: float | None = None
    ) -> RunOperations:
        """
        Send what is queued now; what other threads go on logging does not keep it from ending.

        Args:
            synchronous: Wait until it is stored, and raise what failed. False: return at once.
            run_id: Only this run (and the creation of its parents).
            timeout: Seconds; what is not stored by then stays queued, and is reported so. None: no bound but
                `retry_timeout`.

        Returns:
            The flush; it is over if `synchronous`.

        Raises:
            FlushError: Everything that was tried and not stored, to the entry.
            ClosedError: The client was closed.
        """
        begun: Future[None] | None = None if synchronous else Future()
        operations = self._begin_flush(run_id, timeout, begun)
        try:
            if begun is None:
                operations.await_completion()
            else:
                begun.result()
        except KeyboardInterrupt:
            operations.cancel()  # the rest stays queued
            raise
        return operations

    def close(self, timeout: float | None = None) -> None:
        """
        Flush, then end the engine. A second call does nothing; any other call from now on raises ClosedError.

        Args:
            timeout: Seconds for the flush.

        Raises:
            FlushError: What could not be sent; it is final.
        """
        timeout = seconds(timeout, "timeout")
        if not self._shut():
            return
        operations: RunOperations | None = None
        try:
            operations = self._begin_end(timeout)
            operations.await_completion()
        finally:
            self._engine.report_lost_entries(
                self._engine.stop(failed=True), None if operations is None else operations.report
            )

    def _discard(self) -> None:
        """End without sending, but for the final status of runs whose block has just ended; say what is lost."""
        if not self._shut():
            return
        lost = 0
        try:
            last = self._engine.send_final_statuses()
            if last is not None:
                with suppress(CancelledError):
                    lost = last.result()
        finally:
            lost += self._engine.stop(failed=False)
            if lost:
                _notices.warning("the block ended by an exception: %d queued entries were not sent", lost)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc is None:
            self.close()
        elif not clean_exit(exc) and not self._engine.config.streams:
            self._discard()
        else:
            try:
                self.close(None if clean_exit(exc) else self._engine.config.exit_timeout)
            except Exception as error:  # the script ends as it wanted to
                _notices.error("%s", error)


def clean_exit(exc: BaseException) -> bool:
    """Whether the exception is `sys.exit()` or `sys.exit(0)`."""
    return isinstance(exc, SystemExit) and exc.code in (None, 0)
