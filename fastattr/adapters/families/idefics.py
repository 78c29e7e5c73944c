"""Idefics3 and SmolVLM: a picture squeezed onto rows and columns of tiles, the whole picture behind them.

SmolVLM shows a frame of a video in one tile.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, image_half, patch
from fastattr.adapters.families.frames import watch_frames
from fastattr.adapters.families.qwen import EVERY_FRAME
from fastattr.adapters.families.tiles import Shape, read_tiles, tile_grid

NAME = "Idefics3, SmolVLM"


def cell(config: Config) -> int:
    return patch(config) * int(config.scale_factor)


def look(shown: Shown) -> list[Looks]:
    tile = int(shown.inputs["pixel_values"].shape[-1])

    def shape(size: Size) -> Shape:
        longest, own = (image_option(shown, NAME, name)["longest_edge"] for name in ("size", "max_image_size"))
        return shape_of(size, tile, round(longest / own * tile))

    return read_tiles(NAME, shown, tile_grid(shown, cell(shown.config)), shape)


def watch(shown: Shown) -> list[Looks]:
    return watch_frames(NAME, shown, tile_grid(shown, cell(shown.config)))


def shape_of(size: Size, tile: int, longest: int) -> Shape:
    """Rows and columns of tiles of a picture whose longer side is first made `longest` pixels.

    Rounded step by step as the processor does: a pixel more can be a row more.
    """
    height, width = _sides(size, longest)
    height += height % 2 if size[1] >= size[0] else 0
    width += width % 2 if size[1] < size[0] else 0
    height, width = _sides((height, width), math.ceil(max(height, width) / tile) * tile)
    return math.ceil(height / tile), math.ceil(width / tile)


def _sides(size: Size, longest: int) -> Size:
    """The picture with its longer side made `longest` pixels, the other rounded down."""
    height, width = size
    if width >= height:
        return max(1, int(longest / (width / height))), longest
    return longest, max(1, int(longest * (width / height)))


def larger_tiles(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    """As many tiles, each larger; one, where the processor does not show how it cuts."""
    images = image_half(processor)
    tile = max(size)
    n_tiles = 1.0 if images is None else images.size["longest_edge"] / images.max_image_size["longest_edge"]
    return {"size": {"longest_edge": round(n_tiles * tile)}, "max_image_size": {"longest_edge": tile}}


IDEFICS3 = Family(NAME, look, cell, larger_tiles, resized=False, tiles=True)
SMOLVLM = replace(IDEFICS3, watch=watch, film_token="image_token_id", filmed=EVERY_FRAME)

FAMILIES = {"idefics3": IDEFICS3, "smolvlm": SMOLVLM}
