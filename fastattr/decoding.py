"""Encoded bytes, PIL images and arrays to RGB. Exceptions of decoders become `ImageError`."""

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

# Formats that Pillow decodes without starting another program, as it would for EPS (Ghostscript). HEIF needs a
# registered plugin.
_COMMON = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "HEIF", "JPEG2000")
FORMATS = (*_COMMON, "PPM", "ICO", "ICNS", "TGA", "QOI", "PCX", "SGI", "DDS", "MSP", "SPIDER", "IM", "XBM")

MAX_DECODED_BYTES = 1 << 30  # that decoding one picture may take
# nearly what decoding to RGB takes, measured: Pillow holds RGB in 4 bytes a pixel, twice while it converts
_BYTES_PER_PIXEL = 8
_ALPHA_BYTES_PER_PIXEL = 8
_WHOLE_FRAME_BYTES_PER_PIXEL = 8  # where the decoder has frames of its own
_WHOLE_FRAME = ("WEBP", "AVIF", "HEIF", "JPEG2000")

ORIENTATION = 0x0112  # of EXIF
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
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
    """Turn every exception of the block except MemoryError into an `ImageError` about `name`."""
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
    """Open a picture of one of `formats` and read its header, not its pixels. The caller closes it.

    Raises:
        ImageError: it has another format, is damaged, of more pixels than `PIL.Image.MAX_IMAGE_PIXELS` allows, or
            decoding it would take more than `MAX_DECODED_BYTES`.
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
    """uint8 `[height width 3]` of a PNG in a saved result or a record, which may be damaged or forged.

    Raises:
        ImageError: it is no PNG, damaged, or too large.
    """
    name = "the picture of the result"
    with open_picture(data, name, ("PNG",)) as opened:
        return np.asarray(to_rgb(opened, name))


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(each for each in FORMATS if each in Image.OPEN)


def turn_upright(rgb: Image.Image, *, of: Image.Image) -> Image.Image:
    """`rgb` with the EXIF orientation of the picture `of` applied.

    `PIL.ImageOps.exif_transpose` would also rewrite the EXIF data, which fails on broken values of other tags.
    """
    turn = _TURNS.get(of.getexif().get(ORIENTATION, 1))
    return rgb if turn is None else rgb.transpose(turn)


def place_in_sequence(image: Image.Image) -> tuple[int, int, str]:
    """Index of the current frame (or page), their number, and what they are called; `(0, 1, "")` for a single picture."""
    called = _SEQUENCES.get(image.format or "")
    count = int(getattr(image, "n_frames", 1)) if called else 1
    return (image.tell(), count, called or "") if count > 1 else (0, 1, "")


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """8-bit RGB: transparency over white, 16-bit grey scaled to 8. The EXIF orientation is not applied.

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
            values = np.asarray(image)
            return from_array(1 - values if _is_white_zero(image) else values, name)
        if image.mode in ("La", "RGBa"):  # premultiplied
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            layers = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", layers.size, (255, 255, 255, 255)), layers)
        return image.convert("RGB")


def _clear_grey(image: Image.Image, name: str) -> int | None:
    """The transparent grey of a PNG of 2, 4 or 16 bits in decoded values, or None. Call it before the pixels are loaded.

    Pillow reports the value of the file, before scaling.

    Raises:
        ImageError: a transparent colour at 16 bits a channel, which cannot be told from others once reduced to 8.
    """
    clear = image.info.get("transparency")
    raw = [str(tile[3]) for tile in getattr(image, "tile", None) or ()]
    if clear is None or not raw:
        return clear if image.mode.startswith("I;16") else None
    if raw[0] == "RGB;16B":
        raise ImageError(f"{name} is a PNG of 16 bits a colour with a transparent colour; convert it to RGBA")
    steps = {"L;2": 85, "L;4": 17, "I;16B": 1}  # decoded value of one step in the file
    return int(clear) * steps[raw[0]] if raw[0] in steps else None


def _from_grey(image: Image.Image, clear: int | None, name: str) -> Image.Image:
    """RGB of 8- or 16-bit grey, in which the value `clear` is transparent. Raises `ImageError` for 32 bits."""
    if image.mode == "I" and image.format not in ("PNG", "PPM"):  # those hold 16 bits
        raise ImageError(
            f"{name} is of mode I (32-bit integers), and the value of white is unknown; convert it to 8 bits "
            "(mode L) or to floats in [0, 1]"
        )
    values = np.asarray(image)
    spare = 4 if _tag(image, _BITS) == 12 else 8  # bits beyond the eight that are kept
    grey = values if image.mode == "L" else np.clip(values >> spare, 0, 255).astype(np.uint8)
    if _is_white_zero(image):
        grey = 255 - grey
    return Image.fromarray(grey if clear is None else np.where(values == clear, np.uint8(255), grey)).convert("RGB")


def _is_white_zero(image: Image.Image) -> bool:
    """Whether a TIFF of more than 8 bits stores white as 0. Pillow turns grey of 8 bits and fewer by itself."""
    return _tag(image, _PHOTOMETRIC) == 0


def _tag(image: Image.Image, number: int) -> Any:
    """A tag of a TIFF that was not made into another picture since it was opened; None where there is none."""
    value = getattr(image, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


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
    """Anything with `__array__` as an array. Raises `ImageError` where that fails."""
    try:
        return np.asarray(image)
    except (TypeError, RuntimeError) as error:  # a tensor on a device, with a gradient, or in bfloat16
        raise ImageError(f"the {type(image).__name__} cannot be read as an array: {error}") from error
