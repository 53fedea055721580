"""The end of the interpreter: a streaming client sends what is queued, in bounded time, whatever ends the script."""

from __future__ import annotations

import multiprocessing
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from support.answers import error
from support.mlflow_server import clean_environment, free_port
from support.process import PREAMBLE, by_name, run
from support.proxy import Fault, ScriptedServer
from support.wire_log import entries, names

RUN = "a" * 32
TRANSPORTS = ["httpx", "auto"]

STREAMING = f"""
client = runqueue.Client(URI, flush_interval=60, exit_timeout=20, transport=sys.argv[2])
for step in range(5):
    client.log_metric("{RUN}", "m", float(step), step)
"""
"""Nothing is due before the end; no connection is there, no name resolved."""


def steps(server: ScriptedServer) -> list[int]:
    """Those that the server was sent, in order."""
    return [point["step"] for request in server.to("runs/log-batch") for point in entries(request, "metrics")]


ENDS = {
    "the last line": ("", 0),
    "sys.exit()": ("sys.exit()", 0),
    "sys.exit(3)": ("sys.exit(3)", 3),
    "an exception": ("raise ValueError('mine')", 1),
    "sys.exit in a block": ("with client: sys.exit(4)", 4),
    "an exception in a block": ("with client: raise ValueError('mine')", 1),
}


@pytest.mark.sample("*-auto", "the last line-*")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(("last", "code"), ENDS.values(), ids=ENDS)
def test_a_script_that_ends_delivers_what_is_queued(
    server: ScriptedServer, last: str, code: int, transport: str
) -> None:
    """By a host name, which is resolved when no thread can be started any more; the exit status is the script's."""
    done = run(STREAMING + last, by_name(server.uri), transport)
    assert done.code == code
    assert steps(server) == [0, 1, 2, 3, 4]
    assert done.out == "" and done.err.count("Traceback") == int("mine" in last), done.err
    assert "not sent" not in done.err


LATE_IMPORTS = f"""
from runqueue.runtime._loop_thread import LoopThread
preload, leaving = LoopThread._preload, threading.Event()
def load(self):
    leaving.wait(20)
    exec("made_up_import = 1")
    preload(self)
LoopThread._preload = load
client = runqueue.Client(URI, flush_interval=60)
client.log_metric("{RUN}", "m", 0.0, 0)
atexit.register(leaving.set)
"""
"""The engine loads its libraries when the script has ended. Among them is one that executes text, as those of attrs."""

LATE_ENDS = {
    "the last line": ("", 0),
    "an exception": ("raise ValueError", 1),
    "sys.exit(3)": ("sys.exit(3)", 3),
    "KeyboardInterrupt": ("raise KeyboardInterrupt", -signal.SIGINT),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)", -signal.SIGINT),
    "SIGINT in a thread's wait": (
        "threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()\nthreading.Event().wait(30)",
        -signal.SIGINT,
    ),
    "a KeyboardInterrupt that is caught": ("try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt:\n    pass", 0),
    "sys.exit(3) after one": ("try:\n    raise KeyboardInterrupt\nexcept KeyboardInterrupt:\n    sys.exit(3)", 3),
}


@pytest.mark.parametrize(("last", "code"), LATE_ENDS.values(), ids=LATE_ENDS)
def test_a_script_keeps_its_exit_status_whatever_is_imported_after_its_end(
    server: ScriptedServer, last: str, code: int
) -> None:
    """An interrupted one dies by SIGINT, which shells report as 130."""
    done = run(LATE_IMPORTS + last, server.uri)
    assert done.code == code
    assert steps(server) == [0]


STARTS = {
    "a file": lambda path: [str(path)],
    "a module": lambda path: ["-m", path.stem],
    "standard input": lambda path: ["-"],
}


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
def test_an_interrupted_script_ends_as_python_ends_it_however_it_was_started(
    server: ScriptedServer, tmp_path: Path, start: Callable[[Path], list[str]]
) -> None:
    """With a client as without one."""
    path, codes = tmp_path / "script.py", list[int]()
    for script in ("raise KeyboardInterrupt", PREAMBLE + LATE_IMPORTS + "raise KeyboardInterrupt"):
        path.write_text(script)
        command = [sys.executable, *start(path), server.uri]
        environment, folder = clean_environment(), tmp_path
        with path.open() as source:
            done = subprocess.run(
                command, check=False, stdin=source, env=environment, cwd=folder, capture_output=True, timeout=60
            )
        codes.append(done.returncode)
    assert codes == [-signal.SIGINT] * 2
    assert steps(server) == [0]


def test_the_libraries_are_loaded_from_the_first_record_on(server: ScriptedServer) -> None:
    """In the background, and not in the flush at exit: it loads no module of a library."""
    script = f"""
client = runqueue.Client(URI, flush_interval=3600)
client.log_metric("{RUN}", "m", 0.0, 0)
while client._engine._thread._loop is None:
    time.sleep(0.01)
before = set(sys.modules)
client.flush()
print(*{{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names))
"""
    done = run(script, by_name(server.uri))
    assert (done.code, done.out.split(), done.err) == (0, [], "")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_threads_that_outlive_the_main_thread_count(server: ScriptedServer, transport: str) -> None:
    """The interpreter waits for them before the exit flush."""
    done = run(
        STREAMING
        + f"""
def work():
    threading.main_thread().join()
    for step in range(5, 8):
        client.log_metric("{RUN}", "m", 1.0, step)
threading.Thread(target=work).start()
""",
        by_name(server.uri),
        transport,
    )
    assert (done.code, done.err) == (0, "")
    assert steps(server) == list(range(8))


def test_a_server_that_is_down_is_waited_for_no_longer_than_the_bound() -> None:
    """One message with counts; the exit status is the script's."""
    begun = time.monotonic()
    done = run(
        """
client = runqueue.Client(URI, flush_interval=60, exit_timeout=1)
client.log_metrics("r", {"a": 1.0, "b": 2.0, "c": 3.0})
sys.exit(3)
""",
        by_name(f"http://127.0.0.1:{free_port()}"),
    )
    assert done.code == 3
    assert time.monotonic() - begun < 15
    assert done.err.startswith("3 of 3 entries were not stored") and done.err.count("not stored") == 1


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_the_bound(server: ScriptedServer) -> None:
    """It has received the request, with an unknown outcome."""
    server.fail("", Fault.hold(), times=None)
    begun = time.monotonic()
    done = run(
        """
client = runqueue.Client(URI, flush_interval=60, exit_timeout=1)
client.log_metrics("r", {"a": 1.0, "b": 2.0})
""",
        server.uri,
    )
    server.let_go()
    assert done.code == 0
    assert time.monotonic() - begun < 15
    assert done.err.startswith("2 of 2 entries were not stored") and done.err.count("not stored") == 1


def test_an_engine_that_has_not_started_within_the_bound_is_warned_of_once(server: ScriptedServer) -> None:
    """As on a machine that is very busy."""
    done = run(
        """
import runqueue.runtime._loop_thread
runqueue.runtime._loop_thread.LoopThread._preload = lambda self: time.sleep(60)
client = runqueue.Client(URI, flush_interval=60, exit_timeout=0.5)
client.log_metrics("r", {"a": 1.0, "b": 2.0})
""",
        server.uri,
    )
    assert (done.code, done.err) == (0, "2 entries were not sent: the time was over\n")


def test_a_failure_at_exit_is_logged_with_its_cause(server: ScriptedServer) -> None:
    """The other entries are stored."""
    bad = Fault.answer(400, error("INVALID_PARAMETER_VALUE", "no such thing"))
    server.fail("", bad, times=None, when=lambda request: b'"bad"' in request.body)
    done = run(
        """
client = runqueue.Client(URI, flush_interval=60)
client.log_metrics("r", {"good": 1.0, "bad": 2.0})
""",
        server.uri,
    )
    assert done.code == 0
    assert done.err.startswith("1 of 2 entries were not stored") and "no such thing" in done.err


def test_several_clients_share_the_time(server: ScriptedServer) -> None:
    """They are flushed side by side: one whose server is down costs the others nothing."""
    done = run(
        """
clients = [runqueue.Client(uri, flush_interval=60, exit_timeout=4) for uri in (*sys.argv[2:], URI)]
for client in clients:
    client.log_metric("r", "m", 1.0)
""",
        server.uri,
        *(f"http://127.0.0.1:{free_port()}" for _ in range(4)),
    )
    assert done.code == 0
    assert names(server.requests) == ["log-batch"]
    assert done.err.count("1 of 1 entries were not stored") == 4


def test_a_client_that_was_garbage_collected_delivers_all_the_same(server: ScriptedServer) -> None:
    """Its engine sends what is queued after the client object is gone."""
    done = run(STREAMING + "del client", server.uri, "auto")
    assert (done.code, done.err) == (0, "")
    assert steps(server) == [0, 1, 2, 3, 4]


def test_a_client_that_does_not_stream_warns_of_unsent_entries(server: ScriptedServer) -> None:
    """It sends nothing without a flush."""
    done = run('client = runqueue.Client(URI)\nclient.log_metrics("r", {"a": 1.0, "b": 2.0})\n', server.uri)
    assert done.code == 0 and server.count() == 0
    (line,) = done.err.splitlines()
    assert "was never closed: 2 entries were not sent" in line


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("flush_interval", [None, 60])
def test_closing_at_exit_works_without_a_thread(
    server: ScriptedServer, flush_interval: float | None, transport: str
) -> None:
    """`atexit.register(client.close)`, and a first log call at exit: where no thread can be started, without one."""
    done = run(
        f"""
def last():
    for step in range(5):
        client.log_metric("{RUN}", "m", 1.0, step)
    client.close()
client = runqueue.Client(URI, flush_interval={flush_interval}, transport=sys.argv[2])
atexit.register(last)
""",
        by_name(server.uri),
        transport,
    )
    assert (done.code, done.err) == (0, "")
    assert steps(server) == [0, 1, 2, 3, 4]


def test_entries_logged_by_an_exit_hook_are_sent(server: ScriptedServer) -> None:
    """The hook was registered after the client was made, and runs before the exit flush."""
    done = run(
        f"""
client = runqueue.Client(URI, flush_interval=60)
atexit.register(client.log_metric, "{RUN}", "m", 1.0, 7)
""",
        by_name(server.uri),
    )
    assert (done.code, done.err) == (0, "")
    assert steps(server) == [7]


LATE = f"""
made = []
def last():
    for step in range(3):
        made[0].log_metric("{RUN}", "m", 1.0, step)
    made[0].set_tags("{RUN}", dict(late="1"))
"""
HOOKS = {
    "runqueue": ("", "atexit.register(last)"),
    "the hook": ("import atexit\natexit.register(lambda: last())\n", ""),
}
"""What comes first: `import runqueue`, or a hook that logs. Each with what stands before that import, and after it."""


@pytest.mark.sample("*-auto")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("used", [True, False])
@pytest.mark.parametrize("first", HOOKS)
def test_entries_logged_after_the_exit_flush_are_sent_too(
    server: ScriptedServer, first: str, used: bool, transport: str
) -> None:
    """The hook was registered before the client, so it runs after the exit flush; `used`: that flush had entries."""
    before, hook = HOOKS[first]
    done = run(
        LATE
        + f"""
{hook}
made.append(runqueue.Client(URI, flush_interval=60, transport=sys.argv[2]))
if {used}:
    made[0].log_metric("{RUN}", "m", 1.0, 99)
sys.exit(3)
""",
        by_name(server.uri),
        transport,
        before=before,
    )
    assert (done.code, done.err) == (3, "")
    assert sorted(steps(server)) == [0, 1, 2, *([99] if used else [])]
    assert sum(len(entries(request, "tags")) for request in server.to("runs/log-batch")) == 1


def test_entries_logged_too_late_for_a_server_that_is_down_are_counted_in_a_warning() -> None:
    """No time is left; the process ends no later, and with its own status."""
    begun = time.monotonic()
    done = run(
        LATE
        + """
made.append(runqueue.Client(URI, flush_interval=60, exit_timeout=1))
made[0].log_metric("r", "m", 1.0)
sys.exit(3)
""",
        f"http://127.0.0.1:{free_port()}",
        before=HOOKS["the hook"][0],
    )
    assert done.code == 3
    assert time.monotonic() - begun < 15
    assert "1 of 1 entries were not stored" in done.err
    assert "4 entries were logged too late" in done.err


@pytest.mark.parametrize("first", HOOKS)
def test_entries_dropped_while_the_interpreter_ends_are_warned_of(first: str) -> None:
    """The queue is full and the last flush has failed; the engine's own warning, once a minute, would come too late."""
    before, hook = HOOKS[first]
    done = run(
        LATE
        + f"""
{hook}
made.append(runqueue.Client(URI, flush_interval=60, exit_timeout=5, max_pending=1, on_full="drop", retry_timeout=0))
made[0].log_metric("r", "m", 1.0)
made[0].log_metric("r", "m", 1.0)
sys.exit(3)
""",
        f"http://127.0.0.1:{free_port()}",
        before=before,
    )
    assert done.code == 3
    assert "1 entries of run r were dropped" in done.err
    assert sum(map(int, re.findall(rf"(\d+) entries of run {RUN} were dropped", done.err))) == 4
    assert "too late" not in done.err


def test_entries_that_another_thread_is_sending_at_exit_are_not_reported_as_too_late(
    server: ScriptedServer,
) -> None:
    """The thread waits for its own flush; a warning would be wrong."""
    server.fail("", Fault.delayed(0.02), times=None)
    done = run(
        f"""
def last():
    for step in range(1, 41):
        client.log_metric("{RUN}", "m", 1.0, step)
    stop.set()
def monitor():
    while not stop.wait(0.005):
        client.log_metric("{RUN}", "system", 1.0)
stop = threading.Event()
client = runqueue.Client(URI, flush_interval=1)
client.log_metric("{RUN}", "first", 1.0)
threading.Thread(target=monitor, daemon=True).start()
""",
        server.uri,
        before="import atexit, threading\natexit.register(lambda: last())\n",
    )
    assert (done.code, done.err) == (0, "")
    assert list(filter(None, steps(server))) == list(range(1, 41))


@pytest.mark.parametrize("first", HOOKS)
def test_entries_logged_after_the_end_of_a_client_that_does_not_stream_are_counted_in_a_warning(
    server: ScriptedServer, first: str
) -> None:
    """No flush was called, and none can be called any more."""
    before, hook = HOOKS[first]
    done = run(
        LATE
        + f"""
{hook}
made.append(runqueue.Client(URI))
made[0].log_metrics("r", dict(a=1.0, b=2.0))
sys.exit(3)
""",
        server.uri,
        before=before,
    )
    assert done.code == 3 and server.count() == 0
    assert "was never closed: 2 entries were not sent" in done.err
    assert "4 entries were logged too late" in done.err


@pytest.mark.parametrize(
    "method", [each for each in ("fork", "spawn", "forkserver") if each in multiprocessing.get_all_start_methods()]
)
def test_a_worker_of_multiprocessing_delivers_at_its_end(server: ScriptedServer, tmp_path: Path, method: str) -> None:
    """Forked ones end without atexit's hooks."""
    (tmp_path / "job.py").write_text(f"def work(client):\n    client.log_metric('{RUN}', 'm', 1.0, 9)\n")
    done = run(
        f"""
import multiprocessing
sys.path.insert(0, sys.argv[2])
import job
client = runqueue.Client(URI, flush_interval=60)
client.log_metric("{RUN}", "m", 1.0, 1)
if __name__ == "__main__":
    worker = multiprocessing.get_context("{method}").Process(target=job.work, args=(client,))
    worker.start()
    worker.join()
    assert worker.exitcode == 0
""",
        by_name(server.uri),
        str(tmp_path),
    )
    assert (done.code, done.err) == (0, "")
    assert sorted(steps(server)) == [1, 9]
