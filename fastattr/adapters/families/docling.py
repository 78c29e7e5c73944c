"""Granite Docling: a page squeezed into tiles of one size, the whole page behind them."""

from __future__ import annotations

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, patch
from fastattr.adapters.families.tiles import Shape, read_tiles

NAME = "Granite Docling"


def cell(config: Config) -> int:
    return patch(config) * int(config.vision_config.scale_factor)


def look(shown: Shown) -> list[Looks]:
    edge = int(shown.inputs["pixel_values"].shape[-1]) // cell(shown.config)
    if "tile_fine_mask" in shown.inputs:
        edge *= 2

    def shape(size: Size) -> Shape:
        rows, columns = image_option(shown, NAME, "get_tile_grid")(*size)
        return int(rows), int(columns)

    return read_tiles(NAME, shown, (1, edge, edge), shape)


DOCLING = Family(NAME, look, cell, None, resized=False, tiles=True)

FAMILIES = {"granite_docling": DOCLING}
