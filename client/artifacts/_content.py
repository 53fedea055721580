"""
From what a call is given to the bytes of an artifact: text, dicts, figures, images.

The bytes are those that MLflow's calls of the same names write, made in the same way: figures and images save themselves
into a file of the artifact's name, from whose ending they tell the format.

Rules of this file: no libraries are imported but those that the value given comes from, and what writes YAML. What is wrong
with a value is raised at once, as by MLflow: nothing could be queued of it.
"""

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

COMPRESSED: Final = 256
"""Pixels of the longer side of the small copy of an image; source: `mlflow.tracking.multimedia.COMPRESSED_IMAGE_SIZE`."""
LOGGED_IMAGES: Final = "mlflow.loggedImages"
"""The tag by which MLflow's page finds a run with images; source: `mlflow.utils.mlflow_tags.MLFLOW_LOGGED_IMAGES`."""
_IMAGE_KEY: Final = re.compile(r"[a-zA-Z0-9_\-./ ]+")
_DRAWN_BY_PLOTLY: Final = (".png", ".jpeg", ".webp", ".svg", ".pdf")


def encode_text(text: Any) -> bytes:
    """
    Raises:
        CallTypeError: It is no text.
    """
    if not isinstance(text, str):
        raise CallTypeError(f"log_text takes text, not {type(text).__name__}")
    return text.replace("\n", os.linesep).encode()


def encode_dict(dictionary: Any, artifact_file: str) -> bytes:
    """YAML by the endings .yml and .yaml, else JSON, in which what JSON does not know becomes its `str()`."""
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
    Raises:
        CallTypeError: It is neither a figure of matplotlib nor one of plotly.
    """
    keywords = dict(save_kwargs or {})
    if _is_a(figure, "matplotlib", "Figure"):
        return _saved(artifact_file, lambda path: figure.savefig(path, **keywords))
    if _is_a(figure, "plotly", "Figure"):
        ending = os.path.splitext(artifact_file)[1]
        if ending == ".html":
            keywords = {"include_plotlyjs": "cdn", "auto_open": False} | keywords
            return _saved(artifact_file, lambda path: figure.write_html(path, **keywords))
        if ending in _DRAWN_BY_PLOTLY:
            return _saved(artifact_file, lambda path: figure.write_image(path, **keywords))
        raise CallTypeError(f"plotly writes no file that ends in {ending!r}: .html, {', '.join(_DRAWN_BY_PLOTLY)}")
    raise CallTypeError(f"log_figure takes a figure of matplotlib or plotly, not {type(figure).__name__}")


def encode_image(image: Any, artifact_file: str) -> bytes:
    """
    Raises:
        CallTypeError: It is no image.
    """
    picture = _picture(image)
    return _saved(artifact_file, picture.save)


def encode_image_series(image: Any, key: Any, step: int, timestamp: int | None) -> dict[str, bytes]:
    """
    An image of a series, and its small copy, by their paths.

    Raises:
        CallTypeError: It is no image, or the key is no text.
        ConfigError: The key has a character that MLflow does not allow there.
    """
    if not isinstance(key, str):
        raise CallTypeError(f"key takes text, not {type(key).__name__}")
    if _IMAGE_KEY.fullmatch(key) is None:
        raise ConfigError(f"key={key[:300]!r} may hold letters, digits, _, -, ., / and spaces only")
    stamp = timestamp or time_ns() // 1_000_000
    name = f"images/{key.replace('/', '~')}+step+{step}+timestamp+{stamp}+{uuid.uuid4()}"
    picture = _picture(image)
    width, height = picture.size
    scale = (COMPRESSED, int(height * (COMPRESSED / width)))
    if width <= height:
        scale = (int(width * (COMPRESSED / height)), COMPRESSED)
    small = picture.resize(scale)
    made = {f"{name}.png": picture.save, f"{name}+compressed.webp": small.save}
    return {path: _saved(path, save) for path, save in made.items()}


def _is_a(value: Any, library: str, name: str) -> bool:
    """By the names of its classes: whoever has such an object has imported its library, and we need not."""
    return any(each.__name__ == name and each.__module__.partition(".")[0] == library for each in type(value).__mro__)


def _saved(artifact_file: str, save: Callable[[str], Any]) -> bytes:
    import tempfile  # with what it imports, as much as all the rest of a client

    with tempfile.TemporaryDirectory(prefix="runqueue-") as made:
        path = os.path.join(made, posixpath.basename(artifact_file))
        save(path)
        return Path(path).read_bytes()


# -- images ----------------------------------------------------------------------------------------------------------


def _picture(image: Any) -> Any:
    """As Pillow has it: an array of numpy's, an image of Pillow's, or MLflow's wrapper of one."""
    if _is_a(image, "numpy", "ndarray"):
        return _from_array(image)
    if _is_a(image, "mlflow", "Image"):
        return image.to_pil()
    if _is_a(image, "PIL", "Image"):
        return image
    raise CallTypeError(f"log_image takes an array of numpy's, an image of Pillow's or mlflow.Image, not {type(image)}")


def _from_array(array: Any) -> Any:
    """
    As `mlflow.tracking.multimedia.convert_to_pil_image` does it.

    Raises:
        CallTypeError: It holds no numbers.
        ConfigError: It has not the shape of an image, or whole numbers that are no bytes.
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
