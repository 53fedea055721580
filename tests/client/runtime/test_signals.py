"""SIGTERM, SIGHUP and SIGINT: a bounded flush, the right final status, the default action; no handler is replaced."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import indent

import pytest

import runqueue
from support.mlflow_server import clean_environment, free_port, wait_until
from support.process import PATIENCE, Process, by_name
from support.proxy import Fault, ScriptedServer
from support.wire_log import names

RUN = "a" * 32
CREATED = Fault.answer(200, {"run": {"info": {"run_id": "made"}}})

ENDING = [signal.SIGTERM, signal.SIGHUP]

STREAMING = f"""
client = runqueue.Client(URI, flush_interval=60, exit_timeout=float(sys.argv[2]))
run = client.start_run(experiment_id="0")
run.log_metrics({{"a": 1.0, "b": 2.0}}, step=1)
client.log_metric("{RUN}", "other", 1.0)
"""
# In naps, as Python hears of a signal that comes just before a wait only after the wait.
WAIT = """
say("ready")
while True:
    time.sleep(0.05)
"""


def statuses(server: ScriptedServer) -> dict[str, str]:
    """The final status of each run."""
    return {request.json["run_id"]: request.json["status"] for request in server.to("runs/update")}


def await_requests(server: ScriptedServer, count: int = 1) -> None:
    wait_until(lambda: server.count() >= count, PATIENCE, "no request")


@pytest.fixture(autouse=True)
def _default_action() -> Iterator[None]:
    """Whatever a test leaves behind."""
    before = {number: signal.getsignal(number) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# -- SIGTERM and SIGHUP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_delivers_sets_runs_killed_and_ends_the_process(
    server: ScriptedServer, number: signal.Signals
) -> None:
    """The runs that the client has made, and no others; the process ends by the signal."""
    server.fail("runs/create", CREATED)
    with Process(STREAMING + WAIT, by_name(server.uri), "20") as process:
        process.expect("ready")
        process.signal(number)
        done = process.end()
    assert (done.code, done.err) == (-number, "")
    assert statuses(server) == {"made": "KILLED"}
    assert sorted(names(server.requests)) == ["create", "log-batch", "log-batch", "update"]


@pytest.mark.parametrize("first", ENDING)
def test_a_sighup_that_follows_does_not_end_the_flush(server: ScriptedServer, first: signal.Signals) -> None:
    """A terminal that is closed may send it twice, and systemd may send it behind SIGTERM."""
    server.fail("runs/create", CREATED)
    server.fail("runs/log-batch", Fault.hold(), times=None)
    with Process(STREAMING + WAIT, server.uri, "60") as process:
        process.expect("ready")
        process.signal(first)
        await_requests(server, 3)
        process.signal(signal.SIGHUP)
        server.mend()
        server.let_go()
        assert process.end().code == -first
    assert statuses(server) == {"made": "KILLED"}


def test_a_closed_terminal_ends_the_process_by_sighup(server: ScriptedServer) -> None:
    """The process leads the session of the terminal, as a script does that a terminal emulator starts."""
    server.fail("runs/create", CREATED)
    script = """
import pty
pid, terminal = pty.fork()
if pid == 0:
    client = runqueue.Client(URI, flush_interval=60)
    client.start_run(experiment_id="0").log_metric("m", 1.0)
    say("ready")
    while True:
        time.sleep(0.05)
seen = b""
while b"ready" not in seen:
    seen += os.read(terminal, 100)
os.close(terminal)
say(ended(pid))
"""
    with Process(script, server.uri) as process:
        done = process.end()
    assert (done.code, done.out.split()) == (0, [str(-signal.SIGHUP)])
    assert statuses(server) == {"made": "KILLED"}
    assert names(server.requests) == ["create", "log-batch", "update"]


def test_a_program_that_ignores_sighup_goes_on(server: ScriptedServer) -> None:
    """As under nohup."""
    server.fail("runs/create", CREATED)
    script = """
os.kill(os.getpid(), signal.SIGHUP)
say(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)
run.set_terminated()
"""
    ignoring = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    with Process(STREAMING + script, server.uri, "20", before=ignoring) as process:
        done = process.end()
    assert (done.code, done.out.split(), done.err) == (0, ["True"], "")
    assert statuses(server) == {"made": "FINISHED"}


def test_a_run_that_has_ended_keeps_its_status(server: ScriptedServer) -> None:
    """Also if the status is still queued."""
    server.fail("runs/create", CREATED)
    with Process(STREAMING + "run.set_terminated('FAILED')\n" + WAIT, server.uri, "20") as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    assert statuses(server) == {"made": "FAILED"}


OF_ENV = """
os.environ["MLFLOW_RUN_ID"] = "of-env"
client = runqueue.Client(URI, flush_interval=60)
run = client.run_from_env()
"""


def test_the_run_that_the_environment_names_is_killed_too(server: ScriptedServer) -> None:
    """MLflow Projects does not end the run of a cancelled entry point; queued entries are sent first."""
    with Process(OF_ENV + 'run.log_metric("m", 1.0)\n' + WAIT, server.uri) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        done = process.end()
    assert (done.code, done.err) == (-signal.SIGTERM, "")
    assert names(server.requests) == ["log-batch", "update"]
    assert statuses(server) == {"of-env": "KILLED"}


@pytest.mark.parametrize("logged", ["", 'run.log_metric("m", 1.0)\nclient.flush()\n'])
def test_it_is_killed_also_if_nothing_waits_for_it(server: ScriptedServer, logged: str) -> None:
    """Nothing was logged yet, or all of it is stored."""
    with Process(OF_ENV + logged + WAIT, server.uri) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    assert statuses(server) == {"of-env": "KILLED"}


@pytest.mark.parametrize("end", ["run.set_terminated('FAILED')", "client.set_terminated('of-env', 'FAILED')"])
@pytest.mark.parametrize("flush", ["", "client.flush()"])
def test_it_keeps_the_status_that_it_was_given(server: ScriptedServer, end: str, flush: str) -> None:
    """By the handle or the client, queued or stored; and it is not the block that ends it."""
    script = f"with run:\n    run.log_metric('m', 1.0)\n{end}\n{flush}\n"
    with Process(OF_ENV + script + WAIT, server.uri) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    assert [request.json["status"] for request in server.to("runs/update")] == ["FAILED"]


def test_a_run_that_was_set_running_again_is_killed(server: ScriptedServer) -> None:
    """That is no final status."""
    with Process(OF_ENV + "run.set_terminated('RUNNING')\n" + WAIT, server.uri) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    assert [request.json["status"] for request in server.to("runs/update")] == ["KILLED"]


def test_a_child_does_not_kill_the_run_of_its_parents_environment(server: ScriptedServer) -> None:
    """The parent is the entry point of the run. A run that was only attached to is not ended either."""
    script = """
def work():
    client.attach("attached").log_metric("m", 1.0)
    client.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
say(ended(child(work)))
client.attach("attached").log_metric("m", 2.0)
"""
    with Process(OF_ENV + script + WAIT, server.uri) as process:
        process.expect("ready")
        assert statuses(server) == {}
        process.signal(signal.SIGTERM)
        assert process.end().out.splitlines()[0] == str(-signal.SIGTERM)
    assert statuses(server) == {"of-env": "KILLED"}


def test_a_second_sigterm_ends_at_once(server: ScriptedServer) -> None:
    """However long the first one's flush may take."""
    server.fail("", Fault.hold(), times=None)
    with Process(STREAMING + WAIT, server.uri, "300") as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        await_requests(server)
        begun = time.monotonic()
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
        assert time.monotonic() - begun < 10
    server.let_go()


def test_sigterm_while_the_server_is_down_ends_at_the_bound() -> None:
    """One message with counts: run, three entries."""
    begun = time.monotonic()
    with Process(STREAMING + WAIT, f"http://127.0.0.1:{free_port()}", "4") as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        done = process.end()
    assert done.code == -signal.SIGTERM
    assert time.monotonic() - begun < 25
    assert done.err.startswith("4 of 4 entries were not stored") and done.err.count("not stored") == 1


def test_sigterm_reaches_a_main_thread_that_waits_in_a_flush(server: ScriptedServer) -> None:
    """It interrupts the wait; the lock that a log handler holds there causes no deadlock."""
    server.fail("", Fault.hold(), times=1)
    script = """
import logging
class Flushing(logging.Handler):
    def emit(self, record):
        if record.name == "mine":
            client.flush()
logging.getLogger().addHandler(Flushing())
logging.getLogger().setLevel(logging.INFO)
say("ready")
logging.getLogger("mine").warning("flush")
"""
    with Process(STREAMING + script, server.uri, "20") as process:
        process.expect("ready")
        await_requests(server)
        process.signal(signal.SIGTERM)
        server.fail("runs/create", CREATED)
        server.let_go()
        assert process.end().code == -signal.SIGTERM
    assert "log-batch" in names(server.requests)


@pytest.mark.parametrize("number", ENDING)
def test_handle_signals_false_leaves_the_default_action(server: ScriptedServer, number: signal.Signals) -> None:
    """The process ends at once, and nothing is sent."""
    script = (
        'client = runqueue.Client(URI, flush_interval=60, handle_signals=False)\nclient.log_metric("r", "m", 1.0)\n'
    )
    with Process(script + WAIT, server.uri) as process:
        process.expect("ready")
        process.signal(number)
        assert process.end().code == -number
    assert server.count() == 0


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_handler_of_the_users_is_never_replaced(server: ScriptedServer, when: str, number: signal.Signals) -> None:
    """Whether it was set before or after; its exit is an exit like any other."""
    mine = f"signal.signal({int(number)}, lambda number, frame: sys.exit(7))\n"
    script = mine + STREAMING if when == "before" else STREAMING + mine
    server.fail("runs/create", CREATED)
    with Process(script + WAIT, server.uri, "20") as process:
        process.expect("ready")
        process.signal(number)
        assert process.end().code == 7
    assert "log-batch" in names(server.requests) and statuses(server) == {}


@pytest.mark.parametrize("number", ENDING)
def test_a_handler_of_the_users_survives_the_last_client(server: ScriptedServer, number: signal.Signals) -> None:
    """A handler that was set while a client lived is not removed."""
    signal.signal(number, signal.SIG_DFL)
    mine = lambda number, frame: None
    with runqueue.Client(server.uri, flush_interval=60):
        signal.signal(number, mine)
    assert signal.getsignal(number) is mine


@pytest.mark.parametrize("number", ENDING)
def test_the_handler_lives_as_long_as_a_streaming_client(server: ScriptedServer, number: signal.Signals) -> None:
    """Installed with the first and removed with the last one, closed or collected; others install none."""
    signal.signal(number, signal.SIG_DFL)
    installed: Callable[[], bool] = lambda: signal.getsignal(number) is not signal.SIG_DFL
    with runqueue.Client(server.uri):
        assert not installed()
    first = runqueue.Client(server.uri, flush_interval=60)
    second = runqueue.Client(server.uri, flush_interval=60)
    assert installed()
    first.close()
    assert installed()
    del second
    gc.collect()
    assert not installed()
    with pytest.raises(ValueError), runqueue.Client(server.uri, flush_interval=60):
        assert installed()
        raise ValueError
    assert not installed()


def test_a_client_made_in_another_thread_installs_nothing(server: ScriptedServer) -> None:
    """Python lets only the main thread do so."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    made: list[runqueue.Client] = []
    thread = threading.Thread(target=lambda: made.append(runqueue.Client(server.uri, flush_interval=60)))
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    made[0].close()


def test_a_forked_child_has_the_default_action(server: ScriptedServer, tmp_path: Path) -> None:
    """A worker that is terminated ends at once."""
    script = """
def work():
    client.log_metric("r", "m", 1.0)
    say("forked", *[signal.getsignal(each) is signal.SIG_DFL for each in (signal.SIGTERM, signal.SIGHUP)])
    time.sleep(40)
pid = child(work)
while not os.path.exists(sys.argv[3]):
    time.sleep(0.02)
os.kill(pid, signal.SIGTERM)
say("child", ended(pid))
say("parent", signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
"""
    flag = tmp_path / "go"  # by which the parent knows that the child has said so
    with Process(STREAMING + script, server.uri, "5", str(flag)) as process:
        process.expect("forked True True")
        flag.touch()
        process.expect("child -15")
        process.expect("parent False")
        process.end()


# -- SIGINT ----------------------------------------------------------------------------------------------------------


def test_an_interrupt_sets_the_runs_of_blocks_killed(server: ScriptedServer) -> None:
    """KeyboardInterrupt leaves the blocks; what is queued is sent, and the process ends by the signal."""
    server.fail("runs/create", CREATED)
    script = """
with runqueue.Client(URI, flush_interval=60) as client, client.start_run(experiment_id="0") as run:
    run.log_metric("m", 1.0)
    say("ready")
    while True:
        time.sleep(0.05)
"""
    with Process(script, server.uri) as process:
        process.expect("ready")
        process.signal(signal.SIGINT)
        done = process.end()
    assert done.code == -signal.SIGINT and done.err.rstrip().endswith("KeyboardInterrupt")
    assert statuses(server) == {"made": "KILLED"}
    assert names(server.requests) == ["create", "log-batch", "update"]


CLIENT = """
client = runqueue.Client(URI, flush_interval=60, exit_timeout=float(sys.argv[2]), transport="httpx")
"""

BLOCKS = {
    "a block": f"with client:\n    client.log_metric('{RUN}', 'm', 1.0)" + indent(WAIT, "    "),
    "no block": f"""
client.log_metric('{RUN}', 'm', 1.0)
{WAIT}""",
    "asyncio": f"""
import asyncio
async def main():
    async with runqueue.AsyncClient(URI, flush_interval=60, exit_timeout=float(sys.argv[2]), transport="httpx") as client:
        client.log_metric('{RUN}', 'm', 1.0)
        say('ready')
        while True:
            await asyncio.sleep(0.05)
asyncio.run(main())
""",
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_the_flush_after_an_interrupt_is_bounded(server: ScriptedServer, block: str) -> None:
    """By `exit_timeout`, though the server never answers; a warning counts the entries that were not sent."""
    server.fail("", Fault.hold(), times=None)
    with Process(CLIENT + block, server.uri, "1") as process:
        process.expect("ready")
        begun = time.monotonic()
        process.signal(signal.SIGINT)
        done = process.end()
        assert time.monotonic() - begun < 15
    server.let_go()
    assert done.code == -signal.SIGINT
    assert "1 of 1 entries were not stored" in done.err


@pytest.mark.parametrize("block", BLOCKS)
def test_a_second_interrupt_ends_the_flush(server: ScriptedServer, block: str) -> None:
    """Without waiting for `exit_timeout`."""
    if block == "asyncio" and sys.version_info < (3, 11):
        pytest.skip("asyncio.run of Python 3.10 leaves the task behind: the second ends the block, a third the exit")
    server.fail("", Fault.hold(), times=None)
    with Process(CLIENT + BLOCKS[block], server.uri, "300") as process:
        process.expect("ready")
        process.signal(signal.SIGINT)
        await_requests(server)
        begun = time.monotonic()
        process.signal(signal.SIGINT)
        done = process.end()
        assert time.monotonic() - begun < 15
    server.let_go()
    assert done.code == -signal.SIGINT
    assert "1 entries were not sent" in done.err


INTERRUPTED = """
import signal, sys, threading, time
import runqueue
client = runqueue.Client(sys.argv[1], flush_interval=60, exit_timeout=20)
for run in range(40):
    for step in range(50):
        client.log_metrics(f"{run:032x}", {"m": 1.0}, step=step)
held = client._engine.accumulator.inbox_entries
def stop(number, frame):  # as a scheduler's warning: whatever the main thread is doing just then
    started = time.monotonic()
    client.flush(timeout=15)
    print(client.statistics().stored, time.monotonic() - started < 10, flush=True)
signal.signal(signal.SIGUSR1, stop)
def waiting():
    count = held()
    if not done:
        done.append(1)
        signal.raise_signal(signal.SIGUSR1)
    return count
done = []
client._engine.accumulator.inbox_entries = waiting
client.statistics()
"""


def test_a_flush_in_a_signal_handler_waits_for_no_lock_of_the_main_thread(server: ScriptedServer) -> None:
    """Not even if the signal comes while queued entries are counted."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, server.uri],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.split() == ["2000", "True"]
