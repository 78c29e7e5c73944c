"""Regional evidence: which parts of the picture a word falls with. Our own addition, asked of the model itself.

Hidden states show where a class is active; whether the model needs that place they do not show. So the picture is cut
into `n x n` cells, every window of two by two cells is hidden once, and a word's fall is read for all words together:
`(n + 1)^2` more forwards a picture, however long the response. The coarse map of falls then weighs the fine maps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastattr.types import Box, Grid

SLIGHT_NATS = 0.1  # a word that no window moves by this much is weighed the less
DARK = 0.01  # of the highest value, counts as dark on either side, as in `msea`


def windows(n: int, extent: Box) -> list[Box]:
    """What is hidden, one after the other: windows of two by two cells at every step of one, cut at the border.

    Args:
        n: cells a side.
        extent: the part of the picture that is cut into cells.

    Returns:
        `(n + 1)^2` boxes in row-major order, as shares of the picture.
    """
    left, top, right, bottom = extent
    edges = [min(max(i, 0), n) / n for i in range(-1, n + 2)]
    xs = [left + (right - left) * edge for edge in edges]
    ys = [top + (bottom - top) * edge for edge in edges]
    return [(xs[j], ys[i], xs[j + 2], ys[i + 2]) for i in range(n + 1) for j in range(n + 1)]


def spread(falls: Tensor, grid: Grid) -> Tensor:
    """Falls of the windows to a map: a cell has the mean of the four windows that hide it, bilinear between cells.

    Args:
        falls: `[target window]` in nats, windows in the order of `windows`.
        grid: `(t, h, w)` of the map; frames share the falls, since a window hides a place in all of them.

    Returns:
        `[target t h w]` in nats.
    """
    n = round(falls.shape[1] ** 0.5)
    cells = F.avg_pool2d(falls.view(len(falls), 1, n, n), 2, stride=1)
    fine = F.interpolate(cells, size=grid[1:], mode="bilinear", align_corners=False)
    return fine.expand(-1, grid[0], -1, -1)


def weigh(image: Sequence[Tensor], falls: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Maps brought together with what the words fall with, in the geometric mean's sense: lit where both are.

    A target keeps its peak, so that a word that looks at nothing stays dark beside the context. The falls say less the
    smaller they are: a word that stays as likely whatever window is hidden keeps its map, since it may well be seen in
    two places.

    Args:
        image: for each image `[target t h w]` in [0, 1].
        falls: for each image `[target t h w]` in nats, not negative.

    Returns:
        for each image `[target t h w]` in [0, 1].
    """
    peak, fall = _highest(image), _highest(falls)
    light = torch.where(peak > 0, peak, 1.0)[:, None, None, None]
    drop = fall.clamp(min=SLIGHT_NATS)[:, None, None, None]
    both = [(maps / light + DARK) * (nats / drop + DARK) - DARK**2 for maps, nats in zip(image, falls, strict=True)]
    top = _highest(both)
    strength = torch.where((peak > 0) & (top > 0), peak / torch.where(top > 0, top, 1.0), 0.0)
    return tuple((maps * strength[:, None, None, None]).clamp(0.0, 1.0) for maps in both)


def _highest(maps: Sequence[Tensor]) -> Tensor:
    """`[target]`, over all images."""
    return torch.stack([each.flatten(1).amax(dim=1) for each in maps]).amax(dim=0)
