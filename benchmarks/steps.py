"""What is logged: the metrics of step 0, 1, … of a training loop. The keys stay, the values change."""

from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from typing import Any

# Dicts that are made beforehand come round again after so many steps.
VALUES_PER_KEY = 100


def log_steps(client: Any, run_id: Any, calls: int, metrics_per_call: int) -> None:
    """Log steps 0, 1, … of one run, of dicts made beforehand."""
    log_metrics = client.log_metrics
    for step, metrics in enumerate(steps(calls, metrics_per_call)):
        log_metrics(run_id, metrics, step)


def steps(calls: int, metrics_per_call: int) -> "islice[dict[str, float]]":
    """
    The dicts to log. They are made once a process and come round again, so that making them is not counted, nor their
    values' memory; taking the next of them costs about 0.03 µs, which is.
    """
    return islice(cycle(_rows(metrics_per_call)), calls)


@cache
def _rows(metrics_per_call: int) -> list[dict[str, float]]:
    columns = [values(column) for column in range(metrics_per_call)]
    return [{f"metric_{column}": value for column, value in enumerate(row)} for row in zip(*columns, strict=True)]


def fresh_steps(calls: int, metrics_per_call: int) -> Iterator[dict[str, float]]:
    """
    Dicts made at each step, with floats of their own, as a loop that computes them has: what memory is counted of.
    Floats that come round again would be counted once only, 24 bytes a metric too few.
    """
    keys = [f"metric_{column}" for column in range(metrics_per_call)]
    for step in range(calls):
        yield {key: step + number / 16 for number, key in enumerate(keys)}


def values(column: int) -> list[float]:
    """What the metric in this column is, step by step, until it comes round again."""
    return [(column + 1) / (step + 3) for step in range(VALUES_PER_KEY)]
