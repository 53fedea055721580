"""
Rounds: every peer of a case, one after another, each in a fresh process, round after round.

Interleaving spreads a slow minute of the machine over all peers, and every second round runs them in the opposite order,
so that none is always first. A measurement whose server did not receive exactly what was logged is an error, never a
figure.
"""

import json
import os
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import field, frozen

from benchmarks.case import Case
from benchmarks.peer import PEERS
from benchmarks.server import HOST

WORKER_TIMEOUT = 900.0  # seconds; the slowest measurement takes seconds, so this only ends a hang
SERVER_TIMEOUT = 10.0  # seconds
REPOSITORY = Path(__file__).resolve().parent.parent

# The port of the discard service: the enqueue cases need an address, and nothing must answer there.
NO_SERVER = f"http://{HOST}:9"


class BenchmarkError(Exception):
    """Raised by the harness when a measurement failed, or when what the server received is not what was logged."""


@frozen(kw_only=True)
class Measurement:
    """All samples of one peer in one case."""

    case: Case
    peer: str
    samples: list[float] = field(factory=list[float])

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def measure_case(case: Case, *, quick: bool, rounds: int, progress: Callable[[str], None]) -> list[Measurement]:
    """
    Measure every peer of *case* that is installed.

    Args:
        case: What to measure.
        quick: Take the case's `quick_size`.
        rounds: How many samples of each peer.
        progress: Is told, before each measurement, what comes.

    Raises:
        BenchmarkError: A worker failed, or the server did not receive what was logged.
    """
    size = case.size_of(quick=quick)
    measurements = [Measurement(case=case, peer=peer) for peer in case.peers if not PEERS[peer].missing()]
    for number in range(rounds):
        for measurement in measurements if number % 2 == 0 else reversed(measurements):
            progress(f"{case.name} · round {number + 1} of {rounds} · {measurement.peer}")
            measurement.samples.append(_measure_once(case, measurement.peer, size))
    return measurements


def _measure_once(case: Case, peer: str, size: int) -> float:
    if case.expected_counts is None:
        return _run_worker(case, peer, size, NO_SERVER)
    with _running_server() as url:
        value = _run_worker(case, peer, size, url)
        received = _received_counts(url)
    expected = case.expected_counts(size)
    differing = [
        f"{key}: {received[key]:,} received, {expected[key]:,} expected"
        for key in expected
        if received[key] != expected[key]
    ]
    if differing:
        raise BenchmarkError(f"{case.name}, {peer}: {'; '.join(differing)}")
    return value


def _run_worker(case: Case, peer: str, size: int, tracking_uri: str) -> float:
    command = [sys.executable, "-m", "benchmarks.worker", case.name, peer, str(size), tracking_uri]
    try:
        worker = subprocess.run(
            command,
            check=False,
            cwd=REPOSITORY,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=WORKER_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchmarkError(f"{case.name}, {peer}: no result within {WORKER_TIMEOUT:.0f} s") from error
    if worker.returncode != 0:
        raise BenchmarkError(f"{case.name}, {peer}: the worker ended with {worker.returncode}\n{worker.stderr}")
    value = json.loads(worker.stdout.splitlines()[-1])["value"]
    return float(value)


@contextmanager
def _running_server() -> Iterator[str]:
    """A counting server of its own for one measurement; its URL."""
    command = [sys.executable, "-m", "benchmarks.server"]
    with subprocess.Popen(
        command, cwd=REPOSITORY, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        port = server.stdout.readline().strip()
        if not port:
            raise BenchmarkError("the counting server did not start")
        try:
            yield f"http://{HOST}:{port}"
        finally:
            server.stdin.close()
            try:
                server.wait(SERVER_TIMEOUT)
            except subprocess.TimeoutExpired:
                server.kill()


def _received_counts(url: str) -> dict[str, int]:
    # Without the proxies of the environment: all traffic stays on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/counts", timeout=SERVER_TIMEOUT) as answer:
        counts: dict[str, int] = json.load(answer)
    return counts


def _environment() -> dict[str, str]:
    """
    This process's environment without what would change a peer or send its traffic elsewhere: MLflow's settings and
    credentials, and proxies. MLflow's usage telemetry, which sends to another host, is off.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("MLFLOW_") and not name.lower().endswith("_proxy")
    }
    return kept | {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
