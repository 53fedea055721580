"""
What a request to an HTTP server authenticates itself with.

Rules of this file: looked up for every request, so that a token that changes is taken over; a user and password come
before a token, and of each kind the URI before the constructor before the environment. Nothing here is ever shown.
"""

from __future__ import annotations

import base64
import os
from urllib.parse import unquote, urlsplit

from runqueue._config import Token


class Credentials:
    """
    Args:
        uri: The tracking URI, maybe with user info in it.
        token: Of the constructor.
    """

    def __init__(self, uri: str, token: Token | None) -> None:
        parts = urlsplit(uri)
        self._user_info = (
            (unquote(parts.username), unquote(parts.password or "")) if parts.username is not None else None
        )
        self._token = token
        self._last: str | None = None

    def __repr__(self) -> str:
        return "<Credentials ***>"

    def header(self, *, fresh: bool = False) -> str | None:
        """
        The value of the Authorization header; None without credentials.

        Args:
            fresh: A token's callable is asked again; otherwise only when it was not asked before.
        """
        user = self._user_info
        if user is None and self._token is None:
            name, password = os.environ.get("MLFLOW_TRACKING_USERNAME"), os.environ.get("MLFLOW_TRACKING_PASSWORD")
            user = (name, password) if name and password else None
        if user is not None:
            return "Basic " + base64.b64encode(":".join(user).encode()).decode()
        token = self._bearer(fresh=fresh)
        return f"Bearer {token}" if token else None

    def _bearer(self, *, fresh: bool) -> str | None:
        if not callable(self._token):
            return self._token or os.environ.get("MLFLOW_TRACKING_TOKEN")
        if fresh or self._last is None:
            self._last = self._token()
        return self._last
