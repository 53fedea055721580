"""Errors that the engine raises, and those whose attributes tell it what to do next."""

# Rule of this file: policy rides on the error. The engine looks at no status code, no message and no class of the
# store's own: it reads the attributes of `StoreError` only.

from __future__ import annotations

from enum import Enum


class Scope(Enum):
    """How much fails with one request whose failure waiting cannot mend."""

    ENTRY = "entry"
    """An entry of the batch is bad: the batch is halved until the bad entries stand alone."""
    BATCH = "batch"
    """This batch as a whole: halving it would prove nothing."""
    LANE = "lane"
    """The whole run: it is unknown or deleted, or we may not write to it. This flush sends nothing more of it."""
    STORE = "store"
    """Every run: the credentials were refused. All entries stay queued, and the flush ends at once."""


class RunqueueError(Exception):
    """Base of every error that runqueue raises."""


class ConfigError(RunqueueError, ValueError):
    """Raised at once by a constructor or a call whose argument has a bad value. The text names the argument."""


class StoreError(RunqueueError):
    """
    Raised by a store when a request did not store what it carried.

    Args:
        message: What happened. It may be shown to anybody, so it must hold no credential.
        retriable: Whether the same request may succeed later. With the scope LANE, only this run has to wait, and the
            store is well. None: the class's own value.
        retry_after: Seconds after which the store asks to be tried again. None: it has named no time.
        scope: How much fails once retrying is over. None: the class's own scope.
        rejects_after: After how many such answers for one batch it counts as rejected, if the store works otherwise:
            some stores give a retriable answer to a bad entry. None: never.
        bars_key: Whether the name of the entry is at fault, so that no other entry of that kind and key is sent to this
            run. The entry has been sent alone.
        too_large: Whether the store takes no batch of as many bytes; later batches are made smaller.
        ambiguous: Whether the store may have done what was asked, although its answer does not say so.
        code: The store's name for the fault. None: it has given none.
    """

    retriable: bool = False
    scope: Scope = Scope.BATCH

    def __init__(
        self,
        message: str,
        *,
        retriable: bool | None = None,
        retry_after: float | None = None,
        scope: Scope | None = None,
        rejects_after: int | None = None,
        bars_key: bool = False,
        too_large: bool = False,
        ambiguous: bool = False,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        if retriable is not None:
            self.retriable = retriable
        if scope is not None:
            self.scope = scope
        self.retry_after = retry_after
        self.rejects_after = rejects_after
        self.bars_key = bars_key
        self.too_large = too_large
        self.ambiguous = ambiguous
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # The attributes travel as state: keyword-only arguments are lost on BaseException's own way to pickle.
        return (type(self), (str(self),), self.__dict__)


class RejectedError(StoreError):
    """Raised when the store, or a check before sending, refuses an entry that no repetition can make valid."""

    scope = Scope.ENTRY


class QueueFullError(RunqueueError):
    """Raised by a log call when `max_pending` leaves no room for its record, which is not queued then."""


class ClosedError(RunqueueError):
    """Raised by every call on a client that was closed."""
