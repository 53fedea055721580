"""
What MLflow's own store would make, at a mere look, in a database or a folder.

Rule of this file: nothing is made by looking here. MLflow's store makes its tables where they are missing, and the
first experiment where there is none; of an older MLflow's tables it makes its own, without being asked.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

DATABASES: Final = frozenset(("sqlite", "postgresql", "mysql", "mssql"))
"""Schemes, without their drivers."""


def missing_file(scheme: str, uri: str) -> Path | None:
    """The file or folder of a local store, if it does not exist."""
    parts = urlsplit(uri)
    if scheme.partition("+")[0] == "sqlite":
        raw = parts.path.removeprefix("/")
        if not raw or raw == ":memory:" or raw.startswith("file:"):
            return None
        path = Path(raw)
        return None if path.exists() or Path(unquote(raw)).exists() else path
    if scheme in ("", "file"):
        path = Path(url2pathname(parts.path) if scheme else uri)
        return None if path.exists() else path
    return None


def unused_folder(scheme: str, uri: str) -> Path | None:
    """The folder of a store in files, if there is one that MLflow has not used yet."""
    if scheme not in ("", "file"):
        return None
    path = Path(url2pathname(urlsplit(uri).path) if scheme else uri)
    # MLflow makes it with the folder; source: `mlflow.store.tracking.file_store.FileStore.__init__`.
    return path if path.is_dir() and not (path / ".trash").exists() else None


def missing_in(uri: str) -> str | None:
    """
    What the first run would do to this database before it is stored; None: nothing. In a worker thread: it imports
    mlflow, and waits for the database.

    Raises:
        Exception: The database cannot be asked; of SQLAlchemy's, of its driver's, of mlflow's.
    """
    utils: Any = importlib.import_module("mlflow.store.db.utils")
    sqlalchemy: Any = importlib.import_module("sqlalchemy")
    engine = utils.create_sqlalchemy_engine(uri)
    try:
        with engine.connect() as connection:
            there = set(sqlalchemy.inspect(connection).get_table_names())
            if "experiments" not in there:
                return "make MLflow's tables"
            if not set(utils.Base.metadata.tables) <= there:
                return "bring MLflow's tables up to date, which are those of an older MLflow (a backup is advised)"
            experiments = sqlalchemy.select(sqlalchemy.func.count()).select_from(sqlalchemy.table("experiments"))
            return None if connection.execute(experiments).scalar() else "make MLflow's experiment 'Default'"
    finally:
        engine.dispose()
