"""Artifacts on real stores: the same names and bytes as MLflow's client stores, in the order of the run's calls."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trustme

import runqueue
from support.embedded import NOLOAD, mlflow_client
from support.mlflow_server import MlflowServer, clean_environment
from support.process import PATIENCE, PREAMBLE
from support.proxy import Fault, FaultyProxy
from support.readback import Readback

pytestmark = [pytest.mark.live, NOLOAD]

Tree = dict[str, bytes]


def tree(folder: Path) -> Path:
    """Make files of many kinds in nested folders, one of them a link."""
    top = folder / "data"
    (top / "sub" / "deep").mkdir(parents=True)
    (top / "a b (1)+~=é.txt").write_text("blanks and more")
    (top / "empty").write_bytes(b"")
    (top / "sub" / "model.bin").write_bytes(os.urandom(700_000))
    (top / "sub" / "deep" / "MLmodel").write_text("flavors: {}")
    (top / "sub" / "link").symlink_to(top / "empty")
    return top


def stored(uri: str, run_id: Any, folder: Path) -> Tree:
    """Return all artifacts of a run, read by MLflow's own client."""
    client = mlflow_client(uri)
    folder.mkdir()
    found: Tree = {}

    def walk(path: str | None) -> None:
        for each in client.list_artifacts(run_id, path):
            if each.is_dir:
                walk(each.path)
            else:
                found[each.path] = Path(client.download_artifacts(run_id, each.path, str(folder))).read_bytes()

    walk(None)
    return found


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@pytest.fixture
def folder_experiment(readback: Readback, tmp_path: Path) -> str:
    """The id of an experiment whose artifacts the server does not take: clients write them to a folder."""
    return readback.new_experiment("folder", artifact_location=f"file://{tmp_path / 'root'}")


@pytest.fixture(params=["server", "folder"])
def any_experiment(request: pytest.FixtureRequest) -> str:
    name = {"server": "experiment_id", "folder": "folder_experiment"}[request.param]
    found: str = request.getfixturevalue(name)
    return found


# -- as MLflow does it -----------------------------------------------------------------------------------------------


def figure() -> Any:
    matplotlib: Any = importlib.import_module("matplotlib.figure")
    made = matplotlib.Figure(figsize=(2, 1))
    made.subplots().plot([0, 1, 4])
    return made


def images() -> dict[str, Any]:
    numpy: Any = importlib.import_module("numpy")
    pillow: Any = importlib.import_module("PIL.Image")
    mlflow: Any = importlib.import_module("mlflow")
    ramp = numpy.arange(30 * 40 * 3, dtype="uint8").reshape(30, 40, 3)
    return {
        "rgb.png": ramp,
        "gray.png": ramp[:, :, 0],
        "one.png": ramp[:, :, :1],
        "bool.png": ramp[:, :, 0] > 99,
        "float.png": ramp / 255.0,
        "rgba.webp": numpy.dstack([ramp, ramp[:, :, 0]]),
        "pillow.jpeg": pillow.fromarray(ramp),
        "dir/wrapped.png": mlflow.Image(ramp),
        "int.png": ramp.astype("int64"),
    }


def log_everything(log: Any, run: Any, top: Path) -> None:
    """Log artifacts by the calls that runqueue and MLflow both have."""
    log.log_artifact(run, str(top / "sub" / "model.bin"))
    log.log_artifact(run, top / "sub" / "link", "x/y")
    log.log_artifact(run, str(top), "as folder")
    log.log_artifacts(run, str(top), "whole")
    log.log_artifacts(run, str(top))
    log.log_text(run, "grüße\n\tand more", "notes/a.txt")
    log.log_text(run, "<h1>head</h1>", "x/../index.html")
    data = {"b": [1, 2.5, None], "a": {"x": "ü", "path": Path("/p")}}
    log.log_dict(run, data, "d.json")
    log.log_dict(run, data, "noending")
    log.log_dict(run, {"b": [1, 2.5, None], "a": {"x": "ü"}}, "dir/d.yml")
    log.log_dict(run, [1, 2], "d.yaml")
    log.log_figure(run, figure(), "f/figure.png")
    log.log_figure(run, figure(), "figure.svg", save_kwargs={"metadata": {"Date": None}})
    for name, image in images().items():
        log.log_image(run, image, name)
    log.log_image(run, images()["rgb.png"], key="series/one", step=3, timestamp=5)


def comparable(content: Tree) -> Tree:
    """Leave out random parts: an image's id, the names inside of an SVG."""
    unique = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}")
    found = {unique.sub("UUID", path): body for path, body in content.items()}
    return {path: b"" if path.endswith(".svg") else body for path, body in found.items()}


def test_artifacts_are_stored_as_mlflows_client_stores_them(
    mlflow_server: MlflowServer, any_experiment: str, tmp_path: Path
) -> None:
    """Every name and every byte, for a run whose creation was still queued at the calls."""
    top = tree(tmp_path)
    with runqueue.Client(mlflow_server.uri) as client:
        ours = client.create_run(any_experiment)
        log_everything(client, ours, top)
        client.set_terminated(ours)
    theirs = mlflow_client(mlflow_server.uri)
    their_run = theirs.create_run(any_experiment).info.run_id
    log_everything(theirs, their_run, top)
    found = comparable(stored(mlflow_server.uri, ours.run_id, tmp_path / "ours"))
    assert found == comparable(stored(mlflow_server.uri, their_run, tmp_path / "theirs"))
    assert len(found) > 30
    assert theirs.get_run(ours.run_id).data.tags["mlflow.loggedImages"] == "True"
    assert theirs.get_run(ours.run_id).info.status == "FINISHED"
    stats = client.statistics()
    assert stats.accepted == stats.stored


def test_an_embedded_store_keeps_artifacts(embedded_uri: str, tmp_path: Path) -> None:
    """In the folder that MLflow has chosen."""
    top = tree(tmp_path)
    with runqueue.Client(embedded_uri) as client, client.start_run("0") as run:
        run.log_artifacts(top, "whole")
        run.log_text("text", "notes.txt")
        run.log_metric("m", 1.0)
    assert stored(embedded_uri, run.run_id, tmp_path / "ours") == {
        **{f"whole/{path.relative_to(top)}": path.read_bytes() for path in top.rglob("*") if path.is_file()},
        "notes.txt": b"text",
    }
    assert mlflow_client(embedded_uri).get_run(run.run_id).info.status == "FINISHED"


@pytest.mark.asyncio
async def test_the_async_client_logs_artifacts(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """By plain calls, which do not wait for the upload."""
    async with runqueue.AsyncClient(mlflow_server.uri) as client:
        async with client.start_run("0") as run:
            run.log_text("text", "a/b.txt")
            run.log_dict({}, "c.json")
            run.log_figure(figure(), "f.png")
            run.log_image(images()["gray.png"], "i.png")
            run.log_artifacts(tree(tmp_path))
        await client.flush(run_id=run.id)
    found = stored(mlflow_server.uri, run.run_id, tmp_path / "ours")
    assert len(found) == 9
    assert found["a/b.txt"] == b"text"


@pytest.mark.whole
def test_a_server_with_users_tls_and_a_prefix_takes_artifacts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads use the same address, credentials and certificates as the other requests of a run."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    issued = authority.issue_cert("127.0.0.1")
    pem = tmp_path / "server.pem"
    issued.private_key_and_cert_chain_pem.write_to_path(str(pem))
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "ca.pem"))
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a password of 16")
    folder = tmp_path / "server"
    with MlflowServer(folder, static_prefix="/ml", admin=("ann", "a password of 16"), certificate=pem) as server:
        (tmp_path / "large").write_bytes(os.urandom(3_000_000))
        for transport in ("auto", "httpx"):
            with runqueue.Client(server.uri, transport=transport) as client, client.start_run("0") as run:
                run.log_text("text", "a/b.txt")
                run.log_artifact(tmp_path / "large")
            assert stored(server.uri, run.run_id, tmp_path / transport) == {
                "a/b.txt": b"text",
                "large": (tmp_path / "large").read_bytes(),
            }


# -- order -----------------------------------------------------------------------------------------------------------


def test_a_run_is_finished_only_after_its_artifacts_are_stored(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, tmp_path: Path
) -> None:
    """Also with lost answers and outages: the order of the server's requests shows it."""
    top = tree(tmp_path)
    proxy.fail("model.bin", Fault.answer(503), times=2)
    proxy.fail("MLmodel", Fault.cut_after_commit())
    proxy.fail("empty", Fault.answer(429, headers={"Retry-After": "1"}))
    with runqueue.Client(proxy.uri) as client:
        runs = [client.create_run(experiment_id) for _ in range(3)]
        for run in runs:
            client.set_terminated(run)
            client.log_artifacts(run, top, "whole")
            client.log_metrics(run, {"m": 1.0})
    for run in runs:
        assert run.run_id is not None
        (ended,) = [each for each in proxy.to("runs/update") if each.json["run_id"] == run.run_id]
        puts = [each for each in proxy.requests if each.method == "PUT" and run.run_id in each.path]
        assert len([each for each in puts if each.status == 200]) == 5
        assert all(each.answered_at is not None and each.answered_at < ended.read_at for each in puts)
        assert readback.run(run.run_id).status == "FINISHED"
        assert len(stored(proxy.upstream, run.run_id, tmp_path / run.run_id)) == 5
    creates = max(each.answered_at or 0 for each in proxy.to("runs/create"))
    assert creates < max(each.read_at for each in proxy.requests if each.method == "PUT")


def test_metrics_do_not_wait_for_an_upload(proxy: FaultyProxy, readback: Readback, experiment_id: str) -> None:
    """While four uploads hang, one worker stores metrics that were logged later, and a flush of other runs ends."""
    proxy.fail("slow.txt", Fault.hold(), times=None)
    with runqueue.Client(proxy.uri, max_workers=1) as client:
        runs = [client.create_run(experiment_id) for _ in range(5)]
        for run in runs:
            client.log_text(run, "x", "slow.txt")
        flush = client.flush(synchronous=False)
        proxy.wait_for(lambda: len([each for each in proxy.requests if each.method == "PUT"]) == 4)
        other = client.create_run(experiment_id)
        client.log_metrics(other, {"m": 1.0})
        client.flush(run_id=other)
        assert readback.content(other.run_id).metrics["m"]
        client.log_metrics(runs[0], {"m": 2.0})
        client.set_terminated(runs[0])
        later = client.flush(synchronous=False)
        proxy.wait_for(lambda: proxy.count("runs/log-batch") == 2)
        assert readback.run(runs[0].run_id).status == "RUNNING"
        assert not flush.done
        proxy.let_go()
        flush.await_completion()
        later.await_completion()
        assert readback.run(runs[0].run_id).status == "FINISHED"


# -- how much --------------------------------------------------------------------------------------------------------


def test_thousands_of_small_files_are_all_stored(mlflow_server: MlflowServer, tmp_path: Path, whole: bool) -> None:
    """They are uploaded side by side, each once. Without `--whole`, 300 of them."""
    files = 2_000 if whole else 300
    top = tmp_path / "many"
    for at in range(files):
        path = top / f"{at % 20}" / f"{at}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(at))
    with runqueue.Client(mlflow_server.uri) as client, client.start_run("0") as run:
        run.log_artifacts(top)
    assert client.statistics().stored == client.statistics().accepted == files + 1
    kept = next(mlflow_server.folder.glob(f"artifacts/*/{run.run_id}/artifacts"))
    assert {str(path.relative_to(kept)): path.read_text() for path in kept.rglob("*.json")} == {
        f"{at % 20}/{at}.json": json.dumps(at) for at in range(files)
    }


MEMORY = """
sys.path.insert(0, sys.argv[4])
from support.memory_probe import memory_bytes
with runqueue.Client(URI, transport=sys.argv[3]) as client:
    run = client.create_run("0")
    client.log_metric(run, "m", 1.0)
    client.log_artifact(run, sys.argv[2] + ".small")
    client.flush()
    before = memory_bytes("VmRSS")
    for name in ("a", "b"):
        client.log_artifact(run, sys.argv[2], name)
    client.flush()
    say(memory_bytes("VmHWM") - before)
say(run.run_id)
"""


@pytest.mark.sample("auto")
@pytest.mark.parametrize("transport", ["auto", "httpx"])
def test_a_file_of_200_mb_takes_no_memory(mlflow_server: MlflowServer, tmp_path: Path, transport: str) -> None:
    """Two such files at once are uploaded in pieces, which take a few MB."""
    path, size = tmp_path / "large", 200_000_000
    block = os.urandom(1_000_000)
    with path.open("wb") as file:
        for _ in range(size // len(block)):
            file.write(block)
    (tmp_path / "large.small").write_bytes(block)
    command = [sys.executable, "-c", PREAMBLE + MEMORY, mlflow_server.uri, str(path), transport]
    done = subprocess.run(
        [*command, str(Path(__file__).parents[1])],
        capture_output=True, text=True, check=True, timeout=3 * PATIENCE, env=clean_environment(),
    )  # fmt: skip
    grown, run_id = done.stdout.split()
    assert int(grown) < 16_000_000
    kept = next(mlflow_server.folder.glob(f"artifacts/*/{run_id}/artifacts"))
    assert (kept / "a" / "large").read_bytes() == (kept / "b" / "large").read_bytes() == path.read_bytes()
    for each in kept.rglob("large*"):
        each.unlink()


# -- ends ------------------------------------------------------------------------------------------------------------

STREAMS = """
client = runqueue.Client(URI, flush_interval=0.2)
run = client.start_run("0").__enter__()
run.log_artifacts(sys.argv[2])
run.log_text("last words", "notes/last.txt")
"""
ENDS: dict[str, str] = {
    "the end of the script": "run.set_terminated(); os.write(1, b'ready\\n')",
    "an exception": "os.write(1, b'ready\\n'); run.__exit__(ValueError, ValueError(), None); raise ValueError('boom')",
    "SIGTERM": "os.write(1, b'ready\\n'); time.sleep(60)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_process_that_ends_has_stored_its_artifacts(
    mlflow_server: MlflowServer, readback: Readback, experiment_id: str, tmp_path: Path, end: str
) -> None:
    """The final status follows them."""
    top = tree(tmp_path)
    script = PREAMBLE + STREAMS.replace('"0"', repr(experiment_id)) + ENDS[end]
    process = subprocess.Popen(
        [sys.executable, "-c", script, mlflow_server.uri, str(top)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        if end == "SIGTERM":
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    (run_id,) = readback.run_ids(experiment_id)
    status = {"the end of the script": "FINISHED", "an exception": "FAILED", "SIGTERM": "KILLED"}[end]
    assert readback.run(run_id).status == status
    assert len(stored(mlflow_server.uri, run_id, tmp_path / "ours")) == 6


def test_a_block_that_raises_sends_no_artifact_that_is_queued_and_ends_the_run(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """A client that does not stream drops its queue after an exception; the final status is sent."""
    client = runqueue.Client(proxy.uri)
    run = client.start_run(experiment_id)
    with pytest.raises(ValueError, match="boom"), client, run:
        client.flush()
        run.log_text("x", "f")
        raise ValueError("boom")
    assert [each for each in proxy.requests if each.method == "PUT"] == []
    assert readback.run(run.run_id).status == "FAILED"
    assert client.statistics().dropped == 1


def test_the_run_ends_although_the_time_is_too_short_for_an_upload(
    proxy: FaultyProxy, readback: Readback, experiment_id: str
) -> None:
    """The upload is reported as failed for good. The run must not be left RUNNING."""
    proxy.fail("slow", Fault.hold(), times=None)
    client = runqueue.Client(proxy.uri)
    run = client.create_run(experiment_id)
    client.log_text(run, "x", "slow")
    client.set_terminated(run)
    with pytest.raises(runqueue.FlushError) as caught:
        client.close(timeout=4)
    proxy.let_go()
    (failure,) = caught.value.failures
    assert (failure.operation, failure.entries, failure.final) == (
        "log_artifact", (runqueue.Entry("artifact", "slow"),), True
    )  # fmt: skip
    assert readback.run(run.run_id).status == "FINISHED"


FORKS = """
client = runqueue.Client(URI)
with client.start_run("0") as run:
    run.log_text("parent", "parent.txt")
    client.flush()
    run.log_text("too", "parent2.txt")
    def work():
        mine = client.attach(run)
        mine.log_text("child", "child.txt")
        client.flush()
    assert ended(child(work)) == 0
client.close()
say(run.run_id)
"""


def test_a_child_process_logs_its_own_artifacts_and_none_of_its_parents(
    mlflow_server: MlflowServer, tmp_path: Path
) -> None:
    """Parent and child each upload what they have logged themselves."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + FORKS, mlflow_server.uri],
        capture_output=True, text=True, check=True, timeout=PATIENCE, env=clean_environment(),
    )  # fmt: skip
    found = stored(mlflow_server.uri, done.stdout.strip(), tmp_path / "ours")
    assert found == {"parent.txt": b"parent", "parent2.txt": b"too", "child.txt": b"child"}


# -- without MLflow --------------------------------------------------------------------------------------------------

WITHOUT = """
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name.split(".")[0] == "mlflow" else real(name, *more)
client = runqueue.Client(URI)
with client.start_run(sys.argv[2]) as run:
    run.log_text("x", "f")
    run.log_metric("m", 1.0)
try:
    client.close()
except runqueue.FlushError as error:
    say(len(error.failures), error.failures[0].error)
say(run.run_id)
"""


def test_without_mlflow_a_folder_of_artifacts_says_what_to_install(
    mlflow_server: MlflowServer, folder_experiment: str, readback: Readback
) -> None:
    """Everything else of the run is stored."""
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + WITHOUT, mlflow_server.uri, folder_experiment],
        capture_output=True, text=True, check=True, timeout=PATIENCE, env=clean_environment(),
    )  # fmt: skip
    said, run_id = done.stdout.strip().split("\n")
    assert said.startswith(
        "1 the artifacts of this run are kept in file:, which takes MLflow: pip install 'runqueue[mlflow]'"
    )
    assert readback.run(run_id).status == "FINISHED"
    assert list(readback.content(run_id).metrics) == ["m"]


def test_the_artifact_uri_of_an_attached_run_is_read_once(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, tmp_path: Path
) -> None:
    """However many artifacts it gets."""
    run_id = readback.new_run(experiment_id)
    with runqueue.Client(proxy.uri) as client:
        run = client.attach(run_id)
        for at in range(50):
            run.log_text(str(at), f"{at}.txt")
        client.flush()
        run.log_text("again", "0.txt")
    assert proxy.count("runs/get") == 1
    found = stored(proxy.upstream, run_id, tmp_path / "ours")
    assert found == {f"{at}.txt": str(at).encode() for at in range(1, 50)} | {"0.txt": b"again"}
    assert readback.run(run_id).status == "RUNNING"
