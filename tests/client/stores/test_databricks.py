"""
Databricks tracking URIs, through a client and over real sockets: host, credentials, renewals, outages, secrets.
"""

# Rules of this file:
# - The SDK is the real one, and finds only what a test has configured.
# - Requests are checked by the workspace's record of them.

from __future__ import annotations

import base64
import importlib
import importlib.util
import logging
import os
import pickle
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import runqueue
from runqueue.errors import (
    AuthError,
    ConfigError,
    FlushError,
    NotFoundError,
    RejectedError,
    Scope,
    StoreError,
    UnavailableError,
    UnexpectedAnswerError,
)
from runqueue.http._signing import Outgoing
from runqueue.settings._config import Config, Transport
from runqueue.stores._databricks import DatabricksCredentials, DatabricksStore
from runqueue.stores._protocol import LOG_BATCH, Traffic
from runqueue.stores._resolve import make_store
from runqueue.wire._limits import MLFLOW_LIMITS
from support.answers import error
from support.databricks import DISCOVERY, INVALID_TOKEN, INVALID_TOKEN_PAGE, OAUTH_SERVER, TOKEN, Workspace
from support.proxy import Fault, reply
from support.wire_log import assert_within_limits, entries, names

PAT = "dapi-0123456789abcdef"
CLIENT = ("5f1c-the-client", "dose-the-client-secret")

both = pytest.mark.parametrize("transport", ["httpx", "auto"])


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the SDK's file, which does not exist yet. There is no home, and no program that gives tokens."""
    importlib.import_module("databricks.sdk.core")  # takes seconds, which are no part of a test with a short time-out
    path = tmp_path / "databrickscfg"
    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in os.environ:
        if name.startswith(("ARM_", "GOOGLE_", "ACTIONS_ID_TOKEN")):
            monkeypatch.delenv(name)
    return path


@pytest.fixture
def workspace() -> Iterator[Workspace]:
    """A workspace that accepts the token and the client's secret."""
    with Workspace(PAT, client=CLIENT) as workspace:
        yield workspace


@pytest.fixture
def variables(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set host and token of the workspace in the environment."""
    monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
    monkeypatch.setenv("DATABRICKS_TOKEN", PAT)


@pytest.fixture
def principal(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set host of the workspace and the client's secret in the environment."""
    monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
    monkeypatch.setenv("DATABRICKS_CLIENT_ID", CLIENT[0])
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", CLIENT[1])


def write_profiles(path: Path, **sections: dict[str, str]) -> None:
    """Write the SDK's file."""
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {text}\n" for key, text in keys.items()) for name, keys in sections.items()
    ]
    path.write_text("\n".join(lines))


def log_one(uri: str = "databricks", **settings: Any) -> None:
    """Log one metric by a client of its own."""
    with runqueue.Client(uri, **settings) as client:
        client.log_metric("r", "loss", 0.5)


def cause_of_outage(client: runqueue.Client, timeout: float | None = None) -> StoreError:
    """The single cause for which everything stays queued."""
    before = client.statistics().pending
    with pytest.raises(FlushError) as caught:
        client.flush(timeout=timeout)
    assert all(not failure.final for failure in caught.value.failures)
    assert client.statistics().pending == before > 0
    causes = {str(failure.error): failure.error for failure in caught.value.failures}
    (cause,) = causes.values()
    assert isinstance(cause, StoreError)
    return cause


def abandon(client: runqueue.Client) -> None:
    """Close a client whose entries the test wanted to stay queued."""
    client.__exit__(RuntimeError, RuntimeError("the test is over"), None)


# -- what the URI means ----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("uri", ["databricks", "databricks://", "databricks-uc", "databricks-uc://", "Databricks://"])
def test_host_and_token_come_from_the_variables(
    workspace: Workspace, variables: None, transport: Transport, uri: str
) -> None:
    """For a whole run: create, log, end."""
    workspace.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": "0a1b"}}}))
    with runqueue.Client(uri, transport=transport) as client:
        run = client.create_run("0", run_name="demo")
        client.log_metric(run, "loss", 0.5)
        client.set_terminated(run)
    assert names(workspace.calls) == ["create", "log-batch", "update"]
    assert workspace.sent() == [f"Bearer {PAT}"] * 3
    assert workspace.sent("x-databricks-org-id") == ["6051921418418893"] * 3
    assert client.statistics().requests == 3


@pytest.mark.parametrize("scheme", ["databricks", "databricks-uc"])
def test_a_profile_is_a_section_of_the_file(workspace: Workspace, profiles: Path, scheme: str) -> None:
    """The URI names it, in upper and lower case."""
    write_profiles(
        profiles, DEFAULT={"host": "http://127.0.0.1:1", "token": "other"}, Team={"host": workspace.uri, "token": PAT}
    )
    log_one(f"{scheme}://Team")
    assert workspace.sent() == [f"Bearer {PAT}"]


def test_a_profile_may_be_named_by_the_variable(
    workspace: Workspace, profiles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The URI's profile comes before it."""
    write_profiles(profiles, mine={"host": workspace.uri, "token": PAT}, bad={"host": workspace.uri, "token": "bad"})
    monkeypatch.setenv("DATABRICKS_CONFIG_PROFILE", "mine")
    log_one()
    monkeypatch.setenv("DATABRICKS_CONFIG_PROFILE", "bad")
    log_one("databricks://mine")
    assert workspace.sent() == [f"Bearer {PAT}"] * 2


def test_without_a_name_the_default_profile_is_used(workspace: Workspace, profiles: Path) -> None:
    """As by Databricks' other tools."""
    write_profiles(profiles, DEFAULT={"host": workspace.uri, "token": PAT, "workspace_id": "77"})
    log_one()
    assert workspace.sent("x-databricks-org-id") == ["77"]


def test_the_org_id_header_is_sent_only_if_the_sdk_knows_a_workspace_id() -> None:
    """Only hosts of many workspaces need it."""
    with Workspace("t0ken", workspace_id=None) as workspace, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATABRICKS_HOST", workspace.uri + "/")
        patch.setenv("DATABRICKS_TOKEN", "t0ken")
        log_one()
        assert workspace.sent("x-databricks-org-id") == [None]
        assert names(workspace.calls) == ["log-batch"]


def test_a_host_without_a_configuration_page_is_accepted(workspace: Workspace, variables: None) -> None:
    """Older hosts have none."""
    workspace.fail(DISCOVERY, Fault.answer(404, error("ENDPOINT_NOT_FOUND")), times=None)
    log_one()
    assert workspace.sent() == [f"Bearer {PAT}"]


@pytest.mark.parametrize("given", ["mine", lambda: "mine"])
def test_the_constructors_token_wins_over_the_sdks_credentials(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, given: Any
) -> None:
    """The host is the SDK's. Its credentials may be contradictory or missing."""
    workspace.tokens = {"mine"}
    monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
    log_one(token=given)
    for name in ("DATABRICKS_TOKEN", "DATABRICKS_CLIENT_ID", "DATABRICKS_USERNAME"):
        monkeypatch.setenv(name, "not this one")
    log_one(token=given)
    assert workspace.sent() == ["Bearer mine"] * 2
    assert workspace.sent("x-databricks-org-id") == ["6051921418418893"] * 2
    assert workspace.count(TOKEN) == 0


def test_variables_for_other_servers_are_not_sent_to_a_workspace(
    workspace: Workspace, variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow does not send them there either."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "elsewhere")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "elsewhere")
    log_one()
    assert workspace.sent() == [f"Bearer {PAT}"]


def test_a_path_that_begins_with_databricks_is_a_path(tmp_path: Path) -> None:
    """Only the word alone means Databricks."""
    config = Config()
    for uri in ("./databricks", str(tmp_path / "databricks"), "file:databricks"):
        assert type(make_store(config, uri, Traffic())).__name__ == "MlflowStore"
    assert type(make_store(config, "databricks", Traffic())).__name__ == "DatabricksStore"


# -- said at once ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["databricks", "databricks://team", "databricks-uc", "databricks-uc://team"])
@pytest.mark.parametrize("absent", ["the SDK", "all of Databricks"])
def test_a_missing_extra_raises_at_construction(monkeypatch: pytest.MonkeyPatch, uri: str, absent: str) -> None:
    """The message says what to install."""
    find_spec = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> Any:
        if name == "databricks.sdk":
            if absent == "the SDK":
                return None
            raise ModuleNotFoundError("No module named 'databricks'", name="databricks")
        return find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(ConfigError) as caught:
        runqueue.Client(uri)
    assert repr(uri) in str(caught.value) and "pip install 'runqueue[databricks]'" in str(caught.value)


@pytest.mark.parametrize("uri", ["databricks://scope:prefix", "databricks-uc://scope:prefix", "databricks://scope:"])
def test_a_scope_of_secrets_raises_at_construction(uri: str) -> None:
    """Only a notebook could read them. The message says what to do instead."""
    with pytest.raises(ConfigError, match="databricks://<profile>") as caught:
        runqueue.Client(uri)
    assert repr(uri) in str(caught.value)


def test_a_uri_that_names_no_profile_raises_at_construction() -> None:
    """One slash too many must not mean the default profile. A password in it is not shown."""
    with pytest.raises(ConfigError, match="names no profile"):
        runqueue.Client("databricks:///team")
    with pytest.raises(ConfigError) as caught:
        runqueue.Client(f"databricks://token:{PAT}@host")
    assert PAT not in str(caught.value)


def test_a_bad_variable_for_tls_raises_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces use https."""
    monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", "/nowhere.pem")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_SERVER_CERT_PATH"):
        runqueue.Client("databricks")


def test_the_constructor_looks_up_nothing(workspace: Workspace, variables: None) -> None:
    """It must not wait for files or the host."""
    with runqueue.Client("databricks") as client:
        client.flush()
    assert workspace.count() == 0


# -- what is not found -----------------------------------------------------------------------------------------------


def test_an_unknown_host_leaves_everything_queued(workspace: Workspace, profiles: Path) -> None:
    """The message says what to set, and the next flush looks again."""
    with runqueue.Client("databricks") as client:
        client.log_metric("r", "loss", 0.5)
        cause = cause_of_outage(client)
        assert cause.scope is Scope.STORE and not cause.retriable
        assert "'databricks'" in str(cause) and "DATABRICKS_HOST" in str(cause)
        write_profiles(profiles, DEFAULT={"host": workspace.uri, "token": PAT})
        client.flush()
        assert client.statistics().stored == 1


def test_an_unknown_host_is_an_error_with_a_token_too() -> None:
    """The SDK itself does not complain about it."""
    client = runqueue.Client("databricks", token="mine")
    client.log_metric("r", "loss", 0.5)
    assert "DATABRICKS_HOST" in str(cause_of_outage(client))
    abandon(client)


@pytest.mark.parametrize("given", [None, "mine"])
def test_a_missing_profile_leaves_everything_queued(workspace: Workspace, profiles: Path, given: str | None) -> None:
    """The message names it, and the next flush looks again."""
    write_profiles(profiles, other={"host": workspace.uri, "token": PAT})
    with runqueue.Client("databricks://team", token=given) as client:
        client.log_metric("r", "loss", 0.5)
        cause = cause_of_outage(client)
        assert cause.scope is Scope.STORE and "'databricks://team'" in str(cause)
        assert "has no team profile" in str(cause) and PAT not in str(cause)
        workspace.tokens.add("mine")
        write_profiles(profiles, team={"host": workspace.uri, "token": PAT})
        client.flush()
    assert client.statistics().stored == 1


def test_a_host_without_credentials_leaves_everything_queued(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No request is sent without credentials."""
    monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
    with runqueue.Client("databricks") as client:
        client.log_metric("r", "loss", 0.5)
        cause = cause_of_outage(client)
        assert isinstance(cause, AuthError) and cause.scope is Scope.STORE
        assert workspace.uri in str(cause) and "'databricks'" in str(cause)
        assert workspace.calls == []
        monkeypatch.setenv("DATABRICKS_TOKEN", PAT)
        client.flush()
    assert workspace.sent() == [f"Bearer {PAT}"]


def test_contradictory_credentials_leave_everything_queued(
    workspace: Workspace, variables: None, principal: None
) -> None:
    """The SDK refuses them. Its message is shown without its configuration."""
    client = runqueue.Client("databricks")
    client.log_metric("r", "loss", 0.5)
    cause = cause_of_outage(client)
    assert "more than one authorization method" in str(cause)
    assert all(secret not in str(cause) for secret in (PAT, *CLIENT))
    abandon(client)


@pytest.mark.parametrize("text", [f"token = {PAT}", f"[DEFAULT]\ntoken = {PAT}\n{PAT}\n"], ids=["section", "line"])
def test_a_broken_file_leaves_everything_queued(workspace: Workspace, profiles: Path, text: str) -> None:
    """Python's parser would quote the line in its message."""
    profiles.write_text(text)
    with runqueue.Client("databricks") as client:
        client.log_metric("r", "loss", 0.5)
        cause = cause_of_outage(client)
        assert cause.scope is Scope.STORE and "Error" in str(cause) and PAT not in str(cause)
        write_profiles(profiles, DEFAULT={"host": workspace.uri, "token": PAT})
        client.flush()
    assert workspace.sent() == [f"Bearer {PAT}"]


@pytest.mark.parametrize("host", ["ftp://host", "http://", "https://?x"])
def test_an_invalid_host_leaves_everything_queued(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """The report has a message, and no traceback."""
    monkeypatch.setenv("DATABRICKS_HOST", host)
    client = runqueue.Client("databricks", token="mine")
    client.log_metric("r", "loss", 0.5)
    cause = cause_of_outage(client)
    assert cause.scope is Scope.STORE and "DATABRICKS_HOST" in str(cause)
    abandon(client)


def test_an_sdk_that_cannot_be_imported_leaves_everything_queued(
    workspace: Workspace, variables: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was installed when the client was made."""
    client = runqueue.Client("databricks")
    client.log_metric("r", "loss", 0.5)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "databricks.sdk.core", None)
        cause = cause_of_outage(client)
    assert cause.scope is Scope.STORE and "pip install 'runqueue[databricks]'" in str(cause)
    client.close()
    assert client.statistics().stored == 1


@both
def test_a_host_that_is_down_is_retried(variables: None, workspace: Workspace, transport: Transport) -> None:
    """As any server. The SDK only logs a warning."""
    workspace.stop_listening()
    with runqueue.Client("databricks", transport=transport, retry_timeout=0) as client:
        client.log_metric("r", "loss", 0.5)
        cause = cause_of_outage(client)
        assert isinstance(cause, UnavailableError) and cause.retriable
        workspace.listen_again()
        client.flush()
    assert workspace.sent() == [f"Bearer {PAT}"]


# -- OAuth -----------------------------------------------------------------------------------------------------------


@both
def test_a_service_principal_gets_a_token_and_keeps_it(
    workspace: Workspace, principal: None, transport: Transport
) -> None:
    """One request for a token serves many others."""
    with runqueue.Client("databricks", transport=transport) as client:
        for number in range(5):
            client.log_metric(f"r{number}", "loss", 0.5)
        client.flush()
        client.log_metric("r", "loss", 0.5)
    assert workspace.sent() == [f"Bearer {workspace.issued[0]}"] * 6
    assert len(workspace.issued) == 1


def test_a_profile_may_hold_a_service_principal(workspace: Workspace, profiles: Path) -> None:
    """The file may hold each kind of credentials."""
    write_profiles(profiles, m2m={"host": workspace.uri, "client_id": CLIENT[0], "client_secret": CLIENT[1]})
    log_one("databricks://m2m")
    assert workspace.sent() == [f"Bearer {workspace.issued[0]}"]


def test_an_expiring_token_is_renewed_before_it_is_sent(workspace: Workspace, principal: None) -> None:
    """The SDK knows the time of expiry."""
    workspace.lifetime = 39
    with runqueue.Client("databricks") as client:
        for _ in range(2):
            client.log_metric("r", "loss", 0.5)
            client.flush()
    assert workspace.sent() == [f"Bearer {token}" for token in workspace.issued]
    assert len(workspace.issued) == 2


@both
def test_after_a_401_the_request_is_repeated_once_with_a_new_token(
    workspace: Workspace, principal: None, transport: Transport
) -> None:
    """The SDK does not know that a token was revoked."""
    with runqueue.Client("databricks", transport=transport) as client:
        client.log_metric("r", "loss", 0.5)
        client.flush()
        workspace.tokens.clear()
        client.log_metric("r", "loss", 0.25)
        client.flush()
        client.log_metric("r", "loss", 0.125)
    old, new = workspace.issued
    assert workspace.sent() == [f"Bearer {token}" for token in (old, old, new, new)]
    assert client.statistics().stored == 3


def test_many_refusals_at_once_request_one_token(workspace: Workspace, principal: None) -> None:
    """One request renews the credentials for all."""
    with runqueue.Client("databricks", max_workers=8) as client:
        client.log_metric("r", "loss", 0.5)
        client.flush()
        workspace.tokens.clear()
        for number in range(40):
            client.log_metric(f"r{number}", "loss", 0.5)
    assert client.statistics().stored == 41
    assert len(workspace.issued) <= 4


def test_a_refused_secret_leaves_everything_queued(
    workspace: Workspace, principal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The OAuth server's message is shown, and it is not asked again and again."""
    monkeypatch.setenv("DATABRICKS_CLIENT_SECRET", "wr0ng-secret")
    client = runqueue.Client("databricks")
    client.log_metric("r", "loss", 0.5)
    cause = cause_of_outage(client)
    assert isinstance(cause, AuthError) and cause.scope is Scope.STORE
    assert "invalid_client" in str(cause) and "wr0ng-secret" not in str(cause)
    assert workspace.calls == [] and workspace.count(TOKEN) == 1
    abandon(client)


LATER = {
    "a page": Fault.answer(502, "<html>bad gateway</html>"),
    "JSON": Fault.answer(503, error("TEMPORARILY_UNAVAILABLE")),
    "OAuth's": Fault.answer(503, {"error": "temporarily_unavailable", "error_description": "later"}),
    "a cut": Fault.cut_before_commit(),
}


@pytest.mark.parametrize("fault", LATER.values(), ids=LATER)
@pytest.mark.parametrize("place", [TOKEN, OAUTH_SERVER])
def test_an_oauth_server_that_is_down_is_retried(
    workspace: Workspace, principal: None, monkeypatch: pytest.MonkeyPatch, place: str, fault: Fault
) -> None:
    """Nothing is wrong with the credentials."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.01")
    workspace.fail(place, fault, times=2)
    log_one()
    assert workspace.count(place) == 3
    assert workspace.sent() == [f"Bearer {workspace.issued[0]}"]


def test_a_host_that_does_not_name_its_oauth_server_leaves_everything_queued(
    workspace: Workspace, principal: None
) -> None:
    """It may be down for a moment. The SDK's own message would be about a URL of None."""
    workspace.fail(DISCOVERY, Fault.answer(404, error("ENDPOINT_NOT_FOUND")))
    with runqueue.Client("databricks", retry_timeout=0) as client:
        client.log_metric("r", "loss", 0.5)
        cause = cause_of_outage(client)
        assert isinstance(cause, UnavailableError) and "OAuth server" in str(cause) and "None" not in str(cause)
        client.flush()
    assert client.statistics().stored == 1


def test_the_wait_for_a_hanging_oauth_server_is_bounded(workspace: Workspace, principal: None) -> None:
    """The SDK would wait for ever. A new attempt does not wait for the old one."""
    workspace.fail(TOKEN, Fault.hold())
    begin = time.monotonic()
    with runqueue.Client("databricks", request_timeout=5, retry_timeout=0) as client:
        client.log_metric("r", "loss", 0.5)
        cause = cause_of_outage(client)
        assert isinstance(cause, UnavailableError) and "within 5 s" in str(cause)
        client.flush()
        assert client.statistics().stored == 1
    assert time.monotonic() - begin < 30
    workspace.let_go()


def test_the_wait_for_a_hanging_configuration_page_is_bounded(workspace: Workspace, principal: None) -> None:
    """The SDK would try for five minutes."""
    workspace.fail(OAUTH_SERVER, Fault.hold(), times=None)
    begin = time.monotonic()
    client = runqueue.Client("databricks", request_timeout=1, retry_timeout=0)
    client.log_metric("r", "loss", 0.5)
    cause = cause_of_outage(client)
    assert isinstance(cause, UnavailableError) and "databricks-sdk within 1 s" in str(cause)
    assert time.monotonic() - begin < 20
    abandon(client)
    workspace.let_go()


# -- refusals --------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("refusal", [None, INVALID_TOKEN, INVALID_TOKEN_PAGE], ids=["401", "403", "403 as a page"])
def test_a_rotated_token_is_picked_up(workspace: Workspace, profiles: Path, transport: Transport, refusal: Any) -> None:
    """The request is repeated with it, whichever status refused the old one. Nothing is lost."""
    workspace.refusal = refusal or workspace.refusal
    write_profiles(profiles, team={"host": workspace.uri, "token": PAT})
    with runqueue.Client("databricks://team", transport=transport) as client:
        client.log_metric("r", "loss", 0.5)
        client.flush()
        workspace.tokens = {"rotated"}
        write_profiles(profiles, team={"host": workspace.uri, "token": "rotated"})
        client.log_metric("r", "loss", 0.25)
        client.flush()
    assert workspace.sent() == [f"Bearer {token}" for token in (PAT, PAT, "rotated")]
    assert client.statistics().stored == 2


@pytest.mark.parametrize("refusal", [None, INVALID_TOKEN], ids=["401", "403"])
def test_a_callable_is_called_again_after_a_refusal(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, refusal: Any
) -> None:
    """Also after a 403 that is about the token."""
    workspace.refusal = refusal or workspace.refusal
    monkeypatch.setenv("DATABRICKS_HOST", workspace.uri)
    tokens = iter(["old", PAT])
    log_one(token=lambda: next(tokens))
    assert workspace.sent() == ["Bearer old", f"Bearer {PAT}"]


REFUSALS = {
    "401": None,
    "403": INVALID_TOKEN,
    "403 as a page": INVALID_TOKEN_PAGE,
    "expired": reply(403, {"error_code": 403, "message": "Token is expiring within 30 seconds. (token expired)"}),
    "expired, of Entra's": reply(400, "io.jsonwebtoken.ExpiredJwtException: JWT expired at 2024-05-01T10:00:00Z"),
    "access list": reply(
        403, error("PERMISSION_DENIED", "Source IP address: 10.1.2.3 is blocked by Databricks IP ACL")
    ),
    "log in": reply(302, b"", {"Location": "/login.html"}),
    "private link": reply(303, b"", {"Location": "/login.html?error=private-link-validation-error:77"}),
    "log in elsewhere": reply(307, b"", {"Location": "https://login.databricks.invalid/?next=x"}),
}


@both
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_a_closed_workspace_leaves_everything_queued(
    workspace: Workspace, variables: None, transport: Transport, refusal: Any
) -> None:
    """Whichever its answer is, no run fails. Each request is repeated once at most."""
    good, workspace.tokens = workspace.tokens, set()
    workspace.refusal = refusal or workspace.refusal
    with runqueue.Client("databricks", transport=transport, max_workers=1) as client:
        client.log_metric("r", "loss", 0.5)
        client.log_metric("s", "loss", 0.5)
        cause = cause_of_outage(client)
        assert isinstance(cause, AuthError) and cause.scope is Scope.STORE and not cause.retriable
        assert len(workspace.calls) <= 2
        workspace.tokens = good
        client.flush()
        assert client.statistics().stored == 2


def test_a_changed_host_gets_no_request(workspace: Workspace, profiles: Path) -> None:
    """It does not have these runs, and must not get another host's token."""
    with Workspace("other") as other, runqueue.Client("databricks") as client:
        write_profiles(profiles, DEFAULT={"host": workspace.uri, "token": PAT})
        client.log_metric("r", "loss", 0.5)
        client.flush()
        workspace.tokens.clear()
        write_profiles(profiles, DEFAULT={"host": other.uri, "token": "other"})
        client.log_metric("r", "loss", 0.25)
        cause = cause_of_outage(client)
        assert isinstance(cause, AuthError) and other.uri in str(cause)
        assert other.calls == [] and "Bearer other" not in workspace.sent()
        workspace.tokens = {"rotated"}
        write_profiles(profiles, DEFAULT={"host": workspace.uri, "token": "rotated"})
        client.flush()
        assert client.statistics().stored == 2


# -- answers ---------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("code", ["REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"])
def test_a_429_is_retried_after_its_retry_after(
    workspace: Workspace, variables: None, transport: Transport, code: str
) -> None:
    """Then the same request is stored."""
    workspace.fail("runs/log-batch", Fault.answer(429, error(code), {"Retry-After": "1"}))
    log_one(transport=transport)
    first, second = workspace.calls
    assert first.body == second.body
    assert first.answered_at is not None and second.read_at - first.answered_at >= 1


@pytest.mark.parametrize(
    "answer", [(503, "TEMPORARILY_UNAVAILABLE"), (504, "DEADLINE_EXCEEDED"), (500, "INTERNAL_ERROR")]
)
def test_temporary_errors_are_retried(
    workspace: Workspace, variables: None, monkeypatch: pytest.MonkeyPatch, answer: tuple[int, str]
) -> None:
    """Until the request is stored."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0.01")
    workspace.fail("runs/log-batch", Fault.answer(answer[0], error(answer[1])), times=2)
    log_one()
    assert sum(call.target.endswith("runs/log-batch") for call in workspace.calls) == 3


DETAILS = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "X", "domain": "databricks.com"}]


@pytest.mark.parametrize("code", ["INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST"])
def test_a_bad_entry_fails_alone(workspace: Workspace, variables: None, code: str) -> None:
    """Also if the error has more fields than code and message."""
    bad = Fault.answer(400, {**error(code, "that one"), "details": DETAILS})
    workspace.fail(
        "runs/log-batch",
        bad,
        times=None,
        when=lambda request: any(p["key"] == "p7" for p in entries(request, "params")),
    )
    client = runqueue.Client("databricks")
    client.log_params("r", {f"p{number}": number for number in range(16)})
    with pytest.raises(FlushError) as caught:
        client.close()
    (failure,) = caught.value.failures
    assert [entry.key for entry in failure.entries] == ["p7"] and failure.final
    assert isinstance(failure.error, RejectedError) and "that one" in str(failure.error)
    assert client.statistics().stored == 15


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (404, "RESOURCE_DOES_NOT_EXIST", NotFoundError),
        (403, "PERMISSION_DENIED", AuthError),
        (400, "INVALID_STATE", NotFoundError),
    ],
)
def test_an_error_about_a_run_fails_that_run_only(
    workspace: Workspace, variables: None, status: int, code: str, kind: type[StoreError]
) -> None:
    """Other runs are stored. A missing permission is not an expired token."""
    workspace.fail(
        "runs/log-batch",
        Fault.answer(status, error(code)),
        times=None,
        when=lambda request: request.json["run_id"] == "x",
    )
    client = runqueue.Client("databricks")
    for run in ("a", "x", "b"):
        client.log_metric(run, "loss", 0.5)
    with pytest.raises(FlushError) as caught:
        client.close()
    (failure,) = caught.value.failures
    assert failure.run_id == "x" and type(failure.error) is kind and failure.final
    assert client.statistics().stored == 2
    assert workspace.count(DISCOVERY) == 1


def test_an_entry_that_mentions_tokens_is_not_taken_for_an_expired_token(workspace: Workspace, variables: None) -> None:
    """MLflow's messages quote what was logged."""
    quoted = error("INVALID_PARAMETER_VALUE", "param 'p': invalid access token, token expired, ExpiredJwtException")
    workspace.fail("runs/log-batch", Fault.answer(400, quoted), times=None)
    client = runqueue.Client("databricks")
    client.log_param("r", "p", "x")
    with pytest.raises(FlushError) as caught:
        client.close()
    assert isinstance(caught.value.failures[0].error, RejectedError) and caught.value.failures[0].final
    assert len(workspace.calls) == 1


def test_a_page_with_200_does_not_count_as_stored(workspace: Workspace, variables: None) -> None:
    """It is most likely a proxy's."""
    workspace.fail("runs/log-batch", Fault.answer(200, "<html>Sign in</html>"))
    client = runqueue.Client("databricks")
    client.log_metric("r", "loss", 0.5)
    with pytest.raises(FlushError) as caught:
        client.close()
    assert isinstance(caught.value.failures[0].error, UnexpectedAnswerError)


def test_the_documented_limits_hold(workspace: Workspace, variables: None) -> None:
    """They are those of MLflow."""
    assert DatabricksStore(Config(), "databricks", None, Traffic()).limits == MLFLOW_LIMITS
    with runqueue.Client("databricks") as client:
        for number in range(3):
            client.log_metrics("r", {f"m{number}-{each}": each for each in range(1_000)})
        client.log_params("r", {f"p{each}": "x" * 6_000 for each in range(250)})
        client.set_tags("r", {f"t{each}": each for each in range(250)})
    assert_within_limits(workspace.calls)
    assert client.statistics().stored == 3_500


# -- never shown -----------------------------------------------------------------------------------------------------

SECRETS = (PAT, CLIENT[1], base64.b64encode(":".join(CLIENT).encode()).decode())


def assert_unseen(text: str, *more: str) -> None:
    """Assert that none of the secrets is in the text."""
    for secret in (*SECRETS, *more):
        assert secret not in text


@both
@pytest.mark.parametrize("kind", ["variables", "principal", "profile"])
def test_no_secret_is_shown_in_reprs_errors_or_logs(
    workspace: Workspace,
    profiles: Path,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    transport: Transport,
    kind: str,
) -> None:
    """In our logs, httpx's and the SDK's at DEBUG, in a server's repetition, and in a pickled error."""
    caplog.set_level(logging.DEBUG)
    uri = "databricks"
    if kind == "profile":
        uri = "databricks://team"
        write_profiles(profiles, team={"host": workspace.uri, "token": PAT})
    else:
        request.getfixturevalue(kind)
    with runqueue.Client(uri, transport=transport, retry_timeout=0) as client:
        client.log_metric("r", "loss", 0.5)
        client.flush()
        token = workspace.issued[0] if kind == "principal" else PAT
        known = SECRETS[1:] if kind == "principal" else (PAT,)
        page = f"You sent: Authorization: Bearer {token}, or plainly {token}, {' '.join(known)}"
        shown = [repr(client), repr(client._engine), client.tracking_uri]
        for status in (503, 403, 401):
            workspace.fail("runs/log-batch", Fault.answer(status, page), times=2)
            client.log_metric("r", "loss", 0.25)
            with pytest.raises(FlushError) as caught:
                client.flush()
            cause = caught.value.failures[0].error
            assert "***" in str(cause)
            shown += [str(caught.value), repr(caught.value), str(cause), repr(cause), repr(pickle.dumps(cause))]
            assert cause.__cause__ is None and cause.__context__ is None
            workspace.mend()
        client.flush()
    for text in (*shown, caplog.text):
        for secret in (*known, token):
            assert secret not in text


def test_secrets_that_an_oauth_server_repeats_are_not_shown(workspace: Workspace, principal: None) -> None:
    """The frames of the error do not hold them either."""
    echo = f"you are {CLIENT[0]} with {CLIENT[1]}, Basic {SECRETS[2]}"
    workspace.fail(TOKEN, Fault.answer(401, {"error": "invalid_client", "error_description": echo}), times=None)
    client = runqueue.Client("databricks")
    client.log_metric("r", "loss", 0.5)
    cause = cause_of_outage(client)
    assert "invalid_client" in str(cause)
    assert_unseen(str(cause))
    abandon(client)


def test_no_frame_of_an_error_holds_a_secret(workspace: Workspace, principal: None) -> None:
    """Error trackers upload the variables of frames."""
    workspace.fail(TOKEN, Fault.answer(401, {"error": "invalid_client"}), times=None)

    async def main() -> StoreError:
        store = DatabricksStore(Config(), "databricks", None, Traffic())
        with pytest.raises(StoreError) as caught:
            await store.call(LOG_BATCH, b"{}")
        await store.aclose()
        return caught.value

    failure = anyio.run(main)
    assert failure.__cause__ is None and failure.__context__ is None
    frame = failure.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename != __file__:
            assert_unseen(repr(frame.tb_frame.f_locals))
        frame = frame.tb_next


def test_a_token_that_no_header_can_hold_is_not_shown(workspace: Workspace, profiles: Path) -> None:
    """No request is sent with it."""
    write_profiles(profiles, DEFAULT={"host": workspace.uri, "token": "dapi-sn\N{SNOWMAN}wman"})
    client = runqueue.Client("databricks")
    client.log_metric("r", "loss", 0.5)
    cause = cause_of_outage(client)
    assert isinstance(cause, AuthError) and "wman" not in str(cause)
    assert workspace.calls == []
    abandon(client)


def test_a_secret_in_place_of_a_profiles_name_is_not_shown(profiles: Path) -> None:
    """Databricks has no such form, but users try it."""
    client = runqueue.Client(f"databricks://{PAT}@host")
    client.log_metric("r", "loss", 0.5)
    write_profiles(profiles, other={"host": "http://127.0.0.1:1"})
    assert_unseen(str(cause_of_outage(client)) + repr(client))
    abandon(client)


# -- both event loops ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_call_of_the_sdk_at_a_time_serves_all(workspace: Workspace, principal: None, backend: str) -> None:
    """Many concurrent requests lead to one look-up of the host, and one of a token."""

    async def main() -> list[str]:
        credentials = DatabricksCredentials("databricks", None, Config())
        requests = [Outgoing("POST", "", b"", {}) for _ in range(8)]

        async def sign(request: Outgoing) -> None:
            assert await credentials.host() == workspace.uri
            await credentials.sign(request, fresh=False)

        async with anyio.create_task_group() as group:
            for request in requests:
                group.start_soon(sign, request)
        assert credentials.kind == "oauth-m2m, by databricks-sdk"
        return [request.headers["Authorization"] for request in requests]

    assert anyio.run(main, backend=backend) == [f"Bearer {workspace.issued[0]}"] * 8
    assert workspace.count(DISCOVERY) == len(workspace.issued) == 1
