"""Heat on pictures: the colour map, one overlay, and a PNG of all tokens."""

from __future__ import annotations

import io
import math
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastattr.errors import InputError
from fastattr.selection import first_frame, peak_step
from fastattr.storage import whole_file
from fastattr.types import Attribution, Box

# Heat, then red, green, blue and opacity. Brightness rises all the way, so the map also reads in grey and to
# the colour-blind; no heat is clear glass, so what a token ignored stays the picture. The stops stand closer
# at the dark end: normalised jointly with the text, many a right map peaks at a fifth.
COLOR_STOPS = (
    (0.00, 58, 22, 102, 0.00),
    (0.03, 78, 24, 116, 0.10),
    (0.10, 116, 32, 128, 0.40),
    (0.25, 178, 42, 108, 0.64),
    (0.50, 234, 82, 60, 0.78),
    (0.75, 252, 142, 52, 0.84),
    (1.00, 255, 206, 96, 0.88),
)
NEUTRAL = 128

MAX_CELLS = 120
MAX_ROWS = 40  # cells of a sheet with a video, which are strips of frames
MAX_STEPS = 8  # frames of such a strip
_THUMB, _VIDEO_THUMB = 180, 112
_NARROWEST = 96  # a tall, thin picture still leaves room for its caption
_NARROWEST_STRIP = 260  # and for the word on where it peaks
_SHEET_WIDTH = 1600
_MARGIN, _GAP, _FRAME_GAP, _CAPTION = 16, 12, 4, 26
_LONGEST_CAPTION = _SHEET_WIDTH
_PAPER, _INK, _FADED = (255, 255, 255), (32, 33, 36), (120, 122, 128)


def color_table() -> np.ndarray:
    """uint8 `[256 4]`: red, green, blue and opacity of each heat level."""
    at, *channels = np.array(COLOR_STOPS, np.float64).T
    levels = np.arange(256) / 255
    table = np.stack([np.interp(levels, at, channel) for channel in channels], axis=1)
    table[:, 3] *= 255
    return np.rint(table).astype(np.uint8)


def overlay(picture: np.ndarray, heat: Tensor, extent: Box) -> Image.Image:
    """Blend a map over the part of a picture it covers.

    Args:
        picture: uint8 `[H W 3]`.
        heat: `[h w]` in [0, 1], upsampled bilinearly.
        extent: `(left, top, right, bottom)` of the map as shares of the picture's width and height.

    Raises:
        InputError: a shape or dtype is not the one above, or `extent` holds no area.
    """
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise InputError(f"picture is {picture.dtype} of shape {picture.shape}, expected uint8 of shape [H W 3]")
    if heat.ndim != 2:
        raise InputError(f"heat has shape {tuple(heat.shape)}, expected [h w]: one map of one frame")
    height, width = picture.shape[:2]
    left, right = _pixels(extent[0], extent[2], width)
    top, bottom = _pixels(extent[1], extent[3], height)
    smooth = F.interpolate(heat[None, None].float(), (bottom - top, right - left), mode="bilinear", align_corners=False)
    colors = color_table()[quantise(smooth[0, 0])].astype(np.float32)
    opacity = colors[..., 3:] / 255
    blended = picture.copy()
    below = picture[top:bottom, left:right]
    blended[top:bottom, left:right] = np.rint(below * (1 - opacity) + colors[..., :3] * opacity)
    return Image.fromarray(blended)


def write_png(attribution: Attribution, path: str | Path) -> Path:
    """Write a contact sheet: every response token with its overlays above it.

    A video is a strip of its frames, one row a token: the first frame of each time step of the map, of more than
    `MAX_STEPS` so many of them, evenly chosen, the first and the last among them. The step where the token's map peaks
    is outlined, and where it is not on the sheet the caption names its frame.

    Past `MAX_CELLS` tokens, `MAX_ROWS` with a video, the sheet says how many it leaves out. Letters that no installed
    font has are drawn as boxes; each token carries its number for that reason.

    Raises:
        InputError: there are pictures, but not one for each map.
        SaveError: the path cannot be written.
    """
    total = len(attribution)
    thumbs = _thumbs(attribution)
    videos = any(thumb.label for thumb in thumbs)
    count = min(total, MAX_ROWS if videos else MAX_CELLS)
    notes = _strip_notes(attribution) + (
        [f"… and {total - count} more tokens ({count} of {total} shown)"] if count < total else []
    )
    cell_width = max(_NARROWEST_STRIP if videos else _NARROWEST, thumbs[-1].left + thumbs[-1].picture.shape[1])
    cell_height = max(thumb.picture.shape[0] for thumb in thumbs) + _CAPTION
    fitting = 1 if videos else (_SHEET_WIDTH - 2 * _MARGIN + _GAP) // (cell_width + _GAP)
    columns = max(1, min(count, fitting))
    rows = math.ceil(count / columns)
    header = _CAPTION if videos else 0
    font = _font()
    size = (
        2 * _MARGIN + max([columns * (cell_width + _GAP) - _GAP, *(math.ceil(font.getlength(note)) for note in notes)]),
        2 * _MARGIN + header + rows * (cell_height + _GAP) - _GAP + _CAPTION * len(notes),
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for thumb in thumbs:
        spare = thumb.picture.shape[1] - draw.textlength(thumb.label, font)
        if spare > -_FRAME_GAP:  # numbers that would run into each other say nothing
            draw.text((_MARGIN + thumb.left + spare / 2, _MARGIN), thumb.label, _FADED, font)
    for token in range(count):
        row, column = divmod(token, columns)
        left, top = _MARGIN + column * (cell_width + _GAP), _MARGIN + header + row * (cell_height + _GAP)
        unseen = _draw_thumbs(sheet, attribution, token, thumbs, (left, top))
        below = top + cell_height - _CAPTION + 5
        room = cell_width - (draw.textlength(unseen, font) + _GAP if unseen else 0)
        draw.text((left + cell_width - draw.textlength(unseen, font), below), unseen, _FADED, font)
        _caption(draw, font, (left, below), token, attribution.tokens[token], room)
    for k, note in enumerate(notes):
        draw.text((_MARGIN, size[1] - _MARGIN - _CAPTION * (len(notes) - k) + 9), note, _FADED, font)
    content = io.BytesIO()
    sheet.save(content, "PNG", compress_level=4)  # 6 takes three times as long and saves nothing here
    with whole_file(path) as file:
        file.write(content.getvalue())
    return Path(path)


def neutral_picture(attribution: Attribution, image: int) -> np.ndarray:
    """uint8 `[1 H W 3]`: a plain ground of the map's shape, for attributions that carry no pictures."""
    _, _, rows, columns = attribution.image[image].shape
    cell = max(1, 336 // max(rows, columns))
    return np.full((1, rows * cell, columns * cell, 3), NEUTRAL, np.uint8)


def frames(attribution: Attribution, image: int) -> np.ndarray:
    """uint8 `[t H W 3]`: the pictures to draw `attribution.image[image]` on.

    Raises:
        InputError: there are pictures, but not one for each map.
    """
    if not attribution.pictures:
        return neutral_picture(attribution, image)
    if len(attribution.pictures) != len(attribution.image):
        raise InputError(
            f"the attribution holds {len(attribution.pictures)} pictures for {len(attribution.image)} maps, "
            "expected one each, or none at all"
        )
    return attribution.pictures[image]


def _pixels(low: float, high: float, size: int) -> tuple[int, int]:
    """Half-open pixel range of a share of `size`, at least one pixel."""
    if not 0 <= low < high <= 1:
        raise InputError(f"extent spans {low} to {high}, expected rising shares of the picture within 0 and 1")
    start = min(round(low * size), size - 1)
    return start, max(start + 1, round(high * size))


def quantise(heat: Tensor) -> np.ndarray:
    """uint8 of the same shape: heat in [0, 1] as one of the 256 levels of `color_table`."""
    return (heat.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


@dataclass(frozen=True, eq=False)
class _Thumb:
    """A place of every cell: an image, or a frame of a video.

    Attributes:
        step: the time step of the map that is drawn on it.
        picture: uint8 `[H W 3]`, as large as it is drawn.
        left: pixels from the left edge of the cell.
        label: the number of the frame; empty for an image.
    """

    image: int
    step: int
    picture: np.ndarray
    left: int
    label: str


def _shown_steps(n_steps: int) -> list[int]:
    """All time steps, or `MAX_STEPS` of them, evenly chosen."""
    shown = min(n_steps, MAX_STEPS)
    return [round(k * (n_steps - 1) / max(1, shown - 1)) for k in range(shown)]


def _n_frames(attribution: Attribution, image: int) -> int:
    """Places in time of an image or video: its frames, or the steps of its map where there are more of those."""
    return max(len(frames(attribution, image)), attribution.image[image].shape[1])


def _frame_label(attribution: Attribution, image: int, step: int) -> str:
    """`3/16` for the first frame of a time step of a video, counted from 1; empty for an image."""
    n_frames = _n_frames(attribution, image)
    return f"{first_frame(step, attribution.image[image].shape[1], n_frames) + 1}/{n_frames}" if n_frames > 1 else ""


def _thumbs(attribution: Attribution) -> list[_Thumb]:
    """What stands in each cell, from left to right; many pictures shrink until one cell fits the sheet."""
    shown = [(image, step) for image, maps in enumerate(attribution.image) for step in _shown_steps(maps.shape[1])]
    videos = any(_n_frames(attribution, image) > 1 for image, _ in shown)
    available = _SHEET_WIDTH - 2 * _MARGIN - _GAP * (len(shown) - 1)
    box = max(8, min(_VIDEO_THUMB if videos else _THUMB, available // len(shown)))
    thumbs: list[_Thumb] = []
    right = 0
    for image, step in shown:
        shots = frames(attribution, image)
        shrink = box / max(shots.shape[1:3])
        height, width = (max(1, round(side * shrink)) for side in shots.shape[1:3])
        shot = shots[first_frame(step, attribution.image[image].shape[1], len(shots))]
        gap = 0 if not thumbs else _FRAME_GAP if thumbs[-1].image == image else _GAP
        picture = np.asarray(Image.fromarray(shot).resize((width, height)))
        thumbs.append(_Thumb(image, step, picture, right + gap, _frame_label(attribution, image, step)))
        right += gap + width
    return thumbs


def _draw_thumbs(
    sheet: Image.Image, attribution: Attribution, token: int, thumbs: list[_Thumb], at: tuple[int, int]
) -> str:
    """Draw a cell's pictures with a token's maps; returns what to say of peaks that are not among them."""
    peaks = {image: peak_step(maps[token]) for image, maps in enumerate(attribution.image) if maps.shape[1] > 1}
    for thumb in thumbs:
        x, y = at[0] + thumb.left, at[1]
        heat = attribution.image[thumb.image][token, thumb.step]
        sheet.paste(overlay(thumb.picture, heat, attribution.extents[thumb.image]), (x, y))
        if thumb.step == peaks.get(thumb.image):
            height, width = thumb.picture.shape[:2]
            ImageDraw.Draw(sheet).rectangle((x - 3, y - 3, x + width + 2, y + height + 2), outline=_INK, width=3)
            del peaks[thumb.image]
    unseen = [_frame_label(attribution, image, step) for image, step in peaks.items() if step is not None]
    return f"peak at {', '.join(unseen)}" if unseen else ""


def _strip_notes(attribution: Attribution) -> list[str]:
    """What a reader of the strips has to know; nothing where there is no video."""
    notes = []
    for image, maps in enumerate(attribution.image):
        steps, n_frames = maps.shape[1], _n_frames(attribution, image)
        if n_frames == 1:
            continue
        chosen = f"{len(_shown_steps(steps))} of them evenly chosen" if steps > MAX_STEPS else "all shown"
        first = "" if steps == n_frames else ", the first frame of each"
        notes.append(f"video {image + 1}: {n_frames} frames, {steps} time steps, {chosen}{first}")
    return [*notes, "outlined: where the map of the word peaks"] if notes else []


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype("DejaVuSans.ttf", 14)
    except OSError:  # Pillow's own is always there, but knows little beyond ASCII
        return ImageFont.load_default(size=14)


def _caption(
    draw: ImageDraw.ImageDraw,
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    at: tuple[int, int],
    token: int,
    text: str,
    width: float,
) -> None:
    number = f"{token + 1} "
    draw.text(at, number, _FADED, font)
    start = draw.textlength(number, font)
    text = text.strip(" ")[:_LONGEST_CAPTION]  # no letter is narrower than a pixel
    visible = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    shown = "".join(visible) or "' '"
    if draw.textlength(shown, font) > width - start:
        lengths = range(len(shown) + 1)
        fits = bisect_right(lengths, width - start, key=lambda n: draw.textlength(f"{shown[:n]}…", font))
        shown = f"{shown[: max(0, fits - 1)]}…"
    draw.text((at[0] + start, at[1]), shown, _INK, font)
