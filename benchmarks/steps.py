"""The data that is logged: the metrics of step 0, 1, … of a training loop. The keys stay, the values change."""

from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from typing import Any

# Dicts that are made beforehand come round again after so many steps.
VALUES_PER_KEY = 100


def log_steps(client: Any, run_id: Any, calls: int, metrics_per_call: int) -> None:
    """Log steps 0, 1, … of one run, from dicts made beforehand."""
    log_metrics = client.log_metrics
    for step, metrics in enumerate(steps(calls, metrics_per_call)):
        log_metrics(run_id, metrics, step)


def steps(calls: int, metrics_per_call: int) -> "islice[dict[str, float]]":
    """
    Yield the dicts to log. They are made once a process and repeat, so that neither their making nor their values'
    memory is counted. Taking the next one costs about 0.03 µs, which is counted.
    """
    return islice(cycle(_rows(metrics_per_call)), calls)


@cache
def _rows(metrics_per_call: int) -> list[dict[str, float]]:
    columns = [values(column) for column in range(metrics_per_call)]
    return [{f"metric_{column}": value for column, value in enumerate(row)} for row in zip(*columns, strict=True)]


def fresh_steps(calls: int, metrics_per_call: int) -> Iterator[dict[str, float]]:
    """
    Yield dicts made at each step, with floats of their own, as a loop that computes them has. Memory is measured with
    them: floats that repeat would be counted once only, 24 bytes a metric too few.
    """
    keys = [f"metric_{column}" for column in range(metrics_per_call)]
    for step in range(calls):
        yield {key: step + number / 16 for number, key in enumerate(keys)}


def values(column: int) -> list[float]:
    """Return the values of the metric in this column until they repeat."""
    return [(column + 1) / (step + 3) for step in range(VALUES_PER_KEY)]
