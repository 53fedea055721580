"""
`runqueue doctor`: a table on stdout; one line on stderr and exit code 1 if something is wrong; no secret in either.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import attrs
import pytest

from runqueue.cli._findings import source_of
from runqueue.cli._main import main
from support.answers import error, login_page
from support.mlflow_server import HOST, clean_environment, free_port
from support.proxy import Fault, ScriptedServer, reply

SECRET = "s3cret-word"
GET_EXPERIMENT = "experiments/get-by-name"
DEFAULT = Fault.answer(200, {"experiment": {"experiment_id": "0", "name": "Default"}})
WITHOUT = "import sys; sys.modules['{}'] = None; from runqueue.cli._main import main; main()"


@attrs.frozen
class Outcome:
    """The result of one run of the command."""

    code: int
    rows: dict[str, str]
    out: str
    err: str


Doctor: TypeAlias = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder without a credentials file, which is the working folder, too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the command, and checks that its output holds no secret and at most one line on stderr."""

    def run(uri: str | None = None) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main(["doctor"] if uri is None else ["doctor", "--tracking-uri", uri])
        out, err = capsys.readouterr()
        code = caught.value.code
        assert isinstance(code, int)
        assert SECRET not in out + err
        assert err.count("\n") == code and "Traceback" not in err
        return Outcome(code, dict(_row(line) for line in out.splitlines()), out, err)

    return run


def _row(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key, value.strip()


@pytest.fixture
def healthy(server: ScriptedServer) -> ScriptedServer:
    """A server that answers its version and its default experiment."""
    server.fail("version", Fault.answer(200, b"3.4.0"), times=None, when=lambda request: request.target == "/version")
    server.fail(GET_EXPERIMENT, DEFAULT, times=None)
    return server


# -- all is well -----------------------------------------------------------------------------------------------------


def test_a_healthy_server_is_reported_in_full(doctor: Doctor, healthy: ScriptedServer) -> None:
    """All rows are there, and nothing was written to the server."""
    found = doctor(healthy.uri)
    assert (found.code, found.err) == (0, "")
    assert found.rows["tracking uri"] == healthy.uri
    assert found.rows["resolved from"] == "the argument --tracking-uri"
    assert found.rows["store"] == "MLflow's REST API"
    assert found.rows["credentials"] == "none"
    assert found.rows["tls"] == "none, it is plain http"
    assert found.rows["timeouts"] == "60 s a request, 300 s of retrying"
    assert found.rows["transport"].startswith("aiohttp 3.")
    assert found.rows["reachable"] == "yes"
    assert found.rows["version"] == "mlflow 3.4.0"
    assert found.rows["authentication"] == "not asked for"
    assert found.rows["round trip"].endswith(" ms (median of 5)")
    assert found.rows["limits"] == (
        "1,000 metrics, 100 params, 100 tags, 1,000 entities, 1,000 datasets, 1,000,000 bytes a request"
    )
    assert {request.method for request in healthy.requests} == {"GET"}
    assert healthy.count(GET_EXPERIMENT) == 1 + 5


def test_the_version_is_requested_below_the_prefix(doctor: Doctor, server: ScriptedServer) -> None:
    """A server below `/ml` has its `/version` there, too."""
    server.fail(GET_EXPERIMENT, DEFAULT, times=None)
    found = doctor(f"{server.uri}/ml/")
    assert found.code == 0
    assert "/ml/version" in [request.target for request in server.requests]
    assert found.rows["version"] == "unknown (/version answers 200, and names none)"


def test_a_server_without_a_default_experiment_is_healthy(doctor: Doctor, server: ScriptedServer) -> None:
    """The experiment was deleted or renamed, and the answer is MLflow's."""
    server.fail(GET_EXPERIMENT, Fault.answer(404, error("RESOURCE_DOES_NOT_EXIST")), times=None)
    assert doctor(server.uri).rows["reachable"] == "yes"


def test_a_user_without_permission_for_the_default_experiment_is_authenticated(
    doctor: Doctor, server: ScriptedServer
) -> None:
    """The credentials are good if a 403 comes for the experiment only, and not for a search."""
    server.fail(GET_EXPERIMENT, Fault.answer(403, b"Permission denied"), times=None)
    found = doctor(server.uri)
    assert found.code == 0
    assert found.rows["authentication"].startswith("accepted, without permission")


# -- from where ------------------------------------------------------------------------------------------------------


def test_the_variable_is_named_as_the_source(
    doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an argument, the URI comes from MLFLOW_TRACKING_URI."""
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", healthy.uri)
    found = doctor()
    assert (found.rows["tracking uri"], found.code) == (healthy.uri, 0)
    assert found.rows["resolved from"] == "the environment variable MLFLOW_TRACKING_URI"


def test_an_imported_mlflow_is_named_as_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow.set_tracking_uri` comes after the argument, and before the variable."""

    class Imported:
        get_tracking_uri = str

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://variable")
    monkeypatch.setitem(sys.modules, "mlflow", Imported)
    assert source_of(None) == "mlflow.get_tracking_uri()"
    assert source_of("http://given") == "the argument --tracking-uri"


def test_the_doctor_does_not_create_the_default_database(
    doctor: Doctor, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first run will create it."""
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    found = doctor()
    assert found.code == 0
    assert found.rows["resolved from"].startswith("MLflow's default")
    assert found.rows["store"] == "MLflow's own, in a database (sqlite)"
    assert found.rows["reachable"].startswith("not yet: the first run will make ")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "file", "user_info", "expected", "header"),
    [
        ({}, "", f"user:{SECRET}@", "user and password, of the URI's user info", "Basic"),
        (
            {"MLFLOW_TRACKING_USERNAME": "user", "MLFLOW_TRACKING_PASSWORD": SECRET},
            "",
            "",
            "user and password, of MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
            "Basic",
        ),
        (
            {"MLFLOW_TRACKING_TOKEN": "token-unused"},
            f"[mlflow]\nmlflow_tracking_username = user\nmlflow_tracking_password = {SECRET}\n",
            "",
            "user and password, of ~/.mlflow/credentials",
            "Basic",
        ),
        (
            {"MLFLOW_TRACKING_USERNAME": "user"},
            f"[mlflow]\nmlflow_tracking_password = {SECRET}\n",
            "",
            "user and password, of MLFLOW_TRACKING_USERNAME and ~/.mlflow/credentials",
            "Basic",
        ),
        ({"MLFLOW_TRACKING_TOKEN": SECRET}, "", "", "token, of MLFLOW_TRACKING_TOKEN", "Bearer"),
        ({"MLFLOW_TRACKING_USERNAME": "user"}, "", "", "none", ""),
    ],
)
def test_credentials_are_named_by_kind_and_source(
    doctor: Doctor,
    healthy: ScriptedServer,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    file: str,
    user_info: str,
    expected: str,
    header: str,
) -> None:
    """They are the ones that are sent, and their values are not shown."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if file:
        (home / ".mlflow").mkdir()
        (home / ".mlflow" / "credentials").write_text(file)
    found = doctor(healthy.uri.replace("://", f"://{user_info}"))
    assert found.rows["credentials"] == expected
    assert found.rows["authentication"] == ("accepted" if header else "not asked for")
    sent = {key.lower(): value for key, value in healthy.requests[0].headers.items()}
    assert sent.get("authorization", "").split(" ")[0] == header
    if user_info:
        assert found.rows["tracking uri"] == healthy.uri.replace("://", "://***@")


# -- something is wrong ----------------------------------------------------------------------------------------------


def test_a_server_that_is_down_is_reported(doctor: Doctor) -> None:
    """The resolved URI is shown all the same."""
    found = doctor(f"http://user:{SECRET}@{HOST}:{free_port()}")
    assert found.code == 1
    assert found.rows["reachable"] == "no"
    assert "is not available: cannot connect" in found.err


def test_refused_credentials_are_reported_with_their_source(doctor: Doctor, server: ScriptedServer) -> None:
    """Also if the server repeats them in its answer."""
    server.fail("", Fault.answer(401, f"who is {SECRET}?".encode()), times=None)
    found = doctor(f"http://user:{SECRET}@{HOST}:{server.port}")
    assert (found.code, found.rows["authentication"]) == (1, "refused")
    assert "refused the credentials" in found.err and "credentials: user and password, of the URI's" in found.err


def test_missing_credentials_are_reported_with_the_variables_to_set(doctor: Doctor, server: ScriptedServer) -> None:
    """A 401 without any credentials leads to advice."""
    server.fail("", Fault.answer(401, b"You are not authenticated."), times=None)
    assert "none were found, set MLFLOW_TRACKING_USERNAME and" in doctor(server.uri).err


def test_a_gateway_that_forbids_everything_is_a_fault(doctor: Doctor, server: ScriptedServer) -> None:
    """A 403 for a search, too, is a refusal."""
    server.fail("", Fault.answer(403, b"Invalid Host header"), times=None)
    found = doctor(server.uri)
    assert found.code == 1
    assert "no permission" in found.err


@pytest.mark.parametrize("path", ["", "/wrong"])
@pytest.mark.parametrize(
    "answer", [login_page(), login_page(404), reply(200, {}), reply(200, {"status": "up"}), reply(204)]
)
def test_a_server_that_is_not_mlflow_is_reported(doctor: Doctor, path: str, answer: object) -> None:
    """A wrong path, a login page, or another service."""
    with ScriptedServer(answer) as server:  # type: ignore[arg-type]
        found = doctor(server.uri + path)
    assert (found.code, found.rows["reachable"]) == (1, "something answers")
    assert "not as an MLflow server does below /api/2.0/mlflow/; check host, port and path" in found.err


def test_an_unavailable_server_is_reported_with_its_message(doctor: Doctor, server: ScriptedServer) -> None:
    """Line breaks in the message make no second line."""
    server.fail("", Fault.answer(503, b"down\nfor\r\nmaintenance"), times=None)
    found = doctor(server.uri)
    assert found.code == 1
    assert "is not available: " in found.err and "down for maintenance" in found.err


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("", "tracking_uri=''"),
        ("http://", "has no host"),
        (f"http://u:{SECRET}@[x", "the tracking URI '***' is none"),
        (f"nobody://u:{SECRET}@host", "no store is known for the tracking URI 'nobody://***@host'"),
        ("localhost:5000", "'localhost:5000' counts as a path; the URI of a server begins with http://"),
    ],
)
def test_a_bad_uri_is_reported(doctor: Doctor, home: Path, uri: str, expected: str) -> None:
    """No request is sent, and no folder of that name is created."""
    found = doctor(uri)
    assert (found.code, list(home.iterdir())) == (1, [])
    assert expected in found.err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon"),
        ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "-1"),
        ("MLFLOW_TRACKING_INSECURE_TLS", "yes"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "nowhere.pem"),
        ("MLFLOW_TRACKING_CLIENT_CERT_PATH", "nowhere.pem"),
    ],
)
def test_a_bad_variable_is_named(doctor: Doctor, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """As by the constructor of a client."""
    monkeypatch.setenv(name, value)
    found = doctor(f"https://{HOST}:{free_port()}")
    assert found.code == 1
    assert f"the environment variable {name}={value!r}" in found.err


def test_missing_verification_of_the_certificate_is_shown(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table, and not on stderr."""
    monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
    found = doctor(f"https://{HOST}:{free_port()}")
    assert found.rows["tls"] == "the server's certificate is NOT verified (MLFLOW_TRACKING_INSECURE_TLS)"


def test_an_unexpected_error_is_one_line(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no traceback, whichever error making the store raises."""

    def broken(*_: object) -> None:
        raise RuntimeError(f"first\nsecond http://u:{SECRET}@host")

    monkeypatch.setattr("runqueue.cli._doctor.make_store", broken)
    assert doctor(f"http://u:{SECRET}@host").err == "runqueue doctor: RuntimeError: first second http://***@host\n"


# -- the program -----------------------------------------------------------------------------------------------------


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, env=_environment())


def _environment() -> dict[str, str]:
    return clean_environment() | {"HOME": os.environ["HOME"]}


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_without_the_extra_the_program_says_what_to_install(missing: str) -> None:
    """One line on stderr, exit code 1, no traceback."""
    done = _python("-c", WITHOUT.format(missing), "doctor")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"runqueue: the command line needs {missing}: pip install 'runqueue[cli]'\n"


def test_a_server_is_examined_without_mlflow(healthy: ScriptedServer) -> None:
    """The core speaks to servers by itself, so the doctor needs mlflow only for mlflow's own stores."""
    done = _python("-c", WITHOUT.format("mlflow"), "doctor", "--tracking-uri", healthy.uri)
    assert (done.returncode, done.stderr) == (0, "")
    assert "version:         mlflow 3.4.0\n" in done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_on_a_terminal_the_findings_are_a_table(healthy: ScriptedServer) -> None:
    """Values are complete, and their square brackets are no markup."""
    import pty

    ours, theirs = pty.openpty()
    uri = f"{healthy.uri}/[bold]"
    command = [sys.executable, "-m", "runqueue", "doctor", "--tracking-uri", uri]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, env=_environment() | {"TERM": "xterm", "COLUMNS": "120"}
    ) as process:
        os.close(theirs)
        shown = b""
        while chunk := _read(ours):
            shown += chunk
        _, err = process.communicate(timeout=60)
    os.close(ours)
    assert (process.returncode, err) == (0, b"")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in _plain(shown).splitlines() if "│" in line]
    assert ["tracking uri", uri] in rows and ["reachable", "yes"] in rows


def _read(number: int) -> bytes:
    try:
        return os.read(number, 4096)
    except OSError:  # how Linux says that the other end was closed
        return b""


def _plain(shown: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())


def test_python_m_runqueue_is_the_same_program(healthy: ScriptedServer) -> None:
    """The table and the exit code are the same, and nothing is on stderr."""
    done = _python("-m", "runqueue", "doctor", "--tracking-uri", healthy.uri)
    assert (done.returncode, done.stderr) == (0, "")
    assert "version:         mlflow 3.4.0\n" in done.stdout


def test_the_version_and_the_help_are_printed() -> None:
    """The options of the group work."""
    assert _python("-m", "runqueue", "--version").stdout.startswith("runqueue, version ")
    assert "doctor" in _python("-m", "runqueue", "--help").stdout


@pytest.mark.parametrize(
    ("name", "found", "text"),
    [
        ("find_spec", lambda _: None, "runqueue run: mlflow is not installed: pip install 'runqueue[mlflow]'"),
        ("entry_points", lambda **_: (), "runqueue run: MLflow would not find runqueue"),
    ],
)
def test_run_says_why_nothing_would_be_queued(
    name: str,
    found: Callable[..., object],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It does not run the script without the queue."""
    monkeypatch.setattr(f"runqueue.cli._commands.{name}", found)
    with pytest.raises(SystemExit) as caught:
        main(["run", "no_such_script.py"])
    out, err = capsys.readouterr()
    assert caught.value.code == 1 and out == "" and err.startswith(text)
    assert "RUNQUEUE_MLFLOW" not in os.environ
