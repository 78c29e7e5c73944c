"""Pictures squeezed onto rows and columns of square tiles, with a look at the whole beside them.

How many tiles a picture is cut into is chosen from its size and is not among what the model takes, so it is worked out
again here and held against the number of tiles that came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from fastattr.adapters.families.cuts import check_count, image_option
from fastattr.adapters.families.family import Look, Looks, Shown, Size, whole
from fastattr.types import Grid

Shape = tuple[int, int]  # (rows, columns) of tiles


def cut(shape: Shape, grid: Grid) -> Looks:
    """The looks at tiles of a whole picture, row by row; each has `grid` tokens."""
    rows, columns = shape
    return tuple(
        Look(grid, (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows))
        for row in range(rows)
        for column in range(columns)
    )


def read_tiles(
    family: str, shown: Shown, grid: Grid, shape: Callable[[Size], Shape], *, whole_first: bool = False
) -> list[Looks]:
    """The looks at every image where `pixel_values` is `[tile ...]`, of all images in a row.

    A picture of more than one tile is also shown whole, before or behind its tiles.

    Args:
        family: for errors.
        grid: tokens of each tile.
        shape: `(height, width) -> (rows, columns)` that a picture of this size is cut into.
        whole_first: the whole comes before the tiles.

    Raises:
        TokenLayoutError: the sizes are needed and not known, or other tiles came than they are cut into.
    """
    n_tiles = math.prod(shown.inputs["pixel_values"].shape[:-3])
    if n_tiles == 1 or (shown.sizes is not None and n_tiles == len(shown.sizes)):
        return [(Look(grid),)] * n_tiles
    sizes = shown.sizes_for(family, "cuts pictures into tiles by their size")
    pictures = [with_whole(shape(size), grid, whole_first=whole_first) for size in sizes]
    check_count(family, shown, n_tiles, pictures)
    return pictures


def read_nearest_tiles(family: str, shown: Shown, cell: int) -> list[Looks]:
    """`read_tiles` of pictures cut by `nearest_shape`, as their processor's `min_patches` and `max_patches` say.

    Args:
        cell: the side in pixels of what one token covers.
    """
    height, width = shown.inputs["pixel_values"].shape[-2:]

    def shape(size: Size) -> Shape:
        fewest, most = (image_option(shown, family, name) for name in ("min_patches", "max_patches"))
        return nearest_shape(size, (height, width), fewest, most)

    return read_tiles(family, shown, tile_grid(shown, cell), shape)


def read_own_grids(
    family: str, shown: Shown, grids: Sequence[Grid], what: str, cut_up: Callable[[Size], Looks]
) -> list[Looks]:
    """The looks at every image where each has a grid of its own among the inputs, one behind the other.

    Args:
        what: for errors, what the family does with pictures.
        cut_up: `(height, width)` to the looks at a picture of this size; their grids are left to `grids`.

    Raises:
        TokenLayoutError: the sizes are needed and not known, or other looks came than pictures are cut into.
    """
    if len(grids) == 1 or (shown.sizes is not None and len(grids) == len(shown.sizes)):
        return whole(grids)
    pictures = [cut_up(size) for size in shown.sizes_for(family, what)]
    check_count(family, shown, len(grids), pictures)
    left = iter(grids)
    return [tuple(Look(next(left), each.box) for each in looks) for looks in pictures]


def with_whole(shape: Shape, grid: Grid, *, whole_first: bool) -> Looks:
    """The looks at tiles and at the whole; the whole alone where there is one tile."""
    tiles = cut(shape, grid)
    if len(tiles) == 1:
        return tiles
    return (Look(grid), *tiles) if whole_first else (*tiles, Look(grid))


def square_tile(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    """Tiles of another size."""
    return {"size": {"height": max(size), "width": max(size)}}


def tile_grid(shown: Shown, cell: int, rounded: Callable[[float], int] = int) -> Grid:
    """Tokens of a tile whose pixels are the last two axes of `pixel_values`."""
    height, width = (rounded(length / cell) for length in shown.inputs["pixel_values"].shape[-2:])
    return 1, height, width


# --- how many tiles -------------------------------------------------------------------------------------


def shapes_up_to(most: int, fewest: int = 1) -> list[Shape]:
    """All `(rows, columns)` of `fewest` to `most` tiles, few tiles first, then few columns."""
    shapes = [
        (rows, columns)
        for columns in range(1, most + 1)
        for rows in range(1, most // columns + 1)
        if rows * columns >= fewest
    ]
    return sorted(shapes, key=math.prod)


def nearest_shape(size: Size, tile: Size, fewest: int, most: int) -> Shape:
    """The shape whose sides are to each other most as the picture's, as InternVL and Aya choose it.

    Of several, the largest whose area is less than twice the picture's, else the smallest.
    """
    height, width = size
    shapes = shapes_up_to(most, fewest) or [(1, 1)]
    off = [abs(width / height - columns / rows) for rows, columns in shapes]
    equal = [shape for shape, by in zip(shapes, off, strict=True) if by == min(off)]
    filled = [shape for shape in equal[1:] if height * width > 0.5 * math.prod(tile) * math.prod(shape)]
    return filled[-1] if filled else equal[0]


def least_enlarged_shape(size: Size, tile: Size, most: int) -> Shape:
    """The shape that holds the picture with the least enlarging, else with the least shrinking, as Command A chooses it."""
    height, width = size
    shapes = shapes_up_to(most)
    growth = [min(columns * tile[0] / width, rows * tile[0] / height) for rows, columns in shapes]
    if max(growth) < 1:
        return shapes[growth.index(max(growth))]
    return shapes[growth.index(min(each for each in growth if each >= 1))]


def largest_held_shape(size: Size, tile: int, most: int) -> Shape:
    """The shape that holds the picture at its largest, as PerceptionLM chooses it.

    Where all are too small, the one whose sides are to each other most as the picture's, from below for wide pictures
    and from above for tall ones, with as many tiles as can be.
    """
    height, width = size
    kinds: dict[float, list[Shape]] = {}
    for n in range(most, 0, -1):  # of equals the last one wins, so the order counts
        for columns in (columns for columns in range(1, n + 1) if n % columns == 0):
            kinds.setdefault(columns / (n // columns), []).append((n // columns, columns))

    def shorter_side(shape: Shape) -> int:  # of the picture on it, in whole pixels
        growth = min(shape[1] * tile / width, shape[0] * tile / height)
        if width > height:
            return math.floor(growth * width / (width / height))
        return math.floor(growth * height * (width / height))

    holding = [
        shape for shapes in kinds.values() for shape in shapes if shape[1] * tile >= width and shape[0] * tile >= height
    ]
    if holding:
        return max(reversed(holding), key=shorter_side)
    aspect = width / height
    if aspect >= 1:
        nearest = min((kind for kind in kinds if kind <= aspect), key=lambda kind: aspect - kind)
        return max(kinds[nearest], key=lambda shape: shape[1])
    nearest = min((kind for kind in kinds if kind > aspect), key=lambda kind: abs(1 / kind - 1 / aspect))
    return max(kinds[nearest], key=lambda shape: shape[0])
