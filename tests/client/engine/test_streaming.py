"""
Streaming and back-pressure as users see them: real threads, a server that answers by script, what is raised and said.

Rules of this file: nothing is slept for; what is waited for is a request, a thread, or a count.
"""

from __future__ import annotations

import itertools
import pickle
import sys
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import runqueue
from runqueue import AuthError, ClosedError, FlushError, QueueFullError, RejectedError
from runqueue.stores._resolve import make_store
from support.answers import error
from support.mlflow_server import wait_until
from support.proxy import Fault, ScriptedServer
from support.recorder import Request
from support.threads import in_threads
from support.warnings_logged import dropped_by_run, warnings_of
from support.wire_log import assert_within_limits, entries, names

RUN = "a" * 32
SOON = 0.05
"""Seconds; an interval."""
LATE = 3_600.0
"""Seconds; an interval that a test does not see the end of."""
PATIENCE = 30.0
BAD = Fault.answer(400, error("INVALID_PARAMETER_VALUE", "not that one"))
NO_EXPERIMENT = Fault.answer(400, error("RESOURCE_DOES_NOT_EXIST", "no such experiment"))
CREATED = Fault.answer(200, {"run": {"info": {"run_id": "r1"}}})


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads for calls that wait."""
    with ThreadPoolExecutor(8) as pool:
        yield pool


def log(client: Any, count: int, *, run: Any = RUN, start: int = 0) -> None:
    for step in range(start, start + count):
        client.log_metric(run, "m", float(step), step)


def steps(server: ScriptedServer, run: str = RUN, key: str = "m") -> list[int]:
    """Of all points that the server was sent of a metric, in order."""
    batches = [request for request in server.to("runs/log-batch") if request.json["run_id"] == run]
    return [point["step"] for request in batches for point in entries(request, "metrics") if point["key"] == key]


def until(condition: Callable[[], bool]) -> None:
    wait_until(condition, PATIENCE, "what the test waits for did not happen")


def pending(client: Any) -> int:
    now = client.statistics()
    return int(now.pending + now.in_flight)


def assert_books(client: Any) -> None:
    now = client.statistics()
    assert now.accepted == now.pending + now.in_flight + now.stored + now.failed + now.dropped
    intake = client._engine.accumulator.intake
    if intake is not None and not client._closed:
        assert intake.pending == now.pending + now.in_flight


# -- sending ---------------------------------------------------------------------------------------------------------


def test_what_is_logged_is_sent_without_a_flush(server: ScriptedServer) -> None:
    """After a pause as well."""
    with runqueue.Client(server.uri, flush_interval=SOON) as client:
        for step in range(3):
            log(client, 1, start=step)
            server.wait_for(lambda wanted=step + 1: steps(server) == list(range(wanted)))  # type: ignore[misc]
            until(lambda: client._engine.accumulator.intake._asleep)  # type: ignore[union-attr]
        assert_books(client)


def test_a_full_batch_is_sent_long_before_the_interval(server: ScriptedServer) -> None:
    """The rest waits for the end."""
    with runqueue.Client(server.uri, flush_interval=LATE) as client:
        log(client, 2_500)
        until(lambda: client.statistics().stored == 2_000)
    assert steps(server) == list(range(2_500))
    assert_within_limits(server.requests)
    assert max(len(entries(request, "metrics")) for request in server.requests) == 1_000


def test_many_producers_and_flushes_between_lose_double_and_reorder_nothing(server: ScriptedServer) -> None:
    """Four threads, three runs, flushes from all of them; a flush is a barrier for what its thread has logged."""
    runs = [letter * 32 for letter in "abc"]
    with runqueue.Client(server.uri, flush_interval=SOON, max_pending=700, on_failure="raise") as client:

        def work(thread: int) -> None:
            for step in range(1_500):
                client.log_metrics(runs[step % 3], {f"t{thread}": step, f"u{thread}": step}, step)
                if step % 500 == 499:
                    client.flush()
                    assert steps(server, runs[0], f"t{thread}")[-1] >= step - 2

        in_threads(work, 4)
    assert client.statistics().stored == client.statistics().accepted == 4 * 1_500 * 2
    for number, run in enumerate(runs):
        for thread in range(4):
            assert steps(server, run, f"t{thread}") == list(range(number, 1_500, 3))
    assert_within_limits(server.requests)


def test_a_log_call_does_nothing_that_could_wait_but_wake_the_engine(
    client: runqueue.Client, server: ScriptedServer
) -> None:
    """No lock is taken and nothing is read; one wake-up is written for a full batch, at most."""
    seen: Counter[str] = Counter()

    def profile(_: Any, event: str, what: Any) -> None:
        if event == "c_call":
            seen[what.__qualname__] += 1

    with runqueue.Client(server.uri, flush_interval=LATE) as streaming:
        log(streaming, 1)
        streaming.flush()
        sys.setprofile(profile)
        try:
            log(streaming, 20_000)
        finally:
            sys.setprofile(None)
    assert not {"lock.acquire", "RLock.acquire", "socket.recv", "socket.connect", "sleep"} & seen.keys()
    assert seen["list.extend"] >= 20_000
    assert seen["socket.send"] <= 22 + 20


def test_nothing_is_started_before_the_first_call(server: ScriptedServer) -> None:
    """A client that logs nothing costs no thread."""
    with runqueue.Client(server.uri, flush_interval=SOON) as client:
        assert "not started" in repr(client._engine)
    assert server.count() == 0


# -- back-pressure ---------------------------------------------------------------------------------------------------


def test_a_full_queue_blocks_its_producers_until_there_is_room(
    server: ScriptedServer, gate: threading.Event, pool: ThreadPoolExecutor
) -> None:
    """Several at once; the bound holds all the time, and nothing is lost."""
    with runqueue.Client(server.uri, flush_interval=SOON, max_pending=100, on_failure="raise") as client:
        working = [pool.submit(log, client, 200, run=letter * 32) for letter in "abcd"]
        until(lambda: pending(client) == 100)
        server.wait_for(lambda: server.count() > 0)
        assert not any(each.done() for each in working)
        assert_books(client)
        gate.set()
        while not all(each.done() for each in working):
            assert pending(client) <= 100
        for each in working:
            each.result()
    assert all(steps(server, letter * 32) == list(range(200)) for letter in "abcd")


def test_a_full_queue_raises_and_keeps_what_it_has(server: ScriptedServer, gate: threading.Event) -> None:
    """Entries that were refused are not accepted; entries that were accepted are stored."""
    with runqueue.Client(server.uri, flush_interval=SOON, max_pending=100, on_full="raise") as client:
        with pytest.raises(QueueFullError, match="100 of at most 100 entries are pending"):
            log(client, 500)
        assert pending(client) == 100
        gate.set()
        client.flush()
        log(client, 1, start=100)
    assert steps(server) == list(range(101))


def test_a_full_queue_drops_with_counts_by_run(
    server: ScriptedServer, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """In a warning for each run, and in the statistics."""
    with runqueue.Client(server.uri, flush_interval=SOON, max_pending=100, on_full="drop") as client:
        log(client, 150)
        log(client, 30, run="other")
        assert client.statistics().dropped == 80
        assert_books(client)
        until(lambda: bool(warnings_of(caplog)))
        gate.set()
    assert dropped_by_run(caplog) == {RUN: 50, "other": 30}
    assert (client.statistics().stored, client.statistics().dropped) == (100, 80)


def test_the_time_to_wait_is_spent_once_and_then_the_call_raises(server: ScriptedServer, gate: threading.Event) -> None:
    """With on_failure="raise"; a training is held up once, not at each step."""
    with runqueue.Client(
        server.uri, flush_interval=SOON, max_pending=10, block_timeout=0.3, on_failure="raise"
    ) as client:
        log(client, 10)
        began = time.monotonic()
        for _ in range(50):
            with pytest.raises(QueueFullError, match=r"no room within 0\.3 s"):
                log(client, 1)
        assert 0.3 <= time.monotonic() - began < 10
        gate.set()
        client.flush()
        log(client, 1, start=10)
    assert steps(server) == list(range(11))


def test_the_time_to_wait_is_spent_once_and_then_data_are_dropped(
    server: ScriptedServer, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """By default a streaming client warns; runs that are begun meanwhile are created all the same."""
    server.fail("runs/create", CREATED)
    with runqueue.Client(server.uri, flush_interval=SOON, max_pending=10, block_timeout=0.2) as client:
        log(client, 30)
        run = client.create_run("0")
        log(client, 5, run=run)
        until(lambda: bool(warnings_of(caplog)))
        gate.set()
        client.flush()
        assert run.run_id == "r1"
        log(client, 1, start=30)
    assert steps(server) == [*range(10), 30]
    assert client.statistics().dropped == 25
    said = dropped_by_run(caplog)
    assert (said.pop(RUN), *said.values()) == (20, 5)


def test_of_many_runs_that_drop_the_first_are_named_and_the_others_counted(
    server: ScriptedServer, gate: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """A service with a run a request would log a line for each of them."""
    with runqueue.Client(server.uri, max_pending=1, on_full="drop") as client:
        log(client, 1)
        for run in range(50):
            log(client, 2, run=f"{run:032x}")
        gate.set()
        client.flush()
    *named, others = warnings_of(caplog)
    assert dropped_by_run(caplog) == {f"{run:032x}": 2 for run in range(10)} and len(named) == 10
    assert others == "80 entries of 40 other runs were dropped: max_pending=1"


def test_without_a_stream_a_full_queue_raises_at_once(server: ScriptedServer) -> None:
    """Nothing would ever make room; a flush does."""
    with runqueue.Client(server.uri, max_pending=10) as client:
        for start in (0, 10):
            with pytest.raises(QueueFullError, match="nothing drains the queue"):
                log(client, 11, start=start)
            client.flush()
    assert steps(server) == list(range(20))


def test_a_call_that_makes_two_records_is_dropped_as_a_whole(server: ScriptedServer, gate: threading.Event) -> None:
    """Tags that may travel inside create-run, and others: at the bound, neither is taken."""
    with runqueue.Client(server.uri, flush_interval=SOON, max_pending=10, on_full="drop") as client:
        log(client, 10)
        for _ in range(20):
            client.set_tags(RUN, {"plain": 1, "mlflow.runName": "other"})
        assert pending(client) == 10
        gate.set()


def test_without_a_stream_a_flush_warns_of_dropped_entries(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Every dropped entry is counted in a warning."""
    with runqueue.Client(server.uri, max_pending=10, on_full="drop") as client:
        log(client, 15)
        client.flush()
        assert dropped_by_run(caplog) == {RUN: 5}


def test_a_producer_far_faster_than_the_server_keeps_the_memory_within_the_bound(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most that a stream ever holds is what a queue of `max_pending` holds at rest, and a fifth."""
    most = 20_000
    monkeypatch.setattr(server, "_answered", lambda *_: server._requests.clear())  # the recorder's own memory

    def peak(count: int, *, streams: bool) -> int:
        with runqueue.Client(server.uri, flush_interval=SOON if streams else None, max_pending=most) as client:
            log(client, 1)
            client.flush()
            tracemalloc.start()
            try:
                log(client, count)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    at_rest = peak(most, streams=False)
    server.fail("", Fault.delayed(0.02), times=None)
    assert peak(3 * most, streams=True) <= 1.2 * at_rest + 1_000_000, "a request under way, and the server's side of it"


# -- the end ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server_is", ["silent", "down"])
def test_a_producer_that_waits_for_room_gets_a_closed_error(
    server: ScriptedServer, gate: threading.Event, pool: ThreadPoolExecutor, server_is: str
) -> None:
    """`close(timeout)` ends in time, with a producer blocked and no server; every entry is in the books."""
    if server_is == "down":
        server.stop_listening()
    client = runqueue.Client(server.uri, flush_interval=SOON, max_pending=10, block_timeout=1_000.0)
    working = [pool.submit(log, client, 50) for _ in range(2)]
    until(lambda: pending(client) == 10 and client._engine.accumulator.intake.found_full is False)  # type: ignore[union-attr]
    began = time.monotonic()
    client.close(timeout=0.3)
    assert time.monotonic() - began < 10
    for each in working:
        with pytest.raises(ClosedError):
            each.result(PATIENCE)
    gate.set()
    assert_books(client)
    assert (client.statistics().failed, pending(client)) == (10, 0)


def test_entries_that_get_room_while_the_client_closes_are_sent_or_warned_of(
    server: ScriptedServer, gate: threading.Event, pool: ThreadPoolExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """The last flush makes room; entries that get in are stored, or counted in a warning."""
    client = runqueue.Client(server.uri, flush_interval=SOON, max_pending=10)
    working = pool.submit(log, client, 50)
    until(lambda: pending(client) == 10)
    closing = pool.submit(client.close)
    until(lambda: client._closed)
    gate.set()
    closing.result(PATIENCE)
    with pytest.raises(ClosedError):
        working.result(PATIENCE)
    now = client.statistics()
    assert_books(client)
    assert len(steps(server)) >= now.stored
    assert now.accepted == now.stored or any("were not sent" in text for text in warnings_of(caplog))


class MyError(BaseException):
    """Not even an Exception."""


@pytest.mark.parametrize("mine", [ValueError("mine"), KeyboardInterrupt(), SystemExit(3), MyError()])
def test_after_an_exception_in_the_block_what_is_queued_is_sent(server: ScriptedServer, mine: BaseException) -> None:
    """And the exception leaves the block unchanged."""
    with (
        pytest.raises(type(mine)) as caught,
        runqueue.Client(server.uri, flush_interval=LATE) as client,
    ):
        log(client, 25)
        client.set_terminated(RUN, "FAILED")
        raise mine
    assert caught.value is mine and mine.__context__ is None
    assert names(server.requests) == ["log-batch", "update"] and steps(server) == list(range(25))


@pytest.mark.parametrize("on_failure", ["warn", "raise"])
def test_after_an_exception_in_the_block_a_dead_server_costs_no_more_than_the_exit_timeout(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, on_failure: Any
) -> None:
    """A warning counts the entries that were not sent; the exception is never hidden."""
    server.stop_listening()
    began = time.monotonic()
    with (
        pytest.raises(ValueError, match="mine"),
        runqueue.Client(server.uri, flush_interval=SOON, exit_timeout=0.5, on_failure=on_failure) as client,
    ):
        log(client, 25)
        raise ValueError("mine")
    assert time.monotonic() - began < 10
    assert client.statistics().failed == 25
    assert any("25 of 25 entries were not stored" in text for text in warnings_of(caplog))


# -- failures --------------------------------------------------------------------------------------------------------


def is_bad(request: Request) -> bool:
    return any(point["key"].startswith("bad") for point in entries(request, "metrics"))


def test_failures_met_on_the_way_are_raised_by_the_next_flush(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With on_failure="raise": all of them, once; a log call never raises for them."""
    server.fail("runs/log-batch", BAD, times=None, when=is_bad)
    with runqueue.Client(server.uri, flush_interval=SOON, on_failure="raise") as client:
        for step in range(3):
            client.log_metric(RUN, f"bad{step}", 1.0)
            client.log_metric("other", "good", 1.0, step)
            until(lambda wanted=step + 1: client.statistics().failed == wanted)  # type: ignore[misc]
        with pytest.raises(FlushError) as caught:
            client.flush()
        assert sum(failure.count for failure in caught.value.failures) == 3
        client.flush()
        assert client.failures == caught.value.failures
    assert len(warnings_of(caplog)) == 1


def test_failures_met_on_the_way_are_raised_by_the_end_of_the_block(server: ScriptedServer) -> None:
    """If no flush has raised them before."""
    server.fail("runs/log-batch", BAD, times=None)
    with (
        pytest.raises(FlushError, match=r"^1 of 1 entries"),
        runqueue.Client(server.uri, flush_interval=SOON, on_failure="raise") as client,
    ):
        log(client, 1)
        until(lambda: client.statistics().failed == 1)


@pytest.mark.parametrize("end", ["flush", "close"])
def test_a_streaming_client_warns_by_default_with_counts_and_causes(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, end: str
) -> None:
    """One warning for the failures in the block and at its end; `failures` holds all."""
    server.fail("runs/log-batch", BAD, times=None, when=is_bad)
    client = runqueue.Client(server.uri, flush_interval=SOON)
    client.log_metric(RUN, "bad", 1.0)
    until(lambda: client.statistics().failed == 1)
    client.log_metrics("other", {"good": 1.0, "text": "no number"})
    until(lambda: client.statistics().failed == 2)
    caplog.clear()
    getattr(client, end)()
    said = [text for text in warnings_of(caplog) if "were not stored" in text]
    assert len(said) == 1 and "2 of 2 entries were not stored" in said[0]
    assert sum(failure.count for failure in client.failures) == 2
    client.close()


def test_the_warning_of_a_flush_names_every_cause(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    """As the exception would have done in its place."""
    server.fail("runs/log-batch", BAD, times=None, when=is_bad)
    with runqueue.Client(server.uri, flush_interval=LATE) as client:
        client.log_metric(RUN, "bad", 1.0)
        client.log_metrics("other", {"text": "no number"})
        client.flush()
        (said,) = (text for text in warnings_of(caplog) if "were not stored" in text)
        assert "not that one" in said and "text" in said and RUN in said and "other" in said


def test_each_cause_is_warned_of_once(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    """Not each entry, nor each tick."""
    server.fail("runs/log-batch", BAD, times=None)
    with runqueue.Client(server.uri, flush_interval=SOON) as client:
        for step in range(20):
            client.log_metric(RUN, f"bad{step}", 1.0)
            until(lambda wanted=step + 1: client.statistics().failed == wanted)  # type: ignore[misc]
        until(lambda: bool(warnings_of(caplog)))
        (said,) = warnings_of(caplog)
        assert "not that one" in said and RUN in said


# -- outages ---------------------------------------------------------------------------------------------------------


def test_a_server_that_recovers_gets_everything_once_without_a_flush(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """No log call raises meanwhile; the outage is warned of once."""
    server.stop_listening()
    with runqueue.Client(server.uri, flush_interval=SOON, retry_timeout=0.2) as client:
        log(client, 3_000)
        until(lambda: bool(warnings_of(caplog)))
        log(client, 3_000, start=3_000)
        server.listen_again()
        until(lambda: client.statistics().stored == 6_000)
        assert_books(client)
    assert steps(server) == list(range(6_000))
    assert server.count() <= 8
    (said,) = warnings_of(caplog)
    assert "does not take data" in said


def test_a_401_that_stays_is_an_outage(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    """It is warned of once; everything stays queued, and is sent when the credentials are accepted again."""
    server.fail("", Fault.answer(401), times=None)
    with runqueue.Client(server.uri, flush_interval=SOON, token="wrong") as client:
        log(client, 10)
        until(lambda: bool(warnings_of(caplog)))
        log(client, 10, start=10)
        assert pending(client) == 20 and client.failures == ()
        server.mend()
        until(lambda: client.statistics().stored == 20)
    (said,) = warnings_of(caplog)
    assert "401" in said and "wrong" not in said


def test_a_flush_under_a_401_reports_it_at_once(server: ScriptedServer) -> None:
    """As without streaming; with on_failure="raise"."""
    server.fail("", Fault.answer(401), times=None)
    with runqueue.Client(server.uri, flush_interval=LATE, on_failure="raise") as client:
        log(client, 10)
        with pytest.raises(FlushError) as caught:
            client.flush()
        assert isinstance(caught.value.failures[0].error, AuthError) and not caught.value.failures[0].final
        server.mend()


# -- refused runs ----------------------------------------------------------------------------------------------------


def test_a_refused_run_is_warned_of_at_once_and_created_again_by_a_flush_only(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Its data and its children's wait for a flush, however many background flushes pass."""
    server.fail("runs/create", NO_EXPERIMENT, times=None)
    with runqueue.Client(server.uri, flush_interval=SOON, on_failure="raise") as client:
        run = client.create_run("7")
        child = client.create_run("7", parent_run_id=run)
        log(client, 10, run=run)
        log(client, 10, run=child)
        until(lambda: bool(warnings_of(caplog)))
        for step in range(5):
            log(client, 1, run="other", start=step)
            until(lambda wanted=step + 1: client.statistics().stored == wanted)  # type: ignore[misc]
        assert server.count("runs/create") == 1
        with pytest.raises(FlushError) as caught:
            client.flush()
        assert sum(failure.count for failure in caught.value.failures) == 22
        assert {failure.final for failure in caught.value.failures} == {False}
        assert server.count("runs/create") == 2
        server.mend()
        server.fail("runs/create", CREATED)
        server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": "r2"}}}))
        client.flush()
        assert (run.run_id, child.run_id) == ("r1", "r2")
        assert steps(server, "r1") == steps(server, "r2") == list(range(10))
    assert len(warnings_of(caplog)) == 1 and "no such experiment" in warnings_of(caplog)[0]


def test_at_the_bound_the_data_of_refused_runs_are_given_up_first(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture
) -> None:
    """With counts; the producers of other runs go on."""
    server.fail("runs/create", NO_EXPERIMENT, times=None)
    with runqueue.Client(server.uri, flush_interval=SOON, max_pending=50) as client:
        run = client.create_run("7")
        until(lambda: bool(warnings_of(caplog)))
        log(client, 40, run=run)
        log(client, 200)
        client.flush(run_id=RUN)
        assert client.statistics().dropped == 40
    assert steps(server) == list(range(200))
    assert sum(dropped_by_run(caplog).values()) == 40


# -- runs that have ended --------------------------------------------------------------------------------------------


def lanes(client: Any) -> list[Any]:
    return list(client._engine.accumulator.all())


@pytest.mark.parametrize("flush_interval", [None, SOON])
def test_a_run_that_has_ended_leaves_nothing_behind_and_may_go_on(
    server: ScriptedServer, flush_interval: float | None
) -> None:
    """By its placeholder, by its real id, as a parent, by a handle, and out of a pickle."""
    ids = itertools.count()
    with runqueue.Client(server.uri, flush_interval=flush_interval) as client:

        def end(run: Any) -> None:
            client.set_terminated(run)
            if flush_interval is None:
                client.flush(run_id=run)
            else:
                until(lambda: not pending(client))
            until(lambda: lanes(client) == [] and not client._engine.accumulator.lanes)

        def create(**settings: Any) -> Any:
            server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": f"r{next(ids)}"}}}))
            return client.create_run("7", **settings)

        run = create()
        log(client, 5, run=run)
        end(run)
        assert run.run_id == "r0"
        uses = [run, "r0", client.attach(run).id, pickle.loads(pickle.dumps(run))]
        for at, name in enumerate(uses, start=1):
            log(client, 5, run=name, start=5 * at)
            assert len(lanes(client)) == 1
            end(name)
        assert client.flush(run_id=run).report == runqueue.FlushReport(total=0, failures=())
        child = create(parent_run_id=run)
        log(client, 5, run=child)
        end(child)
        assert (child.run_id, steps(server, "r1")) == ("r1", list(range(5)))
        assert steps(server, "r0") == list(range(25))
        assert_books(client)


@pytest.mark.parametrize("flush_interval", [None, 0.01])
def test_threads_may_end_a_run_and_go_on_logging_to_it(server: ScriptedServer, flush_interval: float | None) -> None:
    """Again and again, while it is sent: every point is stored once, in the order of its thread."""
    with runqueue.Client(server.uri, flush_interval=flush_interval) as client:

        def work(thread: int) -> None:
            for step in range(1_000):
                client.log_metric(RUN, f"t{thread}", 1.0, step)
                if step % 10 == thread:
                    client.set_terminated(RUN)
                if step % 100 == thread:
                    client.flush(run_id=RUN if thread % 2 else None)

        in_threads(work, 4)
        client.set_terminated(RUN)
        client.flush()
        for thread in range(4):
            assert steps(server, key=f"t{thread}") == list(range(1_000))
        now = client.statistics()
        assert (now.accepted, now.stored) == (4_000, 4_000)
        assert_books(client)
        until(lambda: lanes(client) == [])


def test_a_create_run_that_finds_no_room_leaves_nothing_behind(server: ScriptedServer) -> None:
    """Its lane is removed again."""
    with runqueue.Client(server.uri, max_pending=10) as client:
        log(client, 10)
        before = client.statistics()
        for _ in range(100):
            with pytest.raises(QueueFullError):
                client.create_run("7", tags={"mlflow.source.name": "x"})
        assert client.statistics() == before
        assert [lane.run for lane in lanes(client)] == [RUN]
        assert list(client._engine.accumulator.lanes) == [RUN]


def test_a_duplicate_is_deleted_without_a_flush(server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    """A slow server has carried out a request that it had not answered in time, while the client streams."""
    server.fail("runs/create", Fault.hold())
    server.fail("runs/create", CREATED)
    server.fail("runs/search", Fault.answer(200, {}))
    server.fail("runs/search", Fault.answer(200, {"runs": [{"info": {"run_id": each}} for each in ("late", "r1")]}))
    with runqueue.Client(server.uri, flush_interval=SOON, request_timeout=0.5) as client:
        client.create_run("7")
        until(lambda: server.count("runs/delete") == 1)
        assert server.to("runs/delete")[0].json == {"run_id": "late"}
        until(lambda: "deleted the run late, a duplicate of r1" in caplog.text)
        server.let_go()


# -- an engine that cannot start ---------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_made_is_warned_of_and_made_later(
    server: ScriptedServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database that is away when a training begins is an outage like any other."""
    calls = []

    def make(*args: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise RejectedError("the database is away")
        return make_store(*args)

    monkeypatch.setattr("runqueue.engine._assembly.make_store", make)
    with runqueue.Client(server.uri, flush_interval=SOON, block_timeout=0.1, max_pending=100) as client:
        log(client, 10)
        wait_until(lambda: bool(warnings_of(caplog)), 5, "nothing was said")
        log(client, 10, start=10)
        wait_until(lambda: client.statistics().stored == 20, 10, "nothing was stored")


def test_a_flush_starts_an_engine_that_could_not_start(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And from then on it streams."""
    calls = []

    def make(*args: Any) -> Any:
        calls.append(1)
        if len(calls) < 2:
            raise RejectedError("the database is away")
        return make_store(*args)

    monkeypatch.setattr("runqueue.engine._assembly.make_store", make)
    with runqueue.Client(server.uri, flush_interval=SOON) as client:
        log(client, 10)
        until(lambda: len(calls) == 1 and "not started" in repr(client._engine))
        client.flush()
        log(client, 10, start=10)
        until(lambda: client.statistics().stored == 20)
