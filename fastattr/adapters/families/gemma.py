"""Gemma 3: one square a picture, always the same number of tokens; crops of a long one behind it, where it is scanned.

Gemma 3n has one square too; Gemma 4 keeps the form of a picture and pools its patches.
"""

from __future__ import annotations

import math
from itertools import accumulate, pairwise

from fastattr.adapters.families.cuts import check_count, image_option
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, patch, side, whole
from fastattr.adapters.families.qwen import EVERY_FRAME
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
    boxes = [(a, 0.0, b, 1.0) if wide else (0.0, a, 1.0, b) for a, b in pairwise(edges)]
    return (Look(grid), *(Look(grid, box) for box in boxes))


def look_once(shown: Shown) -> list[Looks]:
    edge = math.isqrt(shown.config.vision_soft_tokens_per_image)
    return whole([(1, edge, edge)] * math.prod(shown.inputs["pixel_values"].shape[:-3]))


def pooled(shown: Shown) -> list[Looks]:
    """Of patches whose places are given as `(x, y)`, -1 where there is none."""
    return whole([(1, h, w) for h, w in _pooled_sides(shown, "image_position_ids")])


def watch_pooled(shown: Shown) -> list[Looks]:
    """The same of every frame, one video behind the other."""
    sides = _pooled_sides(shown, "video_position_ids")
    n_frames = shown.inputs["num_frames_per_video"].tolist()
    firsts = accumulate(n_frames[:-1], initial=0)
    return whole([(n, *sides[first]) for n, first in zip(n_frames, firsts, strict=True)])


def _pooled_sides(shown: Shown, name: str) -> list[Size]:
    factor = int(shown.config.vision_config.pooling_kernel_size)
    return [(h, w) for w, h in ((shown.inputs[name].amax(dim=1) + 1) // factor).tolist()]


def pooled_cell(config: Config) -> int:
    return patch(config) * int(config.vision_config.pooling_kernel_size)


GEMMA3 = Family(NAME, look, cell, None, token_types="token_type_ids", tiles=True)
GEMMA3N = Family(  # what its tower sees with one token is said nowhere, and asked for only where pictures can be larger
    "Gemma3n", look_once, lambda config: 1, None, token_types="token_type_ids"
)
GEMMA4 = Family(
    "Gemma4",
    pooled,
    pooled_cell,
    None,
    watch_pooled,
    token_types="mm_token_type_ids",
    filmed=EVERY_FRAME,
    keeps_aspect=True,
)

FAMILIES = {"gemma3": GEMMA3, "shieldgemma2": GEMMA3, "gemma3n": GEMMA3N, "gemma4": GEMMA4}
