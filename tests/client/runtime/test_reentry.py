"""Re-entrant calls: from log handlers, signal handlers and garbage collections."""

from __future__ import annotations

import gc
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import count
from typing import TypeAlias

import pytest

import runqueue
from runqueue.runtime._notices import LOGGER_NAMES, _RelayFilter
from support.mlflow_server import wait_until
from support.process import PATIENCE
from support.proxy import Fault, ScriptedServer
from support.wire_log import entries

RUN = "a" * 32
LONG = "k" * 300
"""A key that is cut, which is worth a warning."""

Attach: TypeAlias = Callable[[str, Callable[[logging.LogRecord], object]], None]


class Calling(logging.Handler):
    """Does what it is told with each record, and counts them."""

    def __init__(self, work: Callable[[logging.LogRecord], object]) -> None:
        super().__init__()
        self.work = work

    def emit(self, record: logging.LogRecord) -> None:
        self.work(record)


@pytest.fixture
def attach() -> Iterator[Attach]:
    """Attach a handler to a logger, for the time of the test."""
    attached: list[tuple[logging.Logger, logging.Handler, int]] = []

    def attach(name: str, work: Callable[[logging.LogRecord], object]) -> None:
        logger, handler = logging.getLogger(name), Calling(work)
        attached.append((logger, handler, logger.level))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)

    yield attach
    for logger, handler, level in attached:
        logger.removeHandler(handler)
        logger.setLevel(level)


def steps(server: ScriptedServer, key: str = "m") -> list[int]:
    """Those of a key that the server was sent, in order."""
    points = [point for request in server.to("runs/log-batch") for point in entries(request, "metrics")]
    return [point["step"] for point in points if point["key"] == key]


def log(client: runqueue.Client, count: int = 5) -> None:
    for step in range(count):
        client.log_metric(RUN, "m", 1.0, step)


# -- log handlers ----------------------------------------------------------------------------------------------------


@pytest.fixture
def among_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx's own client sends, and logs by httpcore; of plain http nothing goes to this proxy."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")


@pytest.mark.usefixtures("among_proxies")
@pytest.mark.parametrize("name", ["runqueue", "httpcore.http11", ""])
@pytest.mark.parametrize("flush_interval", [None, 0.01])
def test_a_handler_that_raises_costs_nothing(
    server: ScriptedServer,
    attach: Attach,
    capfd: pytest.CaptureFixture[str],
    name: str,
    flush_interval: float | None,
) -> None:
    """Its error is printed as logging does it; every entry is stored."""

    def fail(_: logging.LogRecord) -> None:
        raise ZeroDivisionError("of the handler")

    attach(name, fail)
    with runqueue.Client(server.uri, flush_interval=flush_interval, transport="httpx") as client:
        log(client)
        client.log_metric(RUN, LONG, 1.0)
        client.flush()
    assert steps(server) == [0, 1, 2, 3, 4]
    assert (client.statistics().stored, client.statistics().failed) == (6, 0)
    assert "of the handler" in capfd.readouterr().err


@pytest.mark.usefixtures("among_proxies")
@pytest.mark.parametrize("name", ["runqueue", "httpcore.http11", ""])
@pytest.mark.parametrize("flush_interval", [None, 0.01])
def test_a_handler_may_log_metrics_and_flush(
    server: ScriptedServer, attach: Attach, name: str, flush_interval: float | None
) -> None:
    """A flush in a thread of the engine's is refused; nothing waits for itself, and nothing loops for ever."""
    refused: list[str] = []
    calls = 0

    def work(record: logging.LogRecord) -> None:
        nonlocal calls
        calls += 1
        if calls > 50 or client._closed:
            return
        client.log_metric(RUN, "of the handler", 1.0, calls)
        try:
            client.flush()
        except RuntimeError as error:
            refused.append(str(error))

    attach(name, work)
    client = runqueue.Client(server.uri, flush_interval=flush_interval, transport="httpx")
    with client:
        log(client)
        client.log_metric(RUN, LONG, 1.0)
        client.flush()
        client.flush()
    assert steps(server) == [0, 1, 2, 3, 4]
    assert refused and set(refused) == {"runqueue's own thread cannot wait for itself"}
    now = client.statistics()
    assert now.accepted == now.stored + now.failed + now.dropped and now.failed == 0


@pytest.mark.usefixtures("among_proxies")
@pytest.mark.parametrize("ours", ["runqueue", "httpcore.http11"])
def test_a_handler_that_flushes_under_its_lock_causes_no_deadlock(
    server: ScriptedServer, attach: Attach, ours: str
) -> None:
    """One thread waits in the handler for a flush, while the engine logs to the same handler."""
    handler = Calling(lambda record: client.flush() if record.name == "mine" else None)
    mine, others = logging.getLogger("mine"), logging.getLogger(ours)
    for logger in (mine, others):
        logger.addHandler(handler)
    level = others.level
    others.setLevel(logging.DEBUG)
    client = runqueue.Client(server.uri, transport="httpx")
    try:
        log(client)
        client.log_metric(RUN, LONG, 1.0)
        thread = threading.Thread(target=mine.warning, args=("flush",), daemon=True)
        thread.start()
        thread.join(PATIENCE / 2)
        assert not thread.is_alive(), "dead-lock"
        client.close()
    finally:
        for logger in (mine, others):
            logger.removeHandler(handler)
        others.setLevel(level)
    assert steps(server) == [0, 1, 2, 3, 4]


def test_a_handler_whose_entries_are_dropped_causes_no_endless_warnings(server: ScriptedServer, attach: Attach) -> None:
    """A warning of dropped entries makes the handler log, which drops entries, and so on; the warnings stay few."""
    server.fail("", Fault.hold(), times=None)
    records: list[str] = []

    def work(record: logging.LogRecord) -> None:
        records.append(record.getMessage())
        if not client._closed:
            client.log_metric(RUN, "of the handler", 1.0)

    attach("runqueue", work)
    client = runqueue.Client(server.uri, flush_interval=0.01, max_pending=10, on_full="drop", exit_timeout=1)
    for step in range(30):
        client.log_metric(RUN, "m", 1.0, step)
    wait_until(lambda: any("dropped" in each for each in records), PATIENCE, "no warning")
    server.let_go()
    client.close()
    assert len(records) < 20, records
    now = client.statistics()
    assert now.accepted == now.stored + now.failed + now.dropped


def test_log_records_are_handled_before_the_call_returns(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Although another thread calls the handlers; and each logger has one filter of the relay."""
    for _ in range(20):
        caplog.clear()
        with runqueue.Client(server.uri) as client:
            client.log_metric(RUN, LONG, 1.0)
            client.flush()
            assert "is cut" in caplog.text
    for name in LOGGER_NAMES:
        assert len([each for each in logging.getLogger(name).filters if type(each) is _RelayFilter]) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("runqueue")]


# -- signal handlers, garbage collections ----------------------------------------------------------------------------


def test_a_signal_handler_may_log_and_flush(server: ScriptedServer) -> None:
    """While the main thread logs, flushes or opens lanes."""
    numbers = count()  # taken before it is logged: on a slow machine the handler interrupts itself

    def handle(number: int, frame: object) -> None:
        handled = next(numbers)
        client.log_metric(RUN, "handled", 1.0, handled)
        if handled % 10 == 0:
            client.flush()

    before = signal.signal(signal.SIGALRM, handle)
    client = runqueue.Client(server.uri, flush_interval=0.01)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
        for step in range(3_000):
            client.log_metric(RUN, "m", 1.0, step)
            if step % 300 == 0:
                client.flush()
                client.log_metric(f"run-{step}", "m", 1.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    client.close()
    points = [
        (request.json["run_id"], point["key"], point["step"])
        for request in server.to("runs/log-batch")
        for point in entries(request, "metrics")
    ]
    assert [step for run, key, step in points if (run, key) == (RUN, "m")] == list(range(3_000))
    handled = next(numbers)
    assert sorted(step for run, key, step in points if key == "handled") == list(range(handled))
    assert handled > 0


class Garbage:
    """Logs when it is collected."""

    def __init__(self, client: runqueue.Client, done: list[int]) -> None:
        self.client, self.done, self.cycle = client, done, self

    def __del__(self) -> None:
        self.client.log_metric(RUN, "collected", 1.0, len(self.done))
        repr(self.client.statistics())
        self.done.append(1)


def test_a_finalizer_may_log(server: ScriptedServer) -> None:
    """In any thread in which the collection happens, the engine's included."""
    done: list[int] = []
    threshold = gc.get_threshold()
    client = runqueue.Client(server.uri, flush_interval=0.01)
    gc.set_threshold(7)
    try:
        for step in range(300):
            Garbage(client, done)
            client.log_metrics(RUN, {"m": 1.0}, step)
            if step % 50 == 0:
                client.flush()
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert len(done) == 300
    client.close()
    assert sorted(steps(server)) == list(range(300))
    assert len(steps(server, "collected")) == 300


def test_any_number_of_threads_may_flush_at_once(server: ScriptedServer) -> None:
    """Each finds its own entries stored."""
    client = runqueue.Client(server.uri)
    failures: list[runqueue.RunqueueError] = []

    def work(number: int) -> None:
        try:
            for step in range(20):
                client.log_metric(f"run-{number}", "m", 1.0, step)
                client.flush()
        except runqueue.RunqueueError as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    assert failures == [] and client.statistics().stored == 16 * 20


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_signal_handler_may_flush_while_the_thread_is_being_started(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Neither waits for the other, and one loop sends everything."""
    flushed: list[bool] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name != "runqueue" or flushed:
            return start(thread)
        flushed.append(False)
        if at == "after":
            start(thread)
        signal.raise_signal(signal.SIGALRM)
        if at == "before":
            start(thread)

    def handle(number: int, frame: object) -> None:
        operations = client.flush(synchronous=False)
        operations.await_completion(timeout=PATIENCE)
        flushed[0] = True

    before = signal.signal(signal.SIGALRM, handle)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    client = runqueue.Client(server.uri)
    try:
        client.log_metric(RUN, "m", 1.0)
        client.flush()
    finally:
        signal.signal(signal.SIGALRM, before)
    client.close()
    assert flushed == [True]
    assert len(server.to("runs/log-batch")) == 1


def test_an_error_of_a_signal_handler_is_not_taken_for_a_thread_that_cannot_be_started(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interrupted call raises it; there is one loop, and a later call uses it."""
    start = threading.Thread.start

    def handle() -> None:
        raise RecursionError("of a handler")

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if thread.name == "runqueue":
            handle()

    client = runqueue.Client(server.uri)
    client.log_metric(RUN, "m", 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(RecursionError, match="of a handler"):
            client.flush()
    client.log_metric(RUN, "m", 2.0)
    client.flush()
    client.close()
    assert [point["value"] for request in server.to("runs/log-batch") for point in entries(request, "metrics")] == [
        1,
        2,
    ]


def test_where_no_thread_can_be_started_the_call_runs_in_the_caller_s_own(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of the interpreter; afterwards a thread is tried again."""

    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "runqueue":
            raise RuntimeError("can't start new thread")
        start(thread)

    client = runqueue.Client(server.uri, progress=False)
    client.log_metric(RUN, "m", 1.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        client.flush()
    assert len(server.to("runs/log-batch")) == 1
    client.log_metric(RUN, "m", 2.0)
    client.flush()
    client.close()
    assert len(server.to("runs/log-batch")) == 2
