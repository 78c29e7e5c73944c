"""LFM2-VL: small pictures in one look of their own form, large ones squeezed into tiles with such a look behind them."""

from __future__ import annotations

from typing import Any

from fastattr.adapters.families.cuts import check_count, image_option
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, patch, whole
from fastattr.adapters.families.tiles import Shape, cut, nearest_shape
from fastattr.types import Grid

NAME = "LFM2-VL"


def cell(config: Config) -> int:
    return patch(config) * int(config.downsample_factor)


def look(shown: Shown) -> list[Looks]:
    factor = int(shown.config.downsample_factor)
    grids: list[Grid] = [(1, h // factor, w // factor) for h, w in shown.inputs["spatial_shapes"].tolist()]
    n_looks = len(grids)
    if n_looks == 1 or (shown.sizes is not None and n_looks == len(shown.sizes)):
        return whole(grids)
    shapes = [_shape(shown, size) for size in shown.sizes_for(NAME, "cuts pictures into tiles by their size")]
    with_whole = bool(image_option(shown, NAME, "use_thumbnail"))
    pictures = [cut(shape, (1, 1, 1)) for shape in shapes]
    pictures = [(*tiles, Look((1, 1, 1))) if with_whole and len(tiles) > 1 else tiles for tiles in pictures]
    check_count(NAME, shown, n_looks, pictures)
    left = iter(grids)
    return [tuple(Look(next(left), each.box) for each in looks) for looks in pictures]


def _shape(shown: Shown, size: Size) -> Shape:
    """Rows and columns of tiles: more than one where the picture is larger than one look by more than a tolerance."""

    def option(name: str) -> Any:
        return image_option(shown, NAME, name)

    least, most, edge = option("min_tiles"), option("max_tiles"), option("tile_size")
    side, small = cell(shown.config), patch(shown.config)
    height, width = (max(small, round(length / side) * side) for length in size)
    fits = height * width <= option("max_image_tokens") * side**2 * option("max_pixels_tolerance")
    if fits or least == most == 1 or not option("do_image_splitting"):
        return 1, 1
    return nearest_shape(size, (edge, edge), least, most)


LFM2 = Family(NAME, look, cell, None, resized=False, tiles=True)

FAMILIES = {"lfm2_vl": LFM2}
