"""Results as a table for people and as JSON for programs, with the machine and the versions that made them."""

import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.harness import Measurement
from benchmarks.peer import PEERS

BASELINE = "mlflow"
FLOOR = "floor"
PACKAGES = ("runqueue", "mlflow", "httpx", "httpx-aiohttp", "aiohttp", "orjson", "sniffio")


def environment() -> dict[str, object]:
    """Where and with what this was measured."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {package: _version(package) for package in PACKAGES},
    }


def header(environment: dict[str, object], *, rounds: int, quick: bool) -> str:
    """The lines above the table."""
    packages = environment["packages"]
    assert isinstance(packages, dict)
    return (
        f"{environment['date']} · {environment['python']} · {environment['system']} · {environment['processor']}"
        f" · {environment['cores']} cores · {rounds} rounds{' · --quick' if quick else ''}\n"
        + " · ".join(f"{package} {found or 'not installed'}" for package, found in packages.items())
    )


def table(cases: Sequence[Sequence[Measurement]]) -> str:
    """
    One block a case, one line a peer. Less is better. `mlflow ÷ it` says how many times cheaper than MLflow's
    queueing client the peer is, `it ÷ floor` how many times dearer than the floor; both are ratios of medians.
    """
    blocks = []
    for measurements in cases:
        case = measurements[0].case
        rows: list[tuple[str, ...]] = [("", "median", "min", "max", "mlflow ÷ it", "it ÷ floor")]
        for measurement in measurements:
            cheaper, dearer = _ratios(measurement, measurements)
            figures = [measurement.median, min(measurement.samples), max(measurement.samples)]
            ratios = ["" if cheaper is None else f"{cheaper:.1f}", "" if dearer is None else f"{dearer:.2f}"]
            rows.append((measurement.peer, *[f"{figure:.3f}" for figure in figures], *ratios))
        lines = [f"{peer:<18}" + "".join(f"{cell:>13}" for cell in cells) for peer, *cells in rows]
        blocks.append("\n".join([f"{case.name}: {case.title} [{case.unit}]", *lines]))
    return "\n\n".join(blocks)


def legend(cases: Sequence[Sequence[Measurement]]) -> str:
    """What each peer in the table is, and which peers were left out and why."""
    measured = {measurement.peer for measurements in cases for measurement in measurements}
    wanted = {peer for measurements in cases for peer in measurements[0].case.peers}
    lines = [f"{peer.name}: {peer.title}" for peer in PEERS.values() if peer.name in measured]
    lines += [
        f"{peer.name}: left out, {', '.join(peer.missing())} not installed"
        for peer in PEERS.values()
        if peer.name in wanted - measured
    ]
    return "\n".join(lines)


def as_json(
    cases: Sequence[Sequence[Measurement]], environment: dict[str, object], *, quick: bool
) -> dict[str, object]:
    """Everything in the table, with every sample."""
    return {
        "environment": environment,
        "quick": quick,
        "cases": [
            {
                "name": measurements[0].case.name,
                "title": measurements[0].case.title,
                "unit": measurements[0].case.unit,
                "size": measurements[0].case.size_of(quick=quick),
                "peers": [_peer_as_json(measurement, measurements) for measurement in measurements],
            }
            for measurements in cases
        ],
    }


def _peer_as_json(measurement: Measurement, measurements: Sequence[Measurement]) -> dict[str, object]:
    cheaper, dearer = _ratios(measurement, measurements)
    return {
        "name": measurement.peer,
        "median": measurement.median,
        "samples": measurement.samples,
        "times_cheaper_than_mlflow": cheaper,
        "times_the_floor": dearer,
    }


def _ratios(measurement: Measurement, measurements: Sequence[Measurement]) -> tuple[float | None, float | None]:
    """(times cheaper than the baseline, times the floor); `None` where the case has no such peer."""
    medians = {other.peer: other.median for other in measurements}
    baseline, floor = medians.get(BASELINE), medians.get(FLOOR)
    return (
        None if baseline is None else baseline / measurement.median,
        None if floor is None else measurement.median / floor,
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux keeps it where `platform` does not look."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown processor"
