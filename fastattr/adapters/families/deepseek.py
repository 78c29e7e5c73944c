"""DeepSeek-VL and Janus: one square a picture, made smaller as it is and padded."""

from __future__ import annotations

import math

from fastattr.adapters.families.family import Family, Look, Looks, Shown, Size, image_half, patch
from fastattr.adapters.families.tiles import square_tile
from fastattr.types import Box


def look(shown: Shown) -> list[Looks]:
    """Two pixel inputs of DeepSeek-VL-7B show the same square, and their features one token."""
    sizes = shown.sizes_for("DeepSeek-VL or Janus", "pads pictures by their size")
    pixels = shown.inputs.get("high_res_pixel_values", shown.inputs["pixel_values"])
    edge = int(pixels.shape[-1])
    height, width = (int(length) // patch(shown.config) for length in shown.inputs["pixel_values"].shape[-2:])
    if len(sizes) != math.prod(pixels.shape[:-3]):  # said by whoever counts them
        return [(Look((1, height, width)),)] * math.prod(pixels.shape[:-3])
    least = int(getattr(image_half(shown.processor), "min_size", 14))
    return [(Look((1, height, width), padded_box(size, edge, least)),) for size in sizes]


def padded_box(size: Size, edge: int, least: int) -> Box:
    """A square of `edge` pixels as shares of the picture in its middle, no side of which is shown below `least` pixels."""
    high, wide = (max(round(length * (edge / max(size))), least) for length in size)
    top, left = (edge - high) // 2, (edge - wide) // 2
    return -left / wide, -top / high, (edge - left) / wide, (edge - top) / high


DEEPSEEK_VL = Family("DeepSeek-VL", look, patch, square_tile, resized=False, interpolates=True)

# one of its two towers has features of a fixed size
DEEPSEEK_VL_HYBRID = Family("DeepSeek-VL (two towers)", look, patch, None, resized=False)

JANUS = Family("Janus", look, patch, square_tile, resized=False, interpolates=True)

FAMILIES = {"deepseek_vl": DEEPSEEK_VL, "deepseek_vl_hybrid": DEEPSEEK_VL_HYBRID, "janus": JANUS}
