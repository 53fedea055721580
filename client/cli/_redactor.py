"""
Takes the secrets of a tracking URI, the environment and MLflow's files out of the doctor's output.
"""

# Rule of this file: every place that a client reads secrets from is searched here, too.

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from netrc import NetrcParseError
from typing import Final
from urllib.parse import parse_qsl, urlsplit

from runqueue.errors import AuthError
from runqueue.http._credentials import find_netrc, read_file, read_netrc
from runqueue.settings._redaction import SECRET_QUERY_ITEM, proxy_user_info, redact, redact_uri, user_info

VARIABLES: Final = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


class Redactor:
    """
    Redacts the doctor's lines.

    Args:
        uri: The tracking URI, valid or not.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._secrets = {secret.strip() for secret in _secrets(uri)}

    def __repr__(self) -> str:
        return "<Redactor ***>"

    def redact(self, text: str) -> str:
        """Return the text as one line without secrets."""
        text = _line(text)
        if self._uri:
            text = text.replace(self._uri, redact_uri(self._uri))
        return redact(text, self._secrets)


def _secrets(uri: str) -> Iterator[str]:
    for name in VARIABLES:
        yield os.environ.get(name, "")
    with suppress(AuthError):
        yield read_file()[1] or ""
    yield from proxy_user_info(os.environ.items())[1]
    head = uri.rpartition("@")[0]
    yield from user_info(head.partition("//")[2] or head)[1]
    with suppress(ValueError):
        for found in SECRET_QUERY_ITEM.finditer(urlsplit(uri).query):
            yield found.group()[len(found.group(1)) :]
            yield from (value for _, value in parse_qsl(found.group()))
    yield from _netrc_password(uri)


def _netrc_password(uri: str) -> Iterator[str]:
    path = find_netrc()
    if path is None:
        return
    try:
        found = read_netrc(path, urlsplit(uri).hostname or "")
    except (OSError, ValueError, NetrcParseError):
        return
    if found is not None:
        yield found[1]


def _line(text: str) -> str:
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())
