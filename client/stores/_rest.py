"""MLflow's REST API over HTTP: URLs and endpoints, and answers judged."""

# Rules of this file: one attempt a call. How a request is sent, and what its errors mean, is decided in
# `runqueue.http`; what an answer means, in `runqueue.wire`.

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from runqueue.http._body import Body
from runqueue.http._client import HttpClient
from runqueue.http._credentials import Credentials
from runqueue.http._response import Answer
from runqueue.http._signing import Signer
from runqueue.queueing import Limits, StoreError
from runqueue.settings._config import Config
from runqueue.stores._protocol import SMALL, Endpoint, Traffic
from runqueue.wire._answer import judge
from runqueue.wire._limits import MLFLOW_LIMITS


class HttpStore:
    """
    Args:
        config: The client's settings.
        uri: http(s), with or without a path; user info in it is moved to the header.
        traffic: Counts the requests.
        signers: Add what the server asks for, in this order. None: MLflow's credentials, see `Credentials`.
        limits: Of the server.
        connections: Requests at once. None: `max_workers`.
        foreign: Whether it is another server than the tracking server: nothing that identifies us there is sent to it.
        borrows: Whether a transport of the user's own is left open by `aclose`.

    Raises:
        ConfigError: No transport can be made of the settings and the environment.
    """

    def __init__(
        self,
        config: Config,
        uri: str,
        traffic: Traffic,
        *,
        signers: Sequence[Signer] | None = None,
        limits: Limits = MLFLOW_LIMITS,
        connections: int | None = None,
        foreign: bool = False,
        borrows: bool = False,
    ) -> None:
        parts = urlsplit(uri)
        bare = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
        self.root = bare.rstrip("/")
        """The beginning of every URL of this server."""
        self._base = self.root + "/api/2.0/mlflow/"
        self._config = config
        self._signers = (Credentials(uri, config.token),) if signers is None else tuple(signers)
        self._limits = limits
        self._traffic = traffic
        self._http = HttpClient(
            config,
            self._base,
            () if foreign else self._signers,
            traffic.count,
            connections=connections or config.max_workers,
            foreign=foreign,
            borrows=borrows,
        )

    @property
    def limits(self) -> Limits:
        return self._limits

    @property
    def transport(self) -> str:
        """The library that sends: "aiohttp" or "httpx", or the name of the class of the user's own transport."""
        return self._http.library

    def __repr__(self) -> str:
        return f"<HttpStore {self._base}>"

    async def aclose(self) -> None:
        await self._http.aclose()

    async def call(
        self, endpoint: Endpoint, body: bytes = b"", query: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """See `Store.call`. A 401 is answered once, with fresh credentials."""
        url = self._base + endpoint.path
        if query:
            url += "?" + urlencode(query)
        return await self.judged(endpoint.method, url, body, cap=endpoint.cap, repeatable=endpoint.repeatable)

    async def judged(
        self,
        method: str,
        url: str,
        body: Body = b"",
        *,
        cap: int = SMALL,
        repeatable: bool | None = None,
        empty: bool = False,
    ) -> dict[str, Any]:
        """
        One attempt, and MLflow's answer.

        Args:
            method: See `HttpClient.exchange`, as for *url*, *body*, *cap* and *repeatable*.
            empty: Whether a 200 with nothing in it is an answer, too.

        Raises:
            StoreError: See `Store.call`.
        """
        answer = await self._http.exchange(method, url, body, cap=cap, repeatable=repeatable)
        return {} if empty and answer.status == 200 and not answer.body else self.judge(answer)

    def judge(self, answer: Answer) -> dict[str, Any]:
        """
        MLflow's answer, if it is one that says "done".

        Raises:
            StoreError: It is not.
        """
        failure: StoreError
        try:
            return judge(
                answer.status,
                answer.body,
                content_type=answer.headers.get("content-type", ""),
                retry_after=answer.headers.get("retry-after", ""),
                now=time.time(),
                redact=self._http.redact,
            )
        except StoreError as error:
            failure = self._http.bare(error)
        raise failure

    async def exchange(
        self, method: str, url: str, body: Body = b"", *, headers: Mapping[str, str | None] | None = None
    ) -> Answer:
        """One request and its answer, whatever it is; see `HttpClient.exchange`."""
        return await self._http.exchange(method, url, body, cap=SMALL, headers=headers)

    async def text(self, endpoint: Endpoint) -> tuple[int, str]:
        """Status and text of what is not MLflow's JSON, for a diagnosis. Raises a StoreError where nothing came."""
        answer = await self._http.exchange(endpoint.method, self._base + endpoint.path, cap=endpoint.cap, renews=False)
        return answer.status, answer.body.decode(errors="replace")

    def beside(self, connections: int) -> HttpStore:
        """Another store of the same server, with the same credentials and connections of its own."""
        return HttpStore(
            self._config, self.root, self._traffic, signers=self._signers, connections=connections, borrows=True
        )

    def elsewhere(self, url: str, connections: int) -> HttpStore:
        """See `foreign`."""
        return HttpStore.foreign(self._config, url, self._traffic, connections)

    @classmethod
    def foreign(cls, config: Config, url: str, traffic: Traffic, connections: int) -> HttpStore:
        """A store of the server that this URL leads to, which does not learn who we are."""
        place = urlsplit(url)
        return cls(config, f"{place.scheme}://{place.netloc}", traffic, connections=connections, foreign=True)
