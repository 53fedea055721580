"""
Transports of the user's own: a client in the tests of somebody's code, on `httpx.MockTransport`, respx, a Unix socket.

Rules of this file: what users do, users' imports alone. The code of docs/testing.md runs here as it stands there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import pickle
import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import respx
from httpx_aiohttp import AiohttpTransport

import runqueue
from support.mlflow_server import MlflowServer
from support.proxy import Fault, ScriptedServer

PAGE = (Path(__file__).parents[3] / "docs" / "testing.md").read_text("utf-8")
URI = "http://mlflow.test"
RUN = "a" * 32


class MlflowInMemory(httpx.AsyncBaseTransport):
    """Answers as a server does, and keeps the requests; counts how often it is closed."""

    def __init__(self, fail: Callable[[httpx.Request], httpx.Response | None] = lambda _: None) -> None:
        self.requests: list[httpx.Request] = []
        self.closed = 0
        self._fail = fail

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        self.requests.append(request)
        failed = self._fail(request)
        if failed is not None:
            return failed
        info = {"run_id": RUN, "experiment_id": "0", "artifact_uri": f"mlflow-artifacts:/0/{RUN}/artifacts"}
        creates = request.url.path.endswith("/runs/create")
        return httpx.Response(200, json={"run": {"info": info}} if creates else {})

    async def aclose(self) -> None:
        self.closed += 1

    def counted(self) -> Counter[str]:
        """Requests by the last two parts of their paths."""
        return Counter("/".join(request.url.path.split("/")[-2:]) for request in self.requests)


# -- docs/testing.md -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE))
def test_the_examples_of_the_documentation_run(block: str, tmp_path: Path) -> None:
    """Each block is a file of tests by itself."""
    (tmp_path / "example.py").write_text(block)
    names = runpy.run_path(str(tmp_path / "example.py"))
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        if asyncio.iscoroutinefunction(test):
            asyncio.run(test())
        else:
            test()


# -- MockTransport and respx -----------------------------------------------------------------------------------------


def test_a_function_stands_for_the_server() -> None:
    """It sees every request, with the headers of the client's settings."""
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={})

    with runqueue.Client(f"{URI}/base", transport=httpx.MockTransport(answer), token="t0ken") as client:
        client.log_metrics(RUN, {"loss": 0.5, "acc": 0.25}, step=3)
        client.log_param(RUN, "lr", 0.1)
    (request,) = seen
    body = json.loads(request.content)
    assert (request.method, str(request.url)) == ("POST", f"{URI}/base/api/2.0/mlflow/runs/log-batch")
    assert {(point["key"], point["value"], point["step"]) for point in body["metrics"]} == {
        ("loss", 0.5, 3),
        ("acc", 0.25, 3),
    }
    assert body["params"] == [{"key": "lr", "value": "0.1"}]
    assert request.headers["authorization"] == "Bearer t0ken"
    assert request.headers["host"] == "mlflow.test"
    assert request.headers["content-length"] == str(len(request.content))


@pytest.mark.asyncio
async def test_the_asynchronous_client_takes_an_asynchronous_function() -> None:
    """And what it awaits is awaited in the client's own loop."""
    loops: set[asyncio.AbstractEventLoop] = set()

    async def answer(request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        loops.add(asyncio.get_running_loop())
        return httpx.Response(200, json={})

    async with runqueue.AsyncClient(URI, transport=httpx.MockTransport(answer)) as client:
        client.log_metric(RUN, "loss", 0.5)
        await client.flush()
        assert client.statistics().stored == 1
    assert len(loops) == 1 and asyncio.get_running_loop() not in loops


def test_respx_answers_by_its_routes() -> None:
    """A router tells what was called, and fails for what no route fits."""
    router = respx.MockRouter(base_url=f"{URI}/api/2.0/mlflow/", assert_all_called=False)
    router.post("runs/create").respond(json={"run": {"info": {"run_id": RUN}}})
    batch = router.post("runs/log-batch").respond(json={})
    update = router.post("runs/update").respond(json={})
    with (
        runqueue.Client(URI, transport=httpx.MockTransport(router.async_handler)) as client,
        client.start_run(experiment_id="0") as run,
    ):
        run.log_metric("loss", 0.5)
    assert (batch.call_count, update.call_count) == (1, 1)
    assert json.loads(batch.calls.last.request.content)["run_id"] == RUN


def test_respx_replaces_the_network_of_httpx() -> None:
    """Below `transport="httpx"`, for a client that is made by other code."""
    with respx.mock(base_url=f"{URI}/api/2.0/mlflow/") as router:
        batch = router.post("runs/log-batch").respond(json={})
        with runqueue.Client(URI, transport="httpx") as client:
            client.log_metric(RUN, "loss", 0.5)
        assert batch.call_count == 1


def test_artifacts_go_through_the_users_transport_too(tmp_path: Path) -> None:
    """Those that the server takes, a streamed file among them."""
    (tmp_path / "large").write_bytes(b"x" * 1_000_000)
    transport = MlflowInMemory()
    with runqueue.Client(URI, transport=transport) as client:
        run = client.create_run(experiment_id="0")
        client.log_text(run, "hello", "small.txt")
        client.log_artifact(run, tmp_path / "large")
    uploads = {request.url.path.rpartition("/")[2]: request.content for request in transport.requests}
    assert uploads["small.txt"] == b"hello"
    assert uploads["large"] == b"x" * 1_000_000
    assert transport.closed == 1


# -- what a transport raises -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "looks"),
    [
        (httpx.ConnectError, False),
        (httpx.ConnectTimeout, False),
        (httpx.PoolTimeout, False),
        (httpx.ProxyError, False),
        (ConnectionRefusedError, False),
        (httpx.ReadError, True),
        (httpx.WriteError, True),
        (httpx.ReadTimeout, True),
        (httpx.RemoteProtocolError, True),
        (TimeoutError, True),
        (OSError, True),
    ],
)
def test_an_error_of_the_transport_is_an_outage(kind: type[Exception], looks: bool) -> None:
    """A run that may have been created is searched for before it is created again."""
    errors = [kind("the connection's fault")]

    def fail(request: httpx.Request) -> httpx.Response | None:
        if errors and request.url.path.endswith("/runs/create"):
            raise errors.pop()
        return None

    transport = MlflowInMemory(fail)
    with runqueue.Client(URI, transport=transport) as client:
        client.create_run(experiment_id="0")
    assert transport.counted()["runs/create"] == 2
    assert (transport.counted()["runs/search"] > 0) is looks


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError, BrokenPipeError])
def test_a_connection_that_breaks_is_replaced_at_once(error: type[Exception]) -> None:
    """No outage, no wait: `retry_timeout=0` would end the flush at the first one."""
    broken = 0

    def fail(request: httpx.Request) -> httpx.Response | None:
        nonlocal broken
        if len(transport.requests) == 2:
            broken += 1
            raise error("Server disconnected without sending a response.")
        return None

    transport = MlflowInMemory(fail)
    with runqueue.Client(URI, transport=transport, retry_timeout=0) as client:
        for step in range(3):
            client.log_metric(RUN, "loss", 0.5, step=step)
            client.flush()
        assert (client.statistics().stored, client.statistics().retried, client.statistics().requests) == (3, 0, 4)
    assert (broken, transport.counted()) == (1, {"runs/log-batch": 4})


def test_a_defect_of_the_transport_is_reported() -> None:
    """Such as a failing assertion in the user's function."""

    def answer(request: httpx.Request) -> httpx.Response:
        raise AssertionError("not what was expected")

    client = runqueue.Client(URI, transport=httpx.MockTransport(answer))
    client.log_metric(RUN, "loss", 0.5)
    with pytest.raises(runqueue.FlushError, match=r"AssertionError at test_users_transports\.py:\d+: not what was"):
        client.close()


def test_aiohttps_errors_mean_the_same_in_a_transport_of_the_users(server: ScriptedServer) -> None:
    """httpx-aiohttp calls every lost connection a ConnectTimeout; that of a request that was sent is none."""
    server.fail("runs/create", Fault.cut_before_commit())
    with runqueue.Client(server.uri, transport=AiohttpTransport(), retry_timeout=0) as client:
        client.create_run(experiment_id="0")
        with pytest.raises(runqueue.FlushError, match="the connection broke"):
            client.flush()
        server.fail("runs/create", Fault.answer(200, {"run": {"info": {"run_id": RUN}}}))
    assert server.count("runs/search") > 0


# -- whose it is -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (httpx.HTTPTransport, "the class HTTPTransport"),
        (httpx.MockTransport, "the class MockTransport"),
        (httpx.HTTPTransport(), "not HTTPTransport"),
        (httpx.AsyncClient, "the class AsyncClient"),
        (lambda request: httpx.Response(200), "not function"),
        (None, "not NoneType"),
        (1, "not int"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_transport_is_refused_at_once(value: Any, words: str) -> None:
    """The message names what was given, and what is taken."""
    with pytest.raises(runqueue.CallTypeError, match=words) as caught:
        runqueue.Client(URI, transport=value)
    assert "httpx.AsyncBaseTransport" in str(caught.value)


def test_a_name_that_is_unknown_is_refused_at_once() -> None:
    """The message names those that are known."""
    with pytest.raises(runqueue.ConfigError, match="'auto', 'aiohttp', 'httpx'"):
        runqueue.Client(URI, transport="requests")  # type: ignore[arg-type]


@pytest.mark.parametrize("used", [True, False])
def test_the_client_closes_it_once_if_it_was_used(used: bool) -> None:
    """As httpx's own clients close theirs; a client that never began has opened nothing."""
    transport = MlflowInMemory()
    with runqueue.Client(URI, transport=transport) as client:
        if used:
            client.log_metric(RUN, "loss", 0.5)
    assert transport.closed == used


def test_a_pickled_client_leaves_it_behind() -> None:
    """Its connections belong to this process."""
    with runqueue.Client(URI, transport=MlflowInMemory(), request_timeout=7) as client:
        copied = pickle.loads(pickle.dumps(client))
    assert "mlflow.test" in repr(copied)
    copied.close()


def test_no_setting_of_the_network_counts_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies and certificates are its own matter."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    transport = MlflowInMemory()
    with runqueue.Client("https://mlflow.test", transport=transport) as client:
        client.log_metric(RUN, "loss", 0.5)
    assert transport.counted() == {"runs/log-batch": 1}


def _log_in_child(client: runqueue.Client, results: Any) -> None:
    client.log_metric(RUN, "loss", 0.5)
    try:
        client.flush()
    except runqueue.RunqueueError as error:
        results.put(f"{type(error).__name__}: {error}")
    else:
        results.put("stored")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("used", [True, False])
def test_a_forked_process_does_not_use_what_its_parent_has_used(used: bool) -> None:
    """Two processes would read each other's answers from one connection. One that was not used yet has none."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    client = runqueue.Client(URI, transport=MlflowInMemory())
    if used:
        client.log_metric(RUN, "loss", 0.25)
        client.flush()
    child = context.Process(target=_log_in_child, args=(client, results))
    child.start()
    found = results.get(timeout=30)
    child.join(30)
    client.close()
    if used:
        assert found.startswith("ConfigError") and "forked" in found
    else:
        assert found == "stored"


# -- a real server on a Unix socket ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unix_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a real server that listens on no port."""
    folder = tmp_path_factory.mktemp("uds")
    path = Path(os.path.relpath(folder / "s")) if len(str(folder / "s")) > 100 else folder / "s"
    with MlflowServer(folder / "server", socket_path=path):
        yield path


@pytest.mark.live
@pytest.mark.skipif(sys.platform == "win32", reason="there are no Unix sockets")
@pytest.mark.parametrize("kind", [httpx.AsyncHTTPTransport, AiohttpTransport])
def test_a_unix_socket_leads_to_a_real_server(unix_server: Path, tmp_path: Path, kind: Any) -> None:
    """A run, its metrics, params and artifact are stored there."""
    transport = kind(uds=str(unix_server))
    with runqueue.Client("http://localhost", transport=transport) as client:
        run = client.create_run(experiment_id="0", run_name="over a socket")
        for step in range(10):
            client.log_metric(run, "loss", 1.0 / (step + 1), step=step)
        client.log_param(run, "lr", 0.1)
        client.log_text(run, "hello", "greeting.txt")
        client.set_terminated(run)
        client.flush()
        run_id = run.run_id
        assert client.statistics().failed == 0
    assert run_id is not None
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(unix_server)), base_url="http://localhost") as reader:
        stored = reader.get("/api/2.0/mlflow/runs/get", params={"run_id": run_id}).json()["run"]
        query = {"run_id": run_id, "metric_key": "loss"}
        history = reader.get("/api/2.0/mlflow/metrics/get-history", params=query).json()["metrics"]
        listed = reader.get("/api/2.0/mlflow/artifacts/list", params={"run_id": run_id}).json()["files"]
    assert (stored["info"]["run_name"], stored["info"]["status"]) == ("over a socket", "FINISHED")
    assert [(point["step"], point["value"]) for point in history] == [(step, 1.0 / (step + 1)) for step in range(10)]
    assert stored["data"]["params"] == [{"key": "lr", "value": "0.1"}]
    assert [(file["path"], file["file_size"]) for file in listed] == [("greeting.txt", 5)]


@pytest.mark.parametrize("kind", [httpx.AsyncHTTPTransport, AiohttpTransport])
def test_a_transport_with_connections_serves_one_client_at_a_time(
    server: ScriptedServer, kind: Callable[[], httpx.AsyncBaseTransport]
) -> None:
    """Its connections belong to the first client's event loop: a second client says so and loses nothing."""
    shared = kind()
    second = runqueue.Client(server.uri, transport=shared)
    with runqueue.Client(server.uri, transport=shared) as first:
        first.log_metric(RUN, "loss", 0.5)
        first.flush()
        second.log_metric(RUN, "loss", 0.5)
        with pytest.raises(runqueue.ConfigError, match="in use by another client"):
            second.flush()
        assert second.statistics().pending == 1
    with contextlib.suppress(runqueue.RunqueueError):  # the first client has closed the transport
        second.close()


def test_a_mock_transport_may_be_shared_by_any_number_of_clients() -> None:
    """It holds no connection."""
    shared = httpx.MockTransport(lambda _: httpx.Response(200, json={}))
    with runqueue.Client(URI, transport=shared) as first, runqueue.Client(URI, transport=shared) as second:
        for client in (first, second, first):
            client.log_metric(RUN, "loss", 0.5)
            client.flush()
        assert (first.statistics().stored, second.statistics().stored) == (2, 1)


def test_what_a_transport_raises_fails_the_entry_by_name_and_nothing_else() -> None:
    """`pytest.fail` raises what is no Exception. The next flush, and the end, are as ever."""
    answers = [True]

    def respond(request: httpx.Request) -> httpx.Response:
        if answers.pop() if answers else False:
            pytest.fail("unexpected request")
        return httpx.Response(200, json={})

    with runqueue.Client(URI, transport=httpx.MockTransport(respond)) as client:
        client.log_metric(RUN, "loss", 0.5)
        with pytest.raises(runqueue.FlushError, match="unexpected request"):
            client.flush()
        client.log_metric(RUN, "loss", 0.5)
        client.flush()
        assert (client.statistics().stored, client.statistics().failed) == (1, 1)


def test_a_transport_may_compare_itself_in_a_way_of_its_own() -> None:
    """A dataclass cannot be hashed; another class may refuse to be compared with text."""

    class Odd(MlflowInMemory):
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            assert isinstance(other, Odd)
            return True

    with runqueue.Client(URI, transport=Odd()) as client:
        client.log_metric(RUN, "loss", 0.5)
        client.flush()
        assert client.statistics().stored == 1


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), OSError("odd"), httpx.ReadError("cut")])
def test_a_lost_connection_of_any_kind_is_retried(error: Exception) -> None:
    """A transport may let pass what a socket raises."""
    faults = [error]

    def respond(request: httpx.Request) -> httpx.Response:
        if faults:
            raise faults.pop()
        return httpx.Response(200, json={})

    with runqueue.Client(URI, transport=httpx.MockTransport(respond)) as client:
        client.log_metric(RUN, "loss", 0.5)
        client.flush()
        assert (client.statistics().stored, client.statistics().retried) == (1, 1)
