"""The inbox: flat records that any thread adds, each whole or not at all."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runqueue.queueing.batches._batch import METRIC, record_of
from runqueue.queueing.batches._part import WIDTH, Record, as_records
from runqueue.queueing.lanes._inbox import Inbox

RECORDS = st.builds(
    record_of,
    st.integers(0, 6),
    st.one_of(st.dictionaries(st.text(max_size=2), st.floats()), st.just(("run",)), st.just(())),
    st.one_of(st.none(), st.integers()),
    st.one_of(st.none(), st.integers()),
)


def put_all(inbox: Inbox, records: list[Record]) -> None:
    put = inbox.appender()
    for record in records:
        put(record)


@given(st.lists(st.one_of(RECORDS, st.integers(0, 5)), max_size=30))
def test_records_come_out_as_they_went_in(script: list[Record | int]) -> None:
    """In order, the same objects. Drawn records are removed. A number in the script draws so many records."""
    inbox, expected = Inbox(), list[Record]()
    for each in script:
        if isinstance(each, tuple):
            put_all(inbox, [each])
            expected.append(each)
        else:
            drawn = list(chain.from_iterable(map(as_records, inbox.draw(each))))
            assert [[id(item) for item in record] for record in drawn] == [
                [id(item) for item in record] for record in expected[:each]
            ]
            del expected[:each]
        assert len(inbox) == len(expected) and bool(inbox) == bool(expected)
        assert list(inbox.weights()) == [len(record[1]) for record in expected]


@pytest.fixture
def switching_threads() -> Iterator[None]:
    """The interpreter switches between threads as often as it can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("switching_threads")
def test_threads_add_whole_records_while_another_thread_draws() -> None:
    """No record is split, lost or doubled, and the records of one thread keep their order."""
    inbox = Inbox()
    begin = threading.Barrier(4)

    def log(thread: int) -> None:
        put = inbox.appender()
        begin.wait()
        for step in range(20_000):
            put((thread, {"m": step}, step, thread, None, None))

    threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    found: list[Record] = []
    while len(found) < 80_000:
        found += chain.from_iterable(map(as_records, inbox.draw(len(inbox))))
    for thread in threads:
        thread.join()
    assert not inbox
    for number in range(4):
        assert [record for record in found if record[0] == number] == [
            (number, {"m": step}, step, number, None, None) for step in range(20_000)
        ]


WITHOUT_MEMORY = """
import resource
from runqueue.queueing.lanes._inbox import Inbox
from runqueue.queueing.batches._part import as_records

inbox = Inbox()
put, record = inbox.appender(), (3, {"m": 1.0}, 1, 2, None, None)
for filled in range(0, 60, 7):  # the end of memory comes at another place each time
    for _ in range(filled):
        put(record)
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2_000_000, resource.RLIM_INFINITY))
    refused = 0
    try:
        while True:
            put(record)
    except MemoryError:
        refused += 1
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert refused == 1
    assert len(inbox.items) == 6 * len(inbox) > 6 * 1_000
    assert all(each == record for flat in inbox.draw(len(inbox)) for each in as_records(flat))
print("whole")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound the memory of a process so")
def test_without_memory_a_record_is_added_whole_or_not_at_all() -> None:
    """Half a record would shift the items of all later records."""
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_MEMORY], check=False, capture_output=True, text=True, timeout=60
    )
    assert (child.stdout.strip(), child.stderr) == ("whole", "")


def test_the_garbage_collector_tracks_no_queued_record() -> None:
    """It tracks none of a thousand queued records, so that queued records cause no full collection."""
    inbox = Inbox()
    put = inbox.appender()
    gc.collect()
    before = len(gc.get_objects())
    for step in range(1_000):
        metrics: dict[str, Any] = {"loss": step / 7, "accuracy": step / 9}
        put((METRIC, {**metrics}, step, step, None, None))
    assert len(gc.get_objects()) - before < 20
    assert len(inbox.items) == 1_000 * WIDTH
