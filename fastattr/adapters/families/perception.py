"""PerceptionLM and FastVLM: towers that do not say their patch size, so tokens are counted in the text."""

from __future__ import annotations

import math

from fastattr.adapters.families.cuts import check_count, image_option
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, whole
from fastattr.adapters.families.llava import extent_of
from fastattr.adapters.families.tiles import cut, largest_held_shape
from fastattr.errors import TokenLayoutError
from fastattr.types import Grid


def cell(config: Config) -> int:
    """Not defined: the number of tokens is fixed."""
    return 1


def square_grid(shown: Shown, family: str, n_squares: int, placeholder: int | None = None) -> Grid:
    """The grid of each of the squares that were shown.

    Raises:
        TokenLayoutError: the image tokens are not those of so many squares.
    """
    placeholder = shown.config.image_token_id if placeholder is None else placeholder
    n_tokens = int((shown.inputs["input_ids"] == placeholder).sum())
    edge = math.isqrt(n_tokens // n_squares)
    if n_squares * edge * edge != n_tokens or n_tokens == 0:
        raise TokenLayoutError(
            f"input_ids holds {n_tokens} image tokens, expected the square of a number for each of the {n_squares} squares "
            f"that {family} is shown"
        )
    return 1, edge, edge


def look_perception(shown: Shown) -> list[Looks]:
    """`pixel_values` is `[image tile ...]`, the whole first; one tile is the whole alone."""
    n_images, n_tiles = shown.inputs["pixel_values"].shape[:2]
    grid = square_grid(shown, PERCEPTION_LM.name, n_images * n_tiles)
    if n_tiles <= 2:
        return [(Look(grid),) * n_tiles] * n_images
    sizes = shown.sizes_for(PERCEPTION_LM.name, "cuts pictures into tiles by their size")
    edge, most = int(shown.inputs["pixel_values"].shape[-1]), image_option(shown, PERCEPTION_LM.name, "max_num_tiles")
    pictures = [(Look(grid), *cut(largest_held_shape(size, edge, most), grid)) for size in sizes]
    check_count(PERCEPTION_LM.name, shown, n_images * n_tiles, pictures)
    return pictures


def watch_perception(shown: Shown) -> list[Looks]:
    """`[video frame ...]`; a frame is shown once."""
    n_videos, n_frames = shown.inputs["pixel_values_videos"].shape[:2]
    _, height, width = square_grid(shown, PERCEPTION_LM.name, n_videos * n_frames, shown.config.video_token_id)
    return whole([(n_frames, height, width)] * n_videos)


def look_fast(shown: Shown) -> list[Looks]:
    n_images = math.prod(shown.inputs["pixel_values"].shape[:-3])
    grid = square_grid(shown, FAST_VLM.name, n_images)
    sizes = shown.sizes_for(FAST_VLM.name, "crops or pads pictures by their size")
    if len(sizes) != n_images:  # said by whoever counts them
        return whole([grid] * n_images)
    height, width = (int(length) for length in shown.inputs["pixel_values"].shape[-2:])
    return [(Look(grid, extent_of(shown.processor, size, (height, width))),) for size in sizes]


PERCEPTION_LM = Family("PerceptionLM", look_perception, cell, None, watch_perception, resized=False, tiles=True)

FAST_VLM = Family("FastVLM", look_fast, cell, None, resized=False)

FAMILIES = {"perception_lm": PERCEPTION_LM, "fast_vlm": FAST_VLM}
