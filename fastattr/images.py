"""Pictures and videos in any common form to RGB.

The picture that is read is the one that is shown to the model. The EXIF orientation is applied to files and encoded
bytes, as `transformers.image_utils.load_image` does, and ignored for PIL images and arrays, as transformers' processors
do.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

from fastattr.decoding import (
    as_array,
    decoder_errors,
    from_array,
    open_picture,
    place_in_sequence,
    to_rgb,
    turn_upright,
)
from fastattr.errors import ImageError, InputError
from fastattr.video import Clip, Sampling, Timing, is_movie, movie_size, read_animation, read_movie

ImageLike = Any  # a path, PIL image, uint8 or float array, encoded bytes, a data: URL, or a `Visual`
Kind = Literal["image", "video"]
MAX_DISPLAY_SIDE = 1024
BLANK = (128, 128, 128)


@dataclass(frozen=True)
class Sizing:
    """The size at which to show a picture, from the keys of Qwen's message parts; see `Family.sized`.

    Attributes:
        min_pixels, max_pixels: limits on the pixels of the picture as shown.
        height, width: in pixels, rounded to whole cells; both or neither.

    Raises:
        InputError: the values contradict each other.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if (self.height is None) != (self.width is None):
            raise InputError("resized_height and resized_width belong together, but one of them is missing")
        if self.height is not None and (self.min_pixels, self.max_pixels) != (None, None):
            raise InputError(
                "resized_height and resized_width already set the size; leave min_pixels and max_pixels out"
            )
        if None not in (self.min_pixels, self.max_pixels) and self.min_pixels > self.max_pixels:  # type: ignore[operator]
            raise InputError(f"min_pixels is {self.min_pixels}, expected at most max_pixels, {self.max_pixels}")


@dataclass(frozen=True)
class Visual:
    """One image, or one video as its frames. All frames have one size.

    Attributes:
        timing: when the frames were taken; None where unknown.
        sizing: the size at which to show it; None where the processor decides.
        notes: what the reader of a report should know of how it was read, such as skipped frames.
    """

    frames: tuple[Image.Image, ...]
    timing: Timing | None = None
    sizing: Sizing | None = None
    notes: tuple[str, ...] = ()

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
        return replace(self, frames=tuple(Image.new("RGB", frame.size, BLANK) for frame in self.frames))

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
        return replace(self, frames=frames)


def read_visuals(image: ImageLike | Sequence[ImageLike]) -> tuple[Visual, ...]:
    """Read one image, a list of images, or a list that holds videos as lists of frames.

    `x` is one image, `[x, y]` two images, `[[f, g, h]]` one video of three frames. The path or bytes of a movie
    are a video.

    Raises:
        ImageError: an image is unreadable, truncated, empty, or frames differ in size.
    """
    if not isinstance(image, list | tuple):
        return (read_visual(image),)
    if not image:
        raise ImageError("image is an empty list, expected at least one image")
    return tuple(read_visual(each) for each in image)


def read_visual(
    image: ImageLike | Sequence[ImageLike],
    kind: Kind | None = None,
    *,
    sampling: Sampling | None = None,
    sizing: Sizing | None = None,
) -> Visual:
    """Read one image, or one video.

    Args:
        image: as of `read_image`; a list of frames, an array `[t h w 3]`, or the path or bytes of a movie for a video.
        kind: what to show it as. An animated picture is shown as a video only if that is asked for; else its first frame is
            shown, with a note.
        sampling: which frames of a file to take. A list of frames is shown whole; `fps` then gives their times.
        sizing: the size at which to show it.

    Raises:
        ImageError: it cannot be read, is a movie where an image is expected, or `sampling` does not apply to it.
    """
    sampling = Sampling() if sampling is None else sampling
    if isinstance(image, Visual):
        return image if sizing is None else replace(image, sizing=sizing)  # its frames are already chosen
    if kind == "video" and not isinstance(image, Image.Image) and getattr(image, "ndim", 0) == 4:
        image = list(as_array(image))
    if isinstance(image, list | tuple):
        if replace(sampling, fps=None) != Sampling():
            raise ImageError(
                "nframes, video_start and video_end choose frames of a file, but a list of frames is given, of which all are "
                "shown; pass the ones to be shown"
            )
        visual = _read_frames(image)
        n_frames = len(visual.frames)
        timing = None if sampling.fps is None else Timing(sampling.fps, tuple(range(n_frames)), n_frames)
        return replace(visual, timing=timing, sizing=sizing)
    source, name = _source(image)
    if isinstance(source, Path | bytes) and is_movie(_head(source)):
        if kind == "image":
            raise ImageError(f'{name} is a video, but an image is expected; write {{"type": "video", "video": ...}}')
        return _of_clip(read_movie(source, sampling, name), sizing)
    if isinstance(source, Image.Image):
        if kind == "video":
            return _of_clip(read_animation(source, sampling, name), sizing)
        with decoder_errors(name):
            notes = _first_of_several(source)
        return Visual((to_rgb(source, name),), sizing=sizing, notes=notes)
    if isinstance(source, np.ndarray):
        return Visual((from_array(source),), sizing=sizing)
    with open_picture(source, name) as opened, decoder_errors(name):
        if kind == "video":
            return _of_clip(read_animation(opened, sampling, name, upright=True), sizing)
        notes, stored = _first_of_several(opened), to_rgb(opened, name)
        upright = turn_upright(stored, of=opened)
        if upright is not stored:
            notes += ("a picture was turned as the EXIF orientation of its file says",)
        return Visual((upright,), sizing=sizing, notes=notes)


def read_image(image: ImageLike) -> Image.Image:
    """RGB of one image: EXIF orientation of files and bytes applied, transparency over white, 16 bits scaled to 8.

    For an animated picture its first frame.

    Raises:
        ImageError: the image is unreadable, truncated or empty. URLs are not fetched; `data:` and `file:` are read.
    """
    return read_visual(image, "image").frames[0]


def count_pixels(data: bytes, name: str) -> int:
    """Number of pixels of a picture, or of one frame of a movie, from the header alone. Raises `ImageError`."""
    if is_movie(_head(data)):
        width, height = movie_size(data, name)
        return width * height
    with open_picture(data, name) as opened:
        return opened.width * opened.height


def encoded_bytes(image: ImageLike) -> bytes | None:
    """The encoded bytes of a file, of bytes or of a data: URL; None for what is already decoded.

    Raises:
        ImageError: there is no such file, or it cannot be read.
    """
    if isinstance(image, Visual | list | tuple):
        return None
    source, name = _source(image)
    if isinstance(source, Path):
        with decoder_errors(name):
            return source.read_bytes()
    return source if isinstance(source, bytes) else None


def _read_frames(frames: Sequence[ImageLike]) -> Visual:
    if not frames:
        raise ImageError("a video is an empty list, expected at least one frame")
    read = [read_visual(frame, "image") for frame in frames]
    sizes = {each.size for each in read}
    if len(sizes) > 1:
        raise ImageError(
            f"a video holds frames of sizes {sorted((w, h) for h, w in sizes)} (width, height), expected one size"
        )
    notes = tuple(dict.fromkeys(note for each in read for note in each.notes))
    return Visual(tuple(each.frames[0] for each in read), notes=notes)


def _of_clip(clip: Clip, sizing: Sizing | None) -> Visual:
    return Visual(clip.frames, clip.timing, sizing, clip.notes)


def _first_of_several(image: Image.Image) -> tuple[str, ...]:
    """A note where a picture has more frames or pages than the one that is shown."""
    place, count, called = place_in_sequence(image)
    if count == 1:
        return ()
    one = called.removesuffix("s")
    return (
        f'only {one} {place + 1} of the {count} {called} of a {image.format} is shown; {{"type": "video", "video": ...}} in a '
        "message shows all",
    )


def _source(image: Any) -> tuple[Path | bytes | Image.Image | np.ndarray, str]:
    """The form a picture is read from, and its name in error messages. Raises `ImageError`."""
    if isinstance(image, Image.Image):
        return image, "the PIL image"
    if isinstance(image, str) and image[:5].lower() == "data:":
        return _decode_url(image), f"image {image[:40]!r}..."
    if isinstance(image, str) and image[:7].lower() == "file://":
        return _existing(Path(path_of_url(image)))
    if isinstance(image, str) and "://" in image[:12]:
        raise ImageError(
            f"image is the URL {image!r}; URLs are not fetched, download it and pass the path or the bytes"
        )
    if isinstance(image, str | Path):
        return _existing(Path(image))
    if isinstance(image, bytes | bytearray | memoryview):
        return bytes(image), f"the image of {len(image)} bytes"
    if hasattr(image, "__array__"):
        return as_array(image), "the image array"
    raise ImageError(f"image is a {type(image).__name__}, expected a path, a PIL image, an array or encoded bytes")


def path_of_url(url: str) -> str:
    """The path that a `file:` URL names. Raises `ImageError` where it is of another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ImageError(
            f"image {url!r} names a file of {parts.netloc!r}, expected one of this machine, file:///folder/picture.png"
        )
    return unquote(parts.path)


def _existing(path: Path) -> tuple[Path, str]:
    try:
        exists = path.is_file()
    except (OSError, ValueError) as error:  # for example base64, which is too long for a path, or a null byte
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"image {str(path)[:80]!r}... cannot be a path: {reason}; write base64 as a data: URL, or decode it"
        ) from error
    if not exists:
        raise ImageError(f"image {str(path)!r} is not a file")
    return path, f"image {str(path)!r}"


def _decode_url(url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ImageError(f"image is {url[:40]!r}..., expected data:image/png;base64,...")
    try:
        return base64.b64decode("".join(body.split()), validate=True)  # may be broken into lines
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"image {url[:40]!r}... is not base64: {error}") from error


def _head(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:12]
    try:
        with source.open("rb") as file:
            return file.read(12)
    except OSError as error:
        raise ImageError(f"image {str(source)!r} cannot be read: {error.strerror or error}") from error
