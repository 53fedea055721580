"""
`runqueue doctor` beyond plain servers: Databricks, mlflow's plugins, ~/.netrc, proxies, certificates, hanging hosts.
"""

from __future__ import annotations

import base64
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias

import attrs
import pytest
import trustme

from runqueue.cli import _doctor
from runqueue.cli._findings import credentials_of, kind_of
from runqueue.cli._local_stores import missing_file
from runqueue.cli._main import main
from runqueue.cli._redactor import Redactor
from runqueue.settings._config import Config
from runqueue.stores._resolve import scheme_of
from support.databricks import INVALID_TOKEN, TOKEN, Workspace
from support.mlflow_server import HOST, clean_environment, free_port
from support.proxy import Fault, ScriptedServer
from support.toy_plugin import install

SECRET = "s3cret-word"
PAT = "dapi-0123456789abcdef"
CLIENT = ("5f1c-the-client", "dose-the-client-secret")
SECRETS = (SECRET, PAT, CLIENT[1])
GET_EXPERIMENT = "experiments/get-by-name"
DEFAULT = Fault.answer(200, {"experiment": {"experiment_id": "0", "name": "Default"}})


@attrs.frozen
class Outcome:
    """The result of one run of the command."""

    code: int
    rows: dict[str, str]
    err: str


Doctor: TypeAlias = Callable[[str], Outcome]


def outcome(code: int, out: str, err: str) -> Outcome:
    """
    The parsed output, after checks that hold in each case: no secret, and one line on stderr if something is wrong.
    """
    assert [each for each in SECRETS if each in out + err] == []
    for secret in SECRETS:
        assert base64.b64encode(f"user:{secret}".encode()).decode() not in out + err
    assert err.count("\n") == code and "Traceback" not in err
    lines = (line.partition(":") for line in out.splitlines())
    return Outcome(code, {key: value.strip() for key, _, value in lines}, err)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the command in this process."""

    def run(uri: str) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main(["doctor", "--tracking-uri", uri])
        assert isinstance(caught.value.code, int)
        return outcome(caught.value.code, *capsys.readouterr())

    return run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home and working folder, and a PATH without programs that could be asked for a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "databrickscfg"))
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.startswith(("ARM_", "GOOGLE_", "ACTIONS_ID_TOKEN", "SSL_CERT_")) or name in ("NETRC", *BUNDLES):
            monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def healthy(server: ScriptedServer) -> ScriptedServer:
    """A server that answers its default experiment."""
    server.fail(GET_EXPERIMENT, DEFAULT, times=None)
    return server


def program(
    uri: str, *, script: str = "", environment: dict[str, str] | None = None, **variables: str
) -> tuple[Outcome, float]:
    """Run the command in a process of its own, after a script; return the outcome and the seconds."""
    begin = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"{script}\nfrom runqueue.cli._main import main\nmain()",
            "doctor",
            "--tracking-uri",
            uri,
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=(environment or clean_environment()) | variables,
    )
    return outcome(done.returncode, done.stdout, done.stderr), time.monotonic() - begin


# -- Databricks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def workspace(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workspace]:
    """A workspace that accepts the token and the client's secret. The environment names its host."""
    importlib.import_module("databricks.sdk.core")  # takes seconds, which are no part of a time-out
    with Workspace(PAT, client=CLIENT) as workspace:
        workspace.fail(GET_EXPERIMENT, DEFAULT, times=None)
        monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
        yield workspace


@pytest.mark.parametrize("uri", ["databricks", "databricks-uc", "databricks://", "Databricks://"])
def test_a_workspace_is_reported_in_full(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """MLflow's own variables are not shown, and nothing is written to the workspace."""
    monkeypatch.setenv("DATABRICKS_TOKEN", PAT)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "user")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    found = doctor(uri)
    assert (found.code, found.err) == (0, "")
    assert list(found.rows.items())[:9] == [
        ("tracking uri", uri),
        ("resolved from", "the argument --tracking-uri"),
        ("store", "Databricks' REST API"),
        ("timeouts", "60 s a request, 300 s of retrying"),
        ("host", f"{HOST}:{workspace.port}"),
        ("credentials", "pat, by databricks-sdk"),
        ("tls", "none, it is plain http"),
        ("proxies", "none"),
        ("transport", f"aiohttp {version('aiohttp')}"),
    ]
    assert found.rows["reachable"] == "yes"
    assert found.rows["version"] == f"Databricks, by databricks-sdk {version('databricks-sdk')}"
    assert found.rows["authentication"] == "accepted"
    assert found.rows["round trip"].endswith(" ms (median of 5)")
    assert found.rows["limits"].startswith("1,000 metrics, 100 params, 100 tags, 1,000 entities")
    assert "workspace" not in found.rows and "header plugins" not in found.rows
    assert {request.method for request in workspace.calls} == {"GET"}
    assert "/version" not in {request.path for request in workspace.requests}


def test_the_kind_of_credentials_is_the_one_that_the_sdk_found(
    doctor: Doctor, workspace: Workspace, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here those of a profile that the URI names."""
    monkeypatch.delenv("DATABRICKS_HOST")
    keys = {"host": workspace.uri, "client_id": CLIENT[0], "client_secret": CLIENT[1]}
    lines = "\n".join(f"{key} = {value}" for key, value in keys.items())
    (home / "databrickscfg").write_text(f"[team]\n{lines}\n")
    found = doctor("databricks://team")
    assert found.code == 0
    assert (found.rows["host"], found.rows["credentials"]) == (
        f"{HOST}:{workspace.port}",
        "oauth-m2m, by databricks-sdk",
    )


def test_a_workspace_without_the_default_experiment_is_healthy(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Databricks names experiments by paths. MLflow's default may be missing, or closed to this user."""
    monkeypatch.setenv("DATABRICKS_TOKEN", PAT)
    missing = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "there is none"}
    with Workspace(PAT) as workspace:
        monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
        workspace.fail(GET_EXPERIMENT, Fault.answer(404, missing), times=6)
        assert doctor("databricks").rows["authentication"] == "accepted"
        denied = {"error_code": "PERMISSION_DENIED", "message": "not yours"}
        workspace.fail(GET_EXPERIMENT, Fault.answer(403, denied), times=None)
        workspace.fail("runs/search", Fault.answer(404, missing), times=None)
        assert doctor("databricks").rows["authentication"].startswith("accepted, without permission")


def test_a_missing_host_is_reported(doctor: Doctor) -> None:
    """The message says what to set."""
    found = doctor("databricks")
    assert found.code == 1
    assert "no host is known for 'databricks': set DATABRICKS_HOST" in found.err
    assert "reachable" not in found.rows


def test_a_bad_databricks_uri_is_reported(doctor: Doctor) -> None:
    """Here one that names a scope of secrets."""
    assert "names a scope of secrets" in doctor("databricks://scope:prefix").err


def test_missing_credentials_are_reported(doctor: Doctor, workspace: Workspace) -> None:
    """No request to MLflow's API was sent, so no row describes its answer."""
    found = doctor("databricks")
    assert (found.code, workspace.calls) == (1, [])
    assert found.rows["authentication"] == "no credentials to be had"
    assert f"'databricks' has no credentials for {workspace.uri}" in found.err
    assert "reachable" not in found.rows


@pytest.mark.parametrize("refusal", ["401", "403"])
def test_a_refused_token_is_reported_with_its_kind(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    """For each form of the refusal."""
    monkeypatch.setenv("DATABRICKS_TOKEN", SECRET)
    if refusal == "403":
        workspace.refusal = INVALID_TOKEN
    found = doctor("databricks")
    assert (found.code, found.rows["reachable"], found.rows["authentication"]) == (1, "yes", "refused")
    assert found.err.endswith("; credentials: pat, by databricks-sdk\n")


def test_a_refused_client_secret_is_reported(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the message of the OAuth server."""
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", CLIENT[0])
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", SECRET)
    found = doctor("databricks")
    assert (found.code, found.rows["authentication"]) == (1, "no credentials to be had")
    assert "invalid_client" in found.err


def test_a_host_that_is_down_is_reported(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and the kind of credentials are shown all the same."""
    port = free_port()
    monkeypatch.setenv("DATABRICKS_HOST", f"http://{HOST}:{port}")
    monkeypatch.setenv("DATABRICKS_TOKEN", PAT)
    found = doctor("databricks")
    assert (found.code, found.rows["host"], found.rows["reachable"]) == (1, f"{HOST}:{port}", "no")
    assert "databricks is not available: cannot connect" in found.err


def test_the_doctor_waits_less_long_than_a_client(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a workspace, too. A variable overrides it."""
    monkeypatch.setenv("DATABRICKS_TOKEN", PAT)
    monkeypatch.setattr(_doctor, "REQUEST_TIMEOUT", 0.75)
    workspace.mend()
    workspace.fail(GET_EXPERIMENT, Fault.hold(), times=None)
    assert "no answer within 0.75 s" in doctor("databricks").err


# -- nobody answers --------------------------------------------------------------------------------------------------


def test_a_hanging_oauth_server_does_not_delay_the_exit(workspace: Workspace, home: Path) -> None:
    """The SDK waits for it in a thread that nothing can end."""
    workspace.fail(TOKEN, Fault.hold(), times=None)
    found, seconds = program(
        "databricks",
        script="import databricks.sdk.core",  # takes seconds, which are no part of the time-out
        MLFLOW_HTTP_REQUEST_TIMEOUT="3",
        DATABRICKS_HOST=workspace.uri,
        DATABRICKS_CLIENT_ID=CLIENT[0],
        DATABRICKS_CLIENT_SECRET=CLIENT[1],
        HOME=str(home),
    )
    assert (found.code, found.rows["authentication"]) == (1, "no credentials to be had")
    assert found.rows["credentials"] == "oauth-m2m, by databricks-sdk"
    assert "no credentials to be had within 3 s" in found.err
    assert seconds < 30


def test_a_hanging_name_look_up_does_not_delay_the_exit(home: Path) -> None:
    """By default, Python waits for such a thread at its end."""
    hangs = "import socket, threading\nsocket.getaddrinfo = lambda *_, **__: threading.Event().wait()"
    found, seconds = program("http://slow.invalid", script=hangs, MLFLOW_HTTP_REQUEST_TIMEOUT="1", HOME=str(home))
    assert (found.code, found.rows["reachable"]) == (1, "no")
    assert "http://slow.invalid is not available: no answer within 1 s" in found.err
    assert seconds < 30


# -- plugins ---------------------------------------------------------------------------------------------------------

SIGNATURE = """
class AWSSigV4:
    def __init__(self, service):
        self.service = service

    def __call__(self, request):
        request.headers["Authorization"] = f"AWS4-HMAC-SHA256 {self.service}"
        return request
"""


def test_amazons_signature_wins_over_other_credentials(
    doctor: Doctor, healthy: ScriptedServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package that makes the signature is replaced by a stand-in."""
    (home / "requests_auth_aws_sigv4.py").write_text(SIGNATURE)
    monkeypatch.syspath_prepend(home)
    monkeypatch.delitem(sys.modules, "requests_auth_aws_sigv4", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_AWS_SIGV4", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    found = doctor(healthy.uri)
    assert (found.code, found.rows["credentials"]) == (0, "signature, of MLFLOW_TRACKING_AWS_SIGV4")
    assert found.rows["authentication"] == "accepted"
    assert healthy.requests[0].headers["authorization"] == "AWS4-HMAC-SHA256 execute-api"


def test_installed_plugins_are_named(healthy: ScriptedServer, home: Path) -> None:
    """Those that add headers, too. Both are used."""
    environment = install(home / "site") | {"HOME": str(home)}
    found, _ = program(healthy.uri, environment=environment, MLFLOW_TRACKING_AUTH="toy", MLFLOW_TRACKING_TOKEN=SECRET)
    assert (found.code, found.err) == (0, "")
    assert found.rows["credentials"] == "plugin 'toy', of MLFLOW_TRACKING_AUTH"
    assert found.rows["header plugins"] == "toy"
    assert found.rows["authentication"] == "accepted"
    assert healthy.requests[0].headers["authorization"].startswith("Toy ")
    assert healthy.requests[0].headers["x-toy-team"] == "vision"
    found, _ = program(healthy.uri, environment=environment)
    assert found.rows["credentials"] == "none"
    assert found.rows["authentication"] == "not asked for, or of the header plugins"


def test_a_plugin_that_is_not_installed_is_reported(
    doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request was sent, so no row describes the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "nobodys")
    found = doctor(healthy.uri)
    assert (found.code, healthy.requests) == (1, ())
    assert found.rows["authentication"] == "no credentials to be had"
    assert "reachable" not in found.rows
    assert "no plugin of mlflow gives the authentication 'nobodys'" in found.err


def test_the_workspace_is_shown_with_its_source(
    doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is sent."""
    assert doctor(healthy.uri).rows["workspace"] == "none"
    monkeypatch.setenv("MLFLOW_WORKSPACE", "vision")
    assert doctor(healthy.uri).rows["workspace"] == "vision, of MLFLOW_WORKSPACE"
    assert healthy.requests[-1].headers["x-mlflow-workspace"] == "vision"


# -- credentials -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "variables", "expected"),
    [
        ("http://user@host", {}, "user, of the URI's user info"),
        (f"http://:{SECRET}@host", {}, "password, of the URI's user info"),
        ("http://@host", {}, "an empty user, of the URI's user info"),
        ("http://host", {"MLFLOW_TRACKING_TOKEN": " \n"}, "none"),
        ("http://host", {"MLFLOW_TRACKING_AUTH": "toy"}, "plugin 'toy', of MLFLOW_TRACKING_AUTH"),
        (f"http://u:{SECRET}@host", {"MLFLOW_TRACKING_AUTH": "toy"}, "plugin 'toy', of MLFLOW_TRACKING_AUTH"),
        (
            "http://host",
            {"MLFLOW_TRACKING_AUTH": "toy", "MLFLOW_TRACKING_AWS_SIGV4": "1"},
            "signature, of MLFLOW_TRACKING_AWS_SIGV4",
        ),
        (
            f"http://u:{SECRET}@host",
            {"MLFLOW_TRACKING_AUTH": "kubernetes"},
            "plugin 'kubernetes', of MLFLOW_TRACKING_AUTH",
        ),
        (
            f"http://u:{SECRET}@host",
            {"MLFLOW_TRACKING_AUTH": "kubernetes-namespaced", "MLFLOW_TRACKING_TOKEN": SECRET},
            "token, of MLFLOW_TRACKING_TOKEN, and plugin 'kubernetes-namespaced', of MLFLOW_TRACKING_AUTH",
        ),
        ("postgresql://user@/db", {}, "user, of the URI's user info"),
        (f"postgresql://user:{SECRET}@/db", {}, "user and password, of the URI's user info"),
        (f"postgresql:///db?user=u&password={SECRET}", {}, "user and password, of the URI's query"),
        ("mysql+pymysql://host/db?user=u", {}, "user, of the URI's query"),
        ("postgresql+psycopg://host/db", {"MLFLOW_TRACKING_TOKEN": SECRET}, "none in the URI"),
        ("sqlite:///mlflow.db", {"MLFLOW_TRACKING_TOKEN": SECRET}, "none"),
        ("mlruns", {}, "none"),
    ],
)
def test_each_kind_of_credentials_is_named_with_its_source(
    monkeypatch: pytest.MonkeyPatch, uri: str, variables: dict[str, str], expected: str
) -> None:
    """In the order in which a store uses them."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert credentials_of(Config(), uri) == expected


@pytest.mark.parametrize("variable", [False, True])
def test_the_netrc_file_is_the_last_source(
    doctor: Doctor, healthy: ScriptedServer, home: Path, monkeypatch: pytest.MonkeyPatch, variable: bool
) -> None:
    """With the path at which it was found. A token comes before it, and with a plugin it is not used."""
    path = home / ("of-the-job" if variable else ".netrc")
    path.write_text(f"machine {HOST} login user password {SECRET}\n")
    if variable:
        monkeypatch.setenv("NETRC", str(path))
    found = doctor(healthy.uri)
    assert found.rows["credentials"] == f"user and password, of {path if variable else '~/.netrc'}"
    assert found.rows["authentication"] == "accepted"
    expected = base64.b64encode(f"user:{SECRET}".encode()).decode()
    assert healthy.requests[0].headers["authorization"] == f"Basic {expected}"
    healthy.mend()
    healthy.fail("", Fault.answer(401, f"who is {SECRET}, {expected}?".encode()), times=None)
    refused = doctor(healthy.uri)
    assert refused.code == 1 and refused.err.count("***") == 2
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "t0ken")
    assert credentials_of(Config(), healthy.uri) == "token, of MLFLOW_TRACKING_TOKEN"


def test_a_netrc_file_that_cannot_be_read_is_reported_and_ignored(
    doctor: Doctor, healthy: ScriptedServer, home: Path
) -> None:
    """As by requests."""
    (home / ".netrc").write_text(f"machine {HOST} login user passwort {SECRET}\n")
    found = doctor(healthy.uri)
    assert found.code == 0
    assert found.rows["credentials"] == "none; ~/.netrc cannot be read"
    assert found.rows["authentication"] == "not asked for"


def test_a_credentials_file_that_cannot_be_read_is_reported(
    doctor: Doctor, healthy: ScriptedServer, home: Path
) -> None:
    """Before any request, and without the file's content."""
    (home / ".mlflow").mkdir()
    (home / ".mlflow" / "credentials").write_text(f"mlflow_tracking_password = {SECRET}\n")
    found = doctor(healthy.uri)
    assert (found.code, healthy.requests) == (1, ())
    assert "the file ~/.mlflow/credentials cannot be read" in found.err


# -- certificates and proxies ----------------------------------------------------------------------------------------

BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.mark.parametrize("name", BUNDLES)
def test_the_bundle_of_requests_is_named(
    doctor: Doctor, home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """If MLflow's own variable is not set."""
    path = home / "ca.pem"
    trustme.CA().cert_pem.write_to_path(path)
    monkeypatch.setenv(name, str(path))
    assert doctor(f"https://{HOST}:{free_port()}").rows["tls"] == f"verified by {name}={path}"
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(path))
    found = doctor(f"https://{HOST}:{free_port()}")
    assert found.rows["tls"] == f"verified by MLFLOW_TRACKING_SERVER_CERT_PATH={path}"


def test_the_proxy_in_use_is_shown(doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only that for the URI's scheme, and without its password."""
    monkeypatch.setenv("http_proxy", f"http://user:{SECRET}@{HOST}:{healthy.port}")
    monkeypatch.setenv("HTTPS_PROXY", "http://not.this:1")
    monkeypatch.setenv("NO_PROXY", "other.invalid")
    found = doctor("http://behind.invalid")
    assert found.code == 0
    assert found.rows["proxies"] == f"http_proxy=http://***@{HOST}:{healthy.port}, NO_PROXY=other.invalid"
    assert healthy.requests[0].target.startswith("http://behind.invalid/api/")


def test_a_password_that_a_proxy_repeats_is_not_shown(
    doctor: Doctor, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the variable has no scheme."""
    monkeypatch.setenv("HTTP_PROXY", f"user:{SECRET}@{HOST}:{server.port}")
    server.fail("", Fault.answer(502, f"who is {SECRET}?".encode()), times=None)
    found = doctor("http://behind.invalid")
    assert found.code == 1 and "who is ***?" in found.err
    assert found.rows["proxies"] == f"HTTP_PROXY=http://***@{HOST}:{server.port}"


def test_no_proxy_alone_is_not_shown(doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exceptions matter only if there is a proxy."""
    monkeypatch.setenv("NO_PROXY", "localhost")
    assert doctor(healthy.uri).rows["proxies"] == "none"


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "scheme", "kind"),
    [
        ("databricks", "databricks", "Databricks' REST API"),
        ("databricks-uc://team", "databricks-uc", "Databricks' REST API"),
        ("./databricks", "", "MLflow's own, in files"),
        ("file:runs", "file", "MLflow's own, in files"),
        ("MySQL+pymysql://host/db", "mysql+pymysql", "MLflow's own, in a database (mysql+pymysql)"),
        ("toy:///folder", "toy", "MLflow's own, by the plugin for toy"),
    ],
)
def test_each_uri_is_described_by_its_kind(uri: str, scheme: str, kind: str) -> None:
    """A path may begin with the word databricks."""
    assert (scheme_of(uri), kind_of(scheme_of(uri))) == (scheme, kind)


def test_a_database_in_memory_has_no_file(tmp_path: Path) -> None:
    """A database in a file has one, for each spelling of the URI."""
    assert missing_file("sqlite", "sqlite://") is None
    assert missing_file("sqlite", "sqlite:///:memory:") is None
    assert missing_file("sqlite", f"sqlite:///{tmp_path}/runs.db") == tmp_path / "runs.db"
    (tmp_path / "two words.db").touch()
    assert missing_file("sqlite", f"sqlite:///{tmp_path}/two%20words.db") is None
    assert missing_file("postgresql", "postgresql:///db") is None


def test_a_redactor_hides_secrets_of_the_query_too() -> None:
    """As they are written, and unquoted. Line breaks become blanks."""
    redactor = Redactor("postgresql:///db?password=p%40ss-word&sslmode=require")
    assert redactor.redact("p@ss-word\np%40ss-word require") == "*** *** require"
    assert repr(redactor) == "<Redactor ***>"
