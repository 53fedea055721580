"""The tools of the live tests work as the tests assume."""

from __future__ import annotations

import gzip
import io
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from support.answers import BOMB_BYTES, gzip_bomb, login_page
from support.mlflow_server import MlflowServer
from support.proxy import Fault, FaultyProxy, ScriptedServer
from support.readback import Point, Readback, StoredInput, content

pytestmark = pytest.mark.live

API = "/api/2.0/mlflow/"


def send(http: httpx.Client, server: FaultyProxy, endpoint: str, body: dict[str, Any]) -> httpx.Response:
    return http.post(server.uri + API + endpoint, json=body)


@pytest.fixture
def http() -> Any:
    with httpx.Client(trust_env=False, timeout=20) as client:
        yield client


def test_the_proxy_passes_requests_on_and_records_them(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, http: httpx.Client
) -> None:
    """They are stored, and each is recorded with its body, size, connection and answer."""
    run_id = send(http, proxy, "runs/create", {"experiment_id": experiment_id}).json()["run"]["info"]["run_id"]
    metrics = [{"key": "m", "value": 0.1, "timestamp": 5, "step": step} for step in range(3)]
    body = {"run_id": run_id, "metrics": metrics, "tags": [{"key": "t", "value": "ü"}]}
    send(http, proxy, "runs/log-batch", body)
    create, batch = proxy.requests
    assert (create.path, create.status, create.connection) == (API + "runs/create", 200, 0)
    assert run_id in create.answer.decode()
    assert (batch.json, batch.size, batch.connection) == (body, len(batch.body), 0)
    assert create.answered_at is not None and create.answered_at <= batch.read_at
    assert [proxy.count(), proxy.count("runs/log-batch"), proxy.count("runs/update")] == [2, 1, 0]
    assert readback.content(run_id) == content(
        tags={"t": "ü"}, metrics={"m": [Point(step, 5, 0.1) for step in range(3)]}
    )


def test_a_cut_after_commit_stores_and_gives_no_answer(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, http: httpx.Client
) -> None:
    """The server stores the request, and the client sees a broken connection, as often as scripted."""
    proxy.fail("runs/create", Fault.cut_after_commit(), times=2)
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError):
            send(http, proxy, "runs/create", {"experiment_id": experiment_id})
    assert send(http, proxy, "runs/create", {"experiment_id": experiment_id}).status_code == 200
    assert len(readback.run_ids(experiment_id)) == 3
    assert [request.status for request in proxy.requests] == [None, None, 200]


def test_faults_happen_in_the_order_of_the_script(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, http: httpx.Client
) -> None:
    """Answers before, after and without a commit follow each other as scripted, for the requests that match."""
    body = {"experiment_id": experiment_id}
    proxy.fail("runs/create", Fault.passed())
    proxy.fail("runs/create", Fault.answer(429, b"", {"Retry-After": "1"}))
    proxy.fail("runs/create", Fault.answer_after_commit(500, "<p>oops</p>"))
    proxy.fail("runs/create", Fault.cut_in_body())
    proxy.fail("runs/create", Fault.answer(418), times=None, when=lambda request: "run_name" in request.json)
    answers = [send(http, proxy, "runs/create", body) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 429, 500]
    assert answers[1].headers["retry-after"] == "1"
    assert answers[2].text == "<p>oops</p>"
    with pytest.raises(httpx.RemoteProtocolError):
        send(http, proxy, "runs/create", body)
    assert send(http, proxy, "runs/create", body).status_code == 200
    assert send(http, proxy, "runs/create", body | {"run_name": "x"}).status_code == 418
    assert len(readback.run_ids(experiment_id)) == 4


def test_a_late_commit_comes_when_it_was_scripted(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, http: httpx.Client
) -> None:
    """A request that was answered 504 is stored later: at another request, or after a time."""
    body = {"experiment_id": experiment_id}
    proxy.fail("runs/create", Fault.late_commit_before("runs/search"))
    assert send(http, proxy, "runs/create", body).status_code == 504
    assert readback.run_ids(experiment_id) == []
    found = send(http, proxy, "runs/search", {"experiment_ids": [experiment_id]}).json()
    assert len(found["runs"]) == 1
    proxy.fail("runs/create", Fault.late_commit(0.05))
    assert send(http, proxy, "runs/create", body).status_code == 504
    proxy.commit_held()
    assert len(readback.run_ids(experiment_id)) == 2


def test_a_proxy_that_stops_listening_refuses_and_comes_back_on_its_port(
    proxy: FaultyProxy, experiment_id: str, http: httpx.Client
) -> None:
    """It refuses connections, also kept-alive ones, and accepts them again afterwards."""
    body = {"experiment_ids": [experiment_id]}
    assert send(http, proxy, "runs/search", body).status_code == 200
    proxy.stop_listening()
    for _ in range(2):
        with pytest.raises(httpx.ConnectError):
            send(http, proxy, "runs/search", body)
    proxy.listen_again()
    assert send(http, proxy, "runs/search", body).status_code == 200
    assert proxy.count() == 2


def test_a_delay_ends_with_the_proxy(mlflow_server: MlflowServer, http: httpx.Client) -> None:
    """A client with a shorter time-out gives up, and closing the proxy does not wait for the delay."""
    with FaultyProxy(mlflow_server.uri) as proxy:
        proxy.fail("", Fault.delayed(60))
        began = time.monotonic()
        with pytest.raises(httpx.ReadTimeout):
            http.get(proxy.uri + "/version", timeout=0.1)
    assert time.monotonic() - began < 20


def test_a_held_request_goes_on_when_the_test_says_so(
    proxy: FaultyProxy, readback: Readback, experiment_id: str, http: httpx.Client
) -> None:
    """Until then the server does not get it."""
    proxy.fail("runs/create", Fault.hold())
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(send, http, proxy, "runs/create", {"experiment_id": experiment_id})
        proxy.wait_for(lambda: proxy.count() == 1)
        assert readback.run_ids(experiment_id) == []
        proxy.let_go()
        assert answer.result().status_code == 200
    assert len(readback.run_ids(experiment_id)) == 1


def test_a_scripted_server_answers_without_an_upstream(http: httpx.Client) -> None:
    """By default with MLflow's answer to a success, else with exactly the scripted bytes."""
    with ScriptedServer() as server:
        assert send(http, server, "runs/log-batch", {}).json() == {}
        server.fail("", Fault(reply=login_page(), forwards=False))
        assert "sign in" in send(http, server, "runs/log-batch", {}).text
        server.fail("", Fault.answer(204))
        assert send(http, server, "runs/log-batch", {}).status_code == 204
        server.fail("", Fault.answer(200, b'{"run": 1}', cut_at=4))
        with pytest.raises(httpx.RemoteProtocolError):
            send(http, server, "runs/log-batch", {})
        assert server.count() == 4


def test_the_bomb_is_small_on_the_wire_and_large_when_opened() -> None:
    """A body of 0.4 MB is a valid gzip file of 400 MB."""
    bomb = gzip_bomb().body
    assert 350_000 < len(bomb) < 450_000
    with gzip.open(io.BytesIO(bomb)) as opened:
        length = sum(len(block) for block in iter(lambda: opened.read(1 << 22), b""))
    assert length == BOMB_BYTES + len(b'{"pad": ""}')


def test_readback_sees_inputs_and_the_whole_history(readback: Readback, experiment_id: str) -> None:
    """It returns a history of more than a page, and dataset inputs with their tags."""
    run_id = readback.new_run(experiment_id, {"p": "1"})
    for start in range(0, 3_000, 1_000):
        metrics = [
            {"key": "m", "value": step / 7, "timestamp": step, "step": step} for step in range(start, start + 1_000)
        ]
        readback.post("runs/log-batch", {"run_id": run_id, "metrics": metrics})
    dataset = {"name": "d", "digest": "1", "source_type": "local", "source": "{}"}
    inputs = [{"dataset": dataset, "tags": [{"key": "mlflow.data.context", "value": "train"}]}]
    readback.post("runs/log-inputs", {"run_id": run_id, "datasets": inputs})
    assert readback.content(run_id) == content(
        params={"p": "1"},
        metrics={"m": [Point(step, step, step / 7) for step in range(3_000)]},
        inputs=[StoredInput("d", "1", "local", "{}", tags=(("mlflow.data.context", "train"),))],
    )


def test_a_file_store_server_runs_beside(file_store_server: MlflowServer) -> None:
    """A server of its own, which answers a conflicting param with 500 INTERNAL_ERROR."""
    with Readback(file_store_server.uri) as readback:
        run_id = readback.new_run(readback.new_experiment(), {"p": "old"})
        with pytest.raises(httpx.HTTPStatusError, match=r"500.*INTERNAL_ERROR"):
            readback.post("runs/log-batch", {"run_id": run_id, "params": [{"key": "p", "value": "new"}]})
