"""Pictures in any common form to RGB, with nothing guessed and every refusal explained."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastattr.errors import ImageError

ImageLike = Any  # a path, PIL image, uint8 or float array, or encoded bytes
MAX_DISPLAY_SIDE = 1024
BLANK = (128, 128, 128)


@dataclass(frozen=True)
class Visual:
    """One image, or one video as its frames. All frames have one size."""

    frames: tuple[Image.Image, ...]

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` in pixels."""
        width, height = self.frames[0].size
        return height, width

    def display(self) -> np.ndarray:
        """uint8 `[t height width 3]`, longer side at most `MAX_DISPLAY_SIDE`."""
        height, width = self.size
        shrink = min(1.0, MAX_DISPLAY_SIDE / max(height, width))
        size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        return np.stack(
            [np.asarray(f if size == f.size else f.resize(size, Image.Resampling.LANCZOS)) for f in self.frames]
        )

    def blank(self) -> Visual:
        """The same sizes, nothing to see: middle grey. (The picture's mean colour would give its background away.)"""
        return Visual(tuple(Image.new("RGB", frame.size, BLANK) for frame in self.frames))

    def hide(self, box: tuple[float, float, float, float]) -> Visual:
        """The same with a box painted over in the grey of `blank`, in every frame.

        Args:
            box: `(left, top, right, bottom)` as shares of the width and height.
        """
        height, width = self.size
        left, top, right, bottom = box
        pixels = (round(left * width), round(top * height), round(right * width), round(bottom * height))
        frames = tuple(frame.copy() for frame in self.frames)
        for frame in frames:
            frame.paste(BLANK, pixels)
        return Visual(frames)


def read_visuals(image: ImageLike | Sequence[ImageLike]) -> tuple[Visual, ...]:
    """Read one image, a list of images, or a list that holds videos as lists of frames.

    `x` is one image, `[x, y]` two images, `[[f, g, h]]` one video of three frames.

    Raises:
        ImageError: an image is unreadable, truncated, empty, or frames differ in size.
    """
    if not isinstance(image, list | tuple):
        return (Visual((read_image(image),)),)
    if not image:
        raise ImageError("image is an empty list, expected at least one image")
    return tuple(_read_video(each) if isinstance(each, list | tuple) else Visual((read_image(each),)) for each in image)


def _read_video(frames: Sequence[ImageLike]) -> Visual:
    if not frames:
        raise ImageError("a video is an empty list, expected at least one frame")
    read = tuple(read_image(frame) for frame in frames)
    if len({frame.size for frame in read}) > 1:
        raise ImageError(
            f"a video holds frames of sizes {sorted({f.size for f in read})} (width, height), expected one size"
        )
    return Visual(read)


def read_image(image: ImageLike) -> Image.Image:
    """Decode to RGB: EXIF rotation applied, transparency over white, 16 bits scaled to 8.

    Raises:
        ImageError: the image is unreadable, truncated or empty. URLs are not fetched.
    """
    if isinstance(image, str) and "://" in image[:12]:
        raise ImageError(
            f"image is the URL {image!r}; URLs are not fetched, download it and pass the path or the bytes"
        )
    if isinstance(image, Image.Image):
        return _to_rgb(image, "the PIL image")
    if isinstance(image, str | Path):
        path = Path(image)
        try:
            exists = path.is_file()
        except OSError as error:  # for example encoded bytes as text, too long for a path
            raise ImageError(f"image {str(path)[:80]!r}... cannot be a path: {error.strerror}") from error
        if not exists:
            raise ImageError(f"image {str(path)!r} is not a file")
        return _decode(path, f"image {str(path)!r}")
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode(io.BytesIO(bytes(image)), f"the image of {len(image)} bytes")
    if hasattr(image, "__array__"):
        try:
            array = np.asarray(image)
        except (TypeError, RuntimeError) as error:  # a tensor on a device, with a gradient, or in bfloat16
            raise ImageError(f"the {type(image).__name__} cannot be read as an array: {error}") from error
        return _from_array(array)
    raise ImageError(f"image is a {type(image).__name__}, expected a path, a PIL image, an array or encoded bytes")


def _decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(source) as opened:
            opened.load()
            return _to_rgb(opened, name)
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not in an image format that Pillow reads") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0:
        raise ImageError(f"the image array has shape {shape}, expected at least one pixel")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"the image array has shape {shape}, expected [h w], [h w 3] or [h w 4]")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError(
                f"the float image array spans {array.min()} to {array.max()}, expected finite values in [0, 1]"
            )
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"the image array is {array.dtype}, expected uint8, uint16, bool, or float in [0, 1]")
    return _to_rgb(Image.fromarray(array), "the image array")


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels, expected at least 1 x 1")
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # 16 or 32 bits of grey
            values = np.asarray(upright)
            upright = Image.fromarray(np.clip(values >> 8, 0, 255).astype(np.uint8))
        if upright.mode == "F":
            return _from_array(np.asarray(upright))
        if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            layers = upright.convert("RGBA")
            upright = Image.alpha_composite(Image.new("RGBA", layers.size, (255, 255, 255, 255)), layers)
        return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{name} cannot be decoded: {error}") from error
