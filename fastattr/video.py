"""Videos from files: which frames of a movie or an animated picture are read, and when they were taken.

Movies are read with PyAV (`pip install ".[video]"`): by default `FPS` frames a second, at least `MIN_FRAMES` and at most
`MAX_FRAMES`, like qwen-vl-utils and transformers' Qwen processors. All frames of an animated picture are read.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastattr.decoding import check_memory, decoder_errors, place_in_sequence, to_rgb, turn_upright
from fastattr.errors import ImageError, InputError, how_to_install

FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 768
MAX_VIDEO_BYTES = 1 << 30  # of all frames together, decoded
MAX_ANIMATION_PIXELS = (
    1 << 32
)  # of all frames of an animated picture, which must be decoded to know how long each is shown

_LEAST_PIXELS = 1 << 14  # a frame takes time however small it is

_PICTURE_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1", b"jxl ")
_QUICKTIME = (b"moov", b"mdat", b"wide", b"free", b"skip")


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video file to read, from the keys of Qwen's message parts.

    Attributes:
        fps: frames to read per second; for a list of frames, the rate at which they were taken.
        n_frames: number of frames to read, evenly spaced.
        start_s, end_s: the stretch of the video to read, in seconds.

    Raises:
        InputError: the values contradict each other.
    """

    fps: float | None = None
    n_frames: int | None = None
    start_s: float | None = None
    end_s: float | None = None

    def __post_init__(self) -> None:
        if self.fps is not None and self.n_frames is not None:
            raise InputError(f"fps is {self.fps:g} and nframes is {self.n_frames}, expected one of them")
        start_s = self.start_s or 0.0
        if start_s < 0 or (self.end_s is not None and self.end_s <= start_s):
            raise InputError(
                f"video_start is {start_s:g} s and video_end {self.end_s} s, expected 0 <= video_start < video_end"
            )


@dataclass(frozen=True)
class Timing:
    """When frames were taken: frame `i` at `indices[i] / fps` seconds, as in transformers' `VideoMetadata`.

    Attributes:
        fps: frames per second of the source video.
        indices: of the frames in the source video.
        total: number of frames of the source video, or of the stretch the frames were taken from.
    """

    fps: float
    indices: tuple[int, ...]
    total: int

    @property
    def seconds(self) -> tuple[float, ...]:
        """When each frame was taken."""
        return tuple(index / self.fps for index in self.indices)

    @property
    def sampled_fps(self) -> float:
        """Frames taken per second of the source video, on average."""
        return len(self.indices) / self.total * self.fps


@dataclass(frozen=True)
class Clip:
    """Frames of a video, all of one size."""

    frames: tuple[Image.Image, ...]
    timing: Timing
    notes: tuple[str, ...] = field(default=())


def is_movie(head: bytes) -> bool:
    """Whether the first 12 bytes of a file are those of a video container rather than a picture."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in _PICTURE_BRANDS
    riff = head[:4] == b"RIFF" and head[8:12] == b"AVI "
    return riff or head[:4] in (b"\x1a\x45\xdf\xa3", b"\0\0\1\xba", b"FLV\1", b"OggS") or head[4:8] in _QUICKTIME


def choose_frames(total: int, fps: float, sampling: Sampling, name: str, *, every: bool = False) -> tuple[int, ...]:
    """Indices of the frames to read, evenly spaced from the first to the last, by the rule of qwen-vl-utils.

    Args:
        total: number of frames of the video.
        fps: its frames per second.
        every: read all by default, rather than `FPS` a second, at least `MIN_FRAMES` and at most `MAX_FRAMES`.

    Raises:
        ImageError: more are asked for than there are, or than `MAX_FRAMES`, or the video ends before `video_start`.
    """
    first = 0 if sampling.start_s is None else round(sampling.start_s * fps)
    last = total - 1 if sampling.end_s is None else min(round(sampling.end_s * fps), total - 1)
    held = last - first + 1
    if held < 1:
        raise ImageError(f"{name} ends after {total / fps:.2f} s, but video_start is {sampling.start_s:g} s")
    if sampling.n_frames is not None:
        n = sampling.n_frames
        if n > held:
            raise ImageError(f"{name} holds {held} frames there, but nframes asks for {n}; ask for at most that many")
    elif sampling.fps is None and every:
        n = held
    else:
        most = MAX_FRAMES if sampling.fps is None else held  # with fps more than MAX_FRAMES is an error below
        n = int(min(max(held / fps * (sampling.fps or FPS), MIN_FRAMES), most, held))
        n -= n % 2 if n > 1 else 0  # models take frames in pairs
    if n > MAX_FRAMES:
        raise ImageError(
            f"{name}: {n} frames are asked for, expected at most {MAX_FRAMES}; ask for fewer with nframes or fps, or for a "
            "stretch with video_start and video_end"
        )
    return tuple(np.linspace(first, last, n).round().astype(int).tolist())


def read_animation(image: Image.Image, sampling: Sampling, name: str, *, upright: bool = False) -> Clip:
    """Frames of an animated picture (or pages of a TIFF, one a second), by default all.

    Args:
        upright: apply the EXIF orientation of frames.

    Raises:
        ImageError: the picture is damaged, or more frames are asked for than it holds or memory allows.
    """
    with decoder_errors(name):
        shown, total, _ = place_in_sequence(image)
        try:
            _check_work(total, image.width * image.height, name)
            lengths_ms = [_length_ms(image, k, name) for k in range(total)]
            begins_ms = [0, *accumulate(lengths_ms)]
            indices = choose_frames(total, 1000 * total / sum(lengths_ms), sampling, name, every=True)
            _check_size(len(indices), image.width * image.height, name)
            frames = []
            for index in indices:
                image.seek(index)
                frame = to_rgb(image, name)
                frames.append(turn_upright(frame, of=image) if upright else frame)
        finally:
            image.seek(shown)
    notes = _left_out(len(frames), total)
    if len(set(lengths_ms)) > 1:
        notes += ("the frames of a video have different durations; a model that reads one frame rate gets the mean",)
        taken_ms = sum(lengths_ms[indices[0] : indices[-1] + 1])
        return Clip(tuple(frames), Timing(1000.0, tuple(begins_ms[k] for k in indices), taken_ms), notes)
    return Clip(tuple(frames), Timing(1000 / lengths_ms[0], indices, _spanned(indices)), notes)


def _left_out(n_frames: int, total: int) -> tuple[str, ...]:
    """A note where fewer frames are shown than the video has."""
    return () if n_frames == total else (f"{n_frames} of the {total} frames of a video are shown",)


def _spanned(indices: Sequence[int]) -> int:
    """Number of frames of the source video from the first index to the last."""
    return indices[-1] - indices[0] + 1


def _length_ms(image: Image.Image, index: int, name: str) -> int:
    """Duration of a frame."""
    image.seek(index)
    check_memory(image, name)  # a page or a frame may be larger than the first
    image.load()  # sets the duration for WebP
    length_ms = round(image.info.get("duration") or 0)
    return length_ms if length_ms > 0 else 1000 if image.format == "TIFF" else 100  # without a duration, as browsers


def read_movie(source: Path | bytes, sampling: Sampling, name: str) -> Clip:
    """Frames of a movie, with its rotation applied.

    Raises:
        ImageError: PyAV is not installed, the movie is damaged, or more is asked for than it holds or memory allows.
    """
    with _opened(source, name) as (container, stream):
        total, fps = _count(container, stream, name), float(stream.average_rate or stream.guessed_rate or 0)
        pixels = stream.width * stream.height
    if not fps > 0:
        raise ImageError(f"{name} has no frame rate; pass its frames as a list")
    for _ in range(2):  # the count of a header may be too high
        indices = choose_frames(total, fps, sampling, name)
        _check_size(len(indices), pixels, name)
        frames, n_decoded = _decode(source, indices, name)
        if len(frames) == len(indices):
            return Clip(tuple(frames), Timing(fps, indices, _spanned(indices)), _left_out(len(frames), total))
        total = n_decoded
        if total == 0:
            break
    raise ImageError(f"{name} holds no frame that can be decoded")


def movie_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """`(width, height)` in pixels, from the header alone. Raises `ImageError`."""
    with _opened(source, name) as (_, stream):
        return int(stream.width), int(stream.height)


@contextmanager
def _opened(source: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its first video stream. Raises `ImageError`, also for exceptions of the block."""
    try:
        import av
    except ImportError as error:
        raise ImageError(
            f"{name} is a video; pass its frames as a list, or install PyAV to read it: {how_to_install('video')}"
        ) from error
    with decoder_errors(name), av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        if not container.streams.video:
            raise ImageError(f"{name} holds no video stream")
        yield container, container.streams.video[0]


def _count(container: Any, stream: Any, name: str) -> int:
    """Frames of a stream, from its header or from its packets."""
    count = int(stream.frames) or sum(1 for packet in container.demux(stream) if packet.size)
    if count < 1:
        raise ImageError(f"{name} holds no frames")
    return count


def _decode(source: Path | bytes, indices: Sequence[int], name: str) -> tuple[list[Image.Image], int]:
    """The frames of ascending indices, and the number of frames that were decoded for them. Raises `ImageError`."""
    frames: list[Image.Image] = []
    n_decoded = 0
    first: tuple[int, int] | None = None
    with _opened(source, name) as (container, stream):
        for frame in container.decode(stream):
            if first is None:
                first = frame.width, frame.height  # which may not be what the header says
                _check_size(len(indices), frame.width * frame.height, name)
            if (frame.width, frame.height) != first:
                raise ImageError(
                    f"{name} changes from {first[0]} x {first[1]} to {frame.width} x {frame.height} pixels at frame {n_decoded}; "
                    "expected one size"
                )
            while len(frames) < len(indices) and indices[len(frames)] == n_decoded:
                turned = getattr(frame, "rotation", 0)  # degrees, counterclockwise
                picture = frame.to_image()
                frames.append(picture.rotate(turned, expand=True) if turned else picture)
            n_decoded += 1
            if len(frames) == len(indices):
                break
    return frames, n_decoded


def _check_work(n_frames: int, pixels: int, name: str) -> None:
    if n_frames * max(pixels, _LEAST_PIXELS) > MAX_ANIMATION_PIXELS:
        raise ImageError(
            f"{name} says it holds {n_frames} frames of {pixels} pixels, which is too much to decode; expected at most "
            f"{MAX_ANIMATION_PIXELS} pixels in all; make it smaller or shorter first"
        )


def _check_size(n_frames: int, pixels: int, name: str) -> None:
    """Raises `ImageError` where the decoded frames would take more than `MAX_VIDEO_BYTES`."""
    if n_frames * pixels * 3 > MAX_VIDEO_BYTES:
        raise ImageError(
            f"{name}: {n_frames} frames of {pixels} pixels need {n_frames * pixels * 3 >> 20} MiB, expected at most "
            f"{MAX_VIDEO_BYTES >> 20}; ask for fewer with nframes or fps, for a stretch with video_start and video_end, or make "
            "its frames smaller first"
        )
