"""The engine's thread: how it starts, what happens when it cannot start, and interrupts."""

from __future__ import annotations

import signal
import threading
import tracemalloc
from typing import Any

import pytest

import runqueue
from runqueue import FlushError
from runqueue.queueing.batches._batch import METRIC
from runqueue.stores._resolve import make_store
from runqueue.wire._encoder import Encoder
from support.proxy import ScriptedServer
from support.threads import in_threads

RUN = "a" * 32


def engine_threads() -> list[threading.Thread]:
    """The threads of all engines."""
    return [thread for thread in threading.enumerate() if thread.name == "runqueue"]


def test_one_daemon_thread_serves_many_callers(client: runqueue.Client, server: ScriptedServer) -> None:
    """The first flush starts it; no other call starts a second one."""

    def work(thread: int) -> None:
        client.log_metric(f"run{thread}", "m", 1.0)
        client.flush()

    in_threads(work, 8)
    (thread,) = engine_threads()
    assert thread.daemon
    assert server.count() == client.statistics().stored == 8


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTP_PROXY", "foo://bar"),
        ("http_proxy", "http://[::1"),
        ("ALL_PROXY", "http://host:port"),
        ("SSL_CERT_FILE", "/no/such/file.pem"),
    ],
)
@pytest.mark.parametrize("transport", ["httpx", "auto"])
def test_a_bad_network_variable_raises_a_config_error_that_names_it(
    monkeypatch: pytest.MonkeyPatch, transport: Any, variable: str, value: str
) -> None:
    """At the constructor or at the first flush, and without a traceback of a thread on the screen."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(runqueue.ConfigError) as caught:
        # Certificates are read for https alone.
        scheme = "https" if variable.startswith("SSL") else "http"
        client = runqueue.Client(f"{scheme}://127.0.0.1:1", transport=transport, retry_timeout=0)
        client.log_metric(RUN, "m", 1.0)
        try:
            client.flush()
        finally:
            client.__exit__(KeyError, KeyError(), None)
    assert variable.lower() in str(caught.value).lower()


def test_an_engine_that_cannot_start_keeps_what_is_queued(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every flush raises the reason, and the next one tries again."""
    failures = 2

    def fail(*args: Any) -> Any:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise OSError("no more file descriptors")
        return make_store(*args)

    monkeypatch.setattr("runqueue.engine._assembly.make_store", fail)
    with runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        for _ in range(2):
            with pytest.raises((OSError, FlushError), match="file descriptors"):
                client.flush()
            assert client.statistics().pending == 1
        client.flush()
        assert client.statistics().stored == 1
    assert engine_threads() == []


def test_a_keyboard_interrupt_ends_the_waiting_and_loses_nothing(server: ScriptedServer, gate: threading.Event) -> None:
    """A second flush sends what is left; the request under way is not repeated."""
    main = threading.main_thread()
    assert threading.current_thread() is main

    def interrupt() -> None:
        server.wait_for(lambda: len(server._requests) == 1)
        assert main.ident is not None
        signal.pthread_kill(main.ident, signal.SIGINT)

    with runqueue.Client(server.uri) as client:
        client.log_metric("one", "m", 1.0)
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.flush()
        thread.join()
        gate.set()
        client.log_metric("one", "m", 2.0)
        client.flush()
        assert client.statistics().stored == client.statistics().accepted == 2
    assert server.count() == 2


def test_the_engines_own_threads_cannot_wait_for_themselves(server: ScriptedServer) -> None:
    """A token's callable that flushes the client would wait for ever; it gets an error."""
    told: list[BaseException] = []

    def token() -> str:
        try:
            client.flush()
        except RuntimeError as error:
            told.append(error)
        return "t"

    with runqueue.Client(server.uri, token=token) as client:
        client.log_metric(RUN, "m", 1.0)
        client.flush()
        assert "itself" in str(told[0])
        assert client.statistics().stored == 1


def test_keys_that_are_new_in_every_call_do_not_fill_the_memory() -> None:
    """Caches of keys are bounded in bytes: 500,000 different keys take no more than 32 MB."""
    encoder = Encoder()
    tracemalloc.start()
    try:
        for call in range(500):
            entries = {f"step {call} of the training/layer {at}": 1.0 for at in range(1_000)}
            encoder.encode((METRIC, entries, 1, 1, None, None), {})
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 32_000_000


def test_reading_the_entries_of_a_large_call_takes_linear_time() -> None:
    """Of a call that was not stored each entry is looked up, not searched for (20,000 took 18 s)."""
    seen = 0

    class Counted(dict[str, float]):
        """Counts how often it is walked through."""

        def items(self) -> Any:
            nonlocal seen
            seen += 1
            return super().items()

    from runqueue.engine._reports import grouped
    from runqueue.queueing import Failure

    record = (METRIC, Counted({f"m{at}": 1.0 for at in range(2_000)}), 1, 1, None, None)
    (failure,) = grouped([Failure(RUN, record, 0, 2_000, ValueError("no"), final=True)])
    assert [entry.key for entry in failure.entries] == list(record[1])
    assert seen <= 10, f"walked through {seen} times"
