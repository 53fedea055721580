"""
MLflow in processes of their own: with runqueue installed but not enabled, with prefixed tracking URIs wherever MLflow
takes one, and at the end of a process that logs by MLflow.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from support.mlflow_server import MlflowServer, clean_environment
from support.process import PATIENCE, Process
from support.proxy import FaultyProxy
from support.readback import Readback
from support.scripts_of_mlflow import SCRIPTS

pytestmark = pytest.mark.live

IDLE = """
say("ready")
while True:
    time.sleep(0.05)
"""

HEAD = """
import os, sys
os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "false"
import mlflow
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils
plain, experiment_id = sys.argv[1:3]
def kind(client):
    return type(client._tracking_client.store).__name__
"""


def run(script: str, *arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script after `HEAD`; assert that it ends with status 0."""
    done = subprocess.run(
        [sys.executable, "-c", HEAD + script, *arguments],
        cwd=folder,
        env=clean_environment() | variables,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done


# -- not enabled -----------------------------------------------------------------------------------------------------


def test_to_have_runqueue_installed_changes_nothing_in_mlflow(
    mlflow_server: MlflowServer, experiment_id: str, tmp_path: Path
) -> None:
    """Every object that the integration would patch is MLflow's own; of runqueue only the plugin is loaded."""
    run(
        """
from mlflow.store.artifact import artifact_repository_registry as artifacts
from mlflow.store.tracking.rest_store import RestStore
from mlflow.tracing.client import TracingClient
from mlflow.tracking._model_registry.client import ModelRegistryClient
from mlflow.tracking._tracking_service.client import TrackingServiceClient
client = MlflowClient(plain)
with_run = client.create_run(experiment_id)
client.log_metric(with_run.info.run_id, "m", 1)
client.set_terminated(with_run.info.run_id)
assert type(client._tracking_client.store) is RestStore
assert set(vars(utils._tracking_store_registry)) == {"_registry", "group_name"}
assert set(vars(utils.MLFLOW_TRACKING_URI)) == {"name", "type", "default"}
assert set(vars(artifacts._artifact_repository_registry)) == {"_registry"}
for owner in (MlflowClient, TrackingServiceClient, TracingClient, ModelRegistryClient):
    assert not any("Plain" in type(each).__name__ for each in vars(owner).values())
for scheme, builder in utils._tracking_store_registry._registry.items():
    assert (builder.__module__ == "runqueue.integrations.mlflow._plugin") == scheme.startswith("runqueue+"), scheme
loaded = {name for name in sys.modules if name.startswith("runqueue")}
rooms = {"runqueue", "runqueue.integrations", "runqueue.integrations.mlflow", "runqueue.settings"}
assert loaded == rooms | {"runqueue.integrations.mlflow._plugin", "runqueue.settings._plain_uri"}, loaded
""",
        mlflow_server.uri,
        experiment_id,
        folder=tmp_path,
    )


def test_the_plugin_costs_below_five_percent_of_the_import_of_mlflow(tmp_path: Path) -> None:
    """What the plugin imports itself is counted."""
    script = """
import time
begun = time.perf_counter()
import mlflow, sys
whole = time.perf_counter() - begun
for name in [name for name in sys.modules if name.startswith("runqueue")]:
    del sys.modules[name]
begun = time.perf_counter()
import runqueue.integrations.mlflow._plugin
print((time.perf_counter() - begun) / whole)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=clean_environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    print(f"{100 * float(done.stdout):.2f} % of the import of mlflow")
    assert float(done.stdout) < 0.05


# -- tracking URIs with the prefix -----------------------------------------------------------------------------------

WRITES = """
run_id = client.create_run(experiment_id).info.run_id
for step in range(20):
    client.log_metric(run_id, "m", step, step=step)
client.log_text(run_id, "text", "a.txt")
assert mlflow.artifacts.load_text(client.get_run(run_id).info.artifact_uri + "/a.txt") == "text"
assert mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path="a.txt", tracking_uri=given)
assert len(client.list_artifacts(run_id)) == 1
assert client.search_registered_models(max_results=1) is not None
client.set_terminated(run_id)
assert kind(client) == "QueuedStore", kind(client)
assert client.tracking_uri == plain, client.tracking_uri
assert client._registry_uri == plain, client._registry_uri
print("RUN", run_id)
"""


@pytest.mark.sample("environment", "set later", "Lightning")
@pytest.mark.parametrize(
    "way",
    [
        "client = MlflowClient(given); mlflow.set_tracking_uri(plain)",
        "mlflow.set_tracking_uri(given); client = MlflowClient()",
        "os.environ['MLFLOW_TRACKING_URI'] = given; client = MlflowClient()",
        "mlflow.set_tracking_uri(plain); MlflowClient(); mlflow.set_tracking_uri(given); client = MlflowClient()",
        (
            "mlflow.set_tracking_uri('runqueue+sqlite:///a.db'); MlflowClient();"
            " mlflow.set_tracking_uri(given); client = MlflowClient()"
        ),
        "mlflow.set_tracking_uri(given); mlflow.set_registry_uri(mlflow.get_tracking_uri()); client = MlflowClient()",
        # Lightning's MLFlowLogger reads the variable itself.
        "client = MlflowClient(os.getenv('MLFLOW_TRACKING_URI')); mlflow.set_tracking_uri(given)",
    ],
    ids=["client", "set", "environment", "set later", "set twice", "registry", "Lightning"],
)
def test_a_tracking_uri_with_the_prefix_is_queued_wherever_it_is_given(
    way: str, proxy: FaultyProxy, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """
    Metrics are queued; artifacts, the registry and links use the plain URI, which is what MLflow shows from then on.
    """
    script = f"given = 'runqueue+' + plain\n{way}{WRITES}assert mlflow.get_tracking_uri() == plain\n"
    variables = {"MLFLOW_TRACKING_URI": f"runqueue+{proxy.uri}"} if "getenv" in way else {}
    done = run(script, proxy.uri, experiment_id, folder=tmp_path, **variables)
    run_id = done.stdout.split("RUN ")[1].split()[0]
    assert "runqueue+" not in done.stdout
    assert f"at: {proxy.uri}/#/experiments/{experiment_id}/runs/{run_id}" in done.stdout
    assert proxy.count("runs/log-metric") == 0
    stored = readback.run(run_id)
    assert len(stored.content.metrics["m"]) == 20 and stored.status == "FINISHED"


def test_the_environments_uri_is_the_plain_one_from_the_first_import_on(
    mlflow_server: MlflowServer, experiment_id: str, tmp_path: Path
) -> None:
    """Also before any store is made. The variable itself keeps the prefix, for processes that the script starts."""
    run(
        """
assert mlflow.get_tracking_uri() == plain == mlflow.get_registry_uri()
assert os.environ["MLFLOW_TRACKING_URI"] == "runqueue+" + plain
assert kind(MlflowClient()) == "QueuedStore" and kind(MlflowClient("sqlite:///a.db")) == "SqlAlchemyStore"
os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///a.db"
assert mlflow.get_tracking_uri() == "sqlite:///a.db" and kind(MlflowClient()) == "SqlAlchemyStore"
import runqueue
assert runqueue.Client("runqueue+" + plain).tracking_uri == plain
""",
        mlflow_server.uri,
        experiment_id,
        folder=tmp_path,
        MLFLOW_TRACKING_URI="runqueue+" + mlflow_server.uri,
    )


@pytest.mark.sample("runqueue+databricks://profile")
@pytest.mark.parametrize("uri", ["runqueue+databricks", "runqueue+databricks://", "runqueue+databricks://profile"])
def test_a_prefixed_databricks_uri_is_databricks_for_all_of_mlflow(uri: str, tmp_path: Path) -> None:
    """Its model registry is Unity Catalog."""
    run(
        """
assert mlflow.get_tracking_uri() in ("databricks", "databricks://profile")
assert mlflow.get_registry_uri() in ("databricks-uc", "databricks-uc://profile")
assert mlflow.utils.uri.is_databricks_uri(mlflow.get_tracking_uri())
""",
        "-",
        "-",
        folder=tmp_path,
        MLFLOW_TRACKING_URI=uri,
    )


@pytest.mark.parametrize("value", ["maybe", "2"])
def test_a_bad_runqueue_mlflow_variable_fails_the_import_of_mlflow(value: str, tmp_path: Path) -> None:
    """The ConfigError names the variable."""
    done = subprocess.run(
        [sys.executable, "-c", "import mlflow"],
        cwd=tmp_path,
        env=clean_environment() | {"RUNQUEUE_MLFLOW": value},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and "ConfigError" in done.stderr and "RUNQUEUE_MLFLOW" in done.stderr


# -- the end of a process --------------------------------------------------------------------------------------------

BEGIN = """
import mlflow
mlflow.set_tracking_uri(URI)
mlflow.set_experiment(experiment_id=sys.argv[2])
run = mlflow.start_run()
for step in range(300):
    mlflow.log_metric("m", step, step=step)
say(run.info.run_id)
"""

ENDS = {
    "the end of the script": ("", 0, "FINISHED"),
    "sys.exit": ("sys.exit(3)", 3, "FINISHED"),
    "an exception": ("raise ZeroDivisionError", 1, "FINISHED"),
    "an exception in the block": ("with run: raise ZeroDivisionError", 1, "FAILED"),
    "a hook of the script's own": ("atexit.register(lambda: mlflow.log_metric('m', 300, step=300))", 0, "FINISHED"),
}


@pytest.mark.sample("an exception")
@pytest.mark.parametrize("end", ENDS)
def test_a_script_that_does_not_end_its_run_leaves_what_mlflow_leaves(
    end: str, mlflow_server: MlflowServer, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """All data, and the final status that MLflow's own exit hook sets."""
    script, code, status = ENDS[end]
    variables = {"RUNQUEUE_MLFLOW": "1", "RUNQUEUE_FLUSH_INTERVAL": "3600"}
    with Process(BEGIN + script, mlflow_server.uri, experiment_id, folder=tmp_path, variables=variables) as process:
        ended = process.end()
    assert ended.code == code, ended.err
    (run_id,) = readback.run_ids(experiment_id)
    stored = readback.run(run_id)
    assert stored.status == status
    steps = [point.step for point in stored.content.metrics["m"]]
    assert steps == list(range(301 if end.startswith("a hook") else 300))


def test_sigterm_sends_what_is_queued_and_ends_the_run_as_killed(
    mlflow_server: MlflowServer, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """A run that this process has created."""
    variables = {"RUNQUEUE_MLFLOW": "1", "RUNQUEUE_FLUSH_INTERVAL": "3600"}
    script = BEGIN + "say('ready')\nwhile True: time.sleep(0.01)"
    with Process(script, mlflow_server.uri, experiment_id, folder=tmp_path, variables=variables) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    (run_id,) = readback.run_ids(experiment_id)
    stored = readback.run(run_id)
    assert stored.status == "KILLED"
    assert [point.step for point in stored.content.metrics["m"]] == list(range(300))


def test_sigterm_ends_a_run_without_entries_as_killed(
    mlflow_server: MlflowServer, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """As when a training is stopped while it loads its data."""
    script = BEGIN.replace("range(300)", "range(0)") + "say('ready')\nwhile True: time.sleep(0.01)"
    with Process(
        script, mlflow_server.uri, experiment_id, folder=tmp_path, variables={"RUNQUEUE_MLFLOW": "1"}
    ) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    (run_id,) = readback.run_ids(experiment_id)
    assert readback.run(run_id).status == "KILLED"


RESUMED = {
    "start_run(run_id=)": "mlflow.start_run(run_id=sys.argv[2])",
    "MLFLOW_RUN_ID": "os.environ['MLFLOW_RUN_ID'] = sys.argv[2]; mlflow.start_run()",
    "update_run": "mlflow.MlflowClient().update_run(sys.argv[2], status='RUNNING')",
    "again": "mlflow.start_run(run_id=sys.argv[2]); mlflow.log_metric('a', 1); mlflow.end_run();"
    "mlflow.start_run(run_id=sys.argv[2])",
}
DOORS = {"environment": ("", {"RUNQUEUE_MLFLOW": "1"}), "prefix": ("runqueue+", {})}


@pytest.mark.sample("*-prefix-logged", "start_run*-environment-nothing")
@pytest.mark.parametrize(
    "log", ["", "mlflow.MlflowClient().log_metric(sys.argv[2], 'm', 1)"], ids=["nothing", "logged"]
)
@pytest.mark.parametrize(("prefix", "variables"), DOORS.values(), ids=DOORS)
@pytest.mark.parametrize("resume", RESUMED.values(), ids=RESUMED)
def test_sigterm_ends_a_resumed_run_as_killed(
    mlflow_server: MlflowServer,
    experiment_id: str,
    readback: Readback,
    tmp_path: Path,
    resume: str,
    prefix: str,
    variables: dict[str, str],
    log: str,
) -> None:
    """As one that was created; another process has created it and ended it."""
    client = MlflowClient(mlflow_server.uri)
    run_id = client.create_run(experiment_id).info.run_id
    client.set_terminated(run_id, "FAILED")
    script = f"import mlflow\nmlflow.set_tracking_uri(URI)\n{resume}\n{log}\n" + IDLE
    with Process(script, prefix + mlflow_server.uri, run_id, folder=tmp_path, variables=variables) as process:
        process.expect("ready")
        assert readback.run(run_id).status == "RUNNING"
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    stored = readback.run(run_id)
    assert stored.status == "KILLED"
    assert ("m" in stored.content.metrics) is bool(log)


def test_sigterm_ends_a_run_as_killed_that_was_open_when_queueing_began(
    mlflow_server: MlflowServer, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """Such runs are included."""
    script = """
import mlflow
import runqueue.integrations.mlflow
mlflow.set_tracking_uri(URI)
run = mlflow.start_run(experiment_id=sys.argv[2])
runqueue.integrations.mlflow.enable()
mlflow.log_metric("m", 1)
"""
    with Process(script + IDLE, mlflow_server.uri, experiment_id, folder=tmp_path) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    (run_id,) = readback.run_ids(experiment_id)
    assert readback.run(run_id).status == "KILLED"


def test_sigterm_leaves_runs_alone_that_the_process_has_ended_or_only_logs_to(
    mlflow_server: MlflowServer, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """A run that was resumed and ended keeps its status, and so does one of another process."""
    client = MlflowClient(mlflow_server.uri)
    ended, foreign = (client.create_run(experiment_id).info.run_id for _ in range(2))
    script = f"""
import mlflow
mlflow.set_tracking_uri(URI)
with mlflow.start_run(run_id="{ended}"):
    mlflow.log_metric("m", 1)
mlflow.MlflowClient().log_metric("{foreign}", "m", 1)
mlflow.MlflowClient().set_tag("{ended}", "late", 1)
"""
    with Process(script + IDLE, "runqueue+" + mlflow_server.uri, folder=tmp_path) as process:
        process.expect("ready")
        process.signal(signal.SIGTERM)
        assert process.end().code == -signal.SIGTERM
    assert readback.run(ended).status == "FINISHED"
    assert readback.run(foreign).status == "RUNNING"
    assert "m" in readback.run(foreign).content.metrics


def test_a_forked_child_and_its_parent_each_send_their_own_data(
    mlflow_server: MlflowServer, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """Nothing is sent twice, and nothing is lost."""
    script = (
        BEGIN
        + """
def work():
    client = mlflow.MlflowClient()
    for step in range(100):
        client.log_metric(run.info.run_id, "of the child", step, step=step)
    assert len(client.get_metric_history(run.info.run_id, "of the child")) == 100
pid = child(work)
for step in range(300, 400):
    mlflow.log_metric("m", step, step=step)
assert ended(pid) == 0
mlflow.end_run()
"""
    )
    variables = {"RUNQUEUE_MLFLOW": "1", "RUNQUEUE_FLUSH_INTERVAL": "3600"}
    with Process(script, mlflow_server.uri, experiment_id, folder=tmp_path, variables=variables) as process:
        ended = process.end(PATIENCE)
    assert ended.code == 0, ended.err
    (run_id,) = readback.run_ids(experiment_id)
    metrics = readback.content(run_id).metrics
    assert [point.step for point in metrics["m"]] == list(range(400))
    assert [point.step for point in metrics["of the child"]] == list(range(100))


def test_mlflows_system_metrics_are_queued_too(
    mlflow_server: MlflowServer, experiment_id: str, readback: Readback, tmp_path: Path
) -> None:
    """A thread of MLflow's logs them, the last ones after the run's final status."""
    script = """
mlflow.set_experiment(experiment_id=experiment_id)
mlflow.enable_system_metrics_logging()
mlflow.set_system_metrics_sampling_interval(0.2)
mlflow.set_system_metrics_samples_before_logging(1)
with mlflow.start_run() as run:
    client = MlflowClient()
    import time
    deadline = time.monotonic() + 60
    while len(client.get_metric_history(run.info.run_id, "system/cpu_utilization_percentage")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert kind(client) == "QueuedStore"
"""
    variables = {"RUNQUEUE_MLFLOW": "1", "MLFLOW_TRACKING_URI": mlflow_server.uri}
    run(script, mlflow_server.uri, experiment_id, folder=tmp_path, **variables)
    (run_id,) = readback.run_ids(experiment_id)
    stored = readback.run(run_id)
    assert stored.status == "FINISHED" and len(stored.content.metrics["system/cpu_utilization_percentage"]) >= 3


# -- runqueue run ----------------------------------------------------------------------------------------------------

SHOW = """
import multiprocessing, pathlib, pickle, sys
class Own:
    pass
def queued(_=None):
    from mlflow.tracking._tracking_service import utils
    return "get_store" in vars(utils._tracking_store_registry)
if __name__ == "__main__":
    assert queued()
    assert pickle.loads(pickle.dumps(Own())).__class__ is Own
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(queued, [0]) == [True]
    print(sys.argv[0] == __file__, sys.argv[1:], sys.path[0] == str(pathlib.Path(__file__).parent), __spec__ is not None)
    sys.exit(5)
"""


@pytest.mark.sample("script")
@pytest.mark.parametrize("as_module", [False, True], ids=["script", "module"])
def test_runqueue_run_runs_a_script_as_python_does(as_module: bool, tmp_path: Path) -> None:
    """Arguments, `__main__`, exit code; workers of multiprocessing are queued, too."""
    (tmp_path / "show.py").write_text(SHOW)
    command = ["-m", "show"] if as_module else ["show.py"]
    done = _runqueue_run(*command, "--help", "-m", "x", folder=tmp_path)
    assert done.returncode == 5, done.stderr
    expected = "True ['--help', '-m', 'x'] True True" if as_module else "show.py"
    if as_module:
        assert done.stdout.strip() == expected
    else:
        assert done.stdout.split(" ", 1)[1].startswith("['--help', '-m', 'x']")


def test_a_traceback_of_runqueue_run_is_the_scripts_own(tmp_path: Path) -> None:
    """The output is exactly that of python."""
    (tmp_path / "fails.py").write_text("def inner():\n    1 / 0\ninner()\n")
    plain = subprocess.run(
        [sys.executable, "fails.py"],
        check=False,
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    done = _runqueue_run("fails.py", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (plain.returncode, plain.stdout, plain.stderr)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_runqueue_run_takes_dash_c_and_reports_a_missing_script(tmp_path: Path) -> None:
    """`-c` works as in python. Without any argument the command fails with a usage error."""
    done = _runqueue_run("-c", "import os, sys; print(sys.argv, os.environ['RUNQUEUE_MLFLOW'])", "a", folder=tmp_path)
    assert (done.returncode, done.stdout) == (0, "['-c', 'a'] 1\n")
    done = _runqueue_run(folder=tmp_path)
    assert done.returncode == 2 and "Missing argument" in done.stderr
    done = _runqueue_run(str(SCRIPTS / "no_such_script.py"), folder=tmp_path)
    assert done.returncode == 2 and "can't open file" in done.stderr


def _runqueue_run(*command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runqueue", "run", *command],
        cwd=folder,
        env=clean_environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
