"""
Rounds: every peer of a case, one after another, each in a fresh process, round after round.

Interleaving spreads a slow minute of the machine over all peers, and every second round runs them in the opposite
order, so that none is always first. A measurement whose server did not receive exactly what was logged is an error,
never a figure. A worker runs in a folder of its own, which is thrown away, and in a process group of its own, which is
ended.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from benchmarks.backend import REPOSITORY, running
from benchmarks.case import Case
from benchmarks.clients import quiet_environment
from benchmarks.measurement import Measurement, Result
from benchmarks.peer import PEERS
from benchmarks.rest import Rest

WORKER_TIMEOUT = 900.0  # seconds; the slowest measurement takes a minute, so this only ends a hang


class BenchmarkError(Exception):
    """Raised by the harness when a measurement failed, or when what the server received is not what was logged."""


def measure_case(
    case: Case, *, quick: bool, rounds: int | None, only: Collection[str], progress: Callable[[str], None]
) -> Result:
    """
    Measure every peer of *case* that can take part.

    Args:
        case: What to measure.
        quick: Take the case's `quick_sizes` and `quick_peers`.
        rounds: How many samples of each peer. None: as the case says.
        only: The peers to measure. Empty: all of the case.
        progress: Called before each measurement with its description.

    Raises:
        BenchmarkError: A worker or server failed, or the server did not receive what was logged.
    """
    rounds = rounds or case.rounds_of(quick=quick)
    sizes = case.sizes_of(quick=quick)
    reasons = {peer: PEERS[peer].left_out(case.options) for peer in case.peers_of(quick=quick)}
    left_out = {peer: reason for peer, reason in reasons.items() if reason is not None}
    left_out |= {peer: "not part of --quick" for peer in case.peers if peer not in reasons}
    left_out |= {peer: "not among --peer" for peer in case.peers if only and peer not in only}
    reason = case.left_out(quick=quick)
    measurements = [
        Measurement(case=case, peer=peer, size=case.size_for(peer, size), repeats=case.samples_of(peer, quick=quick))
        for peer in case.peers
        for size in sizes
        if reason is None and peer not in left_out
    ]
    began = time.monotonic()
    if measurements:
        try:
            with one_processor() if case.one_processor else nullcontext():
                _measure(case, measurements, rounds, progress)
        except (RuntimeError, OSError) as error:
            raise BenchmarkError(f"{case.name}: {error}") from error
    return Result(
        case=case,
        sizes=sizes,
        rounds=rounds,
        measurements=tuple(measurements),
        left_out=left_out,
        seconds=time.monotonic() - began,
        reason=reason,
    )


@contextmanager
def one_processor() -> Generator[None, None, None]:
    """Let processes that are started in the block share one processor, where the system supports it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(ours)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


def _measure(case: Case, measurements: list[Measurement], rounds: int, progress: Callable[[str], None]) -> None:
    if not case.backend.lasting:
        _measure_rounds(case, measurements, rounds, progress, None)
        return
    progress(f"{case.name} · its server starts")
    with running(case.backend, {}) as url:
        _measure_rounds(case, measurements, rounds, progress, url)


def _measure_rounds(
    case: Case, measurements: list[Measurement], rounds: int, progress: Callable[[str], None], url: str | None
) -> None:
    for number in range(rounds):
        for measurement in measurements if number % 2 == 0 else reversed(measurements):
            progress(f"{case.name} · round {number + 1} of {rounds} · {measurement.peer} · {measurement.size:,}")
            for _ in range(measurement.repeats):
                measurement.samples.append(_measure_once(measurement, url))


def _measure_once(measurement: Measurement, url: str | None) -> dict[str, float]:
    case = measurement.case
    with tempfile.TemporaryDirectory(prefix="rq-bench-", ignore_cleanup_errors=True) as folder:
        environment = quiet_environment(Path(folder))
        path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        if url is not None:
            return _run_worker(measurement, url, environment, folder)
        with running(case.backend, environment) as own_url:
            values = _run_worker(measurement, own_url, environment, folder)
            if case.expected_counts is not None:
                _check_counts(measurement, Rest(own_url).counts(), case.expected_counts(measurement.size))
        return values


def _check_counts(measurement: Measurement, received: dict[str, int], expected: dict[str, int]) -> None:
    differing = [
        f"{key}: {received[key]:,} received, {expected[key]:,} expected"
        for key in expected
        if received[key] != expected[key]
    ]
    if differing:
        raise BenchmarkError(f"{measurement.case.name}, {measurement.peer}: {'; '.join(differing)}")


def _run_worker(measurement: Measurement, url: str, environment: dict[str, str], folder: str) -> dict[str, float]:
    case, peer = measurement.case.name, measurement.peer
    command = [sys.executable, "-m", "benchmarks.worker", case, peer, str(measurement.size), url]
    output = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=output, stderr=output, text=True, start_new_session=True
    ) as worker:
        try:
            printed, complaints = worker.communicate(timeout=WORKER_TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise BenchmarkError(f"{case}, {peer}: no result within {WORKER_TIMEOUT:.0f} s") from error
        finally:
            _end_group(worker.pid)
    if worker.returncode != 0:
        raise BenchmarkError(f"{case}, {peer}: the worker ended with {worker.returncode}\n{complaints}")
    values: dict[str, float] = json.loads(printed.splitlines()[-1])["values"]
    return values


def _end_group(leader: int) -> None:
    """End processes that a peer may have left behind. The worker is the leader of a process group of its own."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # macOS: EPERM where only zombies are left
        return
