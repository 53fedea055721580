"""A real `mlflow server` in a process group of its own, on a free port of 127.0.0.1."""

# Rules of this file: the server writes nothing outside its folder, has no connections but those of the tests, and is ended by the very
# process id that was started. It knows nothing of runqueue.

from __future__ import annotations

import http.client
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from support import watchdog

if TYPE_CHECKING:
    from typing_extensions import Self

HOST = "127.0.0.1"
START_TIMEOUT = 60.0
"""Seconds; a start takes 5 to 8 of them on two cores, most of it imports."""
STOP_TIMEOUT = 10.0
_POLL = 0.05

OWN_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes, and a second at the start
    # MLflow finds a model's requirements by loading it in another process, which takes longer than all else in a test.
    "MLFLOW_REQUIREMENTS_INFERENCE_TIMEOUT": "1",
}

_OF_HTTP_CLIENTS = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR", "NETRC")


class MlflowServer:
    """
    One server over one folder. A context manager: started on entry, ended on exit.

    It may be stopped and started again: it keeps its port and its data, and pays the database's migration once.

    Args:
        folder: Holds the data, the artifacts and the log of the server.
        file_store: Keep the data in files, as MLflow did before 3.7, and not in SQLite.
        backend_uri: Keep the data there instead.
        workers: Processes that answer.
        static_prefix: What every path begins with, e.g. "/mlflow".
        admin: User and password of its administrator. None: the server asks for no user.
        certificate: A PEM file with a certificate and its key, to speak https by.
        environment: More variables for it.
        socket_path: A Unix socket to listen on, instead of the port.
    """

    def __init__(
        self,
        folder: Path,
        *,
        file_store: bool = False,
        backend_uri: str | None = None,
        workers: int = 1,
        static_prefix: str = "",
        admin: tuple[str, str] | None = None,
        certificate: Path | None = None,
        environment: Mapping[str, str] | None = None,
        socket_path: Path | None = None,
    ) -> None:
        self.folder = folder
        self._socket_path = socket_path
        self.port = free_port()
        self._static_prefix = static_prefix
        self._admin = admin
        self._secured = certificate is not None
        self._environment = dict(environment or {})
        if backend_uri is None:
            backend_uri = f"file:{folder / 'files'}" if file_store else f"sqlite:///{folder / 'mlflow.db'}"
        if file_store:
            self._environment["MLFLOW_ALLOW_FILE_STORE"] = "true"
        self._options = ["--backend-store-uri", backend_uri, "--artifacts-destination", str(folder / "artifacts")]
        self._options += ["--host", HOST, "--port", str(self.port), "--workers", str(workers)]
        if static_prefix:
            self._options += ["--static-prefix", static_prefix]
        if admin is not None:
            self._options += ["--app-name", "basic-auth"]
        if certificate is not None:
            pem = shlex.quote(str(certificate))
            self._options += ["--uvicorn-opts", f"--ssl-certfile {pem} --ssl-keyfile {pem}"]
        if socket_path is not None:
            self._options += ["--uvicorn-opts", f"--uds {shlex.quote(str(socket_path))}"]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """The tracking URI of the server."""
        return f"{'https' if self._secured else 'http'}://{HOST}:{self.port}{self._static_prefix}"

    @property
    def log(self) -> Path:
        """The file that the server's output is written to."""
        return self.folder / "server.log"

    def start(self) -> None:
        """
        Start the server and wait until it answers.

        Raises:
            RuntimeError: It has ended, or does not answer in time; the end of its output is in the text.
        """
        assert self._process is None, "it runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        environment = clean_environment() | self._environment
        if self._admin is not None:
            environment |= self._with_users(*self._admin)
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *self._options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment,
                start_new_session=True,  # so that its workers can be ended together with it, and nothing else
            )
        watchdog.guard(self._process.pid)
        try:
            self._await_health()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and its workers, and wait for their end."""
        process, self._process = self._process, None
        if process is None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            _signal_group(process.pid, signal.SIGKILL)
            process.wait()
        _signal_group(process.pid, signal.SIGKILL)  # a worker may outlive the leader
        watchdog.release(process.pid)
        wait_until(lambda: not _listens(self.port), STOP_TIMEOUT, "the server's port is still open")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<MlflowServer {self.uri} {'stopped' if self._process is None else 'running'}>"

    def _with_users(self, user: str, password: str) -> dict[str, str]:
        """Return the variables that make the server ask for users, which it keeps in a database beside its own."""
        settings = self.folder / "auth.ini"
        settings.write_text(
            f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{self.folder / 'users.db'}\n"
            f"admin_username = {user}\nadmin_password = {password.replace('%', '%%')}\n"
            "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        )
        return {
            "MLFLOW_AUTH_CONFIG_PATH": str(settings),
            "MLFLOW_AUTH_ADMIN_PASSWORD": password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
        }

    def _await_health(self) -> None:
        process = self._process
        assert process is not None

        def healthy() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"mlflow server ended with {process.returncode}:\n{self._tail()}")
            return self._is_healthy()

        try:
            wait_until(healthy, START_TIMEOUT, "no answer from mlflow server")
        except TimeoutError as error:
            raise RuntimeError(f"{error}:\n{self._tail()}") from None

    def _is_healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=5)
        if self._secured:  # by whom it is certified is the test's matter
            context = ssl._create_unverified_context()
            connection = http.client.HTTPSConnection(HOST, self.port, timeout=5, context=context)
        try:
            if self._socket_path is not None:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.connect(str(self._socket_path))
            connection.request("GET", f"{self._static_prefix}/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def clean_environment() -> dict[str, str]:
    """
    Return an environment for processes of the tests, without the user's MLflow settings, credentials and HTTP proxies.

    Telemetry and the job runner are off. Pytest's variables are left out, since MLflow behaves differently under
    pytest.
    """
    kept = {key: value for key, value in os.environ.items() if not is_foreign(key) and not key.startswith("PYTEST_")}
    return kept | OWN_ENVIRONMENT


def is_foreign(variable: str) -> bool:
    """Return whether an environment variable would change what the tests do, or the address they send to."""
    ours = variable.startswith(("MLFLOW_", "_MLFLOW_", "DATABRICKS_", "RUNQUEUE_")) or variable.lower().endswith(
        "_proxy"
    )
    return ours or variable in _OF_HTTP_CLIENTS


def free_port() -> int:
    """
    Return a port that no process listens on, the least recently returned one; no other worker of this test run gets it.

    Its ports are below the ephemeral ones. A client that connects to an ephemeral port while its server is down could
    be given that very port as its own, and would then be connected to itself.
    """
    for port in islice(_ports, _SHARE):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


_SHARE = 3_192
"""Ports of one worker, of which there are four at most (see pyproject.toml)."""


def _share() -> Iterator[int]:
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + worker % 4 * _SHARE
    for number in count(os.getpid()):  # two test runs at once begin in different places
        yield first + number % _SHARE


_ports = _share()


def wait_until(condition: Callable[[], bool], timeout: float, message: str) -> None:
    """
    Poll a condition that sends no signal when it changes.

    Args:
        condition: The condition.
        timeout: Seconds until the wait has failed.
        message: The text of the TimeoutError.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} after {timeout:g} s")
        time.sleep(_POLL)  # between two looks at the condition


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM where only zombies are left
        return
