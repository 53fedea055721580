"""
Checks a tracking URI, and makes the store that it means.
"""

# Rules of this file:
# - `check_uri` runs at the client's construction, and finds what cannot work: it looks at settings and installed
#   packages, and neither imports them nor connects.
# - `make_store` runs in the engine's thread, and imports what the store needs.

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
"""Schemes of MLflow's own stores, without the driver: `postgresql+psycopg` is `postgresql`."""
DATABRICKS: Final = frozenset(("databricks", "databricks-uc"))
"""Schemes of a Databricks workspace. Each of them alone is a URI, too."""
_LIKE_A_SERVER: Final = re.compile(r"(?:.*@)?[A-Za-z0-9.-]+:\d+(?:/.*)?|https?:.*", re.DOTALL | re.IGNORECASE)
"""URIs that MLflow would take for a path, although the user certainly meant a server."""


def check_uri(uri: str) -> None:
    """
    Check that a store can be made for this URI, without importing httpx or mlflow.

    Raises:
        ConfigError: The URI is not valid, its scheme is unknown, a setting for it is bad, or a package is missing.
    """
    try:
        scheme = scheme_of(uri)
        parts = urlsplit(uri)
        host, _ = parts.hostname, None if scheme in DATABRICKS else parts.port
    except ValueError:  # not chained: its message may quote a part of the password
        raise ConfigError(f"the tracking URI {redact_uri(uri)!r} is none: its host or port cannot be read") from None
    if scheme in ("http", "https"):
        if not host:
            raise ConfigError(f"the tracking URI {redact_uri(uri)!r} has no host")
        if "@" in parts.path + parts.query + parts.fragment:  # the host would be a part of an unquoted password
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
    Make the store of a URI that `check_uri` has accepted. It imports what the store needs, in the engine's thread.

    Raises:
        ConfigError: The store cannot be made. The error has no traceback, as its frames would hold the URI.
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
    if ":" in parts.netloc:  # MLflow reads such secrets by the notebook's `dbutils`, which it calls deprecated
        raise ConfigError(
            f"the tracking URI {shown!r} names a scope of secrets, which are not read here: name a profile by"
            " databricks://<profile>, or set DATABRICKS_HOST and give token=; in a notebook 'databricks' will do"
        )
    if not parts.netloc and uri not in DATABRICKS and parts.path.strip("/"):
        raise ConfigError(f"the tracking URI {shown!r} names no profile; one is named by databricks://<profile>")
    try:
        found = importlib.util.find_spec("databricks.sdk")
    except ModuleNotFoundError:  # the package `databricks` is not installed at all
        found = None
    if found is None:
        raise ConfigError(f"the tracking URI {shown!r} needs databricks-sdk: pip install 'runqueue[databricks]'")
    _tls.check()


def _profile(uri: str) -> str | None:
    """Return the profile that a Databricks URI names, if it names one."""
    return urlsplit(uri).netloc or None


def scheme_of(uri: str) -> str:
    """
    Return the scheme of a tracking URI in small letters; "" if the URI is a path.

    Raises:
        ValueError: It is not a URI.
    """
    if uri in DATABRICKS:
        return uri
    return urlsplit(uri).scheme.lower() if "://" in uri or uri.startswith("file:") else ""


def _file_store_is_refused() -> bool:
    """
    Tell if the installed MLflow refuses its file store. Newer versions do, unless MLFLOW_ALLOW_FILE_STORE is true.

    Its source is searched for the variable's name, because importing it takes seconds.
    """
    if os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1"):
        return False
    folder = installed_mlflow()
    source = folder and folder / "store/tracking/file_store.py"
    return source is not None and source.exists() and b"MLFLOW_ALLOW_FILE_STORE" in source.read_bytes()


def _plugin_schemes() -> set[str]:
    from importlib.metadata import entry_points  # not at the top: it takes a tenth of the time of `import runqueue`

    return {point.name for point in entry_points(group="mlflow.tracking_store")}
