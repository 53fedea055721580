"""
The table of cases, `CASES`, with the targets. A row here and a function that measures make a case.

A target is the least that is acceptable; `aim` is the wish beyond it.
"""

from benchmarks import delivery, enqueue, importing, memory, throughput, training, waiting
from benchmarks.backend import NONE, POSTGRES, RAW, SLOW, SQLITE
from benchmarks.case import Case
from benchmarks.clients import Options
from benchmarks.quantity import Quantity
from benchmarks.target import Target

OTHERS = ("mlflow-async", "mlflow-sync", "wandb", "neptune", "trackio")
ENQUEUE_PEERS = ("floor", "mlflow", *OTHERS, "runqueue")
OURS = ("runqueue", "runqueue-aiohttp")
STREAMING = Options(flush_interval=2.0)
STREAMING_BOUNDED = Options(flush_interval=2.0, max_pending=1_000_000)
MANY_ROUNDS = 9
"""
Rounds of short measurements, and of those that must be exact to a few percent: the machine's speed changes for seconds.
"""

_FLOOR = Target(quantity="caller", relation="÷", other="floor", at_most=3.5)
_PER_METRIC = Quantity(name="caller", unit="µs/metric")
_PER_CALL = Quantity(name="caller", unit="µs/call")
_CPU = Quantity(name="cpu", unit="CPU µs/metric")
_WALL = Quantity(name="wall", unit="wall µs/metric")
_OF_IDEAL = Quantity(name="wall", unit="wall ÷ ideal")
_REQUESTS = Quantity(name="requests", unit="requests")
_REQUESTS_NEEDED = Quantity(name="requests needed", unit="÷ least possible")
_RATE = Quantity(name="rate", unit="metrics/s", better="more")
_OF_BARE = Target(quantity="rate", relation="÷", other="bare", at_least=0.95)

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            name="enqueue-10",
            group="enqueue",
            title="log_metrics of 10 metrics, caller's thread",
            quantities=(_PER_METRIC,),
            peers=ENQUEUE_PEERS,
            sizes=(50_000,),
            quick_sizes=(10_000,),
            measure=enqueue.enqueue_ten,
            targets=(
                Target(quantity="caller", relation="cheaper", other="mlflow", at_least=15, aim=25),
                *(Target(quantity="caller", relation="cheaper", other=other, at_least=8) for other in OTHERS),
                _FLOOR,
            ),
            rounds=MANY_ROUNDS,
            samples={"floor": 3, "runqueue": 3},
        ),
        Case(
            name="enqueue-1",
            group="enqueue",
            title="log_metrics of 1 metric, caller's thread",
            quantities=(_PER_CALL,),
            peers=ENQUEUE_PEERS,
            sizes=(200_000,),
            quick_sizes=(50_000,),
            measure=enqueue.enqueue_one,
            targets=(_FLOOR,),
            quick_peers=("floor", "mlflow", "runqueue"),
        ),
        Case(
            name="enqueue-single",
            group="enqueue",
            title="log_metric, caller's thread",
            quantities=(_PER_CALL,),
            peers=ENQUEUE_PEERS,
            sizes=(200_000,),
            quick_sizes=(50_000,),
            measure=enqueue.enqueue_single,
            targets=(_FLOOR,),
            quick_peers=("floor", "mlflow", "runqueue"),
        ),
        Case(
            name="delivery",
            group="client",
            title="whole client, 1 run, 10 metrics a call, to a server that answers {}",
            quantities=(_CPU,),
            peers=("mlflow", *OURS),
            sizes=(1_000_000,),
            quick_sizes=(50_000,),
            measure=delivery.one_run,
            one_processor=True,
            expected_counts=delivery.counts_of_one_run,
            targets=(
                Target(quantity="cpu", relation="cheaper", other="mlflow", at_least=15, aim=25),
                Target(
                    quantity="cpu", peer="runqueue-aiohttp", relation="cheaper", other="mlflow", at_least=25, aim=40
                ),
            ),
        ),
        Case(
            name="small-runs",
            group="client",
            title="many runs of 1 metric each: created, logged to, terminated",
            quantities=(Quantity(name="cpu", unit="CPU ms/run"), Quantity(name="requests", unit="requests/run")),
            peers=("mlflow", *OURS),
            sizes=(10_000,),
            quick_sizes=(300,),
            measure=delivery.small_runs,
            one_processor=True,
            expected_counts=delivery.counts_of_small_runs,
            targets=(
                Target(quantity="cpu", peer="runqueue-aiohttp", relation="cheaper", other="mlflow", at_least=6),
                Target(quantity="requests", at_most=3),
            ),
            rounds=3,
            shares={"mlflow": 10},
        ),
        Case(
            name="memory-queued",
            group="memory",
            title="metrics queued and not sent, 10 a call, each with values of its own; RSS",
            quantities=(Quantity(name="memory", unit="bytes/metric"),),
            peers=("floor", "mlflow", "runqueue"),
            sizes=(1_000_000,),
            quick_sizes=(200_000,),
            measure=memory.queued,
            backend=NONE,
            targets=(Target(quantity="memory", at_most=80),),
            rounds=3,
            requires=("psutil",),
        ),
        Case(
            name="memory-streaming",
            group="memory",
            title="metrics logged as fast as they are taken, streamed; RSS",
            quantities=(Quantity(name="peak", unit="MB above start"), Quantity(name="drift", unit="MB"), _WALL),
            peers=OURS,
            sizes=(10_000_000,),
            quick_sizes=(300_000,),
            measure=memory.streaming,
            options=STREAMING_BOUNDED,
            expected_counts=memory.counts_of_streaming,
            targets=(Target(quantity="peak", at_most=150), Target(quantity="drift", at_most=15)),
            rounds=2,
            requires=("psutil",),
        ),
        Case(
            name="latency",
            group="waiting",
            title="runs of 5 full batches, 50 ms a request, 4 workers",
            quantities=(_OF_IDEAL, _REQUESTS, _REQUESTS_NEEDED),
            peers=("mlflow", *OURS),
            sizes=(32,),
            quick_sizes=(8,),
            measure=waiting.many_runs,
            backend=SLOW,
            options=waiting.FOUR_AT_ONCE,
            expected_counts=waiting.counts_of_many_runs,
            targets=(Target(quantity="wall", at_most=1.10), Target(quantity="requests needed", at_most=1)),
            rounds=3,
        ),
        Case(
            name="latency-one-run",
            group="waiting",
            title="1 run of full batches, 50 ms a request",
            quantities=(_OF_IDEAL, _REQUESTS, _REQUESTS_NEEDED),
            peers=("mlflow", *OURS),
            sizes=(100,),
            quick_sizes=(10,),
            measure=waiting.one_run,
            backend=SLOW,
            expected_counts=waiting.counts_of_one_run,
            targets=(Target(quantity="wall", at_most=1.05), Target(quantity="requests needed", at_most=1)),
            rounds=3,
            quick_peers=OURS,
        ),
        Case(
            name="server-sqlite",
            group="server",
            title="a real mlflow server, SQLite, 1 worker, 2 requests at once",
            quantities=(_RATE,),
            peers=("bare", "mlflow", *OURS),
            sizes=(40_000,),
            quick_sizes=(12_000,),
            measure=throughput.into_server,
            backend=SQLITE,
            options=throughput.TWO_AT_ONCE,
            rounds=MANY_ROUNDS,
            targets=(_OF_BARE,),
            quick_peers=("bare", "runqueue"),
        ),
        Case(
            name="server-postgres",
            group="server",
            title="a real mlflow server, PostgreSQL, 2 workers, 4 requests at once",
            quantities=(_RATE,),
            peers=("bare", "mlflow", *OURS),
            sizes=(48_000,),
            quick_sizes=(16_000,),
            measure=throughput.into_server,
            backend=POSTGRES,
            options=throughput.FOUR_AT_ONCE,
            targets=(_OF_BARE,),
            full_only=True,
        ),
        Case(
            name="training",
            group="training",
            title="a numpy step of 1 ms, 10 metrics a step, streaming, against the same loop without logging",
            quantities=(
                Quantity(name="step", unit="step time ÷ without"),
                Quantity(name="p99", unit="µs/call"),
                Quantity(name="without", unit="ms/step", better="neither"),
            ),
            peers=("mlflow", "mlflow-async", "wandb", "neptune", "trackio", *OURS),
            sizes=(12_000,),
            quick_sizes=(400,),
            measure=training.training_loop,
            backend=RAW,
            options=STREAMING,
            targets=(Target(quantity="step", at_most=1.015), Target(quantity="p99", at_most=20)),
            shares=dict.fromkeys(("mlflow", "mlflow-async", "wandb", "neptune", "trackio"), 4),
            quick_peers=("mlflow", "runqueue"),
            requires=("numpy",),
        ),
        Case(
            name="import",
            group="import",
            title="python -X importtime",
            quantities=(Quantity(name="import", unit="ms"), Quantity(name="early", unit="of httpx, anyio")),
            peers=("mlflow", "wandb", "neptune", "trackio", "runqueue"),
            sizes=(1,),
            quick_sizes=(1,),
            measure=importing.import_time,
            backend=NONE,
            targets=(Target(quantity="import", at_most=60), Target(quantity="early", at_most=0)),
            quick_peers=("runqueue",),
        ),
        Case(
            name="growth-metrics",
            group="growth",
            title="more and more metrics to 1 run",
            quantities=(_CPU,),
            peers=("runqueue",),
            sizes=(10_000, 100_000, 1_000_000, 10_000_000),
            quick_sizes=(10_000, 100_000),
            measure=delivery.more_metrics,
            one_processor=True,
            expected_counts=delivery.counts_of_more_metrics,
            targets=(Target(quantity="cpu", relation="spread", at_most=1.25),),
            rounds=MANY_ROUNDS,
        ),
        Case(
            name="growth-runs",
            group="growth",
            title="more and more runs of 1,000 metrics",
            quantities=(_CPU,),
            peers=("runqueue",),
            sizes=(1, 10, 100, 1_000, 10_000),
            quick_sizes=(1, 100),
            measure=delivery.more_runs,
            one_processor=True,
            expected_counts=delivery.counts_of_more_runs,
            targets=(Target(quantity="cpu", relation="spread", at_most=1.25),),
            rounds=MANY_ROUNDS,
        ),
    )
}

GROUPS = tuple(dict.fromkeys(case.group for case in CASES.values()))


def chosen(names: list[str]) -> list[Case]:
    """
    Return the cases that these names of cases and groups mean, in the order of the table; without a name, all.

    Raises:
        KeyError: There is no such case or group; its argument is the name.
    """
    for name in names:
        if name not in CASES and name not in GROUPS:
            raise KeyError(name)
    return [case for case in CASES.values() if not names or case.name in names or case.group in names]
