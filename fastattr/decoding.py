"""Encoded bytes, PIL images and arrays to RGB. Whatever a decoder raises becomes an `ImageError` here."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastattr.errors import ImageError

# Formats that Pillow decodes by itself. It would start other programs for some of the rest (EPS: Ghostscript). HEIF is
# there where a plugin for it is registered.
_COMMON = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JPEG2000")
FORMATS = (*_COMMON, "PPM", "ICO", "ICNS", "TGA", "QOI", "PCX", "SGI", "DDS", "MSP", "SPIDER", "IM", "XBM")

MAX_DECODED_BYTES = 1 << 30  # that decoding one picture may take
# nearly what decoding to RGB takes, measured: Pillow holds RGB in 4 bytes a pixel, twice while it converts
_BYTES_PER_PIXEL = 8
_ALPHA_BYTES_PER_PIXEL = 8
_WHOLE_FRAME_BYTES_PER_PIXEL = 8  # where the decoder has frames of its own
_WHOLE_FRAME = ("WEBP", "AVIF", "HEIF", "JPEG2000")

ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SEQUENCES = {"GIF": "frames", "WEBP": "frames", "PNG": "frames", "AVIF": "frames", "TIFF": "pages"}


@contextmanager
def decoder_errors(name: str) -> Iterator[None]:
    """Every exception of the block but MemoryError as an `ImageError` about `name`: decoders raise anything."""
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name} is not in an image format that is read here (PNG, JPEG, WEBP, GIF, TIFF, AVIF and others)"
        ) from error
    except Exception as error:
        raise ImageError(f"{name} cannot be decoded: {str(error) or type(error).__name__}") from error


def open_picture(source: Path | bytes, name: str, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A picture of one of these formats, its header read and its pixels not yet. To be closed by the caller.

    Raises:
        ImageError: it is of no such format, damaged, of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` allows, or would
            take more than `MAX_DECODED_BYTES`.
    """
    with decoder_errors(name), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of what is well below the limit here
        opened = Image.open(
            io.BytesIO(source) if isinstance(source, bytes) else source,
            formats=[each for each in formats if each in _known_formats()],
        )
    try:
        check_memory(opened, name)
    except ImageError:
        opened.close()
        raise
    return opened


def check_memory(image: Image.Image, name: str) -> None:
    """Raises `ImageError` where to decode the frame an image stands at would take more than `MAX_DECODED_BYTES`."""
    clear = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    per_pixel = _BYTES_PER_PIXEL + clear * _ALPHA_BYTES_PER_PIXEL
    per_pixel += (image.format in _WHOLE_FRAME) * _WHOLE_FRAME_BYTES_PER_PIXEL
    n_bytes = image.width * image.height * per_pixel
    if n_bytes > MAX_DECODED_BYTES:
        raise ImageError(
            f"{name} is {image.width} x {image.height} pixels, and decoding it would take {n_bytes >> 20} MiB, expected at most "
            f"{MAX_DECODED_BYTES >> 20}; make it smaller first"
        )


def read_png(data: bytes) -> np.ndarray:
    """uint8 `[height width 3]` of a PNG that was written by fastattr, or so it is said.

    Raises:
        ImageError: it is none, damaged, or too large.
    """
    name = "the picture of the result"
    with open_picture(data, name, ("PNG",)) as opened:
        return np.asarray(to_rgb(opened, name))


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


def turn_upright(rgb: Image.Image, *, of: Image.Image) -> Image.Image:
    """Pixels turned as the EXIF orientation of the picture they are of says.

    `PIL.ImageOps.exif_transpose` also writes the EXIF data again, which fails on broken values of other tags.
    """
    turn = _TURNS.get(of.getexif().get(ORIENTATION, 1))
    return rgb if turn is None else rgb.transpose(turn)


def place_in_sequence(image: Image.Image) -> tuple[int, int, str]:
    """Which frame (or page) this is, from 0, of how many, and what they are called; `(0, 1, "")` of a single picture."""
    called = _SEQUENCES.get(image.format or "")
    count = int(getattr(image, "n_frames", 1)) if called else 1
    return (image.tell(), count, called or "") if count > 1 else (0, 1, "")


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """RGB of 8 bits: transparency over white, 16 bits of grey scaled to 8. Pixels stay where they lie.

    Raises:
        ImageError: the picture is empty or damaged, or its values have no known range.
    """
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{name} is {image.width} x {image.height} pixels, expected at least 1 x 1")
    with decoder_errors(name):
        clear = _clear_grey(image, name)
        if getattr(image, "tile", None):  # its pixels are not there yet
            check_memory(image, name)
        image.load()
        if image.mode.startswith("I") or clear is not None:
            return _from_grey(image, clear, name)
        if image.mode == "F":
            return from_array(np.asarray(image), name)
        if image.mode in ("La", "RGBa"):  # premultiplied
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            layers = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layers.size, (255, 255, 255, 255)), layers)
        return image.convert("RGB")


def _clear_grey(image: Image.Image, name: str) -> int | None:
    """The transparent grey of a PNG that is not of 8 bits, which Pillow names as it is in the file; before it is loaded.

    Raises:
        ImageError: 16 bits a colour become 8, so that other colours cannot be told from the transparent one.
    """
    clear = image.info.get("transparency")
    raw = [str(tile[3]) for tile in getattr(image, "tile", None) or ()]
    if clear is None or not raw:
        return clear if image.mode.startswith("I;16") else None
    if raw[0] == "RGB;16B":
        raise ImageError(f"{name} is a PNG of 16 bits a colour with a transparent colour; convert it to RGBA")
    depths = {"L;2": 85, "L;4": 17, "I;16B": 1}  # what one step in the file is in what Pillow decodes
    return int(clear) * depths[raw[0]] if raw[0] in depths else None


def _from_grey(image: Image.Image, clear: int | None, name: str) -> Image.Image:
    """Grey of 8 or 16 bits, of which `clear` is transparent."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # which hold 16 bits
        raise ImageError(
            f"{name} is of mode I, whole numbers of 32 bits, and nothing says which of them is white; convert it to 8 bits "
            "(mode L) or to floats in [0, 1]"
        )
    values = np.asarray(image)
    grey = values if image.mode == "L" else np.clip(values >> 8, 0, 255).astype(np.uint8)
    return Image.fromarray(grey if clear is None else np.where(values == clear, np.uint8(255), grey)).convert("RGB")


def from_array(array: np.ndarray, name: str = "the image array") -> Image.Image:
    """RGB of an array `[h w]`, `[h w 1]`, `[h w 3]` or `[h w 4]`.

    Raises:
        ImageError: it has another shape or dtype, or holds values out of range.
    """
    shape = list(array.shape)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.size == 0:
        raise ImageError(f"{name} has shape {shape}, expected at least one pixel")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ImageError(f"{name} has shape {shape}, expected [h w], [h w 3] or [h w 4]")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ImageError(f"{name} of floats spans {array.min()} to {array.max()}, expected finite values in [0, 1]")
        array = np.round(array * 255).astype(np.uint8)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        array = (array >> 8).astype(np.uint8)
    elif array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        raise ImageError(f"{name} is {array.dtype}, expected uint8, uint16, bool, or float in [0, 1]")
    return to_rgb(Image.fromarray(array), name)


def as_array(image: Any) -> np.ndarray:
    """Anything with `__array__`. Raises `ImageError` where it has none to give."""
    try:
        return np.asarray(image)
    except (TypeError, RuntimeError) as error:  # a tensor on a device, with a gradient, or in bfloat16
        raise ImageError(f"the {type(image).__name__} cannot be read as an array: {error}") from error
