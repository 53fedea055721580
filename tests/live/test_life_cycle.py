"""
The life of a process that logs to a real server by a host name: forks, workers, signals, the end.

Each test reads back what is stored. The scripts are written as users write them.
"""

from __future__ import annotations

import multiprocessing
import shutil
import signal
from pathlib import Path

import pytest

from support.embedded import NOLOAD, read
from support.mlflow_server import MlflowServer, wait_until
from support.process import PATIENCE, Ended, Process, by_name, run
from support.proxy import Fault, FaultyProxy
from support.readback import Readback, StoredRun

pytestmark = pytest.mark.live

STREAMING = """
client = runqueue.Client(URI, flush_interval=0.2)
run = client.start_run(experiment_id=sys.argv[2], run_name="parent")
"""


def only_run(readback: Readback, experiment_id: str) -> StoredRun:
    (run_id,) = readback.run_ids(experiment_id)
    return readback.run(run_id)


def steps(stored: StoredRun, key: str) -> list[int]:
    return [point.step for point in stored.content.metrics.get(key, [])]


def went_well(done: Ended) -> None:
    assert (done.code, done.err) == (0, "")


# -- forks and workers -----------------------------------------------------------------------------------------------


def test_forked_workers_log_beside_their_parent(
    mlflow_server: MlflowServer, readback: Readback, experiment_id: str
) -> None:
    """As those of a data loader: the parent streams to the same run, whose creation is still queued at the fork."""
    script = """
def work(worker):
    for step in range(100):
        client.log_metric(run.id, f"worker {worker}", 1.0, step, timestamp=1)
    client.flush()
pids = []
for step in range(200):
    run.log_metric("parent", 1.0, step, timestamp=1)
    if step % 50 == 10:
        pids.append(child(lambda number=len(pids): work(number)))
codes = [ended(pid) for pid in pids]
assert codes == [0] * 4, codes
run.set_terminated()
"""
    went_well(run(STREAMING + script, by_name(mlflow_server.uri), experiment_id))
    stored = only_run(readback, experiment_id)
    assert stored.status == "FINISHED"
    assert steps(stored, "parent") == list(range(200))
    for worker in range(4):
        assert steps(stored, f"worker {worker}") == list(range(100))


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_workers_get_placeholders_before_any_request(
    mlflow_server: MlflowServer, readback: Readback, experiment_id: str, tmp_path: Path, method: str
) -> None:
    """A launcher passes placeholders to workers at once. Each worker logs to its run, and creates children of it."""
    (tmp_path / "job.py").write_text(
        """
def work(client, pending, number):
    assert pending.run_id is None
    for step in range(20):
        client.log_metric(pending, "m", float(number), step, timestamp=1)
    client.create_run(EXPERIMENT, run_name=f"below {number}", parent_run_id=pending)
    client.flush()
    assert pending.run_id is not None
""".replace("EXPERIMENT", repr(experiment_id))
    )
    script = f"""
import multiprocessing
sys.path.insert(0, sys.argv[3])
import job
if __name__ == "__main__":
    client = runqueue.Client(URI)
    runs = [client.create_run(sys.argv[2], run_name=f"run {{number}}") for number in range(3)]
    context = multiprocessing.get_context("{method}")
    workers = [context.Process(target=job.work, args=(client, run, number)) for number, run in enumerate(runs)]
    for worker in workers: worker.start()
    assert client.statistics().requests == 0
    client.flush()
    for worker in workers: worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 3
    for run in runs: client.set_terminated(run)
    client.close()
"""
    went_well(run(script, by_name(mlflow_server.uri), experiment_id, str(tmp_path)))
    stored = [readback.run(run_id) for run_id in readback.run_ids(experiment_id)]
    assert sorted(each.name for each in stored) == [f"{kind} {at}" for kind in ("below", "run") for at in range(3)]
    by_number = {each.name: each for each in stored}
    ids = {readback.run(run_id).name: run_id for run_id in readback.run_ids(experiment_id)}
    for number in range(3):
        above = by_number[f"run {number}"]
        assert above.status == "FINISHED"
        assert [point.value for point in above.content.metrics["m"]] == [float(number)] * 20
        assert by_number[f"below {number}"].tags["mlflow.parentRunId"] == ids[f"run {number}"]


# -- ends ------------------------------------------------------------------------------------------------------------

ENDS = {
    "the last line": ("", 0, "FINISHED"),
    "sys.exit(0)": ("sys.exit(0)", 0, "FINISHED"),
    "sys.exit(3)": ("sys.exit(3)", 3, "FAILED"),
    "an exception": ("raise ValueError('mine')", 1, "FAILED"),
    "KeyboardInterrupt": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(30)", -signal.SIGINT, "KILLED"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", -signal.SIGTERM, "KILLED"),
}


@pytest.mark.sample("*-0.2")
@pytest.mark.parametrize("flush_interval", [0.2, 60])
@pytest.mark.parametrize(("last", "code", "status"), ENDS.values(), ids=ENDS)
def test_whatever_ends_a_script_everything_is_stored_with_the_right_status(
    mlflow_server: MlflowServer,
    readback: Readback,
    experiment_id: str,
    last: str,
    code: int,
    status: str,
    flush_interval: float,
) -> None:
    """The script never closes the client; only the block of the run ends."""
    script = f"""
client = runqueue.Client(URI, flush_interval={flush_interval})
with client.start_run(experiment_id=sys.argv[2]) as run:
    for step in range(1_500):
        run.log_metrics({{"a": 1.0, "b": 2.0}}, step=step, timestamp=1)
    run.log_param("p", 1)
    {last}
"""
    done = run(script, by_name(mlflow_server.uri), experiment_id)
    assert done.code == code
    assert "not sent" not in done.err and "not stored" not in done.err
    stored = only_run(readback, experiment_id)
    assert stored.status == status
    assert steps(stored, "a") == steps(stored, "b") == list(range(1_500))
    assert stored.content.params == {"p": "1"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_long_flush(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, number: signal.Signals
) -> None:
    """The first signal's flush waits for a server that does not answer. The run, which was created, stays RUNNING."""
    script = """
from runqueue.engine._engine import Engine
flush = Engine._flush
def tell(*args):
    if args[-1]:  # the last flush
        say("first")
    return flush(*args)
Engine._flush = tell
client = runqueue.Client(URI, flush_interval=0.05, exit_timeout=300)
with client.start_run(experiment_id=sys.argv[2]) as run:
    client.flush()
    run.log_metric("m", 1.0)
    say("logged")
    while True:
        time.sleep(0.05)
"""
    proxy.fail("runs/log-batch", Fault.hold(), times=None)
    with Process(script, by_name(proxy.uri), experiment_id) as process:
        process.expect("logged")
        wait_until(lambda: proxy.count("runs/log-batch") == 1, PATIENCE, "no request")
        process.signal(number)
        process.expect("first")
        process.signal(number)
        done = process.end(20)
    assert done.code == -number
    proxy.let_go()
    assert only_run(readback, experiment_id).status == "RUNNING"


# -- the embedded default --------------------------------------------------------------------------------------------


@pytest.mark.sample("True")
@NOLOAD
@pytest.mark.parametrize("used", [False, True])
def test_the_embedded_default_delivers_at_exit_and_after_a_fork(first_use: Path, tmp_path: Path, used: bool) -> None:
    """
    With MLflow's own store: at exit, where no thread can be started, and in a child, whether the parent has used it or
    not.
    """
    shutil.copy(first_use / "mlflow.db", tmp_path)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    script = f"""
client = runqueue.Client(URI, flush_interval=60, exit_timeout=60)
run = client.create_run("0")
client.log_metric(run, "parent", 1.0, 0)
if {used}:
    client.flush()
def work():
    client.log_metric(run, "child", 1.0, 0)
    client.flush()
    say(run.run_id)
if {used}:
    assert ended(child(work)) == 0
client.log_metric(run, "parent", 1.0, 1)
client.set_terminated(run)
if not {used}:
    atexit.register(lambda: print(run.run_id))
"""
    done = run(script, uri, folder=tmp_path)
    assert done.code == 0 and "not stored" not in done.err and "not sent" not in done.err, done.err
    client_run = run(
        """
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
import mlflow
(found,) = [each.info.run_id for each in mlflow.MlflowClient(URI).search_runs(["0"])]
say(found)
""",
        uri,
        folder=tmp_path,
        flags=("-W", "ignore"),
    )
    run_id = client_run.out.split()[-1]
    stored, content = read(uri, run_id)
    assert stored.info.status == "FINISHED"
    assert [point.step for point in content.metrics["parent"]] == [0, 1]
    assert ("child" in content.metrics) is used
