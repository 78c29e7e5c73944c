"""LFM2-VL: small pictures in one look of their own form, large ones squeezed into tiles with such a look behind them."""

from __future__ import annotations

from typing import Any

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, patch
from fastattr.adapters.families.tiles import Shape, cut, nearest_shape, read_own_grids
from fastattr.types import Grid

NAME = "LFM2-VL"


def cell(config: Config) -> int:
    return patch(config) * int(config.downsample_factor)


def look(shown: Shown) -> list[Looks]:
    factor = int(shown.config.downsample_factor)
    grids: list[Grid] = [(1, h // factor, w // factor) for h, w in shown.inputs["spatial_shapes"].tolist()]

    def cut_up(size: Size) -> Looks:
        tiles = cut(_shape(shown, size), (1, 1, 1))
        with_whole = image_option(shown, NAME, "use_thumbnail") and len(tiles) > 1
        return (*tiles, Look((1, 1, 1))) if with_whole else tiles

    return read_own_grids(NAME, shown, grids, "cuts pictures into tiles by their size", cut_up)


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
