"""
Finds out what MLflow's own store would create or migrate when it is opened: a file, folders, tables, an experiment.
"""

# Rule of this file: it only reads. Opening MLflow's store is no way to look: it creates missing tables and the default
# experiment, and migrates the tables of an older MLflow, without being asked.

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

DATABASES: Final = frozenset(("sqlite", "postgresql", "mysql", "mssql"))
"""Schemes of databases, without the driver."""


def missing_file(scheme: str, uri: str) -> Path | None:
    """Return the file or folder of a local store if it does not exist yet, else None."""
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
    """Return the folder of a store in files if it exists, but MLflow has not used it yet; else None."""
    if scheme not in ("", "file"):
        return None
    path = Path(url2pathname(urlsplit(uri).path) if scheme else uri)
    # MLflow creates .trash with its folder; source: `mlflow.store.tracking.file_store.FileStore.__init__`.
    return path if path.is_dir() and not (path / ".trash").exists() else None


def missing_in(uri: str) -> str | None:
    """
    Return what MLflow will do to this database before it stores the first run; None if there is nothing to do.

    It imports mlflow and waits for the database, so it is called in a worker thread.

    Raises:
        Exception: The database cannot be read: an error of SQLAlchemy, the driver or mlflow.
    """
    utils: Any = importlib.import_module("mlflow.store.db.utils")
    sqlalchemy: Any = importlib.import_module("sqlalchemy")
    engine = utils.create_sqlalchemy_engine(uri)
    try:
        with engine.connect() as connection:
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            if "experiments" not in tables:
                return "make MLflow's tables"
            if not set(utils.Base.metadata.tables) <= tables:
                return "bring MLflow's tables up to date, which are those of an older MLflow (a backup is advised)"
            experiments = sqlalchemy.select(sqlalchemy.func.count()).select_from(sqlalchemy.table("experiments"))
            return None if connection.execute(experiments).scalar() else "make MLflow's experiment 'Default'"
    finally:
        engine.dispose()
