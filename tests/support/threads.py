"""Work in several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


def in_threads(work: Callable[[int], object], count: int) -> None:
    """Call `work(0)`, `work(1)`, ... in threads of their own at the same time; raise an exception of one of them."""
    together = threading.Barrier(count)

    def begin(thread: int) -> None:
        together.wait()
        work(thread)

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(begin, thread) for thread in range(count)]:
            future.result()
