"""
Training case: what logging does to a loop that computes, in one process: blocks of steps with and without it take
turns, A B B A, so that what the machine does meanwhile meets both.

A step is a real one, forward and backward through one layer in numpy, of 1 ms; numpy gives up the interpreter's
lock several times in it, so a client's own thread can take it, and the step waits to get it back: that is counted. Each
block with logging is followed by a flush that is not counted, so that what is left over does not meet the next block; a
block lasts ten batches, of which the client sends all but the last while the loop runs. MLflow's queueing client sends
nothing in the loop; peers without a flush go on writing in the blocks without logging, which flatters them.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

from benchmarks.delivery import METRICS_PER_CALL, warm_up
from benchmarks.steps import VALUES_PER_KEY, steps
from benchmarks.work import Work

STEP_SECONDS = 0.001
STEPS_A_BLOCK = 1_000
CALIBRATIONS = 12  # at most, on a machine that changes its speed all the time
NEAR = 0.03
STEPS_TO_WARM_UP = 50
STEPS_TO_CALIBRATE = 150
WIDTH = 160
PERCENTILE = 0.99

Step = Callable[[], None]
Log = Callable[[Any, dict[str, float], int], None]


def training_loop(work: Work) -> dict[str, float]:
    """
    Run steps with logging, and as many without. Return their ratio, the 99th percentile of a log call in µs, and the ms
    of a step without logging.
    """
    train = _calibrated_step()
    client = work.connect()
    if hasattr(client, "set_terminated"):  # the queueing clients
        warm_up(client)
    run_id = client.create_run("0")
    client.log_metrics(run_id, next(steps(1, METRICS_PER_CALL)), 0)
    numbers = iter(range(1, 10**9))
    steps_a_block = min(STEPS_A_BLOCK, work.size)
    ratios: list[float] = []
    alone: list[float] = []
    calls: list[int] = []
    for pair in range(max(work.size // steps_a_block, 1)):
        logged = plain = 0.0
        for logging in (False, True) if pair % 2 == 0 else (True, False):
            if logging:
                if hasattr(client, "set_terminated"):  # MLflow's queueing client takes no placeholder after a flush
                    run_id = client.create_run("0")
                logged = _block(train, client.log_metrics, run_id, numbers, steps_a_block, calls)
                client.flush()
            else:
                plain = _block(train, _log_nothing, run_id, numbers, steps_a_block, [])
        ratios.append(logged / plain)
        alone.append(plain / steps_a_block * 1_000)
    calls.sort()
    return {
        "step": statistics.median(ratios),
        "p99": calls[int(len(calls) * PERCENTILE)] / 1_000,
        "without": statistics.median(alone),
    }


def _block(train: Step, log: Log, run_id: Any, numbers: Iterator[int], length: int, calls: list[int]) -> float:
    """Run steps; return their seconds. The duration of each call of *log*, in ns, is appended to *calls*."""
    rows = cycle(list(steps(VALUES_PER_KEY, METRICS_PER_CALL)))
    clock = time.perf_counter_ns
    began = clock()
    for _ in range(length):
        train()
        row, number = next(rows), next(numbers)
        before = clock()
        log(run_id, row, number)
        calls.append(clock() - before)
    return (clock() - began) / 1e9


def _log_nothing(run_id: Any, metrics: dict[str, float], step: int) -> None:
    """The log function of blocks without logging."""


def _calibrated_step() -> Step:
    """Return a numpy step with as many samples as make it last 1 ms on this machine, after a warm-up."""
    samples = 64
    step = _step(samples)
    for _ in range(CALIBRATIONS):
        _typical_seconds(step, STEPS_TO_WARM_UP)
        lasted = _typical_seconds(step, STEPS_TO_CALIBRATE)
        if abs(lasted / STEP_SECONDS - 1) <= NEAR:
            break
        samples = max(1, round(samples * min(STEP_SECONDS / lasted, 4)))
        step = _step(samples)
    return step


def _typical_seconds(step: Step, times: int) -> float:
    lasted = []
    for _ in range(times):
        began = time.perf_counter()
        step()
        lasted.append(time.perf_counter() - began)
    return statistics.median(lasted)


def _step(samples: int) -> Step:
    import numpy as np

    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(samples, WIDTH))
    wanted = generator.normal(size=(samples, WIDTH))
    weights = generator.normal(size=(WIDTH, WIDTH)) / WIDTH
    # Results go into existing arrays. Allocating new ones sometimes fetches memory, which can double a step's time.
    outputs, slope, change = np.empty_like(inputs), np.empty_like(inputs), np.empty_like(weights)

    def step() -> None:
        np.tanh(np.matmul(inputs, weights, out=outputs), out=outputs)
        np.subtract(outputs, wanted, out=slope)
        np.subtract(1, np.square(outputs, out=outputs), out=outputs)
        np.multiply(slope, outputs, out=slope)
        np.multiply(np.matmul(inputs.T, slope, out=change), 1e-3 / samples, out=change)
        np.subtract(weights, change, out=weights)

    return step
