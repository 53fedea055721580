"""
Fixtures of all rings. Those of the live ring need a real `mlflow server`, which is started once a session, when first
asked for.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from support.mlflow_server import OWN_ENVIRONMENT, MlflowServer, is_foreign
from support.proxy import FaultyProxy
from support.readback import Readback


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's settings, credentials, certificates and HTTP proxies away from every test: its home is empty."""
    with pytest.MonkeyPatch.context() as patch:
        home = str(tmp_path_factory.mktemp("home"))
        for variable in ("HOME", "USERPROFILE"):  # the latter on Windows
            patch.setenv(variable, home)
        for variable in filter(is_foreign, tuple(os.environ)):
            patch.delenv(variable)
        for variable, value in OWN_ENVIRONMENT.items():
            patch.setenv(variable, value)
        yield


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell has what it starts in the background ignore interrupts, and so would every child that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server on SQLite, as `mlflow server` is by default."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server


@pytest.fixture(scope="session")
def file_store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server on the file store: it answers 500 INTERNAL_ERROR to one param that conflicts."""
    with MlflowServer(tmp_path_factory.mktemp("file-store-server"), file_store=True) as server:
        yield server


@pytest.fixture
def readback(mlflow_server: MlflowServer) -> Iterator[Readback]:
    """Reads what the server has stored, past the proxy and the library."""
    with Readback(mlflow_server.uri) as reader:
        yield reader


@pytest.fixture
def experiment_id(readback: Readback, request: pytest.FixtureRequest) -> str:
    """An experiment of the test's own."""
    return readback.new_experiment(request.node.name)


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultyProxy]:
    """Counts, and on demand fails, what goes to the server."""
    with FaultyProxy(mlflow_server.uri) as proxy:
        yield proxy
