"""
The logic of the benchmarks' harness: tables, targets, the counting server. Nothing here looks at a time.

The repository root stays off the path (see `test_layers.py`), so each test puts it there for itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _root_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    yield
    for name in [name for name in sys.modules if name == "benchmarks" or name.startswith("benchmarks.")]:
        del sys.modules[name]


def test_every_case_names_peers_and_quantities_that_exist() -> None:
    from benchmarks.cases import CASES
    from benchmarks.peer import PEERS

    for case in CASES.values():
        quantities = {quantity.name for quantity in case.quantities}
        assert {*case.peers, *(case.quick_peers or ())} <= set(PEERS), case.name
        for target in case.targets:
            assert target.quantity in quantities, case.name
            assert target.peer in case.peers, case.name
            assert target.other is None or target.other in case.peers, case.name


def test_a_name_of_a_case_and_a_group_means_the_same_cases() -> None:
    from benchmarks.cases import CASES, GROUPS

    for name in set(CASES) & set(GROUPS):
        assert [case.name for case in CASES.values() if case.group == name] == [name]


def test_every_case_has_a_target() -> None:
    from benchmarks.cases import CASES

    assert [case.name for case in CASES.values() if not case.targets] == []


def test_a_group_means_all_its_cases_in_the_order_of_the_table() -> None:
    from benchmarks.cases import chosen

    assert [case.name for case in chosen(["memory-queued", "waiting"])] == [
        "memory-queued",
        "latency",
        "latency-one-run",
    ]
    with pytest.raises(KeyError, match="speed"):
        chosen(["speed"])


def test_a_target_of_times_cheaper_divides_the_other_by_the_peer() -> None:
    from benchmarks.target import Target

    target = Target(quantity="cpu", relation="cheaper", other="mlflow", at_least=15)
    assert target.judge({("runqueue", 1): {"cpu": 2.0}, ("mlflow", 1): {"cpu": 30.0}}).met
    short = target.judge({("runqueue", 1): {"cpu": 2.0}, ("mlflow", 1): {"cpu": 29.0}})
    assert (short.met, short.reached, short.verdict) == (False, 14.5, "falls short")


def test_a_target_beside_the_floor_divides_the_peer_by_it_and_includes_the_bound() -> None:
    from benchmarks.target import Target

    target = Target(quantity="caller", relation="÷", other="floor", at_most=3.5)
    assert target.judge({("runqueue", 1): {"caller": 7.0}, ("floor", 1): {"caller": 2.0}}).met


def test_a_spread_is_taken_over_all_sizes() -> None:
    from benchmarks.target import Target

    target = Target(quantity="cpu", relation="spread", at_most=1.25)
    medians = {("runqueue", size): {"cpu": cpu} for size, cpu in ((10, 2.0), (100, 1.0), (1_000, 1.5))}
    assert target.judge(medians).reached == 2.0


def test_a_target_without_a_measurement_is_not_reached_and_names_the_peer() -> None:
    from benchmarks.target import Target

    target = Target(quantity="cpu", relation="cheaper", other="wandb", at_least=8)
    judgement = target.judge({("runqueue", 1): {"cpu": 2.0}})
    assert (judgement.met, judgement.missing, judgement.verdict) == (False, "wandb", "not measured")


@pytest.mark.parametrize(
    "options",
    [{}, {"at_most": 1.0, "at_least": 1.0}, {"at_most": 1.0, "other": "mlflow"}, {"at_most": 1.0, "relation": "÷"}],
)
def test_an_inconsistent_target_is_refused(options: dict[str, object]) -> None:
    from benchmarks.target import Target

    with pytest.raises(ValueError, match=r"one bound|go together"):
        Target(quantity="cpu", **options)  # type: ignore[arg-type]


def test_a_peer_whose_constructor_lacks_an_option_is_left_out_with_the_reason() -> None:
    from attrs import evolve

    from benchmarks.clients import Options
    from benchmarks.peer import PEERS

    old = evolve(PEERS["runqueue"], keywords=lambda: frozenset({"max_workers"}))
    assert old.left_out(Options(max_workers=4)) is None
    reason = old.left_out(Options(flush_interval=2.0))
    assert reason == "this version of runqueue.Client does not take flush_interval="


def test_a_peer_that_is_not_installed_is_left_out_with_the_reason() -> None:
    from benchmarks.clients import Options, nothing
    from benchmarks.peer import Peer

    peer = Peer(name="x", title="x", connect=nothing, requires=("no_such_module",))
    assert peer.left_out(Options()) == "no_such_module not installed"


def test_the_counting_server_counts_what_it_answers() -> None:
    from benchmarks.server import CountingServer

    server = CountingServer()
    body = b'{"run_id": "1", "metrics": [{"key": "a", "timestamp": 1}, {"key": "b", "timestamp": 1}]}'
    assert server.answer(b"POST", b"/api/2.0/mlflow/runs/log-batch", body) == b"{}"
    assert b'"run_id"' in server.answer(b"POST", b"/api/2.0/mlflow/runs/create", b"{}")
    assert (server.counts.requests, server.counts.metrics, server.counts.created) == (2, 2, 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system lets no process choose its processors")
def test_one_processor_binds_children_and_then_frees_the_harness() -> None:
    from benchmarks.harness import one_processor

    ours = os.sched_getaffinity(0)
    asks = [sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)))"]
    with one_processor():
        assert subprocess.check_output(asks, text=True) == "1\n"
    assert os.sched_getaffinity(0) == ours


def test_only_the_cases_that_count_cpu_run_on_one_processor() -> None:
    from benchmarks.cases import CASES

    count_cpu = {name for name, case in CASES.items() if case.quantities[0].unit.startswith("CPU")}
    assert {name for name, case in CASES.items() if case.one_processor} == count_cpu
    assert all("one processor" in CASES[name].described() for name in count_cpu)
    assert CASES["latency"].described() == CASES["latency"].title


def test_a_short_measurement_is_repeated_in_new_processes_within_a_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks import harness
    from benchmarks.cases import CASES
    from benchmarks.measurement import Measurement

    case = CASES["enqueue-10"]
    taken: list[str] = []

    def measure_once(measurement: Measurement, url: str | None) -> dict[str, float]:
        taken.append(measurement.peer)
        return {"caller": 1.0}

    monkeypatch.setattr(harness, "_measure_once", measure_once)
    harness.measure_case(case, quick=False, rounds=2, only=["floor", "runqueue"], progress=lambda text: None)
    assert taken == [*["floor"] * 3, *["runqueue"] * 6, *["floor"] * 3]
    taken.clear()
    harness.measure_case(case, quick=True, rounds=1, only=["floor", "runqueue"], progress=lambda text: None)
    assert taken == ["floor", "runqueue"]


def test_a_figure_that_describes_the_conditions_is_not_compared() -> None:
    from benchmarks import report
    from benchmarks.cases import CASES
    from benchmarks.measurement import Measurement, Result

    case = CASES["training"]
    samples = [{"step": 1.01, "p99": 10.0, "without": 1.02}]
    rows = tuple(Measurement(case=case, peer=peer, size=1, samples=samples) for peer in ("mlflow", "runqueue"))
    result = Result(case=case, sizes=(1,), rounds=1, measurements=rows, left_out={})
    shown = report.table(result)
    assert "step [step time ÷ without; less is better]" in shown
    assert shown[shown.index("without [ms/step]") :].splitlines()[1].split() == ["mlflow", *["1.020"] * 3]


def test_a_figure_is_shown_with_its_significant_digits() -> None:
    from benchmarks.quantity import Quantity

    show = Quantity(name="cpu", unit="µs").show
    figures = (0, 0.0042, 0.1234, 1.0, 12.344, 123.44, 98_765.4)
    assert [show(figure) for figure in figures] == ["0", "0.0042", "0.123", "1.000", "12.34", "123.4", "98,765"]


def test_the_import_time_excludes_the_start_of_the_interpreter() -> None:
    from benchmarks.importing import _sum_of_roots

    report = """\
import time: self [us] | cumulative | imported package
import time:       100 |        100 |   encodings
import time:       200 |        900 | site
import time:        10 |         10 |     attr
import time:        20 |         30 |   attrs
import time:        40 |         70 | runqueue
import time:         5 |          5 | runqueue.more
"""
    assert _sum_of_roots(report) == 75


def test_the_command_is_shown_without_folders() -> None:
    """The charts, which are published, show the command."""
    from benchmarks.report import command

    given = ["growth", "--json", "/home/me/a.json", "--check", "--plot=/home/me/charts", "--rounds", "9"]
    assert command(given) == "python -m benchmarks growth --check --rounds 9"
    assert command(["--plot", "charts"]) == "python -m benchmarks"


def test_the_command_line_lists_every_case() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert "growth-runs" in done.stdout
    assert "server-postgres" in done.stdout
