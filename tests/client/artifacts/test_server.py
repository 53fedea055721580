"""Artifacts through a server: requests, retries, checks of an empty 200, credentials, uploads in parts."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

import pytest

import runqueue
from runqueue.http._upload import CHUNK
from support.mlflow_server import HOST
from support.proxy import Fault, ScriptedServer, reply
from support.recorder import Request

NewClient: TypeAlias = Callable[..., runqueue.Client]
RUN = "a" * 32
ROOT = f"mlflow-artifacts:/1/{RUN}/artifacts"
PUT = f"/api/2.0/mlflow-artifacts/artifacts/1/{RUN}/artifacts/"


@pytest.fixture(params=["httpx", "auto"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def has_run(server: ScriptedServer, root: str = ROOT) -> None:
    """Let the server know the run."""
    run = {"run": {"info": {"run_id": RUN, "artifact_uri": root}}}
    server.fail("runs/get", Fault.answer(200, run), times=None)


def puts(server: ScriptedServer) -> list[Request]:
    return [request for request in server.requests if request.method == "PUT"]


def failure(client: runqueue.Client) -> runqueue.OperationFailure:
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    (found,) = caught.value.failures
    return found


def large(path: Path, size: int = 5 * CHUNK + 7) -> bytes:
    content = os.urandom(size)
    path.write_bytes(content)
    return content


# -- what is sent ----------------------------------------------------------------------------------------------------


def test_a_file_and_text_are_put_at_the_runs_artifact_uri(
    server: ScriptedServer, new_client: NewClient, tmp_path: Path, transport: str
) -> None:
    """Byte for byte; a large file as a stream with its length. The URI is looked up once."""
    has_run(server)
    content = large(tmp_path / "model ü.bin")
    client = new_client(transport=transport)
    client.log_artifact(RUN, tmp_path / "model ü.bin", "a/b")
    client.log_text(RUN, "grüße\n", "notes.txt")
    client.log_dict(RUN, {"k": [1, {"x": None}]}, "c.json")
    client.flush()
    sent = {request.target: request for request in puts(server)}
    assert {target: request.body for target, request in sent.items()} == {
        f"{PUT}a/b/model%20%C3%BC.bin": content,
        f"{PUT}notes.txt": "grüße\n".encode(),
        f"{PUT}c.json": b'{\n  "k": [\n    1,\n    {\n      "x": null\n    }\n  ]\n}',
    }
    assert sent[f"{PUT}a/b/model%20%C3%BC.bin"].headers["content-length"] == str(len(content))
    assert sent[f"{PUT}notes.txt"].headers["content-type"] == "text/plain"
    assert server.count("runs/get") == 1
    stats = client.statistics()
    assert (stats.accepted, stats.stored, stats.requests) == (3, 3, 4)
    assert stats.bytes_sent == len(content) + len("grüße\n".encode()) + len(sent[f"{PUT}c.json"].body)


def test_an_empty_file_is_stored(server: ScriptedServer, new_client: NewClient, tmp_path: Path, transport: str) -> None:
    """With an empty body and Content-Length 0."""
    has_run(server)
    (tmp_path / "empty").write_bytes(b"")
    client = new_client(transport=transport)
    client.log_artifact(RUN, tmp_path / "empty")
    client.flush()
    (request,) = puts(server)
    assert (request.body, request.headers["content-length"]) == (b"", "0")


def test_the_artifact_uri_is_read_from_the_answer_to_create_run(server: ScriptedServer, new_client: NewClient) -> None:
    """No request is made for it."""
    run = {"run": {"info": {"run_id": RUN, "artifact_uri": ROOT}}}
    server.fail("runs/create", Fault.answer(200, run))
    client = new_client()
    pending = client.create_run("1")
    client.log_text(pending, "x", "f")
    client.flush()
    assert server.count("runs/get") == 0
    assert puts(server)[0].target == f"{PUT}f"


# -- what is repeated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [7, 5 * CHUNK + 7])
@pytest.mark.parametrize(
    "fault",
    [Fault.answer(503), Fault.answer(429, headers={"Retry-After": "0"}), Fault.cut_before_commit(), Fault.answer(502)],
)
def test_an_upload_is_retried_from_the_first_byte(
    server: ScriptedServer, new_client: NewClient, tmp_path: Path, fault: Fault, size: int, transport: str
) -> None:
    """As each other request."""
    has_run(server)
    content = large(tmp_path / "f", size)
    server.fail("f", fault, times=2)
    client = new_client(transport=transport)
    client.log_artifact(RUN, tmp_path / "f")
    client.flush()
    assert [request.body for request in puts(server)] == [content] * 3
    assert client.statistics().retried == 2
    assert client.statistics().stored == 1


def test_retry_after_is_obeyed(server: ScriptedServer, new_client: NewClient) -> None:
    """In place of the random back-off."""
    has_run(server)
    server.fail("f", Fault.answer(503, headers={"Retry-After": "1"}))
    client = new_client()
    client.log_text(RUN, "x", "f")
    client.flush()
    first, second = puts(server)
    assert first.answered_at is not None
    assert second.read_at - first.answered_at >= 0.99


def test_an_artifact_stays_queued_in_an_outage_and_a_later_flush_sends_it(
    server: ScriptedServer, new_client: NewClient
) -> None:
    """The run's final status follows it. The metrics are stored meanwhile."""
    has_run(server)
    server.fail("f", Fault.answer(503), times=None)
    client = new_client(retry_timeout=0)
    client.log_text(RUN, "x", "f")
    client.log_metric(RUN, "m", 1.0)
    client.set_terminated(RUN)
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    assert sorted((each.operation, each.count, each.final) for each in caught.value.failures) == [
        ("log_artifact", 1, False), ("set_terminated", 0, False)
    ]  # fmt: skip
    assert caught.value.failures[0].entries == (runqueue.Entry("artifact", "f"),) or (
        caught.value.failures[1].entries == (runqueue.Entry("artifact", "f"),)
    )
    assert (server.count("runs/log-batch"), server.count("runs/update")) == (1, 0)
    server.mend()
    has_run(server)
    client.flush()
    assert [request.path.rpartition("/")[2] for request in server.requests[-2:]] == ["f", "update"]
    assert client.statistics().stored == 2


def test_a_client_closed_in_an_outage_ends_the_run_without_its_artifacts(
    server: ScriptedServer, new_client: NewClient
) -> None:
    """The artifacts have failed for good, and the run must not stay RUNNING."""
    has_run(server)
    server.fail("f", Fault.answer(503), times=None)
    client = new_client(retry_timeout=0)
    client.log_text(RUN, "x", "f")
    client.set_terminated(RUN)
    with pytest.raises(runqueue.FlushError) as caught:
        client.close()
    (found,) = caught.value.failures
    assert (found.operation, found.final, found.entries) == ("log_artifact", True, (runqueue.Entry("artifact", "f"),))
    assert server.count("runs/update") == 1
    assert client.statistics().failed == 1


@pytest.mark.parametrize("size", [7, 5 * CHUNK])
def test_after_a_401_the_upload_is_repeated_once_with_a_fresh_token(
    server: ScriptedServer, new_client: NewClient, tmp_path: Path, size: int, transport: str
) -> None:
    """And with the whole file."""
    has_run(server)
    content = large(tmp_path / "f", size)
    tokens = iter(["old", "new", "newer"])
    server.fail("f", Fault.answer(401))
    client = new_client(token=lambda: next(tokens), transport=transport)
    client.log_artifact(RUN, tmp_path / "f")
    client.flush()
    assert [(request.headers["authorization"], request.body) for request in puts(server)] == [
        ("Bearer old", content), ("Bearer new", content)
    ]  # fmt: skip


def test_a_second_401_leaves_the_artifact_queued(server: ScriptedServer, new_client: NewClient) -> None:
    """The flush ends at once."""
    has_run(server)
    server.fail("f", Fault.answer(401), times=None)
    client = new_client(token="t")
    client.log_text(RUN, "x", "f")
    found = failure(client)
    assert (type(found.error), found.final) == (runqueue.AuthError, False)
    assert len(puts(server)) == 2


# -- what is believed ------------------------------------------------------------------------------------------------


def test_an_empty_200_counts_if_the_server_lists_the_file(server: ScriptedServer, new_client: NewClient) -> None:
    """MLflow answers so. The list is requested once, for the first file."""
    has_run(server)
    server.fail("f", Fault.answer(200), times=None)
    server.fail("g", Fault.answer(200), times=None)
    listed = {"files": [{"path": "f", "is_dir": False, "file_size": "4"}]}
    server.fail("mlflow-artifacts/artifacts", Fault.answer(200, listed), times=None)
    client = new_client()
    client.log_text(RUN, "four", "dir/f")
    client.flush()
    client.log_text(RUN, "more", "g")
    client.flush()
    looks = [request for request in server.to("mlflow-artifacts/artifacts") if request.method == "GET"]
    assert [parse_qs(urlsplit(request.target).query) for request in looks] == [{"path": [f"1/{RUN}/artifacts/dir"]}]


@pytest.mark.parametrize(
    "listing",
    [
        Fault.answer(200),
        Fault.answer(200, {"files": []}),
        Fault.answer(200, {}),
        Fault.answer(200, {"files": [{"path": "f", "is_dir": False, "file_size": "3"}]}),
    ],
)
def test_an_empty_200_does_not_count_if_the_server_does_not_list_the_file(
    server: ScriptedServer, new_client: NewClient, listing: Fault
) -> None:
    """For example that of a proxy that answers 200 to each request."""
    has_run(server)
    server.fail("f", Fault.answer(200), times=None)
    server.fail("mlflow-artifacts/artifacts", listing, times=None)
    client = new_client()
    client.log_text(RUN, "four", "f")
    found = failure(client)
    assert (type(found.error), found.final) == (runqueue.UnexpectedAnswerError, True)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Fault.answer(200, "<html>Log in</html>"), "200 without MLflow's answer: text/html"),
        (Fault.answer(204), "204 without MLflow's answer"),
        (Fault.answer(302, headers={"Location": "/login"}), "would turn the request into a GET"),
        (Fault.answer(307, headers={"Location": "http://elsewhere.invalid/x"}), "nothing was sent there"),
        (Fault.answer(400, {"error_code": "INVALID_PARAMETER_VALUE", "message": "Invalid path"}), "Invalid path"),
        (Fault.answer(413), "the server takes no body as large"),
        (
            Fault.answer(503, {"detail": "Run `mlflow server` with `--serve-artifacts`"}),
            "the server takes no artifacts",
        ),
    ],
)
def test_another_answer_fails_the_artifact_alone(
    server: ScriptedServer, new_client: NewClient, answer: Fault, error: str
) -> None:
    """Other artifacts are stored."""
    has_run(server)
    server.fail("bad", answer, times=None)
    client = new_client()
    client.log_text(RUN, "x", "bad")
    client.log_text(RUN, "y", "good")
    client.set_terminated(RUN)
    found = failure(client)
    assert error in str(found.error)
    assert (found.operation, found.entries, found.final) == (
        "log_artifact", (runqueue.Entry("artifact", "bad"),), True
    )  # fmt: skip
    assert client.statistics().stored == 1
    assert server.count("runs/update") == 1
    assert client.failures[0].entries == (runqueue.Entry("artifact", "bad"),)


def test_a_redirect_that_keeps_the_method_is_followed_with_the_whole_file(
    server: ScriptedServer, new_client: NewClient, tmp_path: Path, transport: str
) -> None:
    """Within the origin."""
    has_run(server)
    content = large(tmp_path / "f")
    server.fail("f", Fault.answer(307, headers={"Location": "/moved/f"}))
    client = new_client(transport=transport)
    client.log_artifact(RUN, tmp_path / "f")
    client.flush()
    assert [(request.target, request.body) for request in puts(server)] == [(f"{PUT}f", content), ("/moved/f", content)]


# -- who is told who we are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["mlflow-artifacts", "http"])
def test_another_artifact_server_gets_no_credentials(
    server: ScriptedServer, new_client: NewClient, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the file, because the run's URI names it."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    with ScriptedServer() as other:
        path = "/1/artifacts" if scheme == "mlflow-artifacts" else "/api/2.0/mlflow-artifacts/artifacts/1/artifacts"
        has_run(server, f"{scheme}://{HOST}:{other.port}{path}")
        client = new_client(headers={"X-Key": "secret"})
        client.log_text(RUN, "x", "f")
        client.flush()
        (request,) = other.requests
        assert (request.path, request.body) == ("/api/2.0/mlflow-artifacts/artifacts/1/artifacts/f", b"x")
        assert not {"authorization", "x-key"} & set(request.headers)
    assert server.to("runs/get")[0].headers["authorization"].startswith("Basic ")
    assert puts(server) == []


def test_the_tracking_server_named_by_an_http_uri_gets_credentials(
    server: ScriptedServer, new_client: NewClient
) -> None:
    """The origins are compared."""
    has_run(server, f"mlflow-artifacts://{HOST}:{server.port}/1/artifacts")
    client = new_client(token="t")
    client.log_text(RUN, "x", "f")
    client.flush()
    assert puts(server)[0].headers["authorization"] == "Bearer t"


# -- files that change or vanish -------------------------------------------------------------------------------------


@contextlib.contextmanager
def reader(meanwhile: Callable[[], None]) -> Generator[tuple[str, list[int]], None, None]:
    """A server that pauses in the middle of a body to call *meanwhile*; it yields its URI and the sizes received."""
    listener = socket.create_server((HOST, 0))
    listener.settimeout(20)
    got: list[int] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(20)
                    count = len(connection.recv(1_000))
                    meanwhile()
                    with contextlib.suppress(OSError):
                        while data := connection.recv(65_536):
                            count += len(data)
                    got.append(count)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://{HOST}:{listener.getsockname()[1]}/api/2.0/mlflow-artifacts/artifacts/1", got
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


@pytest.mark.parametrize("change", ["grows", "shrinks", "is touched"])
def test_a_file_that_changes_in_the_middle_of_its_upload_fails_alone(
    server: ScriptedServer, new_client: NewClient, tmp_path: Path, change: str, transport: str
) -> None:
    """The server gets fewer bytes than announced, and stores nothing."""
    path, size = tmp_path / "f", 40_000_000

    def meanwhile() -> None:
        if change == "is touched":
            os.utime(path, ns=(1, 1))
        else:
            os.truncate(path, 2 * size if change == "grows" else size - 1)

    with path.open("wb") as file:
        file.truncate(size)
    with reader(meanwhile) as (root, got):
        has_run(server, root)
        client = new_client(transport=transport)
        client.log_artifact(RUN, path)
        client.log_metric(RUN, "m", 1.0)
        found = failure(client)
    assert f"{path} changed while it was uploaded" in str(found.error)
    assert (type(found.error), found.final, found.entries) == (
        runqueue.RejectedError, True, (runqueue.Entry("artifact", "f"),)
    )  # fmt: skip
    assert max(got) < size
    assert client.statistics().stored == 1


def test_a_file_that_has_vanished_fails_alone(server: ScriptedServer, new_client: NewClient, tmp_path: Path) -> None:
    """Before the call, or between the call and the upload."""
    has_run(server)
    for name in ("kept", "lost"):
        (tmp_path / name).write_text(name)
    client = new_client()
    client.log_artifacts(RUN, tmp_path)
    client.log_artifact(RUN, tmp_path / "never")
    (tmp_path / "lost").unlink()
    with pytest.raises(runqueue.FlushError) as caught:
        client.flush()
    assert sorted(str(each.error) for each in caught.value.failures) == [
        f"{tmp_path / name} cannot be read: No such file or directory" for name in ("lost", "never")
    ]
    assert [request.body for request in puts(server)] == [b"kept"]


def test_a_stalled_upload_ends_after_the_request_timeout(
    server: ScriptedServer, new_client: NewClient, tmp_path: Path, transport: str
) -> None:
    """The time-out is one of each piece: a slow upload goes on."""
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(30_000_000)
    stuck = threading.Event()
    with reader(lambda: (stuck.wait(20), None)[1]) as (root, _):
        has_run(server, root)
        client = new_client(transport=transport, request_timeout=1, retry_timeout=0)
        client.log_artifact(RUN, path)
        found = failure(client)
        stuck.set()
    assert (str(found.error), found.final) == ("no answer within 1 s", False)


# -- in parts --------------------------------------------------------------------------------------------------------

PARTS = "mlflow-artifacts/mpu/{}/1/" + RUN + "/artifacts/dir"


@pytest.fixture
def store() -> Iterator[ScriptedServer]:
    """An object store at another origin."""
    with ScriptedServer(reply(200, b"", {"ETag": '"tag"'})) as server:
        yield server


@pytest.fixture
def in_parts(server: ScriptedServer, store: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1000000")
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE", "600000")
    has_run(server)
    server.fail("server-info", Fault.answer(200, {"multipart_uploads_enabled": True}), times=None)


def addresses(store: ScriptedServer, count: int) -> dict[str, Any]:
    credentials = [
        {"url": f"{store.uri}/bucket/part?n={n}&sig=s%2F", "part_number": n, "headers": {"x-amz-what": "ever"}}
        for n in range(1, count + 1)
    ]
    return {"upload_id": "u", "credentials": credentials}


@pytest.mark.usefixtures("in_parts")
def test_a_large_file_is_sent_in_parts_without_credentials(
    server: ScriptedServer, store: ScriptedServer, new_client: NewClient, tmp_path: Path, transport: str
) -> None:
    """Each part goes to its URL with the headers for it, and then the server completes the upload."""
    content = large(tmp_path / "f", 2_000_000)
    server.fail(PARTS.format("create"), Fault.answer(200, addresses(store, 4)))
    client = new_client(token="t", headers={"X-Key": "secret"}, transport=transport)
    client.log_artifact(RUN, tmp_path / "f", "dir")
    client.flush()
    sent = sorted(store.requests, key=lambda request: request.target)
    assert b"".join(request.body for request in sent) == content
    assert [request.target for request in sent] == [f"/bucket/part?n={n}&sig=s%2F" for n in range(1, 5)]
    for request in sent:
        assert not {"authorization", "x-key", "content-type"} & set(request.headers)
        assert request.headers["x-amz-what"] == "ever"
    assert server.to(PARTS.format("create"))[0].json == {"path": "f", "num_parts": 4}
    assert server.to(PARTS.format("complete"))[0].json == {
        "path": "f",
        "upload_id": "u",
        "parts": [
            {"part_number": n, "etag": '"tag"', "url": f"{store.uri}/bucket/part?n={n}&sig=s%2F"} for n in range(1, 5)
        ],
    }
    assert server.to(PARTS.format("complete"))[0].headers["authorization"] == "Bearer t"
    assert puts(server) == []
    assert client.statistics().stored == 1


@pytest.mark.usefixtures("in_parts")
def test_a_failed_upload_in_parts_is_aborted_and_repeated(
    server: ScriptedServer, store: ScriptedServer, new_client: NewClient, tmp_path: Path
) -> None:
    """With new URLs."""
    content = large(tmp_path / "f", 2_000_000)
    server.fail(PARTS.format("create"), Fault.answer(200, addresses(store, 4)), times=2)
    store.fail("part", Fault.answer(503), times=4)
    client = new_client()
    client.log_artifact(RUN, tmp_path / "f", "dir")
    client.flush()
    assert server.to(PARTS.format("abort"))[0].json == {"path": "f", "upload_id": "u"}
    assert (server.count(PARTS.format("create")), server.count(PARTS.format("complete"))) == (2, 1)
    last = sorted(store.requests[-4:], key=lambda request: request.target)
    assert b"".join(request.body for request in last) == content


@pytest.mark.usefixtures("in_parts")
def test_no_error_holds_the_url_of_a_part(
    server: ScriptedServer, store: ScriptedServer, new_client: NewClient, tmp_path: Path
) -> None:
    """The URL is a permission. It is neither in the text nor in the frames."""
    large(tmp_path / "f", 2_000_000)
    server.fail(PARTS.format("create"), Fault.answer(200, addresses(store, 4)))
    store.fail("part", Fault.answer(503), times=None)
    client = new_client(retry_timeout=0)
    client.log_artifact(RUN, tmp_path / "f", "dir")
    error: BaseException | None = failure(client).error
    assert str(error) == f"{HOST} answered 503 to a part of the file"
    while error is not None:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            assert "sig=" not in repr(frame.f_locals)
        error = error.__cause__ or error.__context__


@pytest.mark.usefixtures("in_parts")
def test_a_server_without_multipart_gets_the_whole_file(
    server: ScriptedServer, store: ScriptedServer, new_client: NewClient, tmp_path: Path
) -> None:
    """It says so when it is asked for URLs, or before."""
    content = large(tmp_path / "f", 2_000_000)
    text = "Multipart upload is not supported for the current artifact repository"
    answer = Fault.answer(501, {"error_code": "NOT_IMPLEMENTED", "message": text})
    server.fail(PARTS.format("create"), answer, times=None)
    client = new_client()
    for _ in range(2):
        client.log_artifact(RUN, tmp_path / "f", "dir")
        client.flush()
    assert [(request.target, request.body) for request in puts(server)] == [(f"{PUT}dir/f", content)] * 2
    assert server.count(PARTS.format("create")) == 1
    assert store.requests == ()


def test_multipart_is_used_only_if_the_server_offers_it(
    server: ScriptedServer, new_client: NewClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And never for small files. A variable of MLflow overrides the server."""
    has_run(server)
    large(tmp_path / "f", 2_000_000)
    client = new_client()
    client.log_artifact(RUN, tmp_path / "f")
    client.flush()
    assert server.count("server-info") == 0
    monkeypatch.setenv("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE", "1000000")
    server.fail("server-info", Fault.answer(404))
    client.log_artifact(RUN, tmp_path / "f")
    client.flush()
    assert server.count("server-info") == 1
    monkeypatch.setenv("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD", "false")
    client.log_artifact(RUN, tmp_path / "f")
    client.flush()
    assert (server.count("server-info"), len(puts(server))) == (1, 3)
