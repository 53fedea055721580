"""
A server that echoes a request's secrets in pages, errors and headers, for the tests that no client shows them.
"""

from __future__ import annotations

import base64
import html
import json
import threading
from collections.abc import Callable
from typing import TypeAlias
from urllib.parse import quote

import attrs

from support.proxy import reply
from support.recorder import RecordingServer, Reply, Request

Answer: TypeAlias = Callable[[Request], Reply | None]


class EchoServer(RecordingServer):
    """Answers with `answer`, which a test may replace at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.answer: Answer = done
        self.over = threading.Event()

    def _respond(self, request: Request) -> Reply | None:
        return self.answer(request)

    def silent(self, _: Request) -> None:
        """Give no answer until the case is over."""
        self.over.wait(20)


def done(request: Request) -> Reply:
    """MLflow's own answer."""
    if request.at("version"):
        return reply(200, b"3.4.0")
    if request.at("experiments/get-by-name"):
        return reply(200, {"experiment": {"experiment_id": "0", "name": "Default"}})
    return reply(200, {"run": {"info": {"run_id": "c" * 32}}} if request.at("runs/create") else {})


def secrets_of(request: Request) -> dict[str, str]:
    """The headers that hold a secret."""
    names = ("authorization", "proxy-authorization", "x-api-key")
    return {name: request.headers[name] for name in names if name in request.headers}


def decoded(request: Request) -> str:
    """The secrets as a server knows them when it has decoded the headers."""
    found = []
    for value in secrets_of(request).values():
        scheme, _, rest = value.partition(" ")
        found.append(base64.b64decode(rest).decode() if scheme == "Basic" else rest or value)
    return " ".join(found)


ECHOES: dict[str, Callable[[Request], str]] = {
    "as it came": lambda request: "\n".join(f"{name}: {value}" for name, value in secrets_of(request).items()),
    "decoded": decoded,
    "URL-quoted": lambda request: quote(decoded(request), safe=""),
    "in HTML": lambda request: html.escape(decoded(request)),
    "in JSON": lambda request: json.dumps(secrets_of(request)),
    "in JSON, decoded": lambda request: json.dumps({"user": decoded(request)}),
    "in a repr": lambda request: repr({name: value.encode() for name, value in secrets_of(request).items()}),
}


def page(status: int, echo: Callable[[Request], str], before: str = "") -> Answer:
    """An error page of a proxy or a framework that shows the request."""
    return lambda request: reply(status, f"<html><body>{before}{echo(request)}</body></html>")


def message(status: int, code: str, echo: Callable[[Request], str], before: str = "") -> Answer:
    """An error of MLflow's own that shows the request."""
    return lambda request: reply(status, {"error_code": code, "message": before + echo(request)})


def redirect(status: int, where: Callable[[Request], str]) -> Answer:
    """A redirect to a place that is made of the request."""
    return lambda request: reply(status, b"", {"Location": where(request)})


def _elsewhere(request: Request) -> str:
    basic = request.headers.get("authorization", "").startswith("Basic")
    parts = decoded(request).split(":", 1) if basic else [decoded(request)]
    return f"http://{':'.join(quote(part, safe='') for part in parts)}@other.invalid/"


RAW, DECODED = ECHOES["as it came"], ECHOES["decoded"]
ANSWERS: dict[str, Answer] = {
    "success": done,
    "401": message(401, "UNAUTHENTICATED", lambda _: "no"),
    "cut": lambda _: None,
    "cut in the body": lambda _: attrs.evolve(reply(200, {"a": "b"}), cut_at=3),
    "redirect elsewhere with user info": redirect(307, _elsewhere),
    "redirect to a path of it": redirect(302, lambda request: "/" + quote(decoded(request), safe="")),
    "a header that is none": lambda request: reply(200, {}, {"X Echo": DECODED(request).replace("\n", " ")}),
    "a page cut in the secret": page(500, DECODED, "x" * 185),
    "a page of tags cut in the secret": page(502, DECODED, "<br>" * 494),
    "a message cut in the secret": message(500, "INTERNAL_ERROR", DECODED, "x" * 965),
    "a login page that echoes": page(200, RAW),
    "a 401 page that echoes": page(401, RAW),
    "a 403 that echoes": message(403, "PERMISSION_DENIED", DECODED),
    **{f"a 500 page that echoes {name}": page(500, echo) for name, echo in ECHOES.items()},
    **{f"a 400 that echoes {name}": message(400, "BAD_REQUEST", echo) for name, echo in ECHOES.items()},
}
