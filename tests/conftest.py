"""
Fixtures of all tests, and the selection of what runs by default.

The live tests need a real `mlflow server`, which is started at its first use, once a session.
By default `pytest` runs each behaviour, and of what is large by repetition a sample; `pytest --whole` runs everything.
"""

# How a test says what of it is repetition:
# - `@pytest.mark.whole`: it runs with `--whole` alone, because other tests show the same in less time.
# - `@pytest.mark.sample("id", ...)`: without `--whole`, of its cases those run whose ids match one of these patterns of
#   fnmatch(3).
# - the fixture `whole`: the length of what it measures, or the number of its rounds.
# Hypothesis tries fewer examples without `--whole`.
# A test or case that the command line names (`file.py::test[case]`) runs in any case.

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase

import hypothesis
import pytest

from support.mlflow_server import OWN_ENVIRONMENT, MlflowServer, is_foreign
from support.proxy import FaultyProxy
from support.readback import Readback

_PR_SET_PDEATHSIG = 1
"""Of prctl(2)."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole", action="store_true", help="run every repetition, and not a sample of them")


def pytest_configure(config: pytest.Config) -> None:
    # A busy machine is no defect: no example has a deadline.
    hypothesis.settings.register_profile("whole", deadline=None)
    hypothesis.settings.register_profile("sample", deadline=None, max_examples=30)
    hypothesis.settings.load_profile("whole" if config.getoption("whole") else "sample")
    if sys.platform == "linux" and hasattr(config, "workerinput"):
        # Without it, a worker of pytest-xdist lives for ten seconds after a test run that was killed, and its servers too.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors, because tests also wait; ports are shared out for four (tests/support)."""
    return min(4, (os.cpu_count() or 1) + 1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = {argument.partition("::")[2] for argument in config.args if "::" in argument}
    if not named:
        _check_samples(items)
    if config.getoption("whole"):
        return
    chosen: list[pytest.Item] = []
    left_out: list[pytest.Item] = []
    for item in items:
        runs = named & {item.name, _function(item)} or _is_in_sample(item)
        (chosen if runs else left_out).append(item)
    if left_out:
        items[:] = chosen
        config.hook.pytest_deselected(items=left_out)


def _is_in_sample(item: pytest.Item) -> bool:
    if item.get_closest_marker("whole") is not None:
        return False
    sample = item.get_closest_marker("sample")
    return sample is None or any(fnmatchcase(_case(item), pattern) for pattern in sample.args)


def _check_samples(items: list[pytest.Item]) -> None:
    """A pattern matches a case: one that was renamed would otherwise run with `--whole` alone, and nobody would notice."""
    unmatched: dict[str, set[str]] = {}
    for item in items:
        for sample in item.iter_markers("sample"):
            patterns = unmatched.setdefault(f"{item.path}::{_function(item)}", set(sample.args))
            patterns -= {pattern for pattern in patterns if fnmatchcase(_case(item), pattern)}
    unknown = [f"{test}: {', '.join(sorted(patterns))}" for test, patterns in unmatched.items() if patterns]
    if unknown:
        raise pytest.UsageError("no case matches the sample of\n" + "\n".join(unknown))


def _function(item: pytest.Item) -> str:
    return item.name.partition("[")[0]


def _case(item: pytest.Item) -> str:
    return item.name.partition("[")[2].removesuffix("]")


@pytest.fixture(scope="session")
def whole(pytestconfig: pytest.Config) -> bool:
    """Whether repetitions run at their full length."""
    return bool(pytestconfig.getoption("whole"))


@pytest.fixture(scope="session", autouse=True)
def _own_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's settings, credentials, certificates and HTTP proxies away from the tests, with an empty home."""
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
    """Let children of the tests be interrupted. A shell lets what it starts in the background ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server on SQLite, as `mlflow server` is by default."""
    with MlflowServer(tmp_path_factory.mktemp("mlflow-server")) as server:
        yield server


@pytest.fixture(scope="session")
def file_store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """A server on the file store, which answers 500 INTERNAL_ERROR to a conflicting param."""
    with MlflowServer(tmp_path_factory.mktemp("file-store-server"), file_store=True) as server:
        yield server


@pytest.fixture
def readback(mlflow_server: MlflowServer) -> Iterator[Readback]:
    """Reads what the server has stored, without the proxy and the library."""
    with Readback(mlflow_server.uri) as reader:
        yield reader


@pytest.fixture
def experiment_id(readback: Readback, request: pytest.FixtureRequest) -> str:
    """The id of an experiment that no other test uses."""
    return readback.new_experiment(request.node.name)


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultyProxy]:
    """Counts, and on demand fails, requests to the server."""
    with FaultyProxy(mlflow_server.uri) as proxy:
        yield proxy
