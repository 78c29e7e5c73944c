"""Kimi-K2.5: pictures are shrunk where they are too large, then padded below and to the right to whole tokens.

A video is cut into runs of four frames that become one, and nothing tells how many runs each video has: its frames are
shown as images.
"""

from __future__ import annotations

import math
from typing import Any

from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, image_half, patch
from fastattr.errors import TokenLayoutError

NAME = "Kimi-K2.5"


def look(shown: Shown) -> list[Looks]:
    cell, merged = cell_of(shown.config), merge_of(shown.config)
    grids = [(h // merged, w // merged) for _, h, w in shown.inputs["image_grid_thw"].tolist()]
    sizes = shown.sizes_for(NAME, "pads pictures by their size")
    if len(sizes) != len(grids):  # said by whoever counts them
        return [(Look((1, *grid)),) for grid in grids]
    found: list[Looks] = []
    for size, (rows, columns) in zip(sizes, grids, strict=True):
        smaller = shrunk(size, image_half(shown.processor), patch(shown.config))
        # as it is where the limits were lifted to show it at another scale
        fitting = [
            each for each in (smaller, size) if (_cells(each[0], cell), _cells(each[1], cell)) == (rows, columns)
        ]
        if not fitting:
            raise TokenLayoutError(
                f"{NAME} shows a picture of {size} (height, width) at {smaller} in cells of {cell} pixels, but its grid is "
                f"{rows} x {columns}: the processor resizes it in a way that is not known"
            )
        height, width = fitting[0]
        found.append((Look((1, rows, columns), (0.0, 0.0, columns * cell / width, rows * cell / height)),))
    return found


def _cells(length: int, cell: int) -> int:
    return math.ceil(length / cell)


def shrunk(size: Size, images: Any, patch_size: int) -> Size:
    """The size at which a picture is shown, before padding: within so many patches in all, and a side."""
    side = (getattr(images, "size", None) or {}).get("max_height", 512)
    height, width = size
    patches = max(1, height // patch_size) * max(1, width // patch_size)
    longest = side * patch_size
    share = min(1.0, math.sqrt(getattr(images, "max_patches", 16384) / patches), longest / height, longest / width)
    high, wide = (min(longest, max(1, int(length * share))) for length in size)
    return high, wide


def merge_of(config: Config) -> int:
    return int(config.vision_config.merge_kernel_size[0])


def cell_of(config: Config) -> int:
    return patch(config) * merge_of(config)


def no_limit(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    """Pictures come at the size of their grid, so the processor shall not change it."""
    side = 2**16
    return {"size": {"max_height": side, "max_width": side}, "max_patches": side**2}


KIMI = Family(NAME, look, cell_of, no_limit)

FAMILIES = {"kimi_k25": KIMI}
