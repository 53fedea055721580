"""
The calls that log artifacts, the same in both faces, and on a run.

Rules of this file: nothing here waits for the network; what a call does on its caller's time is to make the bytes of what
may change after it, or to list files. Whatever is wrong with what was called for raises at once; whatever is wrong with a
file fails that file alone, later.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, Protocol

from runqueue._run_id import RunId
from runqueue.api import _conversion as convert
from runqueue.artifacts import _content as content
from runqueue.artifacts import _source as artifacts
from runqueue.errors import CallTypeError, ConfigError
from runqueue.queueing import Lane
from runqueue.queueing.batches._batch import ARTIFACT, record_of
from runqueue.wire._records import InvalidValue


class _LogCalls(Protocol):
    def _lane(self, run_id: RunId) -> Lane: ...

    def set_tag(self, run_id: RunId, key: str, value: Any) -> None: ...

    def _log_files(self, run_id: RunId, files: Mapping[str, artifacts.Source]) -> None: ...


class ArtifactCalls:
    """A mixin; the rest of the client is the `_LogCalls` it needs."""

    def log_artifact(
        self: _LogCalls, run_id: RunId, local_path: str | PathLike[str], artifact_path: str | None = None
    ) -> None:
        """
        Queue a file for upload, or like MLflow a folder, which goes under its own name.

        Args:
            run_id: Real or pending.
            local_path: The file. It is read when it is uploaded: what it holds then is stored. If it is gone by then, or
                changes while it is read, it fails, and nothing else does.
            artifact_path: The folder among the run's artifacts. None: their root.

        Raises:
            ConfigError: `artifact_path` leads out of the run's artifacts.
            CallTypeError: A path is none.
            QueueFullError: There is no room, and `on_full` says to raise.
            ClosedError: The client was closed.

        Guarantees:
            Stored behind the run's creation and before its final status, beside its metrics and never in front of them,
            by at most four uploads at once. Of one path, what was logged last stays.
        """
        self._log_files(run_id, artifacts.file_or_folder(local_path, artifacts.artifact_folder(artifact_path)))

    def log_artifacts(
        self: _LogCalls, run_id: RunId, local_dir: str | PathLike[str], artifact_path: str | None = None
    ) -> None:
        """
        Queue all files of a folder, and of those in it, for upload; see `log_artifact`.

        Args:
            run_id: Real or pending.
            local_dir: The folder. It is listed now, and its files are read when they are uploaded. Symbolic links to
                folders are not followed; one that leads out of the folder fails.
            artifact_path: The folder among the run's artifacts. None: their root.
        """
        self._log_files(run_id, artifacts.files_in(local_dir, artifacts.artifact_folder(artifact_path)))

    def log_text(self: _LogCalls, run_id: RunId, text: str, artifact_file: str) -> None:
        """
        Queue text for upload, as a file in UTF-8; see `log_artifact`.

        Args:
            run_id: Real or pending.
            text: Its content.
            artifact_file: The path among the run's artifacts, e.g. "dir/notes.txt".
        """
        path = artifacts.artifact_file_path(artifact_file)
        self._log_files(run_id, {path: artifacts.InMemory(content.encode_text(text))})

    def log_dict(self: _LogCalls, run_id: RunId, dictionary: Any, artifact_file: str) -> None:
        """
        Queue what JSON or YAML can hold for upload; see `log_artifact`.

        Args:
            run_id: Real or pending.
            dictionary: Written now. Of what JSON does not know, the `str()` is.
            artifact_file: The path among the run's artifacts: YAML if it ends in .yml or .yaml, else JSON.
        """
        path = artifacts.artifact_file_path(artifact_file)
        self._log_files(run_id, {path: artifacts.InMemory(content.encode_dict(dictionary, artifact_file))})

    def log_figure(
        self: _LogCalls,
        run_id: RunId,
        figure: Any,
        artifact_file: str,
        *,
        save_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Queue a figure of matplotlib or plotly for upload; it is drawn now. See `log_artifact`.

        Args:
            run_id: Real or pending.
            figure: To be drawn.
            artifact_file: The path among the run's artifacts; its ending says the format.
            save_kwargs: For `savefig`, `write_html` or `write_image`.

        Raises:
            CallTypeError: It is no such figure.
        """
        path = artifacts.artifact_file_path(artifact_file)
        self._log_files(run_id, {path: artifacts.InMemory(content.encode_figure(figure, path, save_kwargs))})

    def log_image(
        self: _LogCalls,
        run_id: RunId,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
    ) -> None:
        """
        Queue an image for upload, by a path, or as one of a series by its key; it is written now. See `log_artifact`.

        Args:
            run_id: Real or pending.
            image: An array of numpy's (H x W, or H x W x 1, 3 or 4), an image of Pillow's, or `mlflow.Image`.
            artifact_file: The path among the run's artifacts, without any of the others.
            key: The name of the series. A small copy is stored with each image, and the run gets a tag by which MLflow's
                page finds them.
            step: In the series. None: 0.
            timestamp: Milliseconds since the epoch. None: now.

        Raises:
            CallTypeError: It is no image; or not exactly one of `artifact_file` and `key` is given.
            ConfigError: Its shape, its numbers or the key are not what an image has.
        """
        if artifact_file is not None and (key, step, timestamp) != (None, None, None):
            raise CallTypeError("log_image takes artifact_file= alone, without key=, step= and timestamp=")
        if artifact_file is not None:
            path = artifacts.artifact_file_path(artifact_file)
            self._log_files(run_id, {path: artifacts.InMemory(content.encode_image(image, path))})
            return
        if key is None:
            raise CallTypeError("log_image takes exactly one of artifact_file= and key=")
        made = content.encode_image_series(image, key, _number(step, "step") or 0, _number(timestamp, "timestamp"))
        self._log_files(run_id, {path: artifacts.InMemory(written) for path, written in made.items()})
        self.set_tag(run_id, content.LOGGED_IMAGES, True)

    def _log_files(self: _LogCalls, run_id: RunId, files: Mapping[str, artifacts.Source]) -> None:
        lane = self._lane(run_id)
        if files:
            lane.append(record_of(ARTIFACT, files))


def _number(value: Any, name: str) -> int | None:
    number = None if value is None else convert.whole(value, name)
    if isinstance(number, InvalidValue):
        raise ConfigError(number.reason)
    return number
