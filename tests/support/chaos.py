"""A store that fails at random. The randomness comes from a seed, so that a run can be repeated."""

from __future__ import annotations

import random

from runqueue.queueing import RejectedError, Scope, StoreError
from support.engine import Request


class Chaos:
    """
    A script of random failures of every kind, until it is `calm`. The key "bad" is always refused.

    Args:
        source: The source of randomness, which the test may use too.
        scope: The scope of the refusal of "bad".
    """

    def __init__(self, source: random.Random, *, scope: Scope = Scope.ENTRY) -> None:
        self.random = source
        self.is_calm = False
        self._scope = scope

    def __call__(self, request: Request) -> StoreError | Exception | None:
        if not self.is_calm and self.random.random() < 0.4:
            return self.random.choice(
                [
                    StoreError("503", retriable=True),
                    StoreError("429", retriable=True, retry_after=self.random.choice([0.5, 3.0, 40.0])),
                    StoreError("500", retriable=True, rejects_after=3),
                    StoreError("401", scope=Scope.STORE),
                    *([StoreError("no such experiment")] if request.creates_run else []),
                ]
            )
        if any(key == "bad" for _, key, _, _ in request.entries):
            return RejectedError("bad", scope=self._scope)
        return None
