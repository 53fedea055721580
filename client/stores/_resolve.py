"""
Which store a tracking URI means.

Rule of this file: what cannot work is said at construction, by looking and not by trying; what a store needs is
imported when it is made, in the engine's thread.
"""

from __future__ import annotations

import importlib.util
import os
import re
from typing import Final
from urllib.parse import urlsplit

from runqueue.errors import ConfigError
from runqueue.http import _plugins, _tls
from runqueue.settings._config import Config
from runqueue.settings._redaction import redact_uri
from runqueue.settings._tracking_uri import installed_mlflow
from runqueue.stores._protocol import Store, Traffic

DELEGATED: Final = frozenset(("", "file", "sqlite", "postgresql", "mysql", "mssql"))
"""Schemes that MLflow's own stores take; `postgresql+psycopg` and the like count as what stands before the plus."""
DATABRICKS: Final = frozenset(("databricks", "databricks-uc"))
"""Schemes of a workspace; each is a whole URI too."""
_LIKE_A_SERVER: Final = re.compile(r"(?:.*@)?[A-Za-z0-9.-]+:\d+(?:/.*)?|https?:.*", re.DOTALL | re.IGNORECASE)
"""What is a path by its form, and never by its writer's mind."""


def check_uri(uri: str) -> None:
    """
    Say at once whether there will be a store for this URI; neither httpx nor mlflow is imported for it.

    Raises:
        ConfigError: Nothing here knows the scheme, or what it needs is not installed.
    """
    try:
        scheme = scheme_of(uri)
        parts = urlsplit(uri)
        host, _ = parts.hostname, None if scheme in DATABRICKS else parts.port
    except ValueError:  # its words quote what may be a password's part
        raise ConfigError(f"the tracking URI {redact_uri(uri)!r} is none: its host or port cannot be read") from None
    if scheme in ("http", "https"):
        if not host:
            raise ConfigError(f"the tracking URI {redact_uri(uri)!r} has no host")
        if "@" in parts.path + parts.query + parts.fragment:  # else a part of the password would be where it leads
            raise ConfigError(
                "the tracking URI (not shown) has an @ behind its host: in a user or password, write / as %2F, ? as %3F"
                " and # as %23; in a path, @ as %40"
            )
        if scheme == "https":
            _tls.check()
        _plugins.check()
        return
    if scheme in DATABRICKS:
        _check_databricks(uri)
        return
    if scheme.split("+")[0] not in DELEGATED and scheme not in _plugin_schemes():
        raise ConfigError(
            f"no store is known for the tracking URI {redact_uri(uri)!r}: its scheme is neither http(s), one of"
            " MLflow's databases, a path, nor that of an installed mlflow plugin"
        )
    if not scheme and _LIKE_A_SERVER.fullmatch(uri) and not os.path.exists(uri):
        raise ConfigError(
            f"the tracking URI {redact_uri(uri)!r} counts as a path; the URI of a server begins with http:// or"
            " https://"
        )
    missing = [name for name in ("mlflow", "sqlalchemy") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the tracking URI {redact_uri(uri)!r} needs MLflow's own store: pip install 'runqueue[mlflow]'"
            f" (not installed: {', '.join(missing)})"
        )
    if scheme in ("", "file") and _file_store_is_refused():
        raise ConfigError(
            f"the tracking URI {redact_uri(uri)!r} means MLflow's store in files, which this MLflow refuses unless"
            " the environment variable MLFLOW_ALLOW_FILE_STORE is true; a database such as sqlite:///mlflow.db is"
            " what it recommends"
        )


def make_store(config: Config, uri: str, traffic: Traffic) -> Store:
    """
    The store of a URI that `check_uri` let pass. In the engine's thread: it imports what the store needs.

    Raises:
        ConfigError: Only now it shows that there can be none; without the frames it came through, which hold the URI.
    """
    try:
        return _made(config, uri, traffic)
    except ConfigError as error:
        failure = error.with_traceback(None)
    failure.__cause__ = failure.__context__ = None
    del uri
    raise failure


def _made(config: Config, uri: str, traffic: Traffic) -> Store:
    if scheme_of(uri) in ("http", "https"):
        from runqueue.stores._rest import HttpStore

        return HttpStore(config, uri, traffic, signers=_plugins.signers(config, uri))
    if scheme_of(uri) in DATABRICKS:
        from runqueue.stores._databricks import DatabricksStore

        return DatabricksStore(config, uri, _profile(uri), traffic)
    from runqueue.stores._mlflow import MlflowStore

    return MlflowStore(uri, traffic)


def _check_databricks(uri: str) -> None:
    """
    Raises:
        ConfigError: The URI names no profile, databricks-sdk is not installed, or a variable for TLS is bad.
    """
    shown, parts = redact_uri(uri), urlsplit(uri)
    if ":" in parts.netloc:  # mlflow asks the notebook's `dbutils` for them, and calls that deprecated
        raise ConfigError(
            f"the tracking URI {shown!r} names a scope of secrets, which are not read here: name a profile by"
            " databricks://<profile>, or set DATABRICKS_HOST and give token=; in a notebook 'databricks' will do"
        )
    if not parts.netloc and uri not in DATABRICKS and parts.path.strip("/"):
        raise ConfigError(f"the tracking URI {shown!r} names no profile; one is named by databricks://<profile>")
    try:
        found = importlib.util.find_spec("databricks.sdk")
    except ModuleNotFoundError:  # nor anything else of Databricks'
        found = None
    if found is None:
        raise ConfigError(f"the tracking URI {shown!r} needs databricks-sdk: pip install 'runqueue[databricks]'")
    _tls.check()


def _profile(uri: str) -> str | None:
    """The profile that a Databricks URI names."""
    return urlsplit(uri).netloc or None


def scheme_of(uri: str) -> str:
    """
    In small letters; "" is a path.

    Raises:
        ValueError: It is no URI.
    """
    if uri in DATABRICKS:
        return uri
    return urlsplit(uri).scheme.lower() if "://" in uri or uri.startswith("file:") else ""


def _file_store_is_refused() -> bool:
    """Whether the installed MLflow has the switch, and it is off. Read off its source: importing it takes seconds."""
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return False
    folder = installed_mlflow()
    source = folder and folder / "store/tracking/file_store.py"
    return source is not None and source.exists() and b"MLFLOW_ALLOW_FILE_STORE" in source.read_bytes()


def _plugin_schemes() -> set[str]:
    from importlib.metadata import entry_points  # with what it imports, a tenth of `import runqueue`

    return {point.name for point in entry_points(group="mlflow.tracking_store")}
