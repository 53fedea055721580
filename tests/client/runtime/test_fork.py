"""
os.fork(): a child begins anew, whatever its parent was doing; what the parent had is sent once, by the parent.

A child that hangs says where, and is ended.
"""

from __future__ import annotations

import pytest

import runqueue
from support.process import Process, by_name, run
from support.proxy import Fault, ScriptedServer
from support.wire_log import entries

RUN = "a" * 32
TRANSPORTS = ["httpx", "auto"]

CLIENT = f"""
client = runqueue.Client(URI, flush_interval=eval(sys.argv[2]), transport=sys.argv[3])
def log(key, count=5):
    for step in range(count):
        client.log_metric("{RUN}", key, 1.0, step)
"""


def keys(server: ScriptedServer) -> dict[str, int]:
    """How many points of each key the server was sent."""
    found: dict[str, int] = {}
    for request in server.to("runs/log-batch"):
        for point in entries(request, "metrics"):
            found[point["key"]] = found.get(point["key"], 0) + 1
    return found


@pytest.mark.sample("*-auto", "False-60-*")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("flush_interval", ["None", "60", "0.01"])
@pytest.mark.parametrize("flushed_before", [False, True])
def test_a_child_starts_with_an_empty_queue_and_no_thread(
    server: ScriptedServer, flush_interval: str, transport: str, flushed_before: bool
) -> None:
    """It logs and flushes with a thread and connections of its own."""
    script = f"""
if {flushed_before}:
    log("before")
    client.flush()
log("parent")
def work():
    assert client.statistics().accepted == 0, client
    assert threading.active_count() == 1, threading.enumerate()
    log("child")
    client.flush()
    assert client.statistics().stored == 5, client
pid = child(work)
code = ended(pid)
assert code == 0, code
client.close()
assert client.statistics().failed == 0
"""
    done = run(CLIENT + script, by_name(server.uri), flush_interval, transport)
    assert (done.code, done.err) == (0, "")
    assert keys(server) == ({"before": 5} if flushed_before else {}) | {"parent": 5, "child": 5}
    of_child = {request.connection for request in server.requests if b'"child"' in request.body}
    of_parent = {request.connection for request in server.requests if b'"child"' not in request.body}
    assert not of_child & of_parent


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_fork_in_mid_flush_leaves_the_flush_to_the_parent(server: ScriptedServer, transport: str) -> None:
    """The parent's request is in flight; the child does not wait for it, nor send it again."""
    server.fail("runs/log-batch", Fault.hold(), times=1)
    script = """
log("parent")
flush = client.flush(synchronous=False)
while not client.statistics().requests:
    time.sleep(0.01)
def work():
    try:
        flush.await_completion()
    except runqueue.ClosedError as error:
        assert "forked" in str(error)
    else:
        raise AssertionError
    assert flush.done and flush.report is None
    log("child")
    client.flush()
pid = child(work)
assert ended(pid) == 0
say("ended")
flush.await_completion()
assert flush.report.stored == 5
client.close()
"""
    with Process(CLIENT + script, server.uri, "None", transport) as process:
        process.expect("ended")
        server.let_go()
        done = process.end()
    assert (done.code, done.err) == (0, "")
    assert keys(server) == {"parent": 5, "child": 5}


def test_a_flush_that_is_over_keeps_its_report_in_a_child(server: ScriptedServer) -> None:
    """Nothing is left to wait for."""
    script = """
log("parent")
flush = client.flush()
def work():
    flush.await_completion()
    assert flush.report.stored == 5
assert ended(child(work)) == 0
"""
    assert run(CLIENT + script, server.uri, "None", "auto").code == 0


@pytest.mark.parametrize("module", ["httpx", "encodings.idna", "runqueue.queueing.delivery._sender"])
def test_a_fork_waits_for_an_import_in_our_thread(server: ScriptedServer, module: str) -> None:
    """Otherwise the child would find the module locked for ever."""
    script = f"""
importing = threading.Event()
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}" and not importing.is_set():
            importing.set()
            time.sleep(0.5)
sys.modules.pop("{module}", None)
sys.meta_path.insert(0, Slow())
log("parent")
assert importing.wait(30)
def work():
    log("child")
    client.flush()
assert ended(child(work)) == 0
client.close()
"""
    done = run(CLIENT + script, by_name(server.uri), "0.01", "httpx")
    assert (done.code, done.err) == (0, "")
    assert keys(server) == {"parent": 5, "child": 5}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_nothing_is_imported_in_our_threads_but_under_the_guard(server: ScriptedServer, transport: str) -> None:
    """On any way of a request: an import during a fork may leave its lock locked in the child."""
    script = """
from runqueue.runtime import _fork
late = []
class Seen:
    def find_spec(self, name, path=None, target=None):
        if threading.current_thread() is not threading.main_thread() and not _fork._importing._is_owned():
            late.append(name)
sys.meta_path.insert(0, Seen())
run = client.create_run(experiment_name="e", tags={"t": 1})
log("m")
client.log_params(run, {"p": 1})
client.log_metric(run, "k" * 300, float("nan"))
client.log_inputs(run, [runqueue.Dataset("n", "d")])
client.set_terminated(run)
client.close()
assert not client.failures, client.failures
assert not late, late
"""
    server.fail("experiments/get-by-name", Fault.answer(200, {"experiment": {"experiment_id": "7"}}))
    server.fail("runs/create", Fault.answer(503))
    server.fail("runs/search", Fault.answer(200, {"runs": []}))
    server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": "r1"}}}))
    server.fail("runs/log-batch", Fault.cut_before_commit())
    done = run(CLIENT + script, by_name(server.uri), "0.01", transport)
    assert done.code == 0, done.err


def test_many_children_log_side_by_side(server: ScriptedServer) -> None:
    """Forked while the parent's threads log and flush without a pause."""
    script = f"""
stop = threading.Event()
logged = [0]
def busy():
    while not stop.is_set():
        client.log_metric("{RUN}", "parent", 1.0, logged[0])
        logged[0] += 1
        if logged[0] % 50 == 0:
            client.flush()
threads = [threading.Thread(target=busy)]
for thread in threads: thread.start()
def work():
    log("child")
    client.flush()
pids = [child(work) for _ in range(12)]
codes = [ended(pid) for pid in pids]
stop.set()
for thread in threads: thread.join()
client.close()
assert codes == [0] * 12, codes
say("logged", logged[0])
"""
    done = run(CLIENT + script, server.uri, "0.01", "auto")
    assert (done.code, done.err) == (0, "")
    logged = int(done.out.split()[-1])
    assert keys(server) == {"parent": logged, "child": 60}


def test_no_fork_happens_while_the_loop_is_made(server: ScriptedServer) -> None:
    """asyncio takes a lock for its first loop, which would stay locked in a child; here it is held for a while."""
    script = """
import asyncio.events
making = threading.Event()
made = asyncio.events._init_event_loop_policy
def make():
    with asyncio.events._lock:
        making.set()
        time.sleep(1)
    made()
asyncio.events._init_event_loop_policy = make
log("parent")
assert making.wait(30)
def work():
    log("child")
    client.flush()
pid = child(work)
code = ended(pid)
assert code == 0, code
client.close()
"""
    done = run(CLIENT + script, server.uri, "0.01", "auto")
    assert (done.code, done.err) == (0, "")
    assert keys(server) == {"parent": 5, "child": 5}


def test_no_fork_happens_while_a_caller_makes_the_loop_at_exit(server: ScriptedServer) -> None:
    """The same guard, at the end of the interpreter."""
    script = """
import asyncio.events
from runqueue.runtime import _fork
owned = []
made = asyncio.events._init_event_loop_policy
def make():
    owned.append(_fork._importing._is_owned())
    made()
def start(self):
    raise RuntimeError("can't start new thread")
asyncio.events._init_event_loop_policy = make
threading.Thread.start = start
log("parent")
client.flush()
assert owned == [True], owned
assert not _fork._importing._is_owned()
"""
    done = run(CLIENT + script, server.uri, "None", "httpx")
    assert (done.code, done.err) == (0, "")
    assert keys(server) == {"parent": 5}


def test_a_child_that_exits_delivers_as_any_process(server: ScriptedServer) -> None:
    """By sys.exit(), through the interpreter's end; and its exit from the block does not end the parent's run."""
    server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": "made"}}}))
    script = """
with client.start_run(experiment_id="0") as run:
    client.flush()
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(45, exit=True)
        run.log_metric("child", 1.0)
        sys.exit(3)
    assert ended(pid) == 3
    run.log_metric("parent", 1.0)
"""
    done = run(CLIENT + script, server.uri, "60", "auto")
    assert (done.code, done.err) == (0, "")
    assert keys(server) == {"child": 1, "parent": 1}
    assert [request.json["status"] for request in server.to("runs/update")] == ["FINISHED"]


def test_children_have_ids_of_their_own(server: ScriptedServer) -> None:
    """Tokens of runs are unique."""
    script = """
client.create_run("0")
def work():
    say(client.create_run("0")._token)
for _ in range(3):
    assert ended(child(work)) == 0
say(client.create_run("0")._token)
"""
    done = run(CLIENT + script, server.uri, "None", "auto")
    assert len(set(done.out.split())) == len(done.out.split()) == 4


def test_a_client_that_was_closed_stays_so(server: ScriptedServer) -> None:
    """In the child as in the parent."""
    script = """
client.close()
def work():
    try:
        log("late")
    except runqueue.ClosedError:
        return
    raise AssertionError
assert ended(child(work)) == 0
"""
    assert run(CLIENT + script, server.uri, "60", "auto").code == 0


def test_the_hooks_of_a_fork_keep_no_object_alive(client: runqueue.Client) -> None:
    """A hook that fails does not keep the others from being called."""
    from runqueue.runtime import _fork

    called: list[str] = []

    class Thing:
        def __init__(self, name: str) -> None:
            self.name = name

        def _after_fork(self) -> None:
            called.append(self.name)
            if self.name == "bad":
                raise ValueError

    things = [Thing("first"), Thing("bad"), Thing("last")]
    for thing in things:
        _fork.register(thing)
    forgotten = Thing("forgotten")
    _fork.register(forgotten)
    del forgotten
    before = _fork._registered.copy()
    try:
        for key in list(_fork._registered):
            if _fork._registered[key] not in things:
                del _fork._registered[key]
        _fork._after_fork_in_child()
    finally:
        _fork._registered.update(before)
    assert called == ["first", "bad", "last"]
