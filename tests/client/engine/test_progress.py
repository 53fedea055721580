"""The progress of a long flush: a bar on a terminal, lines in the log elsewhere; nothing for a short flush."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

import runqueue
from runqueue.engine import _progress
from support.mlflow_server import clean_environment
from support.process import PATIENCE, PREAMBLE
from support.proxy import Fault, ScriptedServer

RUN = "a" * 32


def on_terminal(script: str, *arguments: str) -> str:
    """What a script writes to stderr where that is a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
    read: list[bytes] = []

    def reading() -> None:
        try:
            while data := os.read(ours, 4096):
                read.append(data)
        except OSError:  # Linux: the other end is closed
            return

    reader = threading.Thread(target=reading)
    reader.start()
    command = [sys.executable, "-c", PREAMBLE + script, *arguments]
    try:
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stderr=theirs, env=clean_environment(), check=True, timeout=PATIENCE
        )
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    return b"".join(read).decode()


SLOW = """
from runqueue.engine import _progress
_progress.SHOWN_AFTER = 0.05
client = runqueue.Client(URI, limits=runqueue.Limits(metrics=10), **eval(sys.argv[2]))
for step in range(50):
    client.log_metric("r", "m", 1.0, step)
"""
WAYS = {"flush": "client.flush()", "close": "client.close()", "exit": "pass"}


@pytest.mark.parametrize("way", WAYS)
def test_a_bar_shows_how_many_entries_are_stored(server: ScriptedServer, way: str) -> None:
    """On a terminal; by a flush, a close, and the end of the interpreter, where no thread can be started for it."""
    server.fail("runs/log-batch", Fault.delayed(0.3), times=5)
    settings = "{'flush_interval': 60}" if way == "exit" else "{}"
    shown = on_terminal(SLOW + WAYS[way], server.uri, settings)
    assert "runqueue: flushing" in shown and "/50" in shown
    assert "10/50" in shown or "20/50" in shown or "30/50" in shown, shown
    assert "Warning" not in shown and "Traceback" not in shown
    assert shown.rsplit("\r", 1)[-1].strip() == "", "the bar is gone at the end"


def test_progress_false_shows_nothing(server: ScriptedServer) -> None:
    """Not even on a terminal."""
    server.fail("runs/log-batch", Fault.delayed(0.3), times=5)
    assert on_terminal(SLOW + "client.close()", server.uri, "{'progress': False}") == ""


def test_a_flush_that_ends_soon_shows_nothing(server: ScriptedServer) -> None:
    """Nothing is left to wait for."""
    assert on_terminal(SLOW.replace("0.05", "20") + "client.close()", server.uri, "{}") == ""
    assert _progress.SHOWN_AFTER == 2.0 and _progress.LINE_EVERY == 30.0


@pytest.mark.parametrize("progress", [False, True])
def test_without_a_terminal_lines_in_the_log_show_the_progress(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, progress: bool
) -> None:
    """At intervals, with counts."""
    monkeypatch.setattr(_progress, "SHOWN_AFTER", 0.02)
    monkeypatch.setattr(_progress, "LINE_EVERY", 0.1)
    server.fail("runs/log-batch", Fault.delayed(0.3), times=2)
    with runqueue.Client(server.uri, limits=runqueue.Limits(metrics=10), progress=progress) as client:
        for step in range(20):
            client.log_metric(RUN, "m", 1.0, step)
        client.flush()
    lines = [record.getMessage() for record in caplog.records if "still flushing" in record.getMessage()]
    assert bool(lines) is progress
    assert not progress or (lines[0].endswith("0 of 20 entries") and lines[-1].endswith("10 of 20 entries"))


@pytest.mark.parametrize("broken", ["isatty", "write", "tqdm"])
def test_a_bar_that_cannot_be_drawn_stops_no_flush(
    server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """A stderr that was closed, or is none at all; a tqdm that fails."""

    class Stderr:
        def isatty(self) -> bool:
            if broken == "isatty":
                raise ValueError("closed")
            return True

        def write(self, text: str) -> int:
            raise ValueError("closed")

        def flush(self) -> None: ...

    def fail(total: int) -> None:
        raise ImportError("tqdm")

    monkeypatch.setattr(_progress, "SHOWN_AFTER", 0.02)
    monkeypatch.setattr(sys, "stderr", Stderr())
    if broken == "tqdm":
        monkeypatch.setattr(_progress, "_bar", fail)
    server.fail("runs/log-batch", Fault.delayed(0.3))
    with runqueue.Client(server.uri) as client:
        client.log_metric(RUN, "m", 1.0)
        client.flush()
    assert client.statistics().stored == 1


UPLOADS = """
from runqueue.engine import _progress
_progress.SHOWN_AFTER = 0.05
open(sys.argv[2], "wb").write(b"x" * 5_000_000)
with runqueue.Client(URI) as client:
    for at in range(12):
        client.log_artifact("a" * 32, sys.argv[2], str(at))
"""


def test_artifacts_are_counted_by_bytes(tmp_path: Path) -> None:
    """In a bar of their own."""
    with ScriptedServer() as server:
        answer = {"run": {"info": {"run_id": RUN, "artifact_uri": "mlflow-artifacts:/1/r"}}}
        server.fail("runs/get", Fault.answer(200, answer))
        server.fail("large", Fault.delayed(0.2), times=None)
        shown = on_terminal(UPLOADS, server.uri, str(tmp_path / "large"))
    assert "runqueue: uploading" in shown
    assert "/60.0M" in shown


def test_a_line_in_the_log_says_how_many_bytes_of_artifacts_are_stored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Where there is no bar."""
    monkeypatch.setattr(_progress, "SHOWN_AFTER", 0.05)
    monkeypatch.setattr(_progress, "LINE_EVERY", 0.1)
    with ScriptedServer() as server:
        answer = {"run": {"info": {"run_id": RUN, "artifact_uri": "mlflow-artifacts:/1/r"}}}
        server.fail("runs/get", Fault.answer(200, answer))
        server.fail("f", Fault.delayed(0.5), times=None)
        with runqueue.Client(server.uri) as client:
            client.log_text(RUN, "x" * 3_000_000, "f")
            client.flush()
    said = re.compile(r"0 of 1 entries, \d\.\d of 3\.0 MB of artifacts")
    assert any(said.search(each.message) for each in caplog.records)
