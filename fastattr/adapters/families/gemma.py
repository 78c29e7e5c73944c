"""Gemma: one square a picture, always the same number of tokens; crops of a long one behind it, where it is scanned."""

from __future__ import annotations

import math

from fastattr.adapters.families.cuts import check_count, image_option
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, side, whole
from fastattr.types import Grid

NAME = "Gemma3"


def cell(config: Config) -> int:
    return side(config.vision_config.image_size) // math.isqrt(config.mm_tokens_per_image)


def look(shown: Shown) -> list[Looks]:
    edge = math.isqrt(shown.config.mm_tokens_per_image)
    grid = (1, edge, edge)
    n_squares = math.prod(shown.inputs["pixel_values"].shape[:-3])
    if n_squares == 1 or (shown.sizes is not None and n_squares == len(shown.sizes)):
        return whole([grid] * n_squares)
    sizes = shown.sizes_for(NAME, "shows more squares than one picture has")
    pictures = [_scanned(shown, size, grid) for size in sizes]
    check_count(NAME, shown, n_squares, pictures)
    return pictures


def _scanned(shown: Shown, size: Size, grid: Grid) -> Looks:
    """The looks at a picture and its crops, which lie along its longer side; the last one may be smaller."""
    least, most, long = (
        image_option(shown, NAME, f"pan_and_scan_{name}", usual)
        for name, usual in (("min_crop_size", 256), ("max_num_crops", 4), ("min_ratio_to_activate", 1.2))
    )
    longer, shorter = max(size), min(size)
    if longer / shorter < long:
        return (Look(grid),)
    n_crops = min(most, max(2, min(longer // least, math.floor(longer / shorter + 0.5))))
    crop = math.ceil(longer / n_crops)
    if min(crop, shorter) < least:
        return (Look(grid),)
    edges = [min(1.0, i * crop / longer) for i in range(n_crops + 1)]
    wide = size[1] >= size[0]
    boxes = [(a, 0.0, b, 1.0) if wide else (0.0, a, 1.0, b) for a, b in zip(edges, edges[1:], strict=False)]
    return (Look(grid), *(Look(grid, box) for box in boxes))


GEMMA3 = Family(NAME, look, cell, None, token_types="token_type_ids", tiles=True)

FAMILIES = {"gemma3": GEMMA3, "shieldgemma2": GEMMA3}
