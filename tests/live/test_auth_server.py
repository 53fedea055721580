"""
Servers as companies run them: MLflow's users and passwords, a path prefix, a reverse proxy that strips the prefix, and
an HTTP proxy between client and server.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import attrs
import pytest

import runqueue
from runqueue.errors import AuthError, NotFoundError
from support.mlflow_server import HOST, MlflowServer, free_port
from support.proxy import FaultyProxy
from support.readback import Point, Readback
from support.recorder import Reply, Request

pytestmark = pytest.mark.live

USER = "admin"
PASSWORD = "p@ss: 100%/ü"
"""Of the test's own server."""
PREFIX = "/mlflow"


@pytest.fixture(scope="module")
def auth_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server that asks for user and password."""
    with MlflowServer(tmp_path_factory.mktemp("auth-server"), admin=(USER, PASSWORD)) as server:
        yield server


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a server whose paths all begin with a prefix."""
    with MlflowServer(tmp_path_factory.mktemp("prefixed-server"), static_prefix=PREFIX) as server:
        yield server.uri


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def with_user(uri: str, user: str = USER, password: str = PASSWORD) -> str:
    """Return the URI with user info in it."""
    return uri.replace("://", f"://{quote(user, safe='')}:{quote(password, safe='')}@")


def credentials_file(password: str) -> None:
    """Write `~/.mlflow/credentials` in the format that MLflow reads."""
    path = Path.home() / ".mlflow" / "credentials"
    path.parent.mkdir(exist_ok=True)
    escaped = password.replace("%", "%%")
    path.write_text(f"[mlflow]\nmlflow_tracking_username = {USER}\nmlflow_tracking_password = {escaped}\n")


def assert_round_trip(uri: str, reader: Readback) -> None:
    """Create, fill and end a run; assert that the server has stored all of it."""
    experiment_id = reader.new_experiment()
    with runqueue.Client(uri) as client:
        run = client.create_run(experiment_id)
        client.log_param(run, "p", "1")
        for step in range(1_500):
            client.log_metric(run, "m", step / 7, step=step, timestamp=step)
        client.set_terminated(run)
    stored = reader.run(run.run_id)
    assert stored.status == "FINISHED"
    assert stored.content.params == {"p": "1"}
    assert stored.content.metrics == {"m": [Point(step, step, step / 7) for step in range(1_500)]}


# -- users and passwords ---------------------------------------------------------------------------------------------


@pytest.mark.sample("variables")
@pytest.mark.parametrize("place", ["variables", "file", "uri"])
def test_credentials_come_from_variables_a_file_or_the_uri(
    auth_server: MlflowServer, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The password has all characters that must be escaped in one of the three."""
    uri = auth_server.uri
    if place == "variables":
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    elif place == "file":
        credentials_file(PASSWORD)
    else:
        uri = with_user(uri)
    with Readback(with_user(auth_server.uri)) as reader:
        assert_round_trip(uri, reader)


@pytest.mark.sample("wrong")
@pytest.mark.parametrize("given", ["wrong", "none"])
def test_a_wrong_password_loses_nothing(auth_server: MlflowServer, given: str) -> None:
    """
    An AuthError ends the flush, and everything stays queued. Once the file is corrected, the next flush stores it.
    """
    if given == "wrong":
        credentials_file("wrong")
    with Readback(with_user(auth_server.uri)) as reader, runqueue.Client(auth_server.uri) as client:
        experiment_id = reader.new_experiment()
        run = client.create_run(experiment_id)
        for step in range(2_500):
            client.log_metric(run, "m", float(step), step=step, timestamp=step)
        queued = client.statistics().pending
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
        assert {type(each.error) for each in caught.value.failures} == {AuthError}
        assert not any(each.final for each in caught.value.failures)
        assert PASSWORD not in str(caught.value) and "wrong" not in str(caught.value)
        assert (client.statistics().pending, client.statistics().failed) == (queued, 0)
        assert reader.run_ids(experiment_id, view="ALL") == []
        credentials_file(PASSWORD)
        client.flush()
        assert client.statistics().stored == queued
        assert len(reader.content(run.run_id).metrics["m"]) == 2_500


def test_a_missing_permission_fails_that_run_alone(auth_server: MlflowServer) -> None:
    """A 403 is final for the run that it answers; the user's other runs are stored."""
    with Readback(with_user(auth_server.uri)) as reader:
        foreign = reader.new_run(reader.new_experiment())
        reader.post("users/create", {"username": "other", "password": "another password"})
    uri = with_user(auth_server.uri, "other", "another password")
    with Readback(uri) as reader, runqueue.Client(uri) as client:
        own = client.create_run(reader.new_experiment())
        client.log_metric(own, "m", 1.0, step=1, timestamp=1)
        client.log_metric(foreign, "m", 1.0)
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
        (failed,) = caught.value.failures
        assert (failed.run_id, type(failed.error), failed.final) == (foreign, AuthError, True)
        assert reader.content(own.run_id).metrics == {"m": [Point(1, 1, 1.0)]}


# -- a path before the API -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "/"])
def test_a_server_with_a_static_prefix_is_reached_under_it(prefixed: str, end: str) -> None:
    """With a trailing slash and without one."""
    with Readback(prefixed) as reader:
        assert_round_trip(prefixed + end, reader)


def test_a_uri_without_the_prefix_is_an_outage(prefixed: str) -> None:
    """The server's 404 page is not MLflow's answer; the failure of the run describes it."""
    with runqueue.Client(prefixed.removesuffix(PREFIX)) as client:
        client.log_metric("0" * 32, "m", 1.0)
        with pytest.raises(runqueue.FlushError) as caught:
            client.flush()
    (failed,) = caught.value.failures
    assert type(failed.error) is NotFoundError and "404" in str(failed.error)


class StrippingProxy(FaultyProxy):
    """Forwards the paths below a prefix without the prefix, as nginx does by `location /ml/x/ { proxy_pass …/; }`."""

    path = "/ml/x"

    def _forward(self, request: Request) -> Reply:
        if not request.target.startswith(f"{self.path}/"):
            return Reply(status=404)
        return super()._forward(attrs.evolve(request, target=request.target.removeprefix(self.path)))


@pytest.mark.parametrize("end", ["", "/"])
def test_a_server_behind_a_reverse_proxy_is_reached_by_its_path(mlflow_server: MlflowServer, end: str) -> None:
    """Every request has the prefix; few connections are made."""
    with StrippingProxy(mlflow_server.uri) as proxy, Readback(mlflow_server.uri) as reader:
        assert_round_trip(proxy.uri + proxy.path + end, reader)
        assert {request.status for request in proxy.requests} == {200}
        assert len({request.connection for request in proxy.requests}) < proxy.count()


# -- HTTP proxies ----------------------------------------------------------------------------------------------------


class ForwardProxy(FaultyProxy):
    """Forwards requests for whole URIs to the one server that it knows."""

    def _forward(self, request: Request) -> Reply:
        assert request.target.startswith("http://tracking.invalid/")
        return super()._forward(attrs.evolve(request, target=request.target.removeprefix("http://tracking.invalid")))


@pytest.mark.filterwarnings("ignore:BasicAuth is deprecated", "ignore:The 'proxy_auth' parameter is deprecated")
def test_the_environments_proxy_is_used(auth_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Only the proxy can resolve the server's name. Proxy and server each get their own credentials, and not the other's.
    """
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    with ForwardProxy(auth_server.uri) as proxy, Readback(with_user(auth_server.uri)) as reader:
        monkeypatch.setenv("HTTP_PROXY", with_user(proxy.uri, "pu", "pp"))
        assert_round_trip("http://tracking.invalid", reader)
    of_server = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    assert {request.headers["authorization"] for request in proxy.requests} == {of_server}
    assert {request.headers["proxy-authorization"] for request in proxy.requests} == {
        "Basic " + base64.b64encode(b"pu:pp").decode()
    }


def test_no_proxy_is_honoured(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to a host of NO_PROXY do not use the proxy."""
    monkeypatch.setenv("HTTP_PROXY", f"http://{HOST}:{free_port()}")
    monkeypatch.setenv("NO_PROXY", HOST)
    with Readback(mlflow_server.uri) as reader:
        assert_round_trip(mlflow_server.uri, reader)
