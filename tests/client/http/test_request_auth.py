"""
Ways of authentication that MLflow takes from plugins: MLFLOW_TRACKING_AUTH and MLFLOW_TRACKING_AWS_SIGV4. What they do
to a request arrives as they did it, they have the last word, and what goes wrong in them loses nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import anyio
import pytest
from mlflow.tracking.request_auth import registry
from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider
from requests import PreparedRequest

import runqueue
from runqueue.errors import AuthError, ConfigError, StoreError
from runqueue.http._plugins import AUTH, SIGV4
from runqueue.settings._config import Config
from runqueue.stores._protocol import GET_EXPERIMENT, LOG_BATCH, Traffic
from runqueue.stores._resolve import make_store
from support.proxy import Fault, ScriptedServer
from support.store_calls import call

SECRET = "s3cret-word"
BOTH = pytest.mark.parametrize("transport", ["httpx", "auto"])

Sign: TypeAlias = Callable[[PreparedRequest], Any]
Use: TypeAlias = Callable[[Sign], None]


@pytest.fixture
def provide(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers a way of authentication with mlflow, and names it in the variable."""

    def one(get_auth: Callable[[], Any], name: str = "mine") -> None:
        class Provider(RequestAuthProvider):
            def get_name(self) -> str:
                return name

            def get_auth(self) -> Any:
                return get_auth()

        kept = registry._request_auth_provider_registry
        monkeypatch.setattr(kept, "_registry", [Provider(), *kept._registry])
        monkeypatch.setenv(AUTH, name)

    return one


@pytest.fixture
def use(provide: Callable[..., None]) -> Use:
    """The same, for one that is the same for all requests."""
    return lambda sign: provide(lambda: sign)


def header(name: str, value: Any) -> Callable[[PreparedRequest], PreparedRequest]:
    """Sets this header."""

    def sign(request: PreparedRequest) -> PreparedRequest:
        request.headers[name] = value
        return request

    return sign


def failure(uri: str, **settings: Any) -> AuthError:
    """The error of one call."""
    with pytest.raises(StoreError) as caught:
        call(uri, **settings)
    assert type(caught.value) is AuthError
    assert SECRET not in str(caught.value)
    return caught.value


# -- what it sees, and what it does ----------------------------------------------------------------------------------


@BOTH
def test_it_is_given_the_request_as_it_will_be_sent(server: ScriptedServer, use: Use, transport: str) -> None:
    """Method, URL with its query, all headers and the body: what a signature is made of."""
    seen: list[tuple[Any, ...]] = []

    def sign(request: PreparedRequest) -> PreparedRequest:
        seen.append((request.method, request.url, dict(request.headers), request.body))
        return request

    async def main() -> None:
        store = make_store(Config(transport=transport, headers={"X-Team": "vision"}), server.uri, Traffic())  # type: ignore[arg-type]
        await store.call(LOG_BATCH, b'{"run_id": "\xc3\xbc"}')
        await store.call(GET_EXPERIMENT, query={"experiment_name": "a b/ü&c"})
        await store.aclose()

    use(sign)
    anyio.run(main)
    assert len(seen) == 2
    for (method, url, headers, body), request in zip(seen, server.requests, strict=True):
        assert (method, url, body or b"") == (request.method, server.uri + request.target, request.body)
        for name in ("Content-Type", "Accept-Encoding", "User-Agent", "X-Team"):
            assert request.headers[name.lower()] == headers[name]


@BOTH
def test_it_has_the_last_word(server: ScriptedServer, use: Use, transport: str) -> None:
    """Over a token, over the constructor's headers, whatever the capitals."""
    use(header("authorization", f"Custom {SECRET}"))
    call(server.uri, token="token", transport=transport, headers={"Authorization": "mine"})
    assert server.requests[0].headers["authorization"] == f"Custom {SECRET}"


@BOTH
def test_all_that_it_adds_changes_and_takes_away_counts(server: ScriptedServer, use: Use, transport: str) -> None:
    """Headers of any name, the Host among them, in text or bytes; and the URL's query."""

    def sign(request: PreparedRequest) -> PreparedRequest:
        request.headers.update({"X-Signature": b"bytes", "Host": "gateway.invalid", "X-Team": "changed"})
        del request.headers["x-gone"]
        request.url = f"{request.url}?signature=abc"
        return request

    use(sign)
    call(server.uri, transport=transport, headers={"X-Team": "vision", "X-Gone": "1"})
    (request,) = server.requests
    assert request.headers["x-signature"] == "bytes"
    assert request.headers["x-team"] == "changed" and "x-gone" not in request.headers
    assert request.headers["host"] == "gateway.invalid"
    assert request.target.endswith("/runs/log-batch?signature=abc")
    assert request.body == b"{}"


def test_a_pair_is_a_user_and_a_password(server: ScriptedServer, provide: Callable[..., None]) -> None:
    """As requests takes it."""
    provide(lambda: ("user", "password"))
    call(server.uri)
    assert server.requests[0].headers["authorization"] == "Basic dXNlcjpwYXNzd29yZA=="


def test_it_is_asked_for_at_every_request(server: ScriptedServer, provide: Callable[..., None]) -> None:
    """As MLflow does: what it gives may be good for one only. A 401 is answered once with another."""
    turns = iter(range(9))
    provide(lambda: header("Authorization", f"Turn {next(turns)}"))
    server.fail("", Fault.answer(401), when=lambda request: request.headers["authorization"] == "Turn 1")
    call(server.uri, times=3)
    assert [request.headers["authorization"] for request in server.requests] == [f"Turn {each}" for each in range(4)]


def test_a_file_of_requests_is_not_looked_into(
    server: ScriptedServer, use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Nor does requests, where it is given a way of authentication."""
    (tmp_path / "netrc").write_text("default login u password p\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    use(header("X-Key", SECRET))
    call(server.uri)
    assert "authorization" not in server.requests[0].headers


def test_kubernetes_is_given_no_password_but_a_token(
    server: ScriptedServer, provide: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It adds nothing where there is an Authorization already; MLflow keeps passwords from it."""
    provide(lambda: lambda request: request, name="kubernetes")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "u")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    call(server.uri)
    assert "authorization" not in server.requests[0].headers
    call(server.uri, token="t")
    assert server.requests[1].headers["authorization"] == "Bearer t"


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_an_unknown_name_loses_nothing(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow would send the request without any authentication. Nothing is sent, everything stays queued."""
    monkeypatch.setenv(AUTH, "no-such-plugin")
    client = runqueue.Client(server.uri)
    client.log_metric("r", "m", 1.0)
    with pytest.raises(runqueue.FlushError, match=f"'no-such-plugin' that {AUTH} names") as caught:
        client.flush()
    (left,) = caught.value.failures
    assert isinstance(left.error, AuthError) and not left.final
    assert (server.count(), client.statistics().pending) == (0, 1)
    with pytest.raises(runqueue.FlushError):
        client.close()


@pytest.mark.parametrize("raised", [SystemExit(SECRET), KeyboardInterrupt(SECRET), ValueError(SECRET)], ids=repr)
@pytest.mark.parametrize("place", ["get_auth", "sign"])
def test_whatever_it_raises_ends_one_flush_only(
    server: ScriptedServer, provide: Callable[..., None], raised: BaseException, place: str
) -> None:
    """And says no more than its kind; the next flush asks again."""
    faults = [raised]

    def get_auth() -> Sign:
        if place == "get_auth" and faults:
            raise faults.pop()
        return sign

    def sign(request: PreparedRequest) -> PreparedRequest:
        if faults:
            raise faults.pop()
        return header("Authorization", "good")(request)

    provide(get_auth)
    with runqueue.Client(server.uri) as client:
        client.log_metric("r", "m", 1.0)
        with pytest.raises(runqueue.FlushError, match=f"'mine' of {AUTH} raised {type(raised).__name__}") as caught:
            client.flush()
        assert SECRET not in str(caught.value)
        error = caught.value.failures[0].error
        assert error.__traceback__ is None or SECRET not in repr(error.__traceback__.tb_frame.f_locals)
        client.flush()
        assert client.statistics().stored == 1


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        (lambda request: None, "raised AttributeError"),
        (header("X-Key", f"{SECRET}\r\nX-Evil: 1"), "no header can be"),
        (header("X Key", SECRET), "no header can be"),
        (header("X-Key", 5), "no header can be"),
    ],
)
def test_what_cannot_be_sent_is_not(server: ScriptedServer, use: Use, sign: Sign, words: str) -> None:
    """A request without its authentication would be somebody else's."""
    use(sign)
    error = failure(server.uri)
    assert words in str(error) and not error.retriable
    assert server.count() == 0


@pytest.mark.parametrize("url", ["http://other.invalid/", "https://127.0.0.1/", "http://127.0.0.1:1/"])
def test_another_origin_is_sent_nothing(server: ScriptedServer, use: Use, url: str) -> None:
    """Headers and body go to the server of the tracking URI alone."""

    def sign(request: PreparedRequest) -> PreparedRequest:
        request.url = url
        return header("X-Key", SECRET)(request)

    use(sign)
    assert "another origin" in str(failure(server.uri))


@pytest.mark.parametrize("change", [{"body": b"other"}, {"method": "PUT"}])
def test_another_body_or_method_is_refused(server: ScriptedServer, use: Use, change: dict[str, Any]) -> None:
    """What was queued is what is sent."""

    def sign(request: PreparedRequest) -> PreparedRequest:
        request.__dict__.update(change)
        return request

    use(sign)
    assert "changed more than" in str(failure(server.uri))
    assert server.count() == 0


def test_one_that_answers_challenges_is_warned_of(
    server: ScriptedServer, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """Digest and Kerberos wait for a 401 in a hook of requests; once for a client."""

    def sign(request: PreparedRequest) -> PreparedRequest:
        request.register_hook("response", lambda answer, **_: answer)
        return request

    use(sign)
    call(server.uri, times=3)
    (record,) = (record for record in caplog.records if record.name == "runqueue")
    assert "the server's answers" in record.getMessage()


def test_one_that_never_answers_holds_to_the_deadline(server: ScriptedServer, use: Use) -> None:
    """It is asked in a worker thread, and nothing was sent; as many as there are workers are asked at once."""
    go_on, asked = threading.Event(), threading.Semaphore(0)

    def sign(request: PreparedRequest) -> PreparedRequest:
        asked.release()
        go_on.wait(20)
        return request

    use(sign)
    client = runqueue.Client(server.uri, max_workers=3)
    try:
        for run in "abcd":
            client.log_metric(run, "m", 1.0)
        operations = client.flush(synchronous=False)
        for _ in range(3):
            assert asked.acquire(timeout=20)
        assert server.count() == 0
        go_on.set()
        operations.await_completion()
        with pytest.raises(StoreError, match=r"no credentials to be had within 0\.2 s"):
            go_on.clear()
            call(server.uri, request_timeout=0.2)
    finally:
        go_on.set()
        client.close()


def test_what_a_server_echoes_of_it_is_not_shown(server: ScriptedServer, use: Use) -> None:
    """Neither the whole header, nor the secret in it."""
    use(header("X-Custom", f"Scheme {SECRET}"))
    server.fail("", Fault.answer(400, {"error_code": "X", "message": f"X-Custom: Scheme {SECRET}; {SECRET}"}))
    with pytest.raises(StoreError, match=r"X-Custom: \*\*\*; \*\*\*"):
        call(server.uri)


@pytest.mark.parametrize("variable", [AUTH, SIGV4])
def test_what_is_not_installed_is_said_at_once(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """By the constructor, with what to install."""
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    monkeypatch.setenv(variable, "true")
    for face in (runqueue.Client, runqueue.AsyncClient):
        with pytest.raises(ConfigError, match=rf"{variable}.*pip install"):
            face("http://127.0.0.1:1")


# -- Amazon's signature ----------------------------------------------------------------------------------------------

STAND_IN = """
class AWSSigV4:
    def __init__(self, service):
        self.service = service

    def __call__(self, request):
        request.headers["X-Amz-Date"] = "20260101T000000Z"
        request.headers["Authorization"] = f"AWS4-HMAC-SHA256 {self.service} {request.method} {len(request.body)}"
        return request
"""


@BOTH
def test_the_signature_of_amazons_gateway_is_made_of_the_whole_request(
    server: ScriptedServer, use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, transport: str
) -> None:
    """By the package that MLflow takes, here a stand-in; it comes before MLFLOW_TRACKING_AUTH, as in MLflow."""
    (tmp_path / "requests_auth_aws_sigv4.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "requests_auth_aws_sigv4", raising=False)
    use(header("Authorization", "the plugin's"))
    monkeypatch.setenv(SIGV4, "true")
    call(server.uri, token="token", transport=transport)
    (request,) = server.requests
    assert request.headers["authorization"] == "AWS4-HMAC-SHA256 execute-api POST 2"
    assert request.headers["x-amz-date"] == "20260101T000000Z"


def test_the_switch_of_the_signature_takes_what_mlflows_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A typing error is refused; false is off, and needs nothing."""
    monkeypatch.setenv(SIGV4, "ture")
    with pytest.raises(ConfigError, match=SIGV4):
        runqueue.Client("http://127.0.0.1:1")
    monkeypatch.setenv(SIGV4, "false")
    runqueue.Client("http://127.0.0.1:1").close()
