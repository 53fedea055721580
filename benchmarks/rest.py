"""A connection to a server that does not use the clients: creates runs, reads back, asks for counts."""

import http.client
import json
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode, urlsplit

API = "/api/2.0/mlflow"
TIMEOUT = 120.0  # seconds


class Rest:
    """One keep-alive connection. `http.client` knows no proxies: all traffic stays on this machine."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT)

    def post(self, path: str, body: bytes) -> Any:
        """Send a POST request to a path of MLflow's API; return the answer's JSON."""
        return self._call("POST", API + path, body)

    def get(self, path: str, query: Mapping[str, object]) -> Any:
        """Send a GET request to a path of MLflow's API; return the answer's JSON."""
        return self._call("GET", f"{API}{path}?{urlencode(query)}", None)

    def counts(self) -> dict[str, int]:
        """Return what the counting server has received so far."""
        counts: dict[str, int] = self._call("GET", "/counts", None)
        return counts

    def close(self) -> None:
        self._connection.close()

    def _call(self, method: str, path: str, body: bytes | None) -> Any:
        self._connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        read = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{method} {path}: {answer.status} {read[:500]!r}")
        return json.loads(read)
