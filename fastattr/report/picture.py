"""Heat on pictures: the colour map, one overlay, and a PNG of all tokens."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastattr.errors import InputError
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
_THUMB = 180
_NARROWEST = 96  # a tall, thin picture still leaves room for its caption
_SHEET_WIDTH = 1600
_MARGIN, _GAP, _CAPTION = 16, 12, 26
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

    A video shows the frame its token looks at most. Past `MAX_CELLS` tokens the sheet says how many it leaves out.
    Letters that no installed font has are drawn as boxes; each token carries its number for that reason.

    Raises:
        SaveError: the path cannot be written.
    """
    total = len(attribution)
    count = min(total, MAX_CELLS)
    thumbs = _thumb_sizes(attribution)
    cell_width = max(_NARROWEST, sum(width for width, _ in thumbs) + _GAP * (len(thumbs) - 1))
    cell_height = max(height for _, height in thumbs) + _CAPTION
    fitting = (_SHEET_WIDTH - 2 * _MARGIN + _GAP) // (cell_width + _GAP)
    columns = max(1, min(count, fitting))
    rows = math.ceil(count / columns)
    footer = _CAPTION if count < total else 0
    size = (
        2 * _MARGIN + columns * (cell_width + _GAP) - _GAP,
        2 * _MARGIN + rows * (cell_height + _GAP) - _GAP + footer,
    )
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), _font()
    for token in range(count):
        row, column = divmod(token, columns)
        left, top = _MARGIN + column * (cell_width + _GAP), _MARGIN + row * (cell_height + _GAP)
        x = left
        for image, (width, height) in enumerate(thumbs):
            sheet.paste(_token_overlay(attribution, token, image, (width, height)), (x, top))
            x += width + _GAP
        _caption(draw, font, (left, top + cell_height - _CAPTION + 5), token, attribution.tokens[token], cell_width)
    if footer:
        note = f"… and {total - count} more tokens ({count} of {total} shown)"
        draw.text((_MARGIN, size[1] - _MARGIN - footer + 9), note, _FADED, font)
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


def _thumb_sizes(attribution: Attribution) -> list[tuple[int, int]]:
    """(width, height) of each image in a cell; many images shrink until one cell fits the sheet."""
    available = _SHEET_WIDTH - 2 * _MARGIN - _GAP * (len(attribution.image) - 1)
    box = max(8, min(_THUMB, available // len(attribution.image)))
    sizes = []
    for image in range(len(attribution.image)):
        height, width = frames(attribution, image).shape[1:3]
        shrink = box / max(height, width)
        sizes.append((max(1, round(width * shrink)), max(1, round(height * shrink))))
    return sizes


def _token_overlay(attribution: Attribution, token: int, image: int, size: tuple[int, int]) -> Image.Image:
    heat = attribution.image[image][token]
    pictures = frames(attribution, image)
    frame = int(heat.float().sum((1, 2)).argmax())
    picture = Image.fromarray(pictures[frame * len(pictures) // len(heat)]).resize(size)
    return overlay(np.asarray(picture), heat[frame], attribution.extents[image])


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
    width: int,
) -> None:
    number = f"{token + 1} "
    draw.text(at, number, _FADED, font)
    start = draw.textlength(number, font)
    visible = (char if char.isprintable() else char.encode("unicode_escape").decode() for char in text.strip(" "))
    shown = "".join(visible) or "' '"
    if draw.textlength(shown, font) > width - start:
        while shown and draw.textlength(shown + "…", font) > width - start:
            shown = shown[:-1]
        shown += "…"
    draw.text((at[0] + start, at[1]), shown, _INK, font)
