"""The `RunOperations` that `Client.flush` returns; see `test_async_client` for those of an `AsyncClient`."""

from __future__ import annotations

import gc
import logging
import threading

import pytest

import runqueue
from runqueue import ClosedError, FlushError
from support.answers import error
from support.proxy import Fault, ScriptedServer

RUN = "a" * 32


def test_an_asynchronous_flush_returns_at_once(client: runqueue.Client, gate: threading.Event) -> None:
    """It is under way, then over; its report says what was stored."""
    client.log_metrics(RUN, {"a": 1.0, "b": 2.0})
    operations = client.flush(synchronous=False)
    assert not operations.done and operations.report is None
    assert repr(operations) == "<RunOperations under way>"
    with pytest.raises(TimeoutError):
        operations.await_completion(timeout=0.01)
    gate.set()
    operations.await_completion()
    operations.await_completion(timeout=5)
    assert operations.done and operations.report is not None
    assert (operations.report.total, operations.report.stored, operations.report.failures) == (2, 2, ())
    assert repr(operations) == "<RunOperations done, 2 of 2 stored>"


def test_a_synchronous_flush_returns_a_handle_that_is_done(client: runqueue.Client) -> None:
    """Also where there was nothing to send."""
    assert client.flush().done
    assert repr(client.flush()) == "<RunOperations done, 0 of 0 stored>"


def test_an_asynchronous_flush_raises_when_it_is_waited_for(
    client: runqueue.Client, server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """At each wait; it is logged too, as its caller may never wait."""
    server.fail("", Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST")))
    client.log_metrics(RUN, {"a": 1.0, "b": 2.0})
    operations = client.flush(synchronous=False)
    for _ in range(2):
        with pytest.raises(FlushError):
            operations.await_completion(timeout=10)
    assert operations.report is not None and operations.report.stored == 0
    assert repr(operations) == "<RunOperations done, 0 of 2 stored>"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "2 of 2" in record.getMessage()


def test_two_flushes_report_what_each_began_with(
    client: runqueue.Client, server: ScriptedServer, gate: threading.Event
) -> None:
    """The first flush does not report the entries of the second."""
    client.log_metric(RUN, "a", 1.0)
    first = client.flush(synchronous=False)
    server.wait_for(lambda: len(server._requests) == 1)
    client.log_metrics(RUN, {"b": 1.0, "c": 1.0})
    gate.set()
    client.flush()
    first.await_completion()
    assert first.report is not None and first.report.total == 1
    assert client.statistics().stored == 3


def test_a_flush_ends_although_others_go_on_logging(client: runqueue.Client, gate: threading.Event) -> None:
    """Entries that are logged after its beginning do not prolong it."""
    client.log_metric(RUN, "m", 1.0)
    operations = client.flush(synchronous=False)
    stop = threading.Event()

    def produce() -> None:
        while not stop.is_set():
            client.log_metric(RUN, "m", 1.0)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        gate.set()
        operations.await_completion(timeout=20)
    finally:
        stop.set()
        thread.join()


def test_waiting_for_a_flush_of_a_discarded_client_raises_closed_error(
    client: runqueue.Client, gate: threading.Event
) -> None:
    """The block ended by an exception while a flush was under way."""
    client.log_metric(RUN, "m", 1.0)
    operations = client.flush(synchronous=False)
    client.__exit__(KeyError, KeyError(), None)
    with pytest.raises((ClosedError, FlushError)):
        operations.await_completion(timeout=10)
    assert operations.done
    assert "under way" not in repr(operations)


def test_a_flush_begins_when_it_is_called(client: runqueue.Client, gate: threading.Event) -> None:
    """Entries logged after the call belong to the next flush, however late the engine's thread begins."""
    client.log_metric(RUN, "start the thread", 1.0)
    gate.set()
    client.flush()
    for _ in range(20):
        client.log_metric(RUN, "a", 1.0)
        operations = client.flush(synchronous=False)
        client.log_metrics(RUN, {"b": 1.0, "c": 1.0})
        operations.await_completion()
        assert operations.report is not None and operations.report.total == 1
        client.flush()


def test_the_handle_of_a_flush_keeps_its_client_alive(server: ScriptedServer, gate: threading.Event) -> None:
    """A function may return the handle and drop the client; the end of a client would end its flushes."""

    def begun() -> runqueue.RunOperations:
        client = runqueue.Client(server.uri)
        client.log_metric(RUN, "m", 1.0)
        return client.flush(synchronous=False)

    operations = begun()
    gc.collect()
    gate.set()
    operations.await_completion(timeout=10)
    assert operations.report is not None and operations.report.stored == 1
