"""`python -m benchmarks`: measure, print the tables, write JSON and charts, judge. See README.md beside this file."""

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from attrs import evolve

from benchmarks import plot, report
from benchmarks.cases import CASES, GROUPS, chosen
from benchmarks.harness import BenchmarkError, measure_case
from benchmarks.measurement import Result
from benchmarks.peer import PEERS


def main() -> int:
    """
    Run the cases.

    Returns:
        The exit status: 1 when a measurement failed or a count did not agree, or, with --check, a target was not
        reached.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure runqueue beside its peers, in one run.", allow_abbrev=False
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="cases, or groups of them (default: all); see --list")
    parser.add_argument("--quick", action="store_true", help="little work a measurement, one round, fewer peers")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="samples of each peer (default: 2 to 9)")
    parser.add_argument(
        "--all-processors", action="store_true", help="also for the cases that count CPU; they take one by default"
    )
    parser.add_argument("--peer", action="append", default=[], choices=PEERS, help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="draw a PNG chart for each group into FOLDER")
    parser.add_argument("--check", action="store_true", help="exit with 1 and name each row that falls short")
    parser.add_argument("--list", action="store_true", help="name the cases and their groups, and measure nothing")
    options = parser.parse_args()
    try:
        cases = chosen(options.cases)
    except KeyError as error:
        parser.error(f"no case or group named {error.args[0]}; there are {', '.join(dict.fromkeys([*GROUPS, *CASES]))}")
    if options.list:
        print("\n".join(f"{case.group:<10} {case.name:<18} {case.title}" for case in cases))
        return 0
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, of the extra `bench`")

    for folder in filter(None, (options.plot, options.json and options.json.parent)):
        folder.mkdir(parents=True, exist_ok=True)  # now, not after half an hour

    environment = report.environment(report.command(sys.argv[1:]))
    print(report.header(environment), end="\n\n")
    results: list[Result] = []
    for case in cases:
        placed = evolve(case, one_processor=case.one_processor and not options.all_processors)
        try:
            result = measure_case(
                placed, quick=options.quick, rounds=options.rounds, only=options.peer, progress=_show_progress
            )
        except BenchmarkError as error:
            _show_progress("")
            print(error, file=sys.stderr)
            return 1
        _show_progress("")
        print(report.table(result), end="\n\n", flush=True)
        results.append(result)
    print(report.legend(results))
    if options.json is not None:
        figures = report.as_json(results, environment, quick=options.quick)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    if options.plot is not None:
        for path in plot.write_charts(results, environment, options.plot):
            print(f"wrote {path}")
    if options.check:
        return _check(results)
    return 0


def _check(results: list[Result]) -> int:
    """Name the targets that were not reached; a figure that could not be measured counts as such."""
    lines = report.shortfalls(results)
    print("\n" + "\n".join(lines) if lines else "\nevery target is reached", file=sys.stderr if lines else sys.stdout)
    return 1 if lines else 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _show_progress(text: str) -> None:
    """Show one status line on a terminal, and nothing in a file or a pipe."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
