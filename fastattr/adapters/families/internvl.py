"""InternVL: a picture squeezed into tiles of one size, its thumbnail behind them."""

from __future__ import annotations

import math
from typing import Any

from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, patch, whole


def cell(config: Config) -> int:
    return round(patch(config) / config.downsample_ratio)


def look(shown: Shown) -> list[Looks]:
    pixels = shown.inputs["pixel_values"]
    height, width = (int(length) // cell(shown.config) for length in pixels.shape[-2:])
    return whole([(1, height, width)] * math.prod(pixels.shape[:-3]))


def square_tile(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    return {"size": {"height": max(size), "width": max(size)}}


INTERNVL = Family("InternVL", look, cell, square_tile, always={"crop_to_patches": False})

FAMILIES = {"internvl": INTERNVL}
