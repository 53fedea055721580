"""
Results as PNG charts, one for each group of cases: bars for each peer, lines where a case has several sizes, a dashed
line for the bound where it bounds the value itself. Date, machine and command are in each picture.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.measurement import Result

OURS, THEIRS, LEAST = "#1f6feb", "#9aa4b2", "#c9d1d9"
INCHES_A_PANEL = 4.8
WIDE = 20.0  # a panel whose largest value is so many times its smallest has a logarithmic scale


def write_charts(results: Sequence[Result], environment: dict[str, Any], folder: Path) -> list[Path]:
    """
    Draw the results.

    Returns:
        The files that were written, one for each group of cases that has figures.
    """
    import matplotlib

    matplotlib.use("Agg")
    groups: dict[str, list[Result]] = {}
    for result in results:
        if result.measurements:
            groups.setdefault(result.case.group, []).append(result)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_chart(folder / f"{group}.png", members, environment) for group, members in groups.items()]


def _write_chart(path: Path, results: Sequence[Result], environment: dict[str, Any]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(INCHES_A_PANEL * len(results), 3.6), layout="constrained")
    for axes, result in zip(figure.subplots(1, len(results), squeeze=False)[0], results, strict=True):
        if len(result.sizes) > 1:
            _draw_lines(axes, result)
        else:
            _draw_bars(axes, result)
        axes.set_title(f"{result.case.name}\n{_wrapped(result.case.described())}", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{_wrapped(report.machine(environment), 90)}\n{environment['command']}", fontsize=6)
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _draw_bars(axes: Any, result: Result) -> None:
    quantity = result.case.quantities[0]
    rows = [(row.peer, row.medians[quantity.name]) for row in result.measurements if quantity.name in row.medians]
    rows.reverse()  # the first at the top
    names, figures = [name for name, _ in rows], [figure for _, figure in rows]
    colors = [OURS if name.startswith("runqueue") else LEAST if name in report.FLOORS else THEIRS for name in names]
    bars = axes.barh(names, figures, color=colors)
    axes.bar_label(bars, labels=[quantity.show(figure) for figure in figures], fontsize=8, padding=3)
    axes.margins(x=0.25)
    if min(figures) > 0 and max(figures) / min(figures) > WIDE:
        axes.set_xscale("log")
    for target in result.case.targets:
        if target.relation == "value" and target.quantity == quantity.name and target.at_most is not None:
            axes.axvline(target.at_most, color="black", linestyle="--", linewidth=0.8)
    axes.set_xlabel(f"{quantity.unit}, {quantity.better} is better", fontsize=8)


def _draw_lines(axes: Any, result: Result) -> None:
    quantity = result.case.quantities[0]
    for peer in dict.fromkeys(row.peer for row in result.measurements):
        rows = [row for row in result.measurements if row.peer == peer and quantity.name in row.medians]
        figures = [row.medians[quantity.name] for row in rows]
        axes.plot([row.size for row in rows], figures, marker="o", color=OURS, label=peer)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0, top=1.1 * axes.get_ylim()[1])
    axes.set_ylabel(quantity.unit, fontsize=8)
    axes.legend(fontsize=8)


def _wrapped(text: str, width: int = 44) -> str:
    return "\n".join(textwrap.wrap(text, width))
