"""Selections and whole responses in notebooks: an HTML cell, a PNG, a matplotlib figure, a pandas table."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from fastattr.errors import InputError, how_to_install
from fastattr.report.picture import MAX_CELLS, frames, overlay
from fastattr.selection import Selection, first_frame, peak_box, peak_step
from fastattr.types import Attribution

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

CELL_SIDE = 448  # pixels of the longer side of a picture in a notebook cell
PLOT_SIDE = 512  # and in a figure
_GAP = 8
_COLUMNS = 6  # of a figure of many tokens
_CELL_INCHES = 1.9
_WORD_INCHES = 4.2


def overlays(selection: Selection) -> list[Image.Image]:
    """One picture for each image of the attribution with the selection's map over it.

    For a video it is the frame where the map peaks, or the first. The background is plain grey where the attribution
    holds no pictures.
    """
    attribution = selection.attribution
    drawn = []
    for image, maps in enumerate(selection.maps):
        shots = frames(attribution, image)
        step = peak_step(maps) or 0
        shot = shots[first_frame(step, len(maps), len(shots))]
        drawn.append(overlay(shot, maps[step], attribution.extents[image]))
    return drawn


def selection_html(selection: Selection) -> str:
    """The overlays of a selection side by side, with its text and evidence below."""
    pictures = "".join(
        f'<img alt="" style="max-width:100%;margin:0 {_GAP}px 0 0" src="data:image/png;base64,'
        f'{base64.b64encode(_png(_fit(picture, CELL_SIDE))).decode()}">'
        for picture in overlays(selection)
    )
    caption = f"<b>{html.escape(selection.text)}</b>"
    n = len(selection.spans)
    if n > 1:
        caption += f", {n} occurrences"
    if selection.score is not None:
        caption += f", evidence {selection.score:+.2f} nats"
    return f'<figure style="margin:0">{pictures}<figcaption>{caption}</figcaption></figure>'


def selection_png(selection: Selection) -> bytes:
    """The overlays of a selection side by side as one PNG."""
    pictures = [_fit(picture, CELL_SIDE) for picture in overlays(selection)]
    width = sum(picture.width for picture in pictures) + _GAP * (len(pictures) - 1)
    sheet = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        sheet.paste(picture, (left, 0))
        left += picture.width + _GAP
    return _png(sheet)


def plot(selections: Sequence[Selection], n_left_out: int = 0) -> Figure:
    """A figure of overlays: a large one for one selection, a grid in order for several.

    Args:
        n_left_out: how many selections the caller left out, which the figure states.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError(f"plot needs matplotlib; {how_to_install('eval')}") from error

    pictures = [overlays(selection) for selection in selections]
    cells = [(selection, picture) for selection, drawn in zip(selections, pictures, strict=True) for picture in drawn]
    per_row = len(pictures[0])  # the pictures of one selection stay in one row
    columns = per_row * max(1, min(len(selections), _COLUMNS // per_row))
    rows = math.ceil(len(cells) / columns)
    inches = _WORD_INCHES if len(selections) == 1 else _CELL_INCHES
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(inches * columns, (inches + 0.25) * rows), squeeze=False, layout="constrained"
    )
    for place in axes.flat:
        place.axis("off")
    for number, (place, (selection, picture)) in enumerate(zip(axes.flat, cells, strict=False)):
        place.imshow(np.asarray(_fit(picture, PLOT_SIDE)))
        if number % per_row == 0:
            place.set_title(_title(selection), fontsize=10, parse_math=False)
    if n_left_out:
        figure.supxlabel(f"… and {n_left_out} more tokens", fontsize=10)
    if "inline" in matplotlib.get_backend():  # a notebook would show an open figure twice
        pyplot.close(figure)
    return figure


def plot_tokens(attribution: Attribution) -> Figure:
    """A grid of overlays, one per token, of at most `MAX_CELLS`. Raises `InputError` as `plot` does."""
    shown = min(len(attribution), MAX_CELLS)
    return plot([attribution[i] for i in range(shown)], len(attribution) - shown)


def to_frame(attribution: Attribution) -> DataFrame:
    """One row per token, see `Attribution.to_frame`.

    Raises:
        InputError: pandas is not installed.
    """
    try:
        from pandas import DataFrame, RangeIndex
    except ImportError as error:
        raise InputError("to_frame needs pandas: pip install pandas") from error

    n = len(attribution)
    starts, ends = zip(*attribution.spans, strict=True)
    evidence = attribution.evidence
    columns = {
        "token": list(attribution.tokens),
        "id": list(attribution.token_ids),
        "start": list(starts),
        "end": list(ends),
        "log_prob": attribution.log_prob.double().numpy(),
        "evidence": np.full(n, math.nan) if evidence is None else evidence.double().numpy(),
    }
    for i, scale in enumerate(attribution.config.known_scales):
        columns[f"agreement_{scale:g}"] = attribution.agreement[:, i].double().numpy()
    columns |= {name: values.double().numpy() for name, values in vars(attribution.descriptors).items()}
    columns["degenerate"] = attribution.degenerate.numpy()
    columns["explained"] = np.full(n, True) if attribution.explained is None else attribution.explained.numpy()
    frame = DataFrame(columns, index=RangeIndex(n, name="index"))
    for image, maps in enumerate(attribution.image):
        boxes = np.full(n, None, dtype=object)  # dtype object, or pandas would split the tuples into columns
        if attribution.picture_sizes:
            size, extent = attribution.picture_sizes[image], attribution.extents[image]
            for target in range(n):
                boxes[target] = peak_box(maps[target], extent, size)
        frame[f"box_{image}"] = boxes
    return frame


def _title(selection: Selection) -> str:
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in selection.text)
    shown = text.strip() or repr(selection.text)
    score = "" if selection.score is None else f"  {round(selection.score, 1) + 0.0:+.1f}"
    return (shown if len(shown) <= 24 else shown[:23] + "…") + score


def _fit(picture: Image.Image, side: int) -> Image.Image:
    """Resized so that the longer side has `side` pixels; small pictures are enlarged."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()
