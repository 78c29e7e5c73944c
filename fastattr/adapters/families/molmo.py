"""Molmo2: all of a picture squeezed to a square, then all of it again in overlapping crops; patches are pooled.

Of crops the model is told which patches become which token, so that each place is read once. Where patches do not fill
the outer pools, those reach over the border. Every frame of a video is squeezed to the square. One placeholder stands
for images and videos, and a prompt holds either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastattr.adapters.families.family import Family, Look, Looks, Shown, image_half, patch
from fastattr.adapters.families.qwen import EVERY_FRAME
from fastattr.errors import TokenLayoutError
from fastattr.types import Grid

NAME = "Molmo2"


def look(shown: Shown) -> list[Looks]:
    if "video_grids" in shown.inputs and "image_grids" not in shown.inputs:
        return []
    grids = shown.inputs["image_grids"].tolist()
    pictures = [((1, rows, columns), (1, fine_rows, fine_columns)) for rows, columns, fine_rows, fine_columns in grids]
    return _looks(pictures, shown.inputs["image_token_pooling"], image_half(shown.processor))


def watch(shown: Shown) -> list[Looks]:
    if "video_grids" not in shown.inputs:
        return []
    videos = [((t, h, w),) for t, h, w in shown.inputs["video_grids"].tolist()]
    return _looks(videos, shown.inputs["video_token_pooling"], getattr(shown.processor, "video_processor", None))


def _looks(pictures: Sequence[tuple[Grid, ...]], pooling: Tensor, half: Any) -> list[Looks]:
    """The looks at every picture, of so many tokens each.

    Args:
        pooling: `[token pool]`, indices of the patches that become a token, -1 where there is none.
        half: of the processor, which says how many rows of patches a pool holds.

    Raises:
        TokenLayoutError: `pooling` holds other tokens.
    """
    counts = [math.prod(grid) for grids in pictures for grid in grids]
    if sum(counts) != len(pooling):
        raise TokenLayoutError(
            f"{NAME} pools patches to {len(pooling)} tokens, but the grids {pictures} need {sum(counts)}"
        )
    pool = _pool(half, pooling.shape[1])
    parts = iter((pooling >= 0).split(counts))
    return [tuple(_look(grid, next(parts), pool) for grid in grids) for grids in pictures]


def _pool(half: Any, n_patches: int) -> tuple[int, int]:
    """Rows and columns of patches that become a token; a square where the processor does not say."""
    edge = math.isqrt(n_patches)
    rows, columns = getattr(half, "pooling_size", None) or (edge, edge)
    if rows * columns != n_patches:
        raise TokenLayoutError(
            f"{NAME} pools {n_patches} patches to a token, but its processor is set to {rows} x {columns}"
        )
    return rows, columns


def _look(grid: Grid, holds: Tensor, pool: tuple[int, int]) -> Look:
    """A look at all of the picture, of which tokens hold a patch at each place of their pool, bool `[token pool]`."""
    patches = holds.view(*grid, *pool)
    top, bottom = _reach(patches.any((0, 2, 4)).flatten())
    left, right = _reach(patches.any((0, 1, 3)).flatten())
    return Look(grid, (left, top, right, bottom))


def _reach(held: Tensor) -> tuple[float, float]:
    """How far rows of pools reach, as shares of the patches that they hold."""
    first, n = int(held.int().argmax()), int(held.sum())
    return -first / n, (len(held) - first) / n


MOLMO2 = Family(NAME, look, patch, None, watch, filmed=EVERY_FRAME, resized=False, tiles=True, stacks=False)

FAMILIES = {"molmo2": MOLMO2}
