"""
Errors the engine raises or reads its policy from.

Rule of this file: policy rides on the error. The engine never looks at a status code, a message or a type of its
caller's; it reads the four attributes of [StoreError][] and nothing else.
"""

from __future__ import annotations

from enum import Enum


class Scope(Enum):
    """How far a failure reaches that waiting cannot mend."""

    ENTRY = "entry"
    """Something in the batch is bad: halve it until the bad entries stand alone."""
    BATCH = "batch"
    """This batch only; to halve it would prove nothing."""
    LANE = "lane"
    """The whole run: it is unknown, deleted, or closed to us. Nothing of it is tried again in this flush."""
    STORE = "store"
    """Every run: the credentials were refused. Everything stays queued, and the flush ends at once."""


class RunqueueError(Exception):
    """Base of every error that runqueue raises."""


class ConfigError(RunqueueError, ValueError):
    """Raised at once by a constructor or a call that was given a value it cannot honour; the text names it."""


class StoreError(RunqueueError):
    """
    Raised by a store when a request did not store what it carried.

    Args:
        message: What happened, in words that may be shown: never with a credential in it.
        retriable: Whether the same request may succeed later. Default: the class's. With the scope LANE, only this run
            has to wait, and nothing is wrong with the store.
        retry_after: Seconds the store asked us to wait, if it did.
        scope: How far the failure reaches once retrying is over. Default: the class's.
        rejects_after: A retriable answer that some stores also give to a bad entry: after so many of them for one
            batch it counts as a rejection of that batch, if the store works (see `_evidence`). None: never.
        bars_key: The fault lies in the *name* of the entry that stood alone, so no other entry of that kind and key
            need be sent to this run.
        too_large: The store takes no batch of as many bytes; later ones are made smaller.
        ambiguous: The store may have done what was asked, although it did not say so.
        code: The store's own name for the fault, if it gave one.
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
    """Raised when the store, or our own check before it, refuses an entry for what it is."""

    scope = Scope.ENTRY


class QueueFullError(RunqueueError):
    """Raised by a log call of a client that bounds what is pending, when there is no room; the record is not taken."""


class ClosedError(RunqueueError):
    """Raised by every call on a client that was closed."""
