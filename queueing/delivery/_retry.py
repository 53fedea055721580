"""Retry: when a failed request is tried again, and when trying ends."""

# Rules of this file: no other file retries. `Outage` is given the time and reads no clock, so that virtual time works.
# The error says whether it may be retried.

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Final

import anyio
import attrs
import tenacity

from runqueue.queueing._errors import Scope, StoreError

REPORT_AFTER: Final = 5.0
"""Seconds of an outage after which it is reported. Shorter outages are left to the retries."""
PROBE_PAUSE: Final = 30.0
"""The longest pause, in seconds, between two probes of a store that was given up."""


@attrs.frozen(kw_only=True)
class RetryPolicy:
    """
    Exponential back-off with full jitter: the n-th wait is drawn evenly from 0 to `base * 2**(n-1)` seconds, `cap`
    seconds at most. A `retry_after` of the error is always waited out.
    """

    timeout: float = 300.0
    """Seconds from the first failure since the last success until trying ends."""
    retries: int | None = None
    """Further attempts for one batch, after which trying ends even before the time-out. None: no bound."""
    base: float = 0.5
    cap: float = 30.0
    jitter: float = 0.0
    """Seconds that are added to each wait at most, drawn evenly."""


@attrs.define(eq=False)
class Outage:
    """
    The store's health, for all lanes of a sender.

    - healthy: `since` is None.
    - failing: `since` is set. Each lane retries at its own pace until `timeout` is over.
    - given up: `given_up` is set. Until the next success only one request at a time is sent, as a probe. Each failed
      probe begins a new `epoch`, and a lane that was started before it stops without a request of its own.
    """

    timeout: float
    on_outage: Callable[[StoreError], None] | None = None
    """Called once an outage: when it has lasted for `REPORT_AFTER` seconds, or when the store is given up."""
    since: float | None = None
    not_before: float = -math.inf
    given_up: bool = False
    epoch: int = 0
    error: StoreError | None = None
    flushes: int = 0
    """
    Flushes begun so far. A request that was sent before a flush began does not count for that flush: the store may have
    been repaired in between.
    """
    reported: bool = False
    probe_at: float = -math.inf
    _pause: float = 0.0

    def failed(self, error: StoreError, now: float) -> None:
        self.error = error
        if self.since is None:
            self.since = now
        if error.retry_after is not None:
            self.not_before = max(self.not_before, now + error.retry_after)
        if now - self.since >= REPORT_AFTER:
            self._report(error)

    def succeeded(self) -> None:
        self.since = self.error = None
        if self.given_up:  # A probe succeeded: an earlier Retry-After no longer counts.
            self.not_before = -math.inf
        self.given_up = self.reported = False
        self.probe_at, self._pause = -math.inf, 0.0

    def left(self, now: float) -> float:
        """Seconds until trying ends."""
        return self.timeout if self.since is None else self.since + self.timeout - now

    def give_up(self, error: StoreError) -> None:
        """Give the store up until the next flush."""
        self.error = error
        self.given_up = True
        self.epoch += 1
        self._report(error)

    def may_probe(self, now: float) -> bool:
        """
        Whether a caller that asks regularly, such as a tick, may try the store now. Always true unless the store was
        given up; then only after the time that the store asked for, and in pauses that grow to `PROBE_PAUSE`.
        """
        if not self.given_up:
            return True
        if now < max(self.probe_at, self.not_before):
            return False
        self._pause = min(PROBE_PAUSE, 2 * self._pause + 1)
        self.probe_at = now + self._pause
        return True

    def _report(self, error: StoreError) -> None:
        if self.on_outage is not None and not self.reported:
            self.reported = True
            self.on_outage(error)

    def admits(self, epoch: int) -> bool:
        """Whether a lane that was started in this epoch may still send."""
        return not self.given_up or epoch == self.epoch


class RetriesEndedError(Exception):
    """Raised inside the engine when trying has ended although the batch is not at fault."""

    def __init__(self, error: StoreError) -> None:
        super().__init__(str(error))
        self.error = error


class Retrying:
    """Repeats one attempt as long as its error, the policy and the outage allow."""

    def __init__(self, policy: RetryPolicy, outage: Outage) -> None:
        self._outage = outage
        self._retries = math.inf if policy.retries is None else policy.retries
        self._wait = tenacity.wait_random_exponential(multiplier=policy.base, max=policy.cap) + tenacity.wait_random(
            0, policy.jitter
        )

    async def __call__(
        self,
        attempt: Callable[[], Awaitable[None]],
        *,
        rejected: Callable[[StoreError], bool],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """
        Args:
            attempt: The attempt. It raises a StoreError if it fails.
            rejected: Whether a retriable answer has come so often that it counts as a rejection.
            sleep: Waits for so many seconds between two attempts.

        Raises:
            StoreError: The batch is at fault; another attempt would not change that.
            RetriesEndedError: Another attempt might succeed, but trying has ended.
        """

        first: StoreError
        try:
            await attempt()
            return
        except StoreError as error:
            if not error.retriable or rejected(error):
                raise
            first = error

        since, resumed_once = anyio.current_time(), False

        async def resumed() -> None:
            # Tenacity is set up only after a first failure: it costs as much as the rest of a request in the engine.
            nonlocal resumed_once
            if not resumed_once:
                resumed_once = True
                raise first
            await attempt()

        def again(state: tenacity.RetryCallState) -> bool:
            error = _error(state)
            return isinstance(error, StoreError) and error.retriable and not rejected(error)

        def over(state: tenacity.RetryCallState) -> bool:
            left = self._outage.left(anyio.current_time())
            if first.scope is Scope.LANE:  # Only this run has to wait: the store is healthy.
                left = since + self._outage.timeout - anyio.current_time()
            return left <= 0 or self._retry_after(state) > left or state.attempt_number > self._retries

        def pause(state: tenacity.RetryCallState) -> float:
            wait = max(self._wait(state), self._retry_after(state))
            return max(0.0, min(wait, self._outage.left(anyio.current_time())))

        retrying = tenacity.AsyncRetrying(retry=again, stop=over, wait=pause, sleep=sleep, reraise=True)
        try:
            await retrying(resumed)
        except StoreError as error:
            if error.retriable and not rejected(error):
                raise RetriesEndedError(error) from None
            raise

    @staticmethod
    def _retry_after(state: tenacity.RetryCallState) -> float:
        error = _error(state)
        return (error.retry_after or 0.0) if isinstance(error, StoreError) else 0.0


def _error(state: tenacity.RetryCallState) -> Any:
    return state.outcome.exception() if state.outcome is not None else None
