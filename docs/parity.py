"""
MLflow's logging calls and their counterparts in runqueue: prints docs/mlflow-parity.md from the real classes.

    python docs/parity.py > docs/mlflow-parity.md
"""

# Rules of this file:
# - Names and signatures are read from the installed mlflow and runqueue; the words beside them stand in the tables below.
# - A method of MLflow's that the tables do not know (another mlflow may have some) gets a line that says so. A method of
#   runqueue that a table names and that does not exist is an error.
# - Signatures are shown without types, because their spelling differs between versions of Python.

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any, Final

import mlflow
from mlflow.tracking.client import MlflowClient
from mlflow.utils.autologging_utils import client as autologging

import runqueue
from runqueue.integrations.mlflow import QueueingClient, RunOperations

LOGS: Final = re.compile(
    r"log_.+|set_tag|delete_tag|set_terminated|(create|update|delete|restore)_run|create_experiment"
    r"|(create|finalize|delete)_logged_model|(set|delete)_logged_model_tags?"
)
"""Methods of MlflowClient that write what a training logs; the others read, or keep a registry, prompts and traces."""

UNKNOWN: Final = "unknown: new in this mlflow"

QUEUEING: Final = {
    "create_run": "`run_name` is sent; a parent may be pending",
    "set_terminated": "one request; sent even if the run's data was rejected",
    "log_params": "single form `log_param`",
    "log_inputs": "also takes `mlflow.data` datasets and `runqueue.Dataset`",
    "log_metrics": "single form `log_metric`",
    "set_tags": "single form `set_tag`",
    "flush": "the failure names each entry that was not stored",
}
"""Methods of `MlflowAutologgingQueueingClient`: the advantage of `runqueue.Client`."""

AT_ONCE: Final = "sent at once by MLflow"
ONE_RUN: Final = "sent by MLflow, after a flush of the run"
ALL_RUNS: Final = "sent by MLflow, after a flush of all runs"
NO_MODELS: Final = "-: models are MLflow's own"

LOGGING: Final = {
    "create_experiment": ("`Client.create_run`, by `experiment_name=`: looked up, or created", AT_ONCE),
    "create_run": ("`Client.create_run`", "sent at once by MLflow: the id is real"),
    "update_run": ("`Client.set_terminated` (status), tag `mlflow.runName` (name)", ONE_RUN),
    "set_terminated": ("`Client.set_terminated`", "sent after a flush of the run"),
    "delete_run": ("-: use MLflow's", ONE_RUN),
    "restore_run": ("-: use MLflow's", ONE_RUN),
    "log_metric": ("`Client.log_metric`, `Client.log_metrics`", "queued"),
    "log_param": ("`Client.log_param`, `Client.log_params`", "queued"),
    "set_tag": ("`Client.set_tag`, `Client.set_tags`", "queued"),
    "delete_tag": ("-: use MLflow's", ONE_RUN),
    "log_batch": ("`Client.log_metrics`, `Client.log_params`, `Client.set_tags`: batches are made for you", "queued"),
    "log_inputs": ("`Client.log_inputs`", "queued"),
    "log_outputs": (NO_MODELS, ONE_RUN),
    "log_artifact": ("`Client.log_artifact`", AT_ONCE),
    "log_artifacts": ("`Client.log_artifacts`", AT_ONCE),
    "log_text": ("`Client.log_text`", AT_ONCE),
    "log_dict": ("`Client.log_dict`", AT_ONCE),
    "log_figure": ("`Client.log_figure`", AT_ONCE),
    "log_image": ("`Client.log_image`", AT_ONCE),
    "log_stream": ("-: write a file, then `Client.log_artifact`", AT_ONCE),
    "log_table": ("-: MLflow reads the stored table and appends to it", AT_ONCE),
    "create_logged_model": (NO_MODELS, AT_ONCE),
    "finalize_logged_model": (NO_MODELS, ALL_RUNS),
    "delete_logged_model": (NO_MODELS, ALL_RUNS),
    "set_logged_model_tags": (NO_MODELS, AT_ONCE),
    "delete_logged_model_tag": (NO_MODELS, AT_ONCE),
    "log_model_artifact": (NO_MODELS, AT_ONCE),
    "log_model_artifacts": (NO_MODELS, AT_ONCE),
    "log_model_params": (NO_MODELS, AT_ONCE),
}
"""Methods of `MlflowClient`: the counterpart in `runqueue.Client`, and the way through the queued store."""


def document() -> str:
    """Return the text of docs/mlflow-parity.md."""
    return "\n".join(_lines()) + "\n"


def public(kind: type[Any]) -> dict[str, Any]:
    """Return the public methods of a class, in alphabetical order."""
    return {
        name: getattr(kind, name)
        for name in sorted(dir(kind))
        if not name.startswith("_") and callable(inspect.getattr_static(kind, name))
    }


def signature(name: str, function: Any) -> str:
    """Return a call as a user writes it: `log_metric(run_id, key, value, step=None)`."""
    parts: list[str] = []
    keyword_only = False
    for each in list(inspect.signature(function).parameters.values()):
        if each.name == "self":
            continue
        if each.kind is each.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        text = "*" * (each.kind is each.VAR_POSITIONAL) + "**" * (each.kind is each.VAR_KEYWORD) + each.name
        parts.append(text if each.default is each.empty else f"{text}={_default(each.default)}")
    return f"`{name}({', '.join(parts)})`"


def _default(value: object) -> str:
    return repr(value) if value is None or isinstance(value, (bool, int, float, str, tuple)) else "..."


def _lines() -> Iterator[str]:
    theirs: Any = autologging.MlflowAutologgingQueueingClient
    yield "# MLflow's logging calls and their counterparts here"
    yield ""
    yield f"Made by `python docs/parity.py > docs/mlflow-parity.md` from the classes of mlflow {mlflow.__version__}."
    yield ""
    yield "## `MlflowAutologgingQueueingClient`"
    yield ""
    yield "`runqueue.integrations.mlflow.QueueingClient` is its substitute, argument by argument; `install()` puts it under"
    yield "MLflow's autologging. `runqueue.Client` has the same methods, and more."
    yield ""
    yield "| in MLflow | `QueueingClient` | `runqueue.Client` | beyond it |"
    yield "| --- | --- | --- | --- |"
    yield _compared("MlflowAutologgingQueueingClient", theirs, QueueingClient, runqueue.Client, "settings as keywords")
    for name, method in public(theirs).items():
        ours, client = getattr(QueueingClient, name, None), getattr(runqueue.Client, name, None)
        yield _compared(name, method, ours, client, QUEUEING.get(name, UNKNOWN))
    yield "| `with` | the same | the same | `SystemExit` with 0 or None is a clean exit |"
    yield "| `PendingRunId()` | the same | the same | valid after a flush, picklable, `.run_id` |"
    pairs = (autologging.RunOperations, RunOperations, runqueue.RunOperations)
    yield _compared("RunOperations", pairs[0], pairs[1], None, "combines several flushes by their futures")
    waits = [kind.await_completion for kind in pairs]
    yield _compared("RunOperations.await_completion", waits[0], waits[1], waits[2], "awaitable; `.done`, `.report`")
    yield ""
    yield "`QueueingClient` raises an `MlflowException` with MLflow's words; its `__cause__` is the `FlushError` that"
    yield "`runqueue.Client` raises. Runs that either of them creates carry the tag `runqueue.create_id`."
    yield ""
    yield "## The logging half of `MlflowClient`"
    yield ""
    yield "The last column is for scripts that log by MLflow's own API (`runqueue.integrations.mlflow.enable()`,"
    yield "`runqueue run`, `MLFLOW_TRACKING_URI=runqueue+http://...`), with the fluent functions `mlflow.log_...` too."
    yield ""
    yield "| in MLflow | `runqueue.Client` | queued store |"
    yield "| --- | --- | --- |"
    methods = public(MlflowClient)
    for name, method in methods.items():
        if LOGS.fullmatch(name):
            client, store = LOGGING.get(name, (UNKNOWN, AT_ONCE))
            yield f"| {signature(name, method)} | {_checked(client)} | {store} |"
    yield ""
    others = sum(LOGS.fullmatch(name) is None for name in methods)
    yield f"The other {others} public methods of `MlflowClient` read, or keep the registry, prompts, traces and the like."
    yield "`runqueue.Client` has none of them. Under MLflow's own API, MLflow carries them out; reads come after a flush of"
    yield "the runs that they concern."


def _compared(name: str, theirs: Any, ours: Any, client: Any, beyond: str) -> str:
    shown = signature(name, theirs)
    same = "the same" if ours is not None and signature(name, ours) == shown else "not there"
    if ours is not None and same != "the same":
        same = signature(ours.__name__, ours)
    own = "-" if client is None else "the same" if signature(name, client) == shown else _more(client)
    return f"| {shown} | {same} | {own} | {beyond} |"


def _more(client: Any) -> str:
    return "`Client(tracking_uri=None, *, ...)`" if client is runqueue.Client else signature(client.__name__, client)


def _checked(cell: str) -> str:
    """
    Return a cell after a check of the methods of runqueue that it names.

    Raises:
        LookupError: One of them does not exist.
    """
    missing = [name for name in re.findall(r"Client\.(\w+)", cell) if not hasattr(runqueue.Client, name)]
    if missing:
        raise LookupError(f"runqueue.Client has no {', '.join(sorted(missing))}")
    return cell.replace("`Client.", "`")


if __name__ == "__main__":
    sys.stdout.write(document())
