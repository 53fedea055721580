"""
Describes a tracking URI without asking its store: where it comes from, what it means, and which settings apply to it.
"""

# Rules of this file:
# - Nothing is sent, created or changed.
# - A setting is described by its place, such as a variable's name. Texts may hold secrets: the caller redacts them.

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from runqueue.cli._local_stores import DATABASES
from runqueue.http import _plugins, _tls
from runqueue.settings import _environment as environment
from runqueue.settings._config import Config
from runqueue.settings._redaction import redact_uri
from runqueue.stores._resolve import DATABRICKS, DELEGATED, scheme_of

HTTP: Final = frozenset(("http", "https"))
NONE: Final = "none"
USERNAME: Final = "MLFLOW_TRACKING_USERNAME"
PASSWORD: Final = "MLFLOW_TRACKING_PASSWORD"
TOKEN: Final = "MLFLOW_TRACKING_TOKEN"

_USER_INFO: Final = "the URI's user info"


def source_of(given: str | None) -> str:
    """Return the place where `resolve_tracking_uri` finds the URI."""
    if given is not None:
        return "the argument --tracking-uri"
    if getattr(sys.modules.get("mlflow"), "get_tracking_uri", None) is not None:
        return "mlflow.get_tracking_uri()"
    if os.environ.get("MLFLOW_TRACKING_URI"):
        return "the environment variable MLFLOW_TRACKING_URI"
    return "MLflow's default, as no URI is given and MLFLOW_TRACKING_URI is not set"


def kind_of(scheme: str) -> str:
    """Describe the store of a scheme."""
    if scheme in HTTP:
        return "MLflow's REST API"
    if scheme in DATABRICKS:
        return "Databricks' REST API"
    if scheme in ("", "file"):
        return "MLflow's own, in files"
    if scheme.split("+")[0] in DELEGATED:
        return f"MLflow's own, in a database ({scheme})"
    return f"MLflow's own, by the plugin for {scheme}"


# -- credentials -----------------------------------------------------------------------------------------------------


def credentials_of(config: Config, uri: str) -> str:
    """
    Return the kind and the place of the credentials that a store would use. Those of Databricks are not known here.

    Raises:
        AuthError: MLflow's file of credentials cannot be read.
    """
    scheme = scheme_of(uri)
    if scheme in HTTP:
        return _plugins.source(config, uri)
    parts, database = urlsplit(uri), scheme.partition("+")[0]
    if parts.username is not None:
        return _named(parts.username, parts.password, _USER_INFO)
    query = dict(parse_qsl(parts.query))
    user, password = query.get("user") or query.get("username"), query.get("password")
    if database in DATABASES and (user or password):
        return _named(user, password, "the URI's query")
    return f"{NONE} in the URI" if database in DATABASES - {"sqlite"} else NONE


def _named(user: str | None, password: str | None, source: str) -> str:
    words = [word for word, value in (("user", user), ("password", password)) if value]
    return f"{' and '.join(words) or 'an empty user'}, of {source}"


# -- other settings for a server --------------------------------------------------------------------------------------


def tls_of(scheme: str) -> str:
    """Describe how the server's certificate is verified, and which client certificate is sent."""
    if scheme != "https":
        return "none, it is plain http"
    named, client = _tls.named_certificates(), environment.text(_tls.CLIENT_CERT)
    system = next(
        (f"{name}={os.environ[name]}" for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if name in os.environ), ""
    )
    if environment.switch(_tls.INSECURE):
        text = f"the server's certificate is NOT verified ({_tls.INSECURE})"
    elif named is not None:
        text = f"verified by {'='.join(named)}"
    else:
        text = f"verified by {system or 'the usual certificates'}"
    return text + (f", client certificate {_tls.CLIENT_CERT}={client}" if client else "")


def proxies_of(scheme: str) -> str:
    """Return the variables that set a proxy for this scheme, and NO_PROXY."""
    named = {name: value for name, value in sorted(os.environ.items()) if value}
    wanted = (f"{scheme}_PROXY".upper(), "ALL_PROXY")
    # Lower-case variables win over upper-case ones, as in curl.
    named = {name: value for name, value in named.items() if name.islower() or name.lower() not in named}
    if not any(name.upper() in wanted for name in named):
        return NONE
    shown = [f"{name}={_address(value)}" for name, value in named.items() if name.upper() in wanted]
    shown += [f"{name}={value}" for name, value in named.items() if name.upper() == "NO_PROXY"]
    return ", ".join(shown)


def _address(proxy: str) -> str:
    return redact_uri(proxy if "://" in proxy else f"http://{proxy}")


def workspace_of(config: Config) -> str:
    """Return the MLflow workspace, which a header of each request names, and its source."""
    if config.workspace is None:
        return NONE
    named = (environment.text(_plugins.WORKSPACE) or "").strip() == config.workspace
    return f"{config.workspace}, of {_plugins.WORKSPACE if named else 'mlflow.set_workspace()'}"


def header_plugins() -> str:
    """Return the names of the installed mlflow plugins that add headers to requests."""
    names = ", ".join(_plugins.header_plugins())
    if names and importlib.util.find_spec("mlflow") is None:
        return f"{names} (not asked, as mlflow is not installed)"
    return names or NONE


def version_of(*distributions: str) -> str:
    """Return the version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"
