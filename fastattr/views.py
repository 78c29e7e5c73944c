"""Tiles, thumbnails and padded pictures: many looks at one picture, laid back onto it.

A model that cuts a picture into tiles reads each place several times, in a tile and in the thumbnail of the whole. Where
views overlap, their maps are averaged, each weighing as many tokens as it shows the place with (as scales do, see
`fastattr.msea.scale_weights`). Padding is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fastattr.errors import TokenLayoutError
from fastattr.types import Box, Grid, ImageGroup, View


def canvas(views: Sequence[View]) -> tuple[Grid, Box]:
    """The grid `(1, h, w)` that is as fine as the finest view, and the part of the picture it covers.

    Raises:
        TokenLayoutError: some of it is in no view.
    """
    boxes = [view.box for view in views]
    extent = (
        max(0.0, min(left for left, _, _, _ in boxes)),
        max(0.0, min(top for _, top, _, _ in boxes)),
        min(1.0, max(right for _, _, right, _ in boxes)),
        min(1.0, max(bottom for _, _, _, bottom in boxes)),
    )
    left, top, right, bottom = extent
    height = max(max(1, round(v.grid[0] * (bottom - top) / (v.box[3] - v.box[1]))) for v in views)
    width = max(max(1, round(v.grid[1] * (right - left) / (v.box[2] - v.box[0]))) for v in views)
    grid = (1, height, width)
    seen = torch.zeros(height, width, dtype=torch.bool, device="cpu")
    for view in views:
        rows, columns = _reach(view, grid, extent)
        seen |= (rows.sum(1) > 0)[:, None] & (columns.sum(1) > 0)
    if not bool(seen.all()):
        raise TokenLayoutError(
            f"{int((~seen).sum())} of {height * width} cells of the picture are in none of its {len(views)} views "
            f"{[view.box for view in views][:6]}, expected views that cover it"
        )
    return grid, extent


def place(flat: Tensor, group: ImageGroup) -> Tensor:
    """Values at the positions of one image, `[target position]`, as a map of it, `[target t h w]`."""
    if not group.views:
        return flat.unflatten(1, group.grid)
    steps = flat.unflatten(1, (group.grid[0], -1))
    sizes = [view.grid[0] * view.grid[1] for view in group.views]
    total = flat.new_zeros(len(flat), *group.grid)
    weight = flat.new_zeros(group.grid[1:])
    for view, part in zip(group.views, steps.split(sizes, dim=2), strict=True):
        rows, columns = (each.to(flat) for each in _reach(view, group.grid, group.extent))
        left, top, right, bottom = view.box
        density = view.grid[0] * view.grid[1] / ((right - left) * (bottom - top))
        with torch.autocast(flat.device.type, enabled=False):
            total += density * (rows @ part.unflatten(2, view.grid) @ columns.T)
        weight += density * rows.sum(1)[:, None] * columns.sum(1)
    return total.div_(weight)


@lru_cache(maxsize=1024)
def _reach(view: View, grid: Grid, extent: Box) -> tuple[Tensor, Tensor]:
    """How a view's rows and columns are mixed into those of the grid, `[h view_h]` and `[w view_w]`."""
    return (
        _mixing(view.grid[0], view.box[1], view.box[3], grid[1], extent[1], extent[3]),
        _mixing(view.grid[1], view.box[0], view.box[2], grid[2], extent[0], extent[2]),
    )


def _mixing(cells: int, low: float, high: float, into: int, start: float, stop: float) -> Tensor:
    """Linear interpolation of `cells` between `low` and `high` at the middles of `into` cells between `start` and `stop`.

    `[into cells]`; rows sum to 1 where the middle lies between `low` and `high`, else to 0.
    """
    middles = start + (torch.arange(into, dtype=torch.float64, device="cpu") + 0.5) / into * (stop - start)
    at = (middles - low) / (high - low) * cells - 0.5
    inside = (at > -0.5 - 1e-6) & (at < cells - 0.5 + 1e-6)
    at = at.clamp(0, cells - 1)
    nearness = (1 - (at[:, None] - torch.arange(cells, device="cpu")).abs()).clamp(min=0)
    return (nearness * inside[:, None]).float()
