"""Results as a table for people and as JSON for programs, with the machine and the versions that made them."""

import os
import platform
import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.measurement import Measurement, Result
from benchmarks.peer import PEERS
from benchmarks.quantity import Quantity

BASELINE = "mlflow"
FLOORS = ("floor", "bare")
PACKAGES = (
    "runqueue",
    "mlflow",
    "wandb",
    "neptune-scale",
    "trackio",
    "httpx",
    "httpx-aiohttp",
    "aiohttp",
    "orjson",
    "sniffio",
    "numpy",
)
WHERETO = ("--json", "--plot")
"""Options that say where to write."""


def command(arguments: Iterable[str]) -> str:
    """Return the command line for tables and charts, without output paths, which are private."""
    shown: list[str] = []
    rest = iter(arguments)
    for each in rest:
        if each in WHERETO:
            next(rest, None)
        elif each.partition("=")[0] not in WHERETO:
            shown.append(each)
    return shlex.join(["python", "-m", "benchmarks", *shown])


def environment(command: str) -> dict[str, Any]:
    """Return machine, versions and command of the measurement."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "packages": {package: _version(package) for package in PACKAGES},
    }


def machine(environment: dict[str, Any]) -> str:
    """Return date and machine in one line."""
    return " · ".join(str(environment[key]) for key in ("date", "python", "system", "processor")) + (
        f" · {environment['cores']} cores"
    )


def header(environment: dict[str, Any]) -> str:
    """Return the lines above the table."""
    packages = environment["packages"].items()
    versions = " · ".join(f"{package} {found or 'not installed'}" for package, found in packages)
    return f"{machine(environment)}\n{versions}\n{environment['command']}"


def table(result: Result) -> str:
    """
    Return a block for each quantity with a line for each peer (and size), then the targets, then the left-out peers.

    Two ratios of medians: how many times better than MLflow's queueing client, and the share of the floor.
    """
    case = result.case
    if result.reason is not None:
        return f"{case.name}: left out, {result.reason}"
    blocks = [_block(result, quantity) for quantity in case.quantities]
    lines = [f"  {judgement}" for judgement in result.judgements]
    lines += [f"  {'left out':<13} {peer}: {reason}" for peer, reason in result.left_out.items()]
    title = f"{case.name}: {case.described()} · size {', '.join(f'{size:,}' for size in result.sizes)}"
    title += f" · {result.rounds} round{'s' if result.rounds > 1 else ''} in {result.seconds:.0f} s"
    return "\n".join([title, *(block for block in blocks if block), *lines])


def legend(results: Sequence[Result]) -> str:
    """Return what each peer in the tables is."""
    measured = {measurement.peer for result in results for measurement in result.measurements}
    return "\n".join(f"{peer.name}: {peer.title}" for peer in PEERS.values() if peer.name in measured)


def shortfalls(results: Sequence[Result]) -> list[str]:
    """Return each target that was not reached, or not measured, with the name of its case."""
    lines = []
    for result in results:
        if result.reason is not None and not result.case.full_only:
            lines.append(f"{result.case.name}: not measured, {result.reason}")
        elif result.reason is None:
            lines += [f"{result.case.name}: {judgement}" for judgement in result.judgements if not judgement.met]
    return lines


def as_json(results: Sequence[Result], environment: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """Return everything in the tables, with every sample."""
    return {"environment": environment, "quick": quick, "cases": [_case_as_json(result) for result in results]}


def ratios(
    measurement: Measurement, others: Sequence[Measurement], quantity: Quantity
) -> tuple[float | None, float | None]:
    """Return (times better than the baseline, share of the floor); `None` where the case has no such peer."""
    case = measurement.case
    medians = {
        other.peer: other.medians.get(quantity.name)
        for other in others
        if len(case.sizes) == 1 or other.size == measurement.size
    }
    own = measurement.medians.get(quantity.name)
    baseline = medians.get(BASELINE)
    floor = next((medians[name] for name in FLOORS if medians.get(name)), None)
    if not own or quantity.better == "neither":
        return None, None
    better = None if not baseline else own / baseline if quantity.better == "more" else baseline / own
    return better, None if not floor else own / floor


def _block(result: Result, quantity: Quantity) -> str:
    several = len({measurement.size for measurement in result.measurements}) > 1
    rows: list[list[str]] = []
    for measurement in result.measurements:
        values = measurement.values(quantity.name)
        if not values:
            continue
        better, share = ratios(measurement, result.measurements, quantity)
        figures = [measurement.medians[quantity.name], min(values), max(values)]
        name = f"{measurement.peer} at {measurement.size:,}" if several else measurement.peer
        shares = ["" if better is None else f"{better:.1f}", "" if share is None else f"{share:.2f}"]
        rows.append([name, *map(quantity.show, figures), *shares])
    if not rows:
        return ""
    measured = {measurement.peer for measurement in result.measurements}
    compared = f"it ÷ {BASELINE}" if quantity.better == "more" else f"{BASELINE} ÷ it"
    if quantity.better == "neither":
        head = [f"  {quantity.name} [{quantity.unit}]", "median", "min", "max", "", ""]
    else:
        head = [f"  {quantity.name} [{quantity.unit}; {quantity.better} is better]", "median", "min", "max"]
        head += [compared if BASELINE in measured else ""]
        head += [*[f"it ÷ {floor}" for floor in FLOORS if floor in measured], ""]
    rows = [[f"    {name}", *cells] for name, *cells in rows]
    return "\n".join(
        f"{row[0]:<46}" + "".join(f"{cell:>11}" for cell in row[1:4]) + _ratio_cells(row) for row in [head, *rows]
    )


def _ratio_cells(row: list[str]) -> str:
    return f"{row[4]:>14}{row[5]:>11}".rstrip() if row[4] or row[5] else ""


def _case_as_json(result: Result) -> dict[str, Any]:
    case = result.case
    return {
        "name": case.name,
        "group": case.group,
        "title": case.title,
        "quantities": [{"name": each.name, "unit": each.unit, "better": each.better} for each in case.quantities],
        "sizes": list(result.sizes),
        "rounds": result.rounds,
        "seconds": result.seconds,
        "left_out": result.reason,
        "peers_left_out": result.left_out,
        "rows": [_row_as_json(measurement, result) for measurement in result.measurements],
        "targets": [
            {
                "target": judgement.target.text,
                "bound": judgement.target.bound,
                "reached": judgement.reached,
                "verdict": judgement.verdict,
            }
            for judgement in result.judgements
        ],
    }


def _row_as_json(measurement: Measurement, result: Result) -> dict[str, Any]:
    figures = {}
    for quantity in result.case.quantities:
        if quantity.name in measurement.medians:
            better, share = ratios(measurement, result.measurements, quantity)
            figures[quantity.name] = {
                "median": measurement.medians[quantity.name],
                "times_better_than_mlflow": better,
                "share_of_the_floor": share,
            }
    return {"peer": measurement.peer, "size": measurement.size, "figures": figures, "samples": measurement.samples}


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
