"""Llama 4: a picture laid into the upper left of rows and columns of tiles, all of it squeezed into one behind them."""

from __future__ import annotations

import math

import torch

from fastattr.adapters.families.cuts import check_count, image_option
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, patch
from fastattr.adapters.families.tiles import Shape, shapes_up_to
from fastattr.types import Grid

NAME = "Llama4"


def cell(config: Config) -> int:
    return round(patch(config) / config.vision_config.pixel_shuffle_ratio)


def look(shown: Shown) -> list[Looks]:
    pixels = shown.inputs["pixel_values"]
    edge = int(pixels.shape[-1])
    sizes = shown.sizes_for(NAME, "lays pictures into tiles by their size")
    most, stretch = (image_option(shown, NAME, name) for name in ("max_patches", "resize_to_max_canvas"))
    grid = (1, edge // cell(shown.config), edge // cell(shown.config))
    pictures = [_looks(size, edge, grid, most, stretch=stretch) for size in sizes]
    check_count(NAME, shown, math.prod(pixels.shape[:-3]), pictures)
    return pictures


def _looks(size: Size, edge: int, grid: Grid, most: int, *, stretch: bool) -> Looks:
    rows, columns = _shape(size, edge, most, stretch=stretch)
    height, width = _laid(size, edge, (rows * edge, columns * edge), stretch=stretch)
    tiles = tuple(
        Look(grid, (column * edge / width, row * edge / height, (column + 1) * edge / width, (row + 1) * edge / height))
        for row in range(rows)
        for column in range(columns)
    )
    return tiles if len(tiles) == 1 else (*tiles, Look(grid))


def _shape(size: Size, edge: int, most: int, *, stretch: bool) -> Shape:
    """The tiles that hold the picture enlarged least (`stretch`: most), else shrunk least; of several the fewest."""
    height, width = size
    shapes = shapes_up_to(most)
    # in single precision, as in the processor
    sides = torch.tensor(shapes, dtype=torch.float32, device="cpu") * edge
    growth = torch.minimum(sides[:, 0] / height, sides[:, 1] / width)
    enlarging = growth[growth >= 1]
    chosen = enlarging.min() if len(enlarging) and not stretch else growth.max()
    return min((shape for shape, by in zip(shapes, growth, strict=True) if by == chosen), key=math.prod)


def _laid(size: Size, edge: int, room: Size, *, stretch: bool) -> Size:
    """The picture's pixels among its tiles: enlarged to one tile at most, unless `stretch`; what is left is padding."""
    height, width = size
    if not stretch:
        room = (min(max(height, edge), room[0]), min(max(width, edge), room[1]))
    across, down = room[1] / width, room[0] / height
    if across < down:
        return max(1, min(math.floor(height * across), room[0])), room[1]
    return room[0], max(1, min(math.floor(width * down), room[1]))


LLAMA4 = Family(NAME, look, cell, None, resized=False, tiles=True)

FAMILIES = {"llama4": LLAMA4}
