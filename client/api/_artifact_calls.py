"""The log calls of both clients that queue files for upload: files, folders, text, dicts, figures and images."""

# Rules of this file: nothing here waits for the network. On its caller's time, a call encodes objects that may change
# after it, and lists folders. A bad call raises at once; a file that cannot be read fails alone, when it is uploaded.

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from runqueue._run_id import RunId
from runqueue.api import _conversion as convert
from runqueue.api._log_calls import LogCalls
from runqueue.artifacts import _content as content
from runqueue.artifacts import _source as artifacts
from runqueue.errors import CallTypeError, ConfigError
from runqueue.queueing.batches._batch import ARTIFACT, record_of
from runqueue.wire._records import InvalidValue


class ArtifactCalls(LogCalls):
    """Adds the calls that log artifacts to a client. Any number of threads may call them at once."""

    def log_artifact(self, run_id: RunId, local_path: str | PathLike[str], artifact_path: str | None = None) -> None:
        """
        Queue a file for upload, or a folder, which keeps its name as in MLflow.

        Args:
            run_id: The run: its id or its placeholder.
            local_path: The file. It is read when it is uploaded, and stored as it is then. A file that is gone by then,
                or changes while it is read, fails alone.
            artifact_path: The folder among the run's artifacts, e.g. "plots". None: their root.

        Raises:
            ConfigError: `artifact_path` leads out of the run's artifacts, or `run_id` cannot be the id of a run.
            CallTypeError: A path or `run_id` is of the wrong type.
            QueueFullError: The queue is full; see `max_pending`.
            ClosedError: The client was closed.

        Guarantees:
            The file is stored after the run's creation and before its final status. Uploads run beside the run's
            metrics and do not delay them, four at a time. Of several files for one path, the last one stays.
        """
        self._log_files(run_id, artifacts.file_or_folder(local_path, artifacts.artifact_folder(artifact_path)))

    def log_artifacts(self, run_id: RunId, local_dir: str | PathLike[str], artifact_path: str | None = None) -> None:
        """
        Queue all files of a folder and its subfolders for upload; see `log_artifact`.

        Args:
            run_id: The run: its id or its placeholder.
            local_dir: The folder. It is listed now; its files are read when they are uploaded. Symbolic links to
                folders are not followed, and a link to a file outside of the folder fails.
            artifact_path: The folder among the run's artifacts. None: their root.

        Raises:
            ConfigError, CallTypeError, QueueFullError, ClosedError: As for `log_artifact`.
        """
        self._log_files(run_id, artifacts.files_in(local_dir, artifacts.artifact_folder(artifact_path)))

    def log_text(self, run_id: RunId, text: str, artifact_file: str) -> None:
        """
        Queue text for upload, as a file in UTF-8; see `log_artifact`.

        Args:
            run_id: The run: its id or its placeholder.
            text: The content of the file.
            artifact_file: The path among the run's artifacts, e.g. "dir/notes.txt".

        Raises:
            ConfigError, CallTypeError, QueueFullError, ClosedError: As for `log_artifact`.
        """
        path = artifacts.artifact_file_path(artifact_file)
        self._log_files(run_id, {path: artifacts.InMemory(content.encode_text(text))})

    def log_dict(self, run_id: RunId, dictionary: Any, artifact_file: str) -> None:
        """
        Queue a dictionary, or anything else that JSON can hold, for upload; see `log_artifact`.

        Args:
            run_id: The run: its id or its placeholder.
            dictionary: The content; it is encoded now. Of values that JSON does not know, the `str()` is stored.
            artifact_file: The path among the run's artifacts. The file holds YAML if it ends in .yml or .yaml, else
                JSON.

        Raises:
            ConfigError, CallTypeError, QueueFullError, ClosedError: As for `log_artifact`.
        """
        path = artifacts.artifact_file_path(artifact_file)
        self._log_files(run_id, {path: artifacts.InMemory(content.encode_dict(dictionary, artifact_file))})

    def log_figure(
        self,
        run_id: RunId,
        figure: Any,
        artifact_file: str,
        *,
        save_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Queue a figure of matplotlib or plotly for upload; see `log_artifact`.

        Args:
            run_id: The run: its id or its placeholder.
            figure: The figure; it is drawn now.
            artifact_file: The path among the run's artifacts; its ending chooses the format.
            save_kwargs: Arguments of matplotlib's `savefig`, or of plotly's `write_html` or `write_image`. None: none.

        Raises:
            CallTypeError: `figure` is no figure of either library, or a value is of the wrong type.
            ConfigError, QueueFullError, ClosedError: As for `log_artifact`.
        """
        path = artifacts.artifact_file_path(artifact_file)
        self._log_files(run_id, {path: artifacts.InMemory(content.encode_figure(figure, path, save_kwargs))})

    def log_image(
        self,
        run_id: RunId,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        timestamp: int | None = None,
    ) -> None:
        """
        Queue an image for upload, under a path or as one of a series; it is encoded now. See `log_artifact`.

        Args:
            run_id: The run: its id or its placeholder.
            image: An array of numpy (H x W, or H x W x 1, 3 or 4), an image of Pillow, or an `mlflow.Image`.
            artifact_file: The path among the run's artifacts. None: `key` is given.
            key: The name of a series of images. A small copy is stored beside each image, and the run gets the tag by
                which MLflow's web page finds them. None: `artifact_file` is given.
            step: The image's step in the series. None: 0.
            timestamp: The image's time in the series, in milliseconds since the epoch. None: now.

        Raises:
            CallTypeError: `image` is no image, or not exactly one of `artifact_file` and `key` is given.
            ConfigError: The image's shape or numbers are not those of an image, or a value is bad.
            QueueFullError, ClosedError: As for `log_artifact`.
        """
        if artifact_file is not None and (key, step, timestamp) != (None, None, None):
            raise CallTypeError("log_image takes artifact_file= alone, without key=, step= and timestamp=")
        if artifact_file is not None:
            path = artifacts.artifact_file_path(artifact_file)
            self._log_files(run_id, {path: artifacts.InMemory(content.encode_image(image, path))})
            return
        if key is None:
            raise CallTypeError("log_image takes exactly one of artifact_file= and key=")
        encoded = content.encode_image_series(image, key, _whole(step, "step") or 0, _whole(timestamp, "timestamp"))
        self._log_files(run_id, {path: artifacts.InMemory(each) for path, each in encoded.items()})
        self.set_tag(run_id, content.LOGGED_IMAGES, True)

    def _log_files(self, run_id: RunId, files: Mapping[str, artifacts.Source]) -> None:
        lane = self._lane(run_id)
        if files:
            lane.append(record_of(ARTIFACT, files))


def _whole(value: Any, name: str) -> int | None:
    number = None if value is None else convert.whole(value, name)
    if isinstance(number, InvalidValue):
        raise ConfigError(number.reason)
    return number
