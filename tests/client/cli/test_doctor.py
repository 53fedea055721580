"""
`runqueue doctor` where more than a URI says where it leads and as whom: workspaces of Databricks, mlflow's plugins,
~/.netrc, proxies, certificates; and that it ends whoever does not answer.

Rules of this file: whatever is said is free of the secrets, and what is wrong is one line and exit code 1.
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
    """What one call of the command left."""

    code: int
    rows: dict[str, str]
    err: str


Doctor: TypeAlias = Callable[[str], Outcome]


def outcome(code: int, out: str, err: str) -> Outcome:
    """Checked for what holds whatever was found."""
    assert [each for each in SECRETS if each in out + err] == []
    for secret in SECRETS:
        assert base64.b64encode(f"user:{secret}".encode()).decode() not in out + err
    assert err.count("\n") == code and "Traceback" not in err
    lines = (line.partition(":") for line in out.splitlines())
    return Outcome(code, {key: value.strip() for key, _, value in lines}, err)


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Runs the command."""

    def run(uri: str) -> Outcome:
        with pytest.raises(SystemExit) as caught:
            main(["doctor", "--tracking-uri", uri])
        assert isinstance(caught.value.code, int)
        return outcome(caught.value.code, *capsys.readouterr())

    return run


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, and a working folder in it, without any file; nor is there a program that could be asked for a token."""
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
    """A server that knows its default experiment."""
    server.fail(GET_EXPERIMENT, DEFAULT, times=None)
    return server


def program(
    uri: str, *, script: str = "", environment: dict[str, str] | None = None, **variables: str
) -> tuple[Outcome, float]:
    """The program in a process of its own, after some code; and the seconds that it took."""
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
    """Lets in who has the token, or the client's secret; the variables say where it is."""
    importlib.import_module("databricks.sdk.core")  # takes seconds, which are no part of a time-out
    with Workspace(PAT, client=CLIENT) as workspace:
        workspace.fail(GET_EXPERIMENT, DEFAULT, times=None)
        monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
        yield workspace


@pytest.mark.parametrize("uri", ["databricks", "databricks-uc", "databricks://", "Databricks://"])
def test_a_workspace_is_reported_in_full(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    """MLflow's own variables say nothing of it, and nothing is written to it."""
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
    """Here by a profile that the URI names."""
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


def test_a_workspace_without_such_an_experiment_is_well(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Databricks names experiments by paths; that MLflow's default is missing, or closed to us, is no fault."""
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


def test_a_workspace_that_nobody_names_is_said(doctor: Doctor) -> None:
    """With what to set; there is no more to tell."""
    found = doctor("databricks")
    assert found.code == 1
    assert "no host is known for 'databricks': set DATABRICKS_HOST" in found.err
    assert "reachable" not in found.rows


def test_a_bad_databricks_uri_is_said(doctor: Doctor) -> None:
    """One that names a scope of secrets."""
    assert "names a scope of secrets" in doctor("databricks://scope:prefix").err


def test_a_workspace_without_credentials_is_said(doctor: Doctor, workspace: Workspace) -> None:
    """Nothing was sent to MLflow's API, so nothing is told of it."""
    found = doctor("databricks")
    assert (found.code, workspace.calls) == (1, [])
    assert found.rows["authentication"] == "no credentials to be had"
    assert f"'databricks' has no credentials for {workspace.uri}" in found.err
    assert "reachable" not in found.rows


@pytest.mark.parametrize("refusal", ["401", "403"])
def test_a_token_that_a_workspace_refuses_is_said_with_its_kind(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, refusal: str
) -> None:
    """Whichever of its ways it says so in."""
    monkeypatch.setenv("DATABRICKS_TOKEN", SECRET)
    if refusal == "403":
        workspace.refusal = INVALID_TOKEN
    found = doctor("databricks")
    assert (found.code, found.rows["reachable"], found.rows["authentication"]) == (1, "yes", "refused")
    assert found.err.endswith("; credentials: pat, by databricks-sdk\n")


def test_a_client_secret_that_the_workspace_refuses_is_said(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its OAuth server's word."""
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", CLIENT[0])
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", SECRET)
    found = doctor("databricks")
    assert (found.code, found.rows["authentication"]) == (1, "no credentials to be had")
    assert "invalid_client" in found.err


def test_a_host_that_is_not_there_is_said(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name and the kind of credentials are told all the same."""
    port = free_port()
    monkeypatch.setenv("DATABRICKS_HOST", f"http://{HOST}:{port}")
    monkeypatch.setenv("DATABRICKS_TOKEN", PAT)
    found = doctor("databricks")
    assert (found.code, found.rows["host"], found.rows["reachable"]) == (1, f"{HOST}:{port}", "no")
    assert "databricks is not available: cannot connect" in found.err


def test_somebody_at_a_terminal_does_not_wait_as_long_as_a_client(
    doctor: Doctor, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for a workspace; a variable that says otherwise counts."""
    monkeypatch.setenv("DATABRICKS_TOKEN", PAT)
    monkeypatch.setattr(_doctor, "REQUEST_TIMEOUT", 0.75)
    workspace.mend()
    workspace.fail(GET_EXPERIMENT, Fault.hold(), times=None)
    assert "no answer within 0.75 s" in doctor("databricks").err


# -- nobody answers --------------------------------------------------------------------------------------------------


def test_an_oauth_server_that_hangs_does_not_hold_up_the_exit(workspace: Workspace, home: Path) -> None:
    """The SDK would wait for it for ever, in a thread that nothing can end."""
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


def test_a_name_that_is_not_resolved_does_not_hold_up_the_exit(home: Path) -> None:
    """Python itself would wait for the thread that asks for it, even after the last word."""
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


def test_amazons_signature_is_what_is_sent_whatever_else_is_there(
    doctor: Doctor, healthy: ScriptedServer, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in for the package that makes it."""
    (home / "requests_auth_aws_sigv4.py").write_text(SIGNATURE)
    monkeypatch.syspath_prepend(home)
    monkeypatch.delitem(sys.modules, "requests_auth_aws_sigv4", raising=False)
    monkeypatch.setenv("MLFLOW_TRACKING_AWS_SIGV4", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    found = doctor(healthy.uri)
    assert (found.code, found.rows["credentials"]) == (0, "signature, of MLFLOW_TRACKING_AWS_SIGV4")
    assert found.rows["authentication"] == "accepted"
    assert healthy.requests[0].headers["authorization"] == "AWS4-HMAC-SHA256 execute-api"


def test_plugins_that_are_installed_are_named(healthy: ScriptedServer, home: Path) -> None:
    """Those that add headers too; both are asked."""
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


def test_a_plugin_that_nobody_has_is_said(
    doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was sent, and so nothing is told of the server."""
    monkeypatch.setenv("MLFLOW_TRACKING_AUTH", "nobodys")
    found = doctor(healthy.uri)
    assert (found.code, healthy.requests) == (1, ())
    assert found.rows["authentication"] == "no credentials to be had"
    assert "reachable" not in found.rows
    assert "no plugin of mlflow gives the authentication 'nobodys'" in found.err


def test_the_workspace_is_told_with_its_source(
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
    """In the order in which a store takes them."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert credentials_of(Config(), uri) == expected


@pytest.mark.parametrize("variable", [False, True])
def test_requests_own_file_is_the_last_source(
    doctor: Doctor, healthy: ScriptedServer, home: Path, monkeypatch: pytest.MonkeyPatch, variable: bool
) -> None:
    """By the path at which it was found; a token comes before it, and a plugin leaves it out."""
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


def test_requests_own_file_that_cannot_be_read_is_told(doctor: Doctor, healthy: ScriptedServer, home: Path) -> None:
    """It counts as not there, as with requests."""
    (home / ".netrc").write_text(f"machine {HOST} login user passwort {SECRET}\n")
    found = doctor(healthy.uri)
    assert found.code == 0
    assert found.rows["credentials"] == "none; ~/.netrc cannot be read"
    assert found.rows["authentication"] == "not asked for"


def test_mlflows_file_that_cannot_be_read_is_said(doctor: Doctor, healthy: ScriptedServer, home: Path) -> None:
    """Before anything is sent, and without what stands in it."""
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
    """Where MLflow's own variable is not set."""
    path = home / "ca.pem"
    trustme.CA().cert_pem.write_to_path(path)
    monkeypatch.setenv(name, str(path))
    assert doctor(f"https://{HOST}:{free_port()}").rows["tls"] == f"verified by {name}={path}"
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(path))
    found = doctor(f"https://{HOST}:{free_port()}")
    assert found.rows["tls"] == f"verified by MLFLOW_TRACKING_SERVER_CERT_PATH={path}"


def test_the_proxy_that_is_used_is_told(
    doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the URI's scheme alone, and without its password."""
    monkeypatch.setenv("http_proxy", f"http://user:{SECRET}@{HOST}:{healthy.port}")
    monkeypatch.setenv("HTTPS_PROXY", "http://not.this:1")
    monkeypatch.setenv("NO_PROXY", "other.invalid")
    found = doctor("http://behind.invalid")
    assert found.code == 0
    assert found.rows["proxies"] == f"http_proxy=http://***@{HOST}:{healthy.port}, NO_PROXY=other.invalid"
    assert healthy.requests[0].target.startswith("http://behind.invalid/api/")


def test_a_proxy_that_echoes_its_password_does_not_betray_it(
    doctor: Doctor, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one whose variable leaves out the scheme."""
    monkeypatch.setenv("HTTP_PROXY", f"user:{SECRET}@{HOST}:{server.port}")
    server.fail("", Fault.answer(502, f"who is {SECRET}?".encode()), times=None)
    found = doctor("http://behind.invalid")
    assert found.code == 1 and "who is ***?" in found.err
    assert found.rows["proxies"] == f"HTTP_PROXY=http://***@{HOST}:{server.port}"


def test_no_proxy_is_no_proxy(doctor: Doctor, healthy: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is excepted counts only beside one."""
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
def test_a_uri_has_its_kind(uri: str, scheme: str, kind: str) -> None:
    """A path is none of Databricks', though it may be called so."""
    assert (scheme_of(uri), kind_of(scheme_of(uri))) == (scheme, kind)


def test_a_database_in_memory_is_no_file(tmp_path: Path) -> None:
    """And one in a file is, in each spelling."""
    assert missing_file("sqlite", "sqlite://") is None
    assert missing_file("sqlite", "sqlite:///:memory:") is None
    assert missing_file("sqlite", f"sqlite:///{tmp_path}/runs.db") == tmp_path / "runs.db"
    (tmp_path / "two words.db").touch()
    assert missing_file("sqlite", f"sqlite:///{tmp_path}/two%20words.db") is None
    assert missing_file("postgresql", "postgresql:///db") is None


def test_a_redactor_hides_secrets_of_the_query_too() -> None:
    """As they stand there, and as they are meant; line breaks go."""
    redactor = Redactor("postgresql:///db?password=p%40ss-word&sslmode=require")
    assert redactor.redact("p@ss-word\np%40ss-word require") == "*** *** require"
    assert repr(redactor) == "<Redactor ***>"
