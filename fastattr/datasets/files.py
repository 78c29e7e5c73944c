"""Files of a dataset, read with every fault named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastattr.decoding import decoder_errors, open_picture, turn_upright
from fastattr.errors import DatasetError, ImageError
from fastattr.images import read_image


def read_json(path: Path) -> Any:
    """Raises `DatasetError` with the line and column where the file is broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DatasetError(
            f"{str(path)!r} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {error}") from error


def digest(files: Iterable[Path], *values: Any) -> str:
    """A hash, 16 hex digits, of the names and contents of files and of values as JSON. Files may be missing."""
    found = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for path in files:
        try:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, ValueError):  # a ValueError where the name cannot be a path
            content = "missing"
        found.update(json.dumps([path.name, content]).encode())
    return found.hexdigest()[:16]


def read_text(path: Path) -> str:
    """The text of a file without white space around it. Raises `DatasetError` when there is none."""
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{str(path)!r} cannot be read: {error}") from error
    if not text:
        raise DatasetError(f"{str(path)!r} is empty, expected some text; write it or remove the file")
    return text


def read_picture(path: Path) -> Image.Image:
    """RGB with the EXIF orientation applied, see `read_image`; masks and boxes must refer to that.

    Raises:
        DatasetError: the picture is missing or cannot be decoded.
    """
    try:
        return read_image(path)
    except ImageError as error:
        raise DatasetError(str(error)) from error


def read_pixels(path: Path, modes: Sequence[str], picture: Image.Image) -> np.ndarray:
    """Values `[H W]`, or `[H W channel]`, of a map that goes with a picture; of a palette the indices.

    Args:
        modes: of Pillow, which are accepted. An EXIF orientation of the map itself is applied.

    Raises:
        DatasetError: the file is missing or cannot be decoded, has another mode, or not the size of the picture.
    """
    if not path.is_file():
        raise DatasetError(f"{str(path)!r} is not a file, expected a map of what the picture shows")
    try:
        with open_picture(path, repr(str(path))) as opened, decoder_errors(repr(str(path))):
            opened.load()
            mode, upright = opened.mode, turn_upright(opened, of=opened)
            values, size = np.asarray(upright), upright.size
    except ImageError as error:
        raise DatasetError(str(error)) from error
    if mode not in modes:
        raise DatasetError(f"{str(path)!r} has pixels of mode {mode}, expected {' or '.join(modes)}; convert it")
    check_size(path, size, picture)
    return values


def check_size(path: Path, size: tuple[int, int], picture: Image.Image) -> None:
    """Raises `DatasetError` unless `size`, `(width, height)` according to `path`, is that of the picture."""
    if size != picture.size:
        raise DatasetError(
            f"{str(path)!r} is about {size[0]} x {size[1]} pixels but the picture has {picture.width} x {picture.height}; "
            "expected one size"
        )


def inside(folder: Path, relative: str, source: Path) -> Path:
    """A path that `source` gives relative to `folder`. Raises `DatasetError` when it leads out of it."""
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise DatasetError(f"{str(source)!r} names the file {relative!r}, expected a path inside {str(folder)!r}")
    return folder / relative
