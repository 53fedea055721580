"""
A real `mlflow server` in a process group of its own, on a free port of 127.0.0.1.

Rules of this file: the server writes nothing outside its folder, talks to nobody but us, and is ended by the very
process id that was started. It knows nothing of runqueue.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

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
}


class MlflowServer:
    """
    One server over one folder. A context manager: started on entry, ended on exit.

    It may be stopped and started again: it keeps its port and its data, and pays the database's migration once.

    Args:
        folder: Holds the data, the artifacts and the log of the server.
        file_store: Keep the data in files, as MLflow did before 3.7, and not in SQLite.
    """

    def __init__(self, folder: Path, *, file_store: bool = False) -> None:
        self.folder = folder
        self.port = free_port()
        self._backend = f"file:{folder / 'files'}" if file_store else f"sqlite:///{folder / 'mlflow.db'}"
        self._environment = {"MLFLOW_ALLOW_FILE_STORE": "true"} if file_store else {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        """What a client takes as its tracking URI."""
        return f"http://{HOST}:{self.port}"

    @property
    def log(self) -> Path:
        """Where the server's output goes."""
        return self.folder / "server.log"

    def start(self) -> None:
        """
        Start the server and wait until it answers.

        Raises:
            RuntimeError: It has ended, or does not answer in time; the end of its output is in the text.
        """
        assert self._process is None, "it runs already"
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self._backend]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        command += ["--host", HOST, "--port", str(self.port), "--workers", "1"]
        with self.log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=clean_environment() | self._environment,
                start_new_session=True,  # so that its workers can be ended together with it, and nothing else
            )
        try:
            self._await_health()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and its workers, and wait until they have gone."""
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
        _await(lambda: not _listens(self.port), STOP_TIMEOUT, "the server's port is still open")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<MlflowServer {self.uri} {'stopped' if self._process is None else 'running'}>"

    def _await_health(self) -> None:
        process = self._process
        assert process is not None

        def healthy() -> bool:
            if process.poll() is not None:
                raise RuntimeError(f"mlflow server ended with {process.returncode}:\n{self._tail()}")
            return _is_healthy(self.port)

        try:
            _await(healthy, START_TIMEOUT, "no answer from mlflow server")
        except TimeoutError as error:
            raise RuntimeError(f"{error}:\n{self._tail()}") from None

    def _tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-30:])


def clean_environment() -> dict[str, str]:
    """
    The environment for a process of the tests: the user's MLflow settings, credentials and HTTP proxies left out,
    telemetry and the job runner switched off. Nor does it know of pytest:
    MLflow behaves differently under it.
    """
    kept = {key: value for key, value in os.environ.items() if not is_foreign(key) and not key.startswith("PYTEST_")}
    return kept | OWN_ENVIRONMENT


def is_foreign(variable: str) -> bool:
    """Whether an environment variable would change what the tests see, or where they send it."""
    return variable.startswith(("MLFLOW_", "_MLFLOW_", "DATABRICKS_")) or variable.lower().endswith("_proxy")


def free_port() -> int:
    """
    A port that nobody listens on.

    It is taken from below the range of ephemeral ports: there, a client that connects while its server is down could
    be given the very port as its own, and would then be connected to itself.
    """
    for port in range(20_000 + os.getpid() % 10_000, 32_768):
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            if port not in _given:
                _given.add(port)
                return port
    raise RuntimeError("no free port")


_given: set[int] = set()


def _await(condition: Callable[[], bool], timeout: float, message: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{message} after {timeout:g} s")
        time.sleep(_POLL)  # between two looks at the condition


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _signal_group(leader: int, number: signal.Signals) -> None:
    try:
        os.killpg(leader, number)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM where only zombies are left
        return
