"""
A distribution with plugins for mlflow, installed into a folder: a provider of request headers, an authentication, and a
tracking store for `toy://`.
"""

# Rules of this file: it is installed as pip would leave it, module and `.dist-info`; nothing of it is imported here.

from __future__ import annotations

import os
from pathlib import Path

from support.mlflow_server import clean_environment

NAME = "toy"
"""Of the way of authentication."""

_REQUESTS = """
import hashlib
from mlflow.tracking.request_auth.abstract_request_auth_provider import RequestAuthProvider
from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

class Headers(RequestHeaderProvider):
    def in_context(self):
        return True

    def request_headers(self):
        return {"X-Toy-Team": "vision", "User-Agent": "toy/1.0"}

class Auth(RequestAuthProvider):
    def get_name(self):
        return "toy"

    def get_auth(self):
        return sign

def sign(request):
    request.headers["Authorization"] = "Toy " + hashlib.sha256(request.body or b"").hexdigest()
    return request
"""
_STORE = """
from urllib.parse import urlsplit
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

class Store(SqlAlchemyStore):
    def __init__(self, store_uri, artifact_uri):
        folder = urlsplit(store_uri).path
        super().__init__(f"sqlite:///{folder}/toy.db", artifact_uri or f"file://{folder}/artifacts")
"""
_BUILDER = """
def build(store_uri=None, artifact_uri=None):
    from toy_store_class import Store  # not before: mlflow loads the entry point while it is being imported itself
    return Store(store_uri, artifact_uri)
"""
_ENTRY_POINTS = """
[mlflow.request_header_provider]
toy = toy_requests:Headers

[mlflow.request_auth_provider]
toy = toy_requests:Auth

[mlflow.tracking_store]
toy = toy_store:build
"""


def install(folder: Path) -> dict[str, str]:
    """
    Install the distribution into the folder.

    Returns:
        The environment of a process that has the folder on its path.
    """
    files = {
        "toy_requests.py": _REQUESTS,
        "toy_store.py": _BUILDER,
        "toy_store_class.py": _STORE,
        "mlflow_toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: mlflow-toy\nVersion: 1.0\n",
        "mlflow_toy-1.0.dist-info/INSTALLER": "pip\n",
        "mlflow_toy-1.0.dist-info/entry_points.txt": _ENTRY_POINTS,
    }
    files["mlflow_toy-1.0.dist-info/RECORD"] = "".join(f"{name},,\n" for name in files)
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    paths = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return clean_environment() | {"PYTHONPATH": paths}
