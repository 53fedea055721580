"""
No token, password or user info is shown: not by a repr, a log line, a warning, an error with its frames, a pickle, the
output or the files of a process; see `support.secrets_grep` for what is looked at, and how.

Rules of this file: every secret is there twice, once plain and once with characters that URLs, HTML, JSON and Python
write otherwise; a case has to prove that the secret was in play, and that something was looked at. No case is
expected to fail.
"""

from __future__ import annotations

import asyncio
import base64
import gc
import html
import importlib
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote

import anyio
import pytest
import trustme

import runqueue
from runqueue.cli._main import main as run_command
from support.echo_server import ANSWERS, DECODED, RAW, EchoServer, done, message, page
from support.mlflow_server import HOST, clean_environment, free_port
from support.proxy import reply
from support.secrets_grep import Evidence, watched
from support.tls_server import TlsServer

USER, HEAD, TAIL = "Us3rXfGkWq", "Qw7ZxKvJrM", "hB3nTyRpLd"
PLAIN = HEAD + TAIL
THORNY = f"{HEAD}'\"/\\@%41&<:{TAIL}"
RUN = "a" * 32
PATIENCE = 0.05
"""Seconds for an answer that does not come."""

Face: TypeAlias = type[runqueue.Client] | type[runqueue.AsyncClient]

SECRETS, TRANSPORTS, FACES = (PLAIN, THORNY), ("auto", "httpx"), (runqueue.Client, runqueue.AsyncClient)


def _named(value: object) -> str | None:
    return {PLAIN: "plain", THORNY: "thorny"}.get(str(value), getattr(value, "__name__", None))


by_face = pytest.mark.parametrize("face", FACES)
by_transport = pytest.mark.parametrize("transport", TRANSPORTS)
by_secret = pytest.mark.parametrize("secret", SECRETS, ids=_named)


def with_user(uri: str, secret: str) -> str:
    """The URI with user info in it."""
    return uri.replace("://", f"://{USER}:{quote(secret, safe='')}@")


# -- where secrets come from -----------------------------------------------------------------------------------------


def arranged(source: str, secret: str, uri: str, patch: pytest.MonkeyPatch) -> tuple[str | None, dict[str, Any]]:
    """The secret put in its place; what the constructor is given beside it."""
    settings: dict[str, Any] = {}
    if source == "user info":
        return with_user(uri, secret), settings
    if source == "URI variable":
        patch.setenv("MLFLOW_TRACKING_URI", with_user(uri, secret))
        return None, settings
    if source == "variables":
        patch.setenv("MLFLOW_TRACKING_USERNAME", "somebody")
        patch.setenv("MLFLOW_TRACKING_PASSWORD", secret)
    elif source == "file":
        file = Path.home() / ".mlflow" / "credentials"
        file.parent.mkdir(exist_ok=True)
        escaped = secret.replace("%", "%%")
        file.write_text(f"[mlflow]\nmlflow_tracking_username = somebody\nmlflow_tracking_password = {escaped}\n")
    elif source == "token variable":
        patch.setenv("MLFLOW_TRACKING_TOKEN", secret)
    elif source == "token":
        settings["token"] = secret
    elif source == "callable":
        settings["token"] = lambda: secret
    else:
        settings["headers"] = {"X-Api-Key": secret}
    return uri, settings


IN_URI = ["user info", "URI variable"]
OF_ENVIRONMENT = ["variables", "file", "token variable"]
SOURCES = [*IN_URI, *OF_ENVIRONMENT, "token", "callable", "header"]


def words_of(source: str) -> tuple[str, ...]:
    """What must not be seen; a user is a secret where it is user info."""
    return (HEAD, TAIL, USER) if source in IN_URI else (HEAD, TAIL)


# -- what happens ----------------------------------------------------------------------------------------------------


UNANSWERED = ["refused", "unknown host", "TLS", "time-out"]


@pytest.fixture(scope="module")
def echo() -> Iterator[EchoServer]:
    """One server for all; a case sets its answer."""
    with EchoServer() as server:
        yield server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of nobody's: a short file, which is read faster than the system's."""
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    trustme.CA().cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="module")
def untrusted() -> Iterator[TlsServer]:
    """Its certificate is by an authority that nobody knows."""
    with TlsServer(trustme.CA().issue_cert(HOST)) as server:
        yield server


@pytest.fixture(scope="module", autouse=True)
def _imported() -> Iterator[None]:
    """What sets up loggers of its own when it is imported."""
    importlib.import_module("mlflow.tracking._tracking_service.utils")
    importlib.import_module("mlflow.store.db.utils")
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, authority: Path) -> Path:
    """Where the process runs; its home is beside it. What is there already need not be collected in every case."""
    gc.freeze()
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def place(echo: EchoServer, untrusted: TlsServer) -> Iterator[Callable[[str], str]]:
    """Makes an event happen; gives the URI that leads to it."""

    def prepare(event: str) -> str:
        echo.over.clear()
        echo.answer = echo.silent if event == "time-out" else ANSWERS.get(event, done)
        elsewhere = {
            "refused": f"http://{HOST}:{free_port()}",
            "unknown host": "http://nothing.invalid",
            "TLS": untrusted.uri,
        }
        return elsewhere.get(event, echo.uri)

    yield prepare
    echo.over.set()


# -- what is done with a client --------------------------------------------------------------------------------------


def completed(call: Callable[[], Any]) -> Any:
    """The result of either face's call."""
    result = call()
    if not asyncio.iscoroutine(result):
        return result

    async def main() -> Any:
        return await result

    return anyio.run(main)


def attempt(evidence: Evidence, where: str, call: Callable[[], Any]) -> Exception | None:
    """The error of a call, if it raises one; it was looked at."""
    try:
        completed(call)
    except Exception as error:  # noqa: BLE001  whatever comes is looked at
        evidence.error(where, error)
        return error
    return None


def drive(evidence: Evidence, face: Face, uri: Any, settings: Mapping[str, Any]) -> list[Exception]:
    """Make a client, log, flush three times, close; look at all of it. Returns what was raised."""
    made: list[Any] = []
    failed = attempt(evidence, "constructor", lambda: made.append(face(uri, **settings)))
    if failed is not None:
        return [failed]
    client: Any = made[0]
    asynchronous = isinstance(client, runqueue.AsyncClient)
    run = client.create_run("0")
    client.log_param(run, "p", "v")
    client.log_metric(RUN, "m", 1.0)
    operations = completed(lambda: client.flush(synchronous=False))

    async def awaited() -> None:
        await operations

    raised = [
        attempt(evidence, "operations", awaited if asynchronous else operations.await_completion),
        attempt(evidence, "flush", client.flush),
    ]
    shown = (client, client.tracking_uri, client.statistics(), client.failures, operations, operations.report, run)
    evidence.value("repr: of public objects", shown)
    for each in shown:
        evidence.pickled("of public objects", each)
    assert {"Engine", "Config", "Traffic", "LoopThread"} < evidence.objects("client", client)
    leave = client.__aexit__ if asynchronous else client.__exit__
    raised.append(attempt(evidence, "end", lambda: leave(SystemExit, SystemExit(0), None)))
    return [error for error in raised if error is not None]


def assert_clean(evidence: Evidence) -> None:
    """Nothing was found; else a few findings of each kind are named."""
    kinds: dict[str, list[str]] = {}
    for leak in evidence.leaks:
        kinds.setdefault(leak.partition(":")[0], []).append(leak)
    if kinds:
        shown = [leak for found in kinds.values() for leak in sorted(found, key=len)[:4]]
        pytest.fail("\n".join([f"{len(evidence.leaks)} leaks, such as", *shown]), pytrace=False)


QUICK = {"retry_timeout": 0}


def variants() -> Iterator[tuple[str, str, str, str, Face]]:
    """
    Every source with every event: with both secrets, over both transports, by both faces, in two cases; of what is
    echoed, which is the same for all of them, in one, and with the secret that is harder to take out.
    """
    for a, source in enumerate(SOURCES):
        for b, event in enumerate([*ANSWERS, *UNANSWERED]):
            turn = (a + b) % 4
            for flip in (0,) if "echoes" in event else (0, 7):
                bits = (turn ^ flip) | ("echoes" in event)
                yield source, event, SECRETS[bits & 1], TRANSPORTS[bits >> 1 & 1], FACES[(bits >> 2 ^ a >> 2 ^ b) & 1]


@pytest.mark.parametrize(("source", "event", "secret", "transport", "face"), [*variants()], ids=_named)
def test_nothing_shows_a_secret_whatever_happens_to_requests(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    echo: EchoServer,
    place: Callable[[str], str],
    source: str,
    event: str,
    secret: str,
    transport: str,
    face: Face,
) -> None:
    """Wherever it comes from, and whatever the server does with it."""
    uri, settings = arranged(source, secret, place(event), monkeypatch)
    settings |= {"transport": transport, "request_timeout": PATIENCE if event == "time-out" else 20}
    before = echo.count()
    with watched(*words_of(source)) as evidence:
        raised = drive(evidence, face, uri, settings | QUICK)
        evidence.files(folder)
    assert_clean(evidence)
    assert bool(raised) == (event != "success")
    assert {"log", "repr", "pickle", *(["error", "local"] if raised else [])} <= set(evidence.looked_at)
    if event not in ("refused", "unknown host", "TLS"):
        assert all(secret in DECODED(request) for request in echo.requests[before:])
        assert echo.count() > before


# -- what is wrong from the start ------------------------------------------------------------------------------------

AT = f"{HOST}:1"
BAD_URIS: dict[str, Any] = {
    "no host": f"http://{USER}:{PLAIN}@",
    "a blank": f"http://{USER}:{HEAD} {TAIL}@{AT}",
    "a line break": f"http://{USER}:{HEAD}\n{TAIL}@{AT}",
    "two ports": f"http://{USER}:{PLAIN}@{HOST}:port:99",
    "an unknown scheme": f"htp://{USER}:{PLAIN}@{HOST}",
    "no scheme": f"{USER}:{PLAIN}@{AT}",
    "one slash": f"http:/{USER}:{PLAIN}@{AT}",
    "a slash in the password": f"http://{USER}:{HEAD}/{TAIL}@{AT}",
    "a question mark in the password": f"http://{USER}:{HEAD}?{TAIL}@{AT}",
    "a hash in the password": f"http://{USER}:{HEAD}#{TAIL}@{AT}",
    "a bracket in the password": f"http://{USER}:{HEAD}[{TAIL}@{AT}",
    "an at in the password": f"http://{USER}:{HEAD}@{TAIL}@{AT}",
    "a sign that is two": f"http://{USER}:{HEAD}\N{ACCOUNT OF}{TAIL}@{AT}",
    "bytes": f"http://{USER}:{PLAIN}@{AT}".encode(),
    "https without a host": f"https://{USER}:{PLAIN}@",
}
DATABASES: dict[str, str] = {
    "nobody listens": f"postgresql://{USER}:{PLAIN}@{AT}/db",
    "nobody listens, quoted": with_user(f"postgresql://{AT}/db", THORNY),
    "another driver": with_user(f"postgresql+psycopg://{AT}/db", THORNY),
    "no host": f"postgresql://{USER}:{PLAIN}@/db",
    "in the query": f"postgresql://{AT}/db?user=somebody&password={PLAIN}",
    "no port": f"postgresql://{USER}:{PLAIN}@{HOST}:port/db",
    "a slash in the password": f"postgresql://{USER}:{HEAD}/{TAIL}@{AT}/db",
    "no driver": f"mysql://{USER}:{PLAIN}@{AT}/db",
    "an unknown driver": f"postgresql+nothing://{USER}:{PLAIN}@{AT}/db",
    "ODBC": f"mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3D{USER}%3BPWD%3D{PLAIN}",
    "SQLite": f"sqlite:///some.db?password={PLAIN}",
    "SQLite with a cipher": f"sqlite+pysqlcipher://:{PLAIN}@/some.db",
}
BAD_SETTINGS: dict[str, dict[str, Any]] = {
    "workers": {"max_workers": 0},
    "a time": {"request_timeout": "soon"},
    "limits": {"limits": 1},
    "a transport": {"transport": "carrier pigeon"},
    "a keyword": {"tokens": PLAIN},
    "a line break in a token": {"token": f"{HEAD}\n{TAIL}"},
    "a snowman in a token": {"token": f"{PLAIN}\N{SNOWMAN}"},
    "a token of bytes": {"token": PLAIN.encode()},
    "a line break in a header": {"headers": {"X-Api-Key": f"{HEAD}\n{TAIL}"}},
    "a header of bytes": {"headers": {"X-Api-Key": PLAIN.encode()}},
    "headers that are text": {"headers": f"X-Api-Key: {PLAIN}"},
    "headers that are pairs": {"headers": [("X-Api-Key", PLAIN)]},
}


@by_face
@pytest.mark.parametrize("uri", BAD_URIS.values(), ids=BAD_URIS)
def test_a_uri_that_is_none_is_not_shown(folder: Path, face: Face, uri: Any) -> None:
    """Whether it is refused at once, or only cannot be reached."""
    with watched(HEAD, TAIL, USER) as evidence:
        assert drive(evidence, face, uri, QUICK)
        evidence.files(folder)
    assert_clean(evidence)


@by_face
@pytest.mark.parametrize("uri", DATABASES.values(), ids=DATABASES)
def test_a_database_that_is_not_there_is_not_shown_with_its_password(folder: Path, face: Face, uri: str) -> None:
    """Drivers, SQLAlchemy and MLflow all have words of their own for it."""
    with watched(HEAD, TAIL, USER) as evidence:
        assert drive(evidence, face, uri, QUICK)
        evidence.files(folder)
    assert_clean(evidence)


@by_face
@pytest.mark.parametrize("wrong", BAD_SETTINGS.values(), ids=BAD_SETTINGS)
def test_a_constructor_that_refuses_shows_no_secret(face: Face, wrong: dict[str, Any]) -> None:
    """Neither what it refuses, nor what was given beside it."""
    given = {"token": PLAIN, "headers": {"X-Api-Key": PLAIN}} | wrong
    with watched(HEAD, TAIL, USER) as evidence:
        assert drive(evidence, face, with_user(f"http://{AT}", PLAIN), given)
    assert_clean(evidence)


@by_face
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_HTTP_REQUEST_TIMEOUT", "soon"),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", "/nothing"),
        ("HTTPS_PROXY", "http://nothing:port:99"),
        ("MLFLOW_TRACKING_TOKEN", f"{HEAD}\n{TAIL}"),
    ],
)
def test_a_variable_that_is_wrong_brings_no_secret_to_light(
    monkeypatch: pytest.MonkeyPatch, face: Face, name: str, value: str
) -> None:
    """Some are read by the constructor, some by the first flush."""
    monkeypatch.setenv(name, value)
    with watched(HEAD, TAIL, USER) as evidence:
        uri = f"https://{AT}" if "TOKEN" in name else with_user(f"https://{AT}", PLAIN)
        assert drive(evidence, face, uri, QUICK)
    assert_clean(evidence)


def _raising() -> str:
    raise RuntimeError(f"no token for {THORNY}")


CALLABLES: dict[str, Callable[[], Any]] = {
    "raises": _raising,
    "gives bytes": THORNY.encode,
    "gives a line break": lambda: f"{HEAD}\n{TAIL}",
    "gives a list": lambda: [THORNY],
}


@by_face
@pytest.mark.parametrize("token", CALLABLES.values(), ids=CALLABLES)
def test_a_callable_that_gives_no_token_gives_away_nothing(echo: EchoServer, face: Face, token: Any) -> None:
    """Neither by what it raises, nor by what it returns."""
    echo.answer = done
    with watched(HEAD, TAIL) as evidence:
        assert drive(evidence, face, echo.uri, QUICK | {"token": token})
    assert_clean(evidence)


@by_face
@pytest.mark.parametrize("text", [THORNY, f"[mlflow]\n{PLAIN}\n", f"[mlflow]\n[mlflow]\n{PLAIN} = 1\n"])
def test_a_file_that_cannot_be_read_is_not_quoted(echo: EchoServer, face: Face, text: str) -> None:
    """Parsers do."""
    echo.answer = done
    (Path.home() / ".mlflow").mkdir()
    (Path.home() / ".mlflow" / "credentials").write_text(text)
    with watched(HEAD, TAIL) as evidence:
        assert drive(evidence, face, echo.uri, QUICK)
    assert_clean(evidence)


@by_face
@by_transport
@pytest.mark.parametrize("event", ["refuses", "is not there", "echoes", "has no port", "has a slash in its password"])
def test_a_proxys_password_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, echo: EchoServer, face: Face, transport: str, event: str
) -> None:
    """It is the environment's, and neither the client's nor the server's."""
    proxies = {
        "is not there": with_user(f"http://{HOST}:{free_port()}", THORNY),
        "has no port": f"http://{USER}:{PLAIN}@{HOST}:port:99",
        "has a slash in its password": f"http://{USER}:{HEAD}/{TAIL}@{AT}",
    }
    echo.answer = page(502, DECODED) if event == "echoes" else lambda _: reply(407)
    monkeypatch.setenv("HTTP_PROXY", proxies.get(event, with_user(echo.uri, THORNY)))
    with watched(HEAD, TAIL, USER) as evidence:
        assert drive(evidence, face, "http://nothing.invalid", QUICK | {"transport": transport})
    assert_clean(evidence)


MISUSES: dict[str, Callable[[Any], Any]] = {
    "a negative time": lambda client: client.flush(timeout=-1),
    "a time that is text": lambda client: client.flush(timeout="soon"),
    "a keyword": lambda client: client.flush(soon=True),
    "a run that is none": lambda client: client.flush(run_id="no run"),
    "a metric of no run": lambda client: client.log_metric("no run", "m", 1.0),
    "params that are text": lambda client: client.log_params(RUN, "p"),
    "no experiment": lambda client: client.create_run(),
    "a late end": lambda client: client.close(timeout=-1),
}


@by_face
@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES)
def test_a_call_that_is_wrong_shows_no_secret_of_its_client(face: Face, misuse: Callable[[Any], Any]) -> None:
    """The client is among the locals of its frames."""
    client = face(with_user(f"http://{AT}", THORNY), token=THORNY, headers={"X-Api-Key": THORNY})
    with watched(HEAD, TAIL, USER) as evidence:
        assert attempt(evidence, "misuse", lambda: misuse(client)) is not None
    assert_clean(evidence)
    assert evidence.looked_at.get("local") or misuse is MISUSES["a keyword"]


@by_face
@pytest.mark.parametrize("end", ["forgotten", "raised"])
def test_a_client_that_was_not_closed_shows_no_secret(face: Face, end: str) -> None:
    """What it leaves behind is logged, with its URI."""
    with watched(HEAD, TAIL, USER) as evidence:
        client: Any = face(with_user(f"http://{AT}", THORNY), token=THORNY)
        client.log_metric(RUN, "m", 1.0)
        error = KeyError("the user's")
        if end == "raised":
            leave = client.__aexit__ if face is runqueue.AsyncClient else client.__exit__
            completed(lambda: leave(KeyError, error, None))
        del client
        gc.collect()
    assert_clean(evidence)
    assert evidence.looked_at["log"] > 0


def test_nothing_that_can_be_pickled_holds_a_secret() -> None:
    """Of all objects that a client is made of: schedulers pickle what they find."""
    client = runqueue.Client(with_user(f"http://{AT}", THORNY), token=THORNY, headers={"X-Api-Key": THORNY})
    with watched(HEAD, TAIL, USER) as evidence:
        for each in (client, client._engine, client._engine.config):
            evidence.pickled(type(each).__name__, each)
    assert_clean(evidence)


# -- the command -----------------------------------------------------------------------------------------------------


def doctor(evidence: Evidence, uri: str | None) -> None:
    """Run the command; `watched` has what it prints."""
    with pytest.raises(SystemExit) as caught:
        run_command(["doctor"] if uri is None else ["doctor", "--tracking-uri", uri])
    evidence.text("output: exit code", repr(caught.value.code))


DIAGNOSED = [event for event in (*ANSWERS, *UNANSWERED) if not event.startswith("a 500") or event.endswith("it came")]


@pytest.mark.parametrize(
    ("source", "event", "secret"),
    [
        (source, event, SECRETS[(a + b) % 2])
        for a, source in enumerate([*IN_URI, *OF_ENVIRONMENT])
        for b, event in enumerate(DIAGNOSED)
    ],
    ids=_named,
)
def test_the_doctor_shows_no_secret_whatever_it_finds(
    monkeypatch: pytest.MonkeyPatch, place: Callable[[str], str], source: str, event: str, secret: str
) -> None:
    """It prints where secrets come from, and what the server says."""
    uri, _ = arranged(source, secret, place(event), monkeypatch)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", str(PATIENCE if event == "time-out" else 20))
    with watched(*words_of(source)) as evidence:
        doctor(evidence, uri)
    assert_clean(evidence)


@pytest.mark.parametrize(
    "uri", [each for each in (BAD_URIS | DATABASES).values() if isinstance(each, str)], ids=lambda uri: uri[:9]
)
def test_the_doctor_shows_nothing_of_a_uri_that_is_none(folder: Path, uri: str) -> None:
    """In a pipeline's log it would be there for everybody."""
    with watched(HEAD, TAIL, USER) as evidence:
        doctor(evidence, uri)
        evidence.files(folder)
    assert_clean(evidence)


# -- in a process of its own -----------------------------------------------------------------------------------------

SCRIPT = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, filename="debug.log")
import anyio, runqueue
face, uri, secret = sys.argv[1:2] + sys.stdin.read().split()
settings = dict(token=secret, headers={"X-Api-Key": secret}, retry_timeout=0)

def logged(client):
    client.log_metric("a" * 32, "m", 1.0)
    return client.create_run("0")

async def main():
    async with runqueue.AsyncClient(uri, **settings) as client:
        logged(client)
        await client.flush(synchronous=False)

forgotten = runqueue.Client(uri, **settings)
logged(forgotten)
if face == "AsyncClient":
    anyio.run(main)
with runqueue.Client(uri, **settings) as client:
    logged(client)
"""


def test_a_process_that_dies_of_a_flush_prints_no_secret(echo: EchoServer, folder: Path) -> None:
    """With its traceback, all warnings, and asyncio's notes; nor is there any in the files beside it."""
    echo.answer = page(500, RAW)
    (folder / "job.py").write_text(SCRIPT)
    given = f"{with_user(echo.uri, THORNY)} {THORNY}"
    variables = clean_environment() | {"HOME": str(Path.home()), "SSL_CERT_FILE": os.environ["SSL_CERT_FILE"]}
    processes = [
        subprocess.Popen(
            [sys.executable, *options, "job.py", face.__name__],
            cwd=folder,
            env=variables | {"PYTHONASYNCIODEBUG": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for face, options in zip(FACES, (["-X", "dev"], ["-W", "always"]), strict=True)
    ]
    evidence = Evidence(HEAD, TAIL, USER)
    for process in processes:
        out, err = process.communicate(given, timeout=60)
        assert process.returncode == 1 and "FlushError" in err
        evidence.text("output: stdout", out)
        evidence.text("output: stderr", err)
    evidence.files(folder)
    assert "debug.log" in {path.name for path in folder.iterdir()}
    assert "DEBUG" in (folder / "debug.log").read_text()
    assert_clean(evidence)


# -- the search itself -----------------------------------------------------------------------------------------------


def found(plant: Callable[[Evidence], object], *words: str) -> set[str]:
    """By which collectors a planted leak is found."""
    with watched(*(words or (HEAD, TAIL))) as evidence:
        plant(evidence)
    return {leak.partition(":")[0] for leak in evidence.leaks}


FORMS: dict[str, str] = {
    "plain": PLAIN,
    "thorny": THORNY,
    "URL-quoted": quote(THORNY, safe=""),
    "in a repr": repr(repr(THORNY)),
    "in HTML": html.escape(THORNY),
    "in JSON": json.dumps(json.dumps(THORNY)),
    "its first eight": HEAD[:8],
    "its last eight": TAIL[-8:],
    "eight in the middle": HEAD[1:9],
    "hexadecimal": THORNY.encode().hex(),
    **{f"base64 {at}": base64.b64encode(b"u" * at + THORNY.encode()).decode() for at in range(3)},
    "base64 for URLs": base64.urlsafe_b64encode(f"somebody:{THORNY}".encode()).decode(),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_secret_is_found_however_it_is_written(form: str) -> None:
    """Whole or in part; and where it is not, nothing is."""
    evidence = Evidence(HEAD, TAIL)
    evidence.text("text", f"before it {form} and after it")
    assert len(evidence.leaks) == 1
    evidence.text("text", f"before it {form[:4]} and after it")
    assert len(evidence.leaks) == 1


def _log(name: str = "some.library", level: int = logging.DEBUG, **named: Any) -> Callable[[Evidence], None]:
    logger = logging.getLogger(name)
    silent, alone = logger.level, logger.propagate

    def plant(_: Evidence) -> None:
        logger.setLevel(logging.CRITICAL)
        logger.propagate = False
        try:
            logger.log(level, "%s", *named.pop("args", ("nothing",)), **named)
        finally:
            logger.setLevel(silent)
            logger.propagate = alone

    return plant


def _leaking(local: object, text: str = "nothing", *, note: str = "") -> Exception:
    """An error that passed through a frame of somebody else's, where this was a local."""
    scope: dict[str, Any] = {}
    code = "def fail(local, error):\n    raise error"
    exec(compile(code, "somebody_elses.py", "exec"), scope)  # noqa: S102  only so is the frame no test's
    error = LookupError(text)
    if note:
        vars(error)["__notes__"] = [note]
    with suppress(LookupError):
        scope["fail"](local, error)
    return error


def _caused(error: Exception) -> Exception:
    outer = LookupError("outer")
    outer.__context__ = error
    return outer


class _Shown:
    """Has a secret, and shows it."""

    def __repr__(self) -> str:
        return f"<Shown {PLAIN}>"


def _failure(error: Exception) -> runqueue.FlushError:
    return runqueue.FlushError((runqueue.OperationFailure(RUN, "log_metrics", (), error, True, 1),), 1)


def _in_thread() -> None:
    raise _leaking(PLAIN)


def _write(name: str, text: str) -> Callable[[Evidence], None]:
    def plant(evidence: Evidence) -> None:
        Path(name).write_text(text)
        evidence.files(Path.cwd())

    return plant


def _die(_: Evidence) -> None:
    thread = threading.Thread(target=_in_thread)
    thread.start()
    thread.join()


LEAKS: dict[str, tuple[str, Callable[[Evidence], object]]] = {
    "a log's argument": ("log", _log(args=(PLAIN,))),
    "a log's argument in a list": ("log", _log(args=([PLAIN],))),
    "what is added to a log": ("log", _log(extra={"password": PLAIN})),
    "a log's error": ("local", lambda evidence: _log(level=logging.ERROR, exc_info=_leaking(PLAIN))(evidence)),
    "a log's error of ours": ("local", lambda evidence: _log("runqueue.x", exc_info=_leaking(PLAIN))(evidence)),
    "a log's traceback": ("log", lambda evidence: _log(exc_info=_leaking(0, PLAIN))(evidence)),
    "a warning": ("warning", lambda _: warnings.warn(PLAIN, stacklevel=1)),
    "a warning's source": ("warning", lambda _: warnings.warn("open", ResourceWarning, 1, _Shown())),
    "output": ("output", lambda _: sys.stdout.write(PLAIN)),
    "an error's text": ("error", lambda evidence: evidence.error("it", LookupError(PLAIN))),
    "an error's note": ("error", lambda evidence: evidence.error("it", _leaking("", note=PLAIN))),
    "an error's attribute": ("error", lambda evidence: evidence.error("it", _with_attribute())),
    "a local": ("local", lambda evidence: evidence.error("it", _leaking(PLAIN))),
    "a local with a repr": ("local", lambda evidence: evidence.error("it", _leaking(_Shown()))),
    "a local in a local": ("local", lambda evidence: evidence.error("it", _leaking([({"a": {_Shown()}},)]))),
    "a local of a cause": ("local", lambda evidence: evidence.error("it", _caused(_leaking(PLAIN)))),
    "a local of a failure": ("local", lambda evidence: evidence.error("it", _failure(_leaking(PLAIN)))),
    "a local of an error in a local": ("local", lambda evidence: evidence.error("it", _leaking([_leaking(PLAIN)]))),
    "an error in a thread": ("local", _die),
    "a pickle": ("pickle", lambda evidence: evidence.pickled("it", [PLAIN])),
    "an error's pickle": ("pickle", lambda evidence: evidence.error("it", _with_attribute())),
    "a repr of ours": ("repr", lambda evidence: evidence.objects("it", runqueue.Dataset(PLAIN, "d"))),
    "a repr of ours far down": ("repr", lambda evidence: evidence.objects("it", [_failure(LookupError(PLAIN))])),
    "a file": ("file", _write("job.log", PLAIN)),
    "a file's name": ("file", _write(PLAIN, "nothing")),
}


def _with_attribute() -> Exception:
    error = LookupError("nothing")
    vars(error)["token"] = PLAIN
    return error


@pytest.mark.parametrize(("collector", "plant"), LEAKS.values(), ids=LEAKS)
def test_every_collector_finds_what_is_planted(collector: str, plant: Callable[[Evidence], object]) -> None:
    """Else an empty list of leaks would prove nothing."""
    assert collector in found(plant)


def test_the_frames_of_tests_are_passed_over() -> None:
    """They hold the secret by right."""
    secret = PLAIN

    def fail() -> None:
        raise LookupError(len(secret))

    with watched(HEAD, TAIL) as evidence:
        attempt(evidence, "test", fail)
    assert_clean(evidence)


@pytest.mark.parametrize(
    ("name", "event", "seen"),
    [
        ("httpcore.http11", "receive_response_headers.complete return_value=", False),
        ("httpcore.http11", "send_request_headers.started request=", True),
        ("httpcore.connection", "connect_tcp.failed exception=", True),
        ("runqueue", "receive_response_headers.complete return_value=", True),
    ],
)
def test_only_httpcores_own_records_of_an_answers_headers_are_left_out(name: str, event: str, seen: bool) -> None:
    """They quote what the server sent; the logger is not ours."""
    assert found(lambda _: logging.getLogger(name).debug("%s%s", event, PLAIN)) == ({"log"} if seen else set())


@by_face
def test_the_logs_of_every_library_are_looked_at(echo: EchoServer, face: Face, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the level of debugging; a leak of any of them is found. httpcore's logs come with proxies."""
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    echo.answer = message(400, "BAD_REQUEST", lambda _: "no")
    with watched("nosuchword") as evidence:
        drive(evidence, face, echo.uri, QUICK | {"transport": "httpx"})
    assert {"runqueue", "httpcore.http11", "asyncio"} <= evidence.loggers


def test_a_secret_in_a_stores_error_is_found_wherever_it_gets_to(
    echo: EchoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: into the log, the flush's error, the locals of its frames, pickles and failures."""
    echo.answer = lambda _: reply(500)
    for show in ("__str__", "__repr__"):
        monkeypatch.setattr(runqueue.UnavailableError, show, lambda _: PLAIN)
    with watched(HEAD, TAIL) as evidence:
        drive(evidence, runqueue.Client, echo.uri, QUICK)
    kinds = {leak.partition(":")[0] for leak in evidence.leaks}
    assert {"log", "error", "local", "pickle", "repr"} <= kinds
