"""Aya Vision and Command A Vision: tiles in two different arrangements, the whole behind them."""

from __future__ import annotations

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, patch
from fastattr.adapters.families.tiles import (
    Shape,
    least_enlarged_shape,
    read_nearest_tiles,
    read_tiles,
    square_tile,
    tile_grid,
)


def cell(config: Config) -> int:
    return patch(config) * int(config.downsample_factor)


def look_aya(shown: Shown) -> list[Looks]:
    return read_nearest_tiles(AYA.name, shown, cell(shown.config))


def look_cohere(shown: Shown) -> list[Looks]:
    height, width = shown.inputs["pixel_values"].shape[-2:]

    def shape(size: Size) -> Shape:
        return least_enlarged_shape(size, (height, width), image_option(shown, COHERE2.name, "max_patches"))

    return read_tiles(COHERE2.name, shown, tile_grid(shown, cell(shown.config)), shape)


AYA = Family("Aya Vision", look_aya, cell, square_tile, resized=False, interpolates=True, tiles=True)

COHERE2 = Family("Command A Vision", look_cohere, cell, square_tile, resized=False, interpolates=True, tiles=True)

FAMILIES = {"aya_vision": AYA, "cohere2_vision": COHERE2}
