"""
Encodes the values of log calls as the bytes of artifacts: text, dicts, figures, images.

The bytes are those that MLflow's calls of the same names write. Figures and images save themselves to a temporary file of
the artifact's name, because they take the format from its ending.
"""

# Rules of this file:
# - No library is imported, except the one that the value comes from, and PyYAML.
# - A bad value raises at once, as in MLflow.

from __future__ import annotations

import importlib
import json
import os
import posixpath
import re
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from time import time_ns
from typing import Any, Final

from runqueue.errors import CallTypeError, ConfigError

SMALL_SIZE: Final = 256
"""
The longer side of an image's small copy, in pixels; source: `mlflow.tracking.multimedia.COMPRESSED_IMAGE_SIZE`.
"""
LOGGED_IMAGES: Final = "mlflow.loggedImages"
"""The tag that tells MLflow's UI that a run has images; source: `mlflow.utils.mlflow_tags.MLFLOW_LOGGED_IMAGES`."""
_IMAGE_KEY: Final = re.compile(r"[a-zA-Z0-9_\-./ ]+")
_PLOTLY_FORMATS: Final = (".png", ".jpeg", ".webp", ".svg", ".pdf")


def encode_text(text: Any) -> bytes:
    """
    Encode text as UTF-8, with the line breaks of the operating system.

    Raises:
        CallTypeError: It is no text.
    """
    if not isinstance(text, str):
        raise CallTypeError(f"log_text takes text, not {type(text).__name__}")
    return text.replace("\n", os.linesep).encode()


def encode_dict(dictionary: Any, artifact_file: str) -> bytes:
    """
    Encode a dict as YAML if the file ends in .yml or .yaml, else as JSON. JSON takes other types as their `str()`.

    Raises:
        ConfigError: PyYAML is missing.
    """
    if os.path.splitext(artifact_file)[1] in (".yml", ".yaml"):
        try:
            yaml: Any = importlib.import_module("yaml")
        except ImportError:
            raise ConfigError(f"to log {artifact_file!r} takes PyYAML: pip install pyyaml") from None
        text = str(yaml.dump(dictionary, indent=2, default_flow_style=False))
    else:
        text = json.dumps(dictionary, indent=2, default=str)
    return encode_text(text)


def encode_figure(figure: Any, artifact_file: str, save_kwargs: Mapping[str, Any] | None) -> bytes:
    """
    Encode a figure in the format that the file's ending names.

    Args:
        figure: A figure of matplotlib or plotly.
        artifact_file: The path of the artifact.
        save_kwargs: More arguments for the method that saves the figure.

    Raises:
        CallTypeError: It is another object, or plotly does not write that format.
    """
    keywords = dict(save_kwargs or {})
    if _is_a(figure, "matplotlib", "Figure"):
        return _saved(artifact_file, lambda path: figure.savefig(path, **keywords))
    if _is_a(figure, "plotly", "Figure"):
        ending = os.path.splitext(artifact_file)[1]
        if ending == ".html":
            keywords = {"include_plotlyjs": "cdn", "auto_open": False} | keywords
            return _saved(artifact_file, lambda path: figure.write_html(path, **keywords))
        if ending in _PLOTLY_FORMATS:
            return _saved(artifact_file, lambda path: figure.write_image(path, **keywords))
        raise CallTypeError(f"plotly writes no file that ends in {ending!r}: .html, {', '.join(_PLOTLY_FORMATS)}")
    raise CallTypeError(f"log_figure takes a figure of matplotlib or plotly, not {type(figure).__name__}")


def encode_image(image: Any, artifact_file: str) -> bytes:
    """
    Encode an image in the format that the file's ending names.

    Raises:
        CallTypeError: It is no image.
        ConfigError: See `_from_array`.
    """
    picture = _picture(image)
    return _saved(artifact_file, picture.save)


def encode_image_series(image: Any, key: Any, step: int, timestamp: int | None) -> dict[str, bytes]:
    """
    Encode one image of a series, and a small copy that MLflow's UI shows first.

    Args:
        image: The image.
        key: The name of the series.
        step: The step.
        timestamp: Milliseconds since the epoch. None: now.

    Returns:
        The bytes by their paths among the run's artifacts.

    Raises:
        CallTypeError: It is no image, or the key is no text.
        ConfigError: The key has a character that MLflow does not allow.
    """
    if not isinstance(key, str):
        raise CallTypeError(f"key takes text, not {type(key).__name__}")
    if _IMAGE_KEY.fullmatch(key) is None:
        raise ConfigError(f"key={key[:300]!r} may hold letters, digits, _, -, ., / and spaces only")
    stamp = timestamp or time_ns() // 1_000_000
    name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{stamp}+{uuid.uuid4()}"
    picture = _picture(image)
    width, height = picture.size
    scale = (SMALL_SIZE, int(height * (SMALL_SIZE / width)))
    if width <= height:
        scale = (int(width * (SMALL_SIZE / height)), SMALL_SIZE)
    small = picture.resize(scale)
    made = {f"{name}.png": picture.save, f"{name}+compressed.webp": small.save}
    return {path: _saved(path, save) for path, save in made.items()}


def _is_a(value: Any, library: str, name: str) -> bool:
    """Tell if a value is of a class of a library, by the names of its classes: the library need not be imported."""
    return any(each.__name__ == name and each.__module__.partition(".")[0] == library for each in type(value).__mro__)


def _saved(artifact_file: str, save: Callable[[str], Any]) -> bytes:
    import tempfile  # not at the top: it imports as much as all the rest of a client

    with tempfile.TemporaryDirectory(prefix="runqueue-") as folder:
        path = os.path.join(folder, posixpath.basename(artifact_file))
        save(path)
        return Path(path).read_bytes()


# -- images ----------------------------------------------------------------------------------------------------------


def _picture(image: Any) -> Any:
    """Convert an array of numpy, an image of Pillow or an `mlflow.Image` to an image of Pillow."""
    if _is_a(image, "numpy", "ndarray"):
        return _from_array(image)
    if _is_a(image, "mlflow", "Image"):
        return image.to_pil()
    if _is_a(image, "PIL", "Image"):
        return image
    raise CallTypeError(f"log_image takes an array of numpy's, an image of Pillow's or mlflow.Image, not {type(image)}")


def _from_array(array: Any) -> Any:
    """
    Convert an array to an image, as `mlflow.tracking.multimedia.convert_to_pil_image` does.

    Raises:
        CallTypeError: The array holds no numbers.
        ConfigError: The shape is not that of an image, integers are not between 0 and 255, or Pillow is missing.
    """
    try:
        pillow: Any = importlib.import_module("PIL.Image")
    except ImportError:
        raise ConfigError("to log an array as an image takes Pillow: pip install pillow") from None
    kind, shape = array.dtype.kind, array.shape
    if kind not in "biuf":
        raise CallTypeError(f"an image holds numbers or booleans, not {array.dtype}")
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in (1, 3, 4)):
        raise ConfigError(f"an image has the shape H x W, or H x W x 1, 3 or 4, not {shape}")
    if len(shape) == 3 and shape[2] == 1:
        array = array[:, :, 0]
    whole = kind in "iu"
    least, most = array.min(), array.max()
    if least < 0 or most > (255 if whole else 1):
        if whole:
            raise ConfigError(f"the whole numbers of an image are 0 to 255, not {least} to {most}")
        warnings.warn(f"an image of floats is 0.0 to 1.0: {least} to {most} is scaled to that", stacklevel=5)
        array = (array - least) / (most - least)
    return pillow.fromarray((array if whole else array * 255).astype("uint8"))
