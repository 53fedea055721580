"""
An asynchronous, batching logging client for MLflow tracking servers.

Rule of this file: `import runqueue` loads nothing; the first use of a public name loads all of `_public`. So a library
may import it at no cost, as MLflow does with each of its plugins. One hook of atexit's is registered all the same: what
is registered early runs late, after hooks of the user's that may log, see `_exit`.
"""

from __future__ import annotations

import atexit as _atexit
import sys as _sys
from typing import TYPE_CHECKING as _TYPE_CHECKING


@_atexit.register
def _last() -> None:
    exit_ = _sys.modules.get("runqueue.runtime._exit")
    if exit_ is not None:
        exit_.flush_after_user_hooks()


if _TYPE_CHECKING:  # no `__getattr__` then: a checker would believe in every name
    from runqueue._public import *  # pyright: ignore[reportWildcardImportFromLibrary]
else:

    def __getattr__(name: str) -> object:
        if name.startswith("_"):  # whatever looks into modules is no user
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from runqueue import _public

        globals().update((each, value) for each, value in vars(_public).items() if not each.startswith("_"))
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        from runqueue import _public

        return sorted({*globals(), *(each for each in vars(_public) if not each.startswith("_"))})
