"""
docs/mlflow-parity.md is what its script prints, and has a line for each public method.

The table names the mlflow it was made with. With another one installed the file cannot be compared, as signatures
differ; what is asserted then is that the script still prints a line for each method, known to it or not.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.tracking.client import MlflowClient
from mlflow.utils.autologging_utils.client import MlflowAutologgingQueueingClient

from support.mlflow_server import clean_environment

DOCS = Path(__file__).parents[1] / "docs"
COMMITTED = (DOCS / "mlflow-parity.md").read_text("utf-8")


@pytest.fixture(scope="module")
def printed() -> str:
    """Return what the command prints."""
    command = [sys.executable, str(DOCS / "parity.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=clean_environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "parity.py"))


def test_the_committed_table_is_what_the_script_prints(printed: str, script: dict[str, Any]) -> None:
    """With the mlflow that the table names. No method is unknown then."""
    (made_with,) = re.findall(r"of mlflow (\S+)\.\n", COMMITTED)
    if mlflow.__version__ == made_with:
        assert printed == COMMITTED, "run: python docs/parity.py > docs/mlflow-parity.md"
        assert script["UNKNOWN"] not in printed
    else:
        assert f"of mlflow {mlflow.__version__}." in printed


def test_every_public_method_has_a_line(printed: str, script: dict[str, Any]) -> None:
    """All methods of the queueing client, and those of `MlflowClient` that log; each with its own signature."""
    lines = [line for line in printed.splitlines() if line.startswith("| `")]
    public, signature = script["public"], script["signature"]
    methods = {**{f"MlflowClient.{name}": each for name, each in public(MlflowClient).items()}}
    logging = {key: each for key, each in methods.items() if script["LOGS"].fullmatch(key.partition(".")[2])}
    assert len(logging) >= 20
    queueing = public(MlflowAutologgingQueueingClient)
    assert len(queueing) >= 7
    for name, each in (*queueing.items(), *((key.partition(".")[2], each) for key, each in logging.items())):
        assert any(line.startswith(f"| {signature(name, each)} |") for line in lines), name


def test_a_method_that_the_script_does_not_know_gets_a_line_that_says_so(
    script: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with an mlflow that is newer than the table. A method that mlflow no longer has gets no line."""
    monkeypatch.setattr(MlflowClient, "log_smell", lambda self, run_id, strength=0.5: None, raising=False)
    monkeypatch.setattr(MlflowAutologgingQueueingClient, "sniff", lambda self: None, raising=False)
    monkeypatch.delattr(MlflowClient, "log_table")
    document = script["document"]()
    assert f"| `log_smell(run_id, strength=0.5)` | {script['UNKNOWN']} | {script['AT_ONCE']} |" in document
    assert f"| `sniff()` | not there | - | {script['UNKNOWN']} |" in document
    assert "log_table" not in document


def test_a_missing_method_of_runqueue_is_an_error(script: dict[str, Any]) -> None:
    """Except for methods that are planned."""
    with pytest.raises(LookupError, match="log_nothing"):
        script["_checked"]("`Client.log_metrics`, `Client.log_nothing`")
