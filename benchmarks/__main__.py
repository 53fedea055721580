"""`python -m benchmarks`: measure, print the table, write the JSON. See README.md beside this file."""

import argparse
import json
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.case import CASES
from benchmarks.harness import BenchmarkError, Measurement, measure_case
from benchmarks.peer import PEERS


def main() -> int:
    """Run the cases; the exit status is 1 when a measurement failed or a count did not agree."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure runqueue beside MLflow's queueing client, in one run."
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"which cases (default: all): {', '.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="a quarter of the work or less a measurement, 3 rounds")
    parser.add_argument("--rounds", type=_positive, metavar="N", help="samples of each peer (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to FILE")
    options = parser.parse_args()
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        parser.error(f"no case named {', '.join(unknown)}; there are {', '.join(CASES)}")
    rounds: int = options.rounds or (3 if options.quick else 5)

    environment = report.environment()
    print(report.header(environment, rounds=rounds, quick=options.quick), end="\n\n")
    results: list[list[Measurement]] = []
    for name in options.cases or CASES:
        case = CASES[name]
        if not any(not PEERS[peer].missing() for peer in case.peers):
            print(f"{name}: left out, none of its peers is installed", file=sys.stderr)
            continue
        try:
            measurements = measure_case(case, quick=options.quick, rounds=rounds, progress=_show_progress)
        except BenchmarkError as error:
            _show_progress("")
            print(error, file=sys.stderr)
            return 1
        _show_progress("")
        print(report.table([measurements]), end="\n\n")
        results.append(measurements)
    print(report.legend(results))
    if options.json is not None:
        figures = report.as_json(results, environment, quick=options.quick)
        options.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return number


def _show_progress(text: str) -> None:
    """Keep one status line on a terminal; say nothing into a file or a pipe."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
