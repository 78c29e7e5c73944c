"""MiniCPM-V 4.6 and 4.7: a picture in its own form, and behind it, where it is large, the same squeezed into slices."""

from __future__ import annotations

import math
from dataclasses import replace

from fastattr.adapters.families.cuts import image_option
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, patch
from fastattr.adapters.families.tiles import Shape, cut, read_own_grids
from fastattr.types import Grid

NAME = "MiniCPM-V"


def merged(config: Config) -> int:
    """How many patches a side become one token."""
    inside = 1 if config.downsample_mode == "4x" else int(config.vision_config.window_kernel_size[0])
    return inside * int(config.merge_kernel_size[0]) ** int(config.merger_times)


def cell(config: Config) -> int:
    return patch(config) * merged(config)


def look(shown: Shown) -> list[Looks]:
    factor = merged(shown.config)
    grids: list[Grid] = [(1, h // factor, w // factor) for h, w in shown.inputs["target_sizes"].tolist()]

    def cut_up(size: Size) -> Looks:
        most, edge = (image_option(shown, NAME, name) for name in ("max_slice_nums", "scale_resolution"))
        shape = _shape(size, most, edge)
        return (Look((1, 1, 1)), *(cut(shape, (1, 1, 1)) if shape else ()))

    return read_own_grids(NAME, shown, grids, "cuts pictures into slices by their size", cut_up)


def _shape(size: Size, most: int, edge: int) -> Shape | None:
    """Rows and columns of about as many slices as the picture has the area of, in the form that is most like it; of equals
    the one with more rows."""
    height, width = size
    n = min(math.ceil(width * height / (edge * edge)), most)
    if n <= 1:
        return None
    form = math.log(width / height)
    counts = [count for count in (n - 1, n, n + 1) if 1 < count <= most]
    shapes = [(rows, count // rows) for count in counts for rows in range(1, count + 1) if count % rows == 0]
    off = [abs(form - math.log(columns / rows)) for rows, columns in shapes]
    equal = [shape for shape, by in zip(shapes, off, strict=True) if by == min(off)]
    return max(equal, key=lambda shape: shape[0])


MINICPM = Family(NAME, look, cell, None, resized=False, tiles=True, along_last=("pixel_values",))
MINICPM_CANVAS = replace(MINICPM, token_types="mm_token_type_ids")  # places of slices are among the positions

FAMILIES = {"minicpmv4_6": MINICPM, "minicpmv4_7": MINICPM_CANVAS}
