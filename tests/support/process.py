"""A script in a process of its own: the lines it prints, the signals it is sent, how and when it ends."""

# Rules of this file: every wait has a deadline; whatever still runs at the end of the block is killed by its handle.

from __future__ import annotations

import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import attrs

from support.mlflow_server import clean_environment

if TYPE_CHECKING:
    from typing_extensions import Self

PATIENCE = 60.0
"""Seconds for what takes a fraction of one where nothing is wrong; a loaded machine is no defect."""

PREAMBLE = """
import atexit, faulthandler, os, signal, sys, threading, time, warnings
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
import runqueue
URI = sys.argv[1]
def say(*words):
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
def child(work):
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(45, exit=True)
        code = 70
        try:
            work()
            code = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\\n")
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid
def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""
"""What scripts begin with."""


@attrs.frozen(kw_only=True)
class Ended:
    """The result of a process."""

    code: int
    """Its exit status; minus the number of the signal that has ended it."""
    out: str
    err: str


class Process:
    """
    A process that runs a Python script. It is a context manager, and is started on entry.

    Args:
        script: The script; it follows `PREAMBLE`.
        arguments: Its arguments, the tracking URI first.
        folder: The working folder.
        variables: Further environment variables.
        flags: Options of the interpreter.
        before: Code before `PREAMBLE`.
    """

    def __init__(
        self,
        script: str,
        *arguments: str,
        folder: Path | None = None,
        variables: Mapping[str, str] | None = None,
        flags: tuple[str, ...] = (),
        before: str = "",
    ) -> None:
        self._command = [sys.executable, *flags, "-c", before + PREAMBLE + script, *arguments]
        self._folder = folder
        self._environment = clean_environment() | dict(variables or {})
        self._lines: queue.Queue[str] = queue.Queue()
        self._out: list[str] = []
        self._err: list[str] = []

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            env=self._environment,
        )
        assert self._process.stdout is not None and self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(self._process.stdout, self._out, self._lines)),
            threading.Thread(target=self._read, args=(self._process.stderr, self._err, None)),
        ]
        for reader in self._readers:
            reader.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()

    def expect(self, line: str) -> None:
        """Wait until the script has printed this line."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                if self._lines.get(timeout=max(0.0, deadline - time.monotonic())) == line:
                    return
            except queue.Empty:
                raise TimeoutError(f"no {line!r}: {self._out} {''.join(self._err)}") from None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to this process alone."""
        self._process.send_signal(number)

    def end(self, within: float = PATIENCE) -> Ended:
        """Wait for the end of the process."""
        try:
            code = self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {within:g} s: {self._out} {''.join(self._err)}") from None
        for reader in self._readers:
            reader.join()
        return Ended(code=code, out="".join(self._out), err="".join(self._err))

    @staticmethod
    def _read(stream: IO[str], text: list[str], lines: queue.Queue[str] | None) -> None:
        with stream:
            for line in stream:
                text.append(line)
                if lines is not None:
                    lines.put(line.rstrip("\n"))


def run(
    script: str, *arguments: str, folder: Path | None = None, flags: tuple[str, ...] = (), before: str = ""
) -> Ended:
    """Run a script to its end."""
    with Process(script, *arguments, folder=folder, flags=flags, before=before) as process:
        return process.end()


def by_name(uri: str) -> str:
    """Return the URI with a host name instead of the address, so that the name has to be resolved."""
    return uri.replace("127.0.0.1", "localhost")
