"""`Client`: what `flush`, `close` and the end of a block do, and how they report entries that were not stored."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

import runqueue
from runqueue import FlushError, UnavailableError
from support.answers import error
from support.mlflow_server import clean_environment
from support.proxy import Fault, ScriptedServer
from support.wire_log import entries, names

RUN = "a" * 32
NOT_THERE = Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST"))


def engine_threads() -> list[threading.Thread]:
    """The threads of all engines."""
    return [thread for thread in threading.enumerate() if thread.name == "runqueue"]


def identity_holds(client: runqueue.Client) -> bool:
    """Nothing was counted twice, nothing not at all."""
    now = client.statistics()
    return now.accepted == now.pending + now.in_flight + now.stored + now.failed + now.dropped


# -- blocks ----------------------------------------------------------------------------------------------------------


def test_leaving_a_block_sends_everything_and_ends_the_thread(server: ScriptedServer) -> None:
    """A clean end is a flush and a close."""
    with runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        assert server.count() == 0
    assert names(server.requests) == ["log-batch"]
    assert client.statistics().stored == 1
    assert engine_threads() == []
    assert "closed" in repr(client)


def test_a_final_status_alone_is_sent(server: ScriptedServer) -> None:
    """It counts as no entry, but it is something to send, by a flush as by the end of a block."""
    with runqueue.Client(server.uri) as client:
        client.set_terminated(RUN, "FAILED")
    assert names(server.requests) == ["update"]
    with runqueue.Client(server.uri) as client:
        client.set_terminated(RUN, "FAILED")
        client.flush()
        assert names(server.requests) == ["update"] * 2


class Surprise(BaseException):
    """Not even an Exception."""


ENDS: dict[str, Callable[[], BaseException]] = {
    "Exception": lambda: ValueError("mine"),
    "KeyboardInterrupt": KeyboardInterrupt,
    "SystemExit(1)": lambda: SystemExit(1),
    "SystemExit(text)": lambda: SystemExit("failed"),
    "BaseException": Surprise,
    "FlushError of another client": lambda: FlushError((), 0),
}


@pytest.mark.parametrize("make", ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("started", [False, True])
def test_a_block_that_raises_sends_nothing_and_hides_nothing(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, make: Callable[[], BaseException], started: bool
) -> None:
    """The exception leaves the block unchanged; queued entries are dropped, counted, and warned of."""
    mine = make()
    with pytest.raises(type(mine)) as caught, runqueue.Client(server.uri) as client:
        if started:
            client.log_metric(RUN, "before", 1.0)
            client.flush()
        client.log_metrics(RUN, {"a": 1.0, "b": 2.0})
        client.set_terminated(RUN)
        raise mine
    assert caught.value is mine and mine.__context__ is None and mine.__cause__ is None
    assert server.count() == int(started)
    assert (client.statistics().dropped, client.statistics().pending) == (2, 0)
    assert identity_holds(client)
    (record,) = [record for record in caplog.records if record.name == "runqueue"]
    assert record.levelno == logging.WARNING and "2 " in record.getMessage()
    assert engine_threads() == []


@pytest.mark.parametrize("code", [None, 0, False])
def test_a_system_exit_without_a_status_is_a_clean_end(server: ScriptedServer, code: Any) -> None:
    """`sys.exit()` and `sys.exit(0)` end scripts that have done their work."""
    with pytest.raises(SystemExit) as caught, runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        sys.exit(code)
    assert caught.value.code == code
    assert names(server.requests) == ["log-batch"]


def test_a_clean_system_exit_is_not_hidden_by_a_failed_flush(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Entries that were not stored are logged, and the exit status of the script stays."""
    server.fail("", NOT_THERE, times=None)
    with pytest.raises(SystemExit) as caught, runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        sys.exit(0)
    assert caught.value.code == 0 and caught.value.__context__ is None
    assert RUN in caplog.text and client.statistics().failed == 1


def test_the_end_of_a_block_raises_what_was_not_stored(server: ScriptedServer) -> None:
    """The failures are final: the client has ended."""
    server.fail("", Fault.answer(503), times=None)
    with pytest.raises(FlushError) as caught, runqueue.Client(server.uri, retry_timeout=0) as client:
        client.log_metrics(RUN, {"a": 1.0, "b": 2.0})
    (failure,) = caught.value.failures
    assert failure.final and failure.count == 2 and isinstance(failure.error, UnavailableError)
    assert client.statistics().failed == 2 and client.statistics().pending == 0
    assert client.failures == caught.value.failures
    assert "flush() tries them again" not in str(caught.value)
    assert engine_threads() == []


def test_a_block_around_a_closed_client_ends_without_an_error(server: ScriptedServer) -> None:
    """Closing twice is closing once."""
    with runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        client.close()
        client.close()
    assert server.count() == 1


# -- flush -----------------------------------------------------------------------------------------------------------


def test_a_failure_is_raised_once(client: runqueue.Client, server: ScriptedServer) -> None:
    """By the flush whose entries failed; `failures` keeps it."""
    server.fail("runs/log-batch", Fault.answer(400, error("INVALID_PARAMETER_VALUE", "no")))
    client.log_metric(RUN, "bad", 1.0)
    with pytest.raises(FlushError) as caught:
        client.flush()
    assert client.flush().report is not None
    client.log_metric(RUN, "good", 1.0)
    client.flush()
    assert client.failures == caught.value.failures
    assert (client.statistics().stored, client.statistics().failed) == (1, 1)


def test_an_outage_keeps_everything_for_the_next_flush(offline: runqueue.Client) -> None:
    """No entry is lost, and the report says that all are still queued."""
    offline.log_metrics(RUN, {"a": 1.0, "b": 2.0})
    offline.set_terminated(RUN)
    for _ in range(2):
        with pytest.raises(FlushError) as caught:
            offline.flush()
        assert {failure.final for failure in caught.value.failures} == {False}
        assert sum(failure.count for failure in caught.value.failures) == 2
        assert offline.statistics().pending == 2 and offline.failures == ()
        assert identity_holds(offline)
        assert "still queued" in str(caught.value)


def test_a_server_that_recovers_gets_everything_once_and_in_order(server: ScriptedServer) -> None:
    """The flush after an outage sends the entries that the flush before could not send."""
    server.stop_listening()
    with runqueue.Client(server.uri, retry_timeout=0) as client:
        for step in range(3):
            client.log_metric(RUN, "m", float(step), step)
        with pytest.raises(FlushError):
            client.flush()
        server.listen_again()
        client.log_metric(RUN, "m", 3.0, 3)
        client.flush()
    points = [point for request in server.to("runs/log-batch") for point in entries(request, "metrics")]
    assert [point["step"] for point in points] == [0, 1, 2, 3]


@pytest.mark.parametrize("asked", ["7200", "9" * 400])
def test_a_retry_after_beyond_the_retrying_ends_the_flush_and_not_the_client(
    server: ScriptedServer, asked: str
) -> None:
    """The flush ends at once with everything queued; the next one probes."""
    server.fail("", Fault.answer(503, b"", {"Retry-After": asked}))
    with runqueue.Client(server.uri, retry_timeout=5) as client:
        client.log_metric(RUN, "m", 1.0)
        with pytest.raises(FlushError):
            client.flush()
        assert client.statistics().pending == 1
        client.flush()
        assert client.statistics().stored == 1


def test_a_flush_that_times_out_leaves_the_rest_queued(server: ScriptedServer, gate: threading.Event) -> None:
    """Requests in flight are neither cut off nor sent twice."""
    with runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        with pytest.raises(FlushError) as caught:
            client.flush(timeout=0.05)
        (failure,) = caught.value.failures
        assert (failure.final, failure.count) == (False, 1) and "0.05 s" in str(failure.error)
        assert identity_holds(client)
        gate.set()
        client.flush()
        assert client.statistics().stored == 1
    assert server.count() == 1


def test_a_flush_of_one_run_leaves_the_others_alone(client: runqueue.Client, server: ScriptedServer) -> None:
    """By its real id."""
    client.log_metric("one", "m", 1.0)
    client.log_metric("other", "m", 1.0)
    client.flush(run_id="one")
    assert [request.json["run_id"] for request in server.requests] == ["one"]
    assert client.statistics().pending == 1


def test_close_has_a_timeout(server: ScriptedServer, gate: threading.Event) -> None:
    """Entries that are not stored by then have failed for good, and are reported and counted once."""
    client = runqueue.Client(server.uri)
    client.log_metric(RUN, "m", 1.0)
    with pytest.raises(FlushError) as caught:
        client.close(timeout=0.05)
    gate.set()
    (failure,) = caught.value.failures
    assert failure.final
    assert (client.statistics().failed, client.statistics().in_flight) == (1, 0)
    assert identity_holds(client)
    assert engine_threads() == []


def test_statistics_count_everything_once(client: runqueue.Client, server: ScriptedServer) -> None:
    """Entries of all kinds, at every stage; requests and bytes as the server saw them."""
    server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": "r1"}}}))
    run = client.create_run("0", tags={"own": 1})
    client.log_metrics(run, {"k" * 300: 1.0, "b": 2.0, "bad": None})
    client.log_params(run, {"a": 1})
    client.set_tags(run, {"a": 1})
    client.log_inputs(run, [runqueue.Dataset("n", "d")])
    client.set_terminated(run)
    before = client.statistics()
    assert (before.accepted, before.pending, before.requests) == (7, 7, 0)
    with pytest.raises(FlushError):
        client.flush()
    after = client.statistics()
    assert (after.accepted, after.stored, after.failed, after.pending) == (7, 6, 1, 0)
    assert (after.requests, after.bytes_sent) == (server.count(), sum(request.size for request in server.requests))
    assert (after.cut, after.retried, after.dropped) == (1, 0, 0)


# -- what is shown ---------------------------------------------------------------------------------------------------


def test_its_repr_tells_its_state(client: runqueue.Client, server: ScriptedServer) -> None:
    """URI, open or closed, counts."""
    client.log_metric(RUN, "m", 1.0)
    assert repr(client) == f"<Client {server.uri} open pending=1 in_flight=0 stored=0 failed=0 dropped=0>"
    assert repr(client._engine) == f"<Engine {server.uri} not started>"
    client.flush()
    assert repr(client._engine) == f"<Engine {server.uri} running>"
    client.close()
    assert repr(client) == f"<Client {server.uri} closed pending=0 in_flight=0 stored=1 failed=0 dropped=0>"
    assert "running" not in repr(client._engine)


def test_nothing_is_ever_printed(server: ScriptedServer, capfd: pytest.CaptureFixture[str]) -> None:
    """Whatever goes wrong, stdout belongs to the user."""
    server.fail("runs/log-batch", Fault.answer(400, error("INVALID_PARAMETER_VALUE", "no")))
    server.fail("runs/update", Fault.answer(503))
    with pytest.raises(FlushError), runqueue.Client(server.uri, retry_timeout=5) as client:
        client.log_metrics(RUN, {"k" * 300: 1.0, "bad": "text"})
        client.set_terminated(RUN)
    with pytest.raises(KeyError), runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        raise KeyError
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_is_garbage_collected_warns_of_unsent_entries(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, started: bool
) -> None:
    """A warning with counts, and the end of its thread."""
    client = runqueue.Client(server.uri)
    if started:
        client.log_metric(RUN, "before", 1.0)
        client.flush()
    client.log_metrics(RUN, {"a": 1.0, "b": 2.0})
    threads = engine_threads()
    assert len(threads) == int(started)
    del client
    gc.collect()
    for thread in threads:
        thread.join(10)
    assert engine_threads() == []
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "never closed" in record.getMessage() and "2 entries" in record.getMessage()


@pytest.mark.parametrize("flushes", [False, True])
def test_a_script_that_ends_without_closing_its_client_is_warned(server: ScriptedServer, flushes: bool) -> None:
    """On stderr, by the logger's last resort; nothing on stdout, and the process ends by itself."""
    script = (
        "import runqueue, sys\n"
        "client = runqueue.Client(sys.argv[1])\n"
        "client.log_metric('r', 'm', 1.0)\n"
        f"if {flushes}: client.flush(); client.log_metric('r', 'm', 1.0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, server.uri],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == ""
    assert "1 entries were not sent" in done.stderr and "Traceback" not in done.stderr


def test_entries_logged_while_the_client_is_closed_are_counted_and_warned_of(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """A call in another thread may have found its lane before the client closes, and append after it."""
    closed = threading.Event()

    class Slow:
        def __float__(self) -> float:
            closed.wait(20)
            return 1.0

    client = runqueue.Client(server.uri)
    client.log_metric(RUN, "before", 1.0)
    late = threading.Thread(target=client.log_metrics, args=(RUN, {"late": Slow()}))
    late.start()
    client.close()
    closed.set()
    late.join(20)
    statistics = client.statistics()
    assert (statistics.accepted, statistics.stored, statistics.pending) == (2, 1, 1)
    del client, late
    gc.collect()
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "got data while it was closed" in record.getMessage() and "1 entries" in record.getMessage()
