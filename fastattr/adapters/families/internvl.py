"""InternVL: a picture squeezed into tiles of one size, its thumbnail behind them."""

from __future__ import annotations

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, patch
from fastattr.adapters.families.tiles import Shape, nearest_shape, read_tiles, square_tile

NAME = "InternVL"


def cell(config: Config) -> int:
    return round(patch(config) / config.downsample_ratio)


def look(shown: Shown) -> list[Looks]:
    height, width = shown.inputs["pixel_values"].shape[-2:]

    def shape(size: Size) -> Shape:
        fewest, most = (image_option(shown, NAME, name) for name in ("min_patches", "max_patches"))
        return nearest_shape(size, (height, width), fewest, most)

    return read_tiles(NAME, shown, (1, height // cell(shown.config), width // cell(shown.config)), shape)


INTERNVL = Family(NAME, look, cell, square_tile, resized=False, tiles=True)

FAMILIES = {"internvl": INTERNVL, "qianfan_ocr": INTERNVL}
