"""
Uploads artifacts to a server by MLflow's REST API: PUT `mlflow-artifacts/artifacts/<path>`, large files in parts.
"""

# Rules of this file:
# - One attempt a call.
# - MLflow's server answers a PUT by an empty 200, and so does many a proxy that stores nothing. So the first such answer is
#   checked: the server has to list the file.
# - The artifact URI decides where the upload goes, as in MLflow. If that is not the tracking server, no credentials go.
# - A file in parts: the server returns one URL a part, most often of an object store, which holds its own permission.
#   Nothing but the part goes there.

from __future__ import annotations

import logging
import math
import mimetypes
import posixpath
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Final
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit

import anyio
import orjson

from runqueue.artifacts._reading import OpenFile, open_source, rejected
from runqueue.artifacts._source import InMemory, Source
from runqueue.errors import UnavailableError, UnexpectedAnswerError
from runqueue.http._body import Body, Streamed, with_heartbeats
from runqueue.http._transports import PORTS
from runqueue.http._upload import CHUNK, Meter
from runqueue.queueing import RejectedError, Scope, StoreError
from runqueue.runtime._waiting import in_thread
from runqueue.settings import _environment as environment
from runqueue.stores._rest import HttpStore
from runqueue.wire._answer import RETRIABLE

SERVICE: Final = "/api/2.0/mlflow-artifacts/artifacts"
"""The path below the root of a server."""
MULTIPART_MIN_BYTES: Final = 500 * 1024**2
"""
Files of at least this size are sent in parts, if the server takes parts; source: the default of
MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE.
"""
PART_BYTES: Final = 10 * 1024**2
"""Bytes of a part; source: the default of MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE."""
MAX_PARTS_AT_ONCE: Final = 4
"""Parts of one file that are in flight at once."""
_ABORT_TIMEOUT: Final = 10.0
"""Seconds for telling the server that an upload has failed, so that it deletes the parts."""
_NO_MULTIPART: Final = "Multipart upload is not supported"
"""MLflow's text for an object store that takes no parts; source: `_UnsupportedMultipartUploadException.MESSAGE`."""
_NOT_SERVED: Final = re.compile(r"--(?:no-)?serve-artifacts")

logger = logging.getLogger("runqueue")


def served_at(artifact_uri: str, tracking_uri: str) -> str:
    """
    Return the URL at which a server takes artifacts, as `MlflowArtifactsRepository.resolve_uri` does.

    Args:
        artifact_uri: A run's artifact URI: `mlflow-artifacts:`, or http(s).
        tracking_uri: The tracking URI without user info.

    Raises:
        RejectedError: The URI is not valid, or relative to a tracking URI that is no server.
    """
    place, tracking = urlsplit(artifact_uri), urlsplit(tracking_uri)
    if place.scheme in ("http", "https"):
        return urlunsplit(place._replace(path=_requoted(place.path.rstrip("/")), query="", fragment=""))
    if tracking.scheme not in ("http", "https"):
        raise rejected(
            f"the artifacts of this run go through a server ({artifact_uri}), and the tracking URI is none: set it to"
            " http:// or https:// of that server"
        )
    try:
        host, port = place.hostname, place.port
    except ValueError:
        raise rejected(f"the artifact URI {artifact_uri!r} is none: its host or port cannot be read") from None
    if host and port is None and host.replace(".", "", 1).isdigit():
        raise rejected(f"the artifact URI {artifact_uri!r} names a port, and no host")
    inside = "" if place.path in ("", "/", SERVICE) else place.path
    path = f"{tracking.path}/{SERVICE}/{inside}"
    path = re.sub(r"//+", "/", path).rstrip("/")
    return urlunsplit((tracking.scheme, place.netloc or tracking.netloc, _requoted(path), "", ""))


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or PORTS.get(parts.scheme)


def _requoted(path: str) -> str:
    """Percent-encode a path for a URL, but leave existing escapes: a server's artifact URI may be encoded already."""
    return quote(path, safe="/%:@!$&'()*+,;=~")


class ArtifactServer:
    """
    Uploads artifacts to one server.

    Args:
        store: The server's store, with connections of its own.
        meter: Counts the bytes sent.
    """

    def __init__(self, store: HttpStore, meter: Meter) -> None:
        self._store = store
        self._meter = meter
        self._has_stored = False  # whether an empty 200 was checked, and was true
        self._takes_parts: bool | None = None
        self._part_stores: dict[tuple[str, str | None, int | None], HttpStore] = {}

    def __repr__(self) -> str:
        return f"<ArtifactServer {self._store.root}>"

    async def aclose(self) -> None:
        for store in (self._store, *self._part_stores.values()):
            await store.aclose()

    async def put(self, root: str, path: str, source: Source) -> None:
        """
        Upload one artifact.

        Args:
            root: The URL of the run's artifacts, see `served_at`.
            path: The artifact's path below it.
            source: The artifact.

        Raises:
            StoreError: The artifact was not stored.
        """
        body = source.content if isinstance(source, InMemory) else await in_thread(open_source, source)
        if isinstance(body, bytes) and len(body) <= CHUNK:
            await self._put(root, path, body)
            self._meter.add(len(body))
            return
        try:
            if isinstance(body, bytes) or not await self._put_in_parts(root, path, body):
                # Without a bound: each piece has a deadline of its own, so the upload cannot hang.
                await with_heartbeats(partial(self._stream, root, path, body), self._meter, math.inf)
        finally:
            if isinstance(body, OpenFile):
                body.close()

    async def _stream(self, root: str, path: str, content: bytes | OpenFile) -> None:
        size = len(content) if isinstance(content, bytes) else content.size
        stream = Streamed(content, 0, size, self._meter.add)
        try:
            await self._put(root, path, stream)
        except BaseException:
            stream.reset()
            raise

    async def _put(self, root: str, path: str, body: Body) -> None:
        kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
        try:
            answer = await self._store.exchange("PUT", self._url(root, path), body, headers={"Content-Type": kind})
            if answer.status == 200 and not answer.body:
                if not self._has_stored and SERVICE in root:  # without SERVICE, the URL of its listing is unknown
                    await self._check_listed(root, path, len(body))
            else:
                self._store.judge(answer)
        except UnavailableError as error:
            if _NOT_SERVED.search(str(error)):
                raise rejected(f"the server takes no artifacts: {error}") from None
            raise
        self._has_stored = True

    async def _check_listed(self, root: str, path: str, size: int) -> None:
        """
        Raises:
            UnexpectedAnswerError: The server does not list the file.
        """
        base, _, inside = root.partition(SERVICE)
        folder, name = posixpath.split(posixpath.join(unquote(inside).strip("/"), path))
        query = urlencode({"path": folder})
        listed = await self._store.judged("GET", f"{base}{SERVICE}?{query}", cap=64_000_000)
        files: Any = listed.get("files", [])
        found = [each for each in files if isinstance(each, dict) and posixpath.basename(str(each.get("path"))) == name]
        if not found or int(found[0].get("file_size", size)) != size:
            raise UnexpectedAnswerError(f"200 with an empty body, but the server does not list {path!r}")

    @staticmethod
    def _url(root: str, path: str) -> str:
        try:
            return f"{root}/{quote(path, safe='/~')}"
        except UnicodeEncodeError:
            raise rejected(f"the path {path!r} is no valid Unicode") from None

    # -- in parts ------------------------------------------------------------------------------------------------------

    async def _put_in_parts(self, root: str, path: str, file: OpenFile) -> bool:
        """Upload a file in parts. Return False, and upload nothing, if it is small or the server takes no parts."""
        if file.size < (environment.count("MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE") or MULTIPART_MIN_BYTES):
            return False
        if SERVICE not in root or not await self._may_take_parts(root):
            return False
        failure = await self._send_in_parts(root, path, file)
        if failure is not None and _NO_MULTIPART in str(failure):
            self._takes_parts = False
            return False
        if failure is not None:
            raise failure
        return True

    async def _send_in_parts(self, root: str, path: str, file: OpenFile) -> StoreError | None:
        """Return the failure, if there is one, without its frames: they hold URLs with permissions."""
        part = environment.count("MLFLOW_MULTIPART_UPLOAD_CHUNK_SIZE") or PART_BYTES
        count = -(-file.size // part)
        folder, name = posixpath.split(path)
        try:
            created = await self._call_multipart("create", root, folder, {"path": name, "num_parts": count})
            upload = {"path": name, "upload_id": created.get("upload_id")}
            try:
                parts = await self._send_parts(created.get("credentials"), file, part, count)
                await self._call_multipart("complete", root, folder, {**upload, "parts": parts})
            except BaseException:
                await self._abort(root, folder, upload)
                raise
        except StoreError as error:
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        return None

    async def _abort(self, root: str, folder: str, upload: Mapping[str, Any]) -> None:
        with anyio.CancelScope(shield=True), anyio.move_on_after(_ABORT_TIMEOUT):
            try:
                await self._call_multipart("abort", root, folder, upload)
            except StoreError as error:  # the object store keeps the parts for a while: that costs, and harms nothing
                logger.info("the parts of a failed upload were not deleted: %s", error)

    async def _may_take_parts(self, root: str) -> bool:
        wanted = environment.switch("MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD")
        if wanted is not None:
            return wanted and self._takes_parts is not False
        if self._takes_parts is None:
            try:
                info = await self._store.judged("GET", root.partition(SERVICE)[0] + "/api/3.0/mlflow/server-info")
            except StoreError as error:
                if error.retriable:
                    raise
                info = {}  # an older server, without this call
            self._takes_parts = info.get("multipart_uploads_enabled") is True
        return self._takes_parts

    async def _call_multipart(self, step: str, root: str, folder: str, data: Mapping[str, Any]) -> dict[str, Any]:
        base, _, inside = root.partition(SERVICE)
        url = posixpath.join(f"{base}/api/2.0/mlflow-artifacts/mpu/{step}{inside}", quote(folder, safe="/~"))
        return await self._store.judged("POST", url.rstrip("/"), orjson.dumps(data), empty=step != "create")

    async def _send_parts(self, credentials: Any, file: OpenFile, size: int, count: int) -> list[dict[str, Any]]:
        if not isinstance(credentials, list) or len(credentials) != count:
            raise UnexpectedAnswerError(f"the server gave no addresses for the {count} parts of a file")
        sent: dict[int, dict[str, Any]] = {}
        failures: list[StoreError] = []
        waiting = list(enumerate(credentials))
        waiting.reverse()
        streams: list[Streamed] = []

        async def send() -> None:
            while waiting and not failures:
                at, credential = waiting.pop()
                stream = Streamed(file, at * size, min(size, file.size - at * size), self._meter.add)
                streams.append(stream)
                try:
                    sent[at] = await self._send_part(credential, stream)
                except StoreError as error:
                    failures.append(error)

        try:
            async with anyio.create_task_group() as tasks:
                for _ in range(min(MAX_PARTS_AT_ONCE, count)):
                    tasks.start_soon(send)
            if failures:
                raise failures[0]
        except BaseException:
            for stream in streams:
                stream.reset()
            raise
        return [sent[at] for at in sorted(sent)]

    async def _send_part(self, credential: Any, stream: Streamed) -> dict[str, Any]:
        try:
            url, number = str(credential["url"]), int(credential["part_number"])
            headers = {str(name): str(value) for name, value in dict(credential.get("headers") or {}).items()}
        except (KeyError, TypeError, ValueError):
            raise UnexpectedAnswerError("the server gave an address for a part of a file that is none") from None
        if urlsplit(url).scheme not in ("http", "https"):
            raise UnexpectedAnswerError("the server gave an address for a part of a file that is not http(s)")
        store = self._part_stores.get(origin(url))
        if store is None:
            store = self._part_stores[origin(url)] = self._store.elsewhere(url, MAX_PARTS_AT_ONCE)
        answer = await store.exchange("PUT", url, stream, headers={"Content-Type": None, **headers})
        if answer.status in (200, 201):
            return {"part_number": number, "etag": answer.headers.get("etag", ""), "url": url}
        where = f"{urlsplit(url).hostname} answered {answer.status} to a part of the file"
        # 401 and 403: the permission in the URL has most likely expired, and the next attempt gets a new one.
        if answer.status in RETRIABLE or answer.status in (401, 403):
            raise UnavailableError(where)
        raise RejectedError(where, scope=Scope.BATCH)
