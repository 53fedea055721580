"""
What runqueue has logged, on MLflow's own web page: a parent with its children, each with its charts.

    pytest -m browser tests/browser
    RUNQUEUE_SCREENSHOT=docs/mlflow-run.png pytest -m browser tests/browser     # makes the picture of the README anew
"""

# Rules of this file: what is asserted is what a user would see. It needs Chromium and its driver, and is skipped where
# they are not installed (Debian: `apt-get install chromium chromium-driver`).

from __future__ import annotations

import math
import os
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import attrs
import pytest

import runqueue
from support.browser import CHROMIUM, DRIVER, Page
from support.mlflow_server import MlflowServer
from support.readback import Readback

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="needs chromium and chromedriver, which are missing"),
]

SCREENSHOT = "RUNQUEUE_SCREENSHOT"
"""The variable that names the file for the picture; no other run of the tests writes one."""
MOST_BYTES = 300_000
STEPS = 300
"""Points of each metric; of more than 320 the page shows a sample."""
RATES = (0.03, 0.003, 0.0003)

READ_ROWS = """
return [...document.querySelectorAll("[role=row] a[href*='/runs/']")].map(link => [
    link.getAttribute("href").split("/").pop(), link.textContent, link.getBoundingClientRect().left
])
"""
READ_CHARTS = """
const charts = {}
for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    const card = plot.closest("[data-testid=experiment-view-compare-runs-card]")
    const drawn = [...plot.querySelectorAll(".scatterlayer .trace path.js-line")].filter(line => line.getTotalLength() > 50)
    const lines = {}
    for (const trace of plot.data) lines[trace.name] = [[...trace.x], [...trace.y]]
    charts[card.innerText.split("\\n")[0]] = [drawn.length, lines]
}
return charts
"""

Lines = dict[str, list[list[float]]]


@attrs.frozen(kw_only=True)
class Logged:
    """What the page should show."""

    experiment_id: str
    parent: str
    children: dict[str, str]
    """Names by id."""
    losses: dict[str, list[float]]
    """Of each run, by its name."""
    accuracies: dict[str, list[float]]

    def charts(self, *names: str) -> dict[str, Lines]:
        """Return the charts of these runs: steps and values, by metric and run."""
        steps = [float(step) for step in range(STEPS)]
        return {
            "loss": {name: [steps, self.losses[name]] for name in names},
            "accuracy": {name: [steps, self.accuracies[name]] for name in names},
        }


@pytest.fixture(scope="module")
def logged(mlflow_server: MlflowServer) -> Logged:
    """A search for a learning rate: a child run for each rate, and the mean in the parent."""
    with Readback(mlflow_server.uri) as readback:
        experiment_id = str(readback.post("experiments/create", {"name": "learning rates"})["experiment_id"])
    rng = random.Random(7)
    losses: dict[str, list[float]] = {}
    accuracies: dict[str, list[float]] = {}
    for rate in RATES:
        fall = [math.exp(-2 * rate * step) for step in range(STEPS)]
        losses[f"rate {rate:g}"] = [0.1 + 2.2 * left + rng.gauss(0, 0.04) for left in fall]
        accuracies[f"rate {rate:g}"] = [0.95 - 0.85 * left + rng.gauss(0, 0.008) for left in fall]
    for metric in (losses, accuracies):
        metric["search"] = [sum(values) / len(RATES) for values in zip(*metric.values(), strict=True)]

    names: dict[str, runqueue.Run] = {}
    with (
        runqueue.Client(mlflow_server.uri, flush_interval=0.5) as client,
        client.start_run(experiment_id=experiment_id, run_name="search", tags={"team": "vision"}) as parent,
    ):
        parent.log_params({"rates": len(RATES), "steps": STEPS})
        for rate in RATES:
            with parent.start_run(run_name=f"rate {rate:g}") as child:
                child.log_params({"rate": rate, "layers": 12})
                names[f"rate {rate:g}"] = child
        for step in range(STEPS):
            for name, run in (*names.items(), ("search", parent)):
                run.log_metrics({"loss": losses[name][step], "accuracy": accuracies[name][step]}, step=step)
    return Logged(
        experiment_id=experiment_id,
        parent=str(parent.run_id),
        children={str(run.run_id): name for name, run in names.items()},
        losses=losses,
        accuracies=accuracies,
    )


@pytest.fixture(scope="module")
def browser(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(mlflow_server.uri, tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(browser: Page) -> Iterator[Page]:
    """A page; at the end of the test assert that it has made no request to another host."""
    yield browser
    assert browser.foreign_addresses() == set()


def rows(page: Page) -> list[tuple[str, str]]:
    """Return id and name of each run of the table."""
    return [(run_id, name) for run_id, name, _ in page.run(READ_ROWS)]


def expand(page: Page, run_id: str) -> None:
    """Open or close the branch of a run."""
    page.click(f"//div[@role='row'][.//a[contains(@href, '{run_id}')]]//button")


def await_charts(page: Page, expected: dict[str, Lines]) -> None:
    """Wait until each metric has a chart with these points and a visible line for each run."""

    def complete() -> bool:
        charts: dict[str, tuple[int, Lines]] = page.run(READ_CHARTS)
        drawn = all(count >= len(expected[metric]) for metric, (count, _) in charts.items() if metric in expected)
        return drawn and {metric: lines for metric, (_, lines) in charts.items()} == expected

    page.wait(complete, f"charts of {sorted(expected)}")


def test_a_parent_and_its_children_stand_in_a_tree(page: Page, logged: Logged) -> None:
    """At first only the parent is shown. Its branch opens and closes; the children are indented below it."""
    page.open(f"experiments/{logged.experiment_id}/runs")
    parent = (logged.parent, "search")
    page.wait(lambda: rows(page) == [parent], "the parent alone")
    expand(page, logged.parent)
    children = [(run_id, name) for run_id, name in logged.children.items()]
    page.wait(lambda: sorted(rows(page)) == sorted([parent, *children]), "the parent and its children")
    assert rows(page)[0] == parent
    left = {run_id: at for run_id, _, at in page.run(READ_ROWS)}
    assert all(left[run_id] > left[logged.parent] for run_id in logged.children)
    expand(page, logged.parent)
    page.wait(lambda: rows(page) == [parent], "the parent alone again")


def test_a_run_has_its_params_tags_metrics_and_relatives(page: Page, logged: Logged) -> None:
    """On its own page: the last value of each metric, the status, and links to parent or children."""
    page.open(f"experiments/{logged.experiment_id}/runs/{logged.parent}")
    for name, value in (
        ("rates", str(len(RATES))),
        ("steps", str(STEPS)),
        ("Status", "Finished"),
        ("team", ": vision"),
    ):
        page.wait(partial(page.shows, name, value), f"{name} {value}")
    page.wait(lambda: page.shows("Child runs"), "its children")
    text = " ".join(page.lines())
    assert all(name in text for name in logged.children.values())

    child, name = next(iter(logged.children.items()))
    page.open(f"experiments/{logged.experiment_id}/runs/{child}")
    expected = [("Parent run", "search"), ("rate", f"{RATES[0]:g}"), ("layers", "12"), ("Run ID", child)]
    expected += [("loss", repr(logged.losses[name][-1])), ("accuracy", repr(logged.accuracies[name][-1]))]
    for label, value in expected:
        page.wait(partial(page.shows, label, value), f"{label} {value}")


def test_each_metric_of_a_run_has_its_chart(page: Page, logged: Logged) -> None:
    """It has every point, by step and value."""
    child, name = next(iter(logged.children.items()))
    page.open(f"experiments/{logged.experiment_id}/runs/{child}/model-metrics")
    await_charts(page, logged.charts(name))


def test_the_charts_of_all_runs_stand_beside_their_tree(page: Page, logged: Logged, tmp_path: Path) -> None:
    """The picture of the README."""
    page.open(f"experiments/{logged.experiment_id}/runs?compareRunsMode=CHART")
    expand(page, logged.parent)
    page.wait(lambda: len(rows(page)) == 1 + len(RATES), "the children")
    await_charts(page, logged.charts("search", *logged.children.values()))
    asked = os.environ.get(SCREENSHOT)
    path = Path(asked) if asked else tmp_path / "page.png"
    page.screenshot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < MOST_BYTES
