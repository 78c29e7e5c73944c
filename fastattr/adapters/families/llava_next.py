"""LLaVA-NeXT and LLaVA-OneVision: all of a picture squeezed to a square, then its tiles as one mosaic.

The mosaic is as large as the best of a list of resolutions; the picture lies in its middle, rows of padding are left out,
and a line break stands behind every row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, Size, patch, side
from fastattr.adapters.families.llava import centre_square, crops, padded_to_square
from fastattr.types import WHOLE_IMAGE, Box

Padding = tuple[int, int]  # (rows, columns) at each side


def cells_a_side(config: Config) -> int:
    """Tokens along a side of the square and of each tile."""
    return side(config.vision_config.image_size) // patch(config)


def look(shown: Shown) -> list[Looks]:
    return [_whole_and_mosaic(shown.config, size, cells_a_side(shown.config)) for size in _sizes(shown)]


def _sizes(shown: Shown) -> list[Size]:
    return [(int(height), int(width)) for height, width in shown.inputs["image_sizes"].tolist()]


def _whole_and_mosaic(config: Config, size: Size, edge: int, most_tiles: int | None = None) -> Looks:
    """The looks at the whole picture and at its mosaic, of tiles of `edge` tokens a side.

    The mosaic is shrunk where it holds many more tokens than `most_tiles` tiles.
    """
    tile = side(config.vision_config.image_size)
    resolution = best_resolution(size, config.image_grid_pinpoints)
    canvas = (resolution[0] // tile * edge, resolution[1] // tile * edge)
    padding = unpadded(size, canvas)
    height, width = (cells - 2 * each for cells, each in zip(canvas, padding, strict=True))
    if height * width == 0:  # a picture so slim that none of its mosaic is left, but for line breaks
        return (Look((1, edge, edge), end=height),)
    box = picture_box(size, resolution, canvas, padding)
    excess = math.sqrt(height * width / (most_tiles * edge**2)) if most_tiles is not None else 1.0
    if excess > 1.1:
        height, width = int(height // excess), int(width // excess)
    return Look((1, edge, edge)), Look((1, height, width), box, row_end=1)


def best_resolution(size: Size, resolutions: Sequence[Sequence[int]]) -> Size:
    """The `(height, width)` that shows most of a picture's pixels, of equals the one that wastes least, then the first."""
    height, width = size

    def merit(resolution: Sequence[int]) -> tuple[int, int]:
        growth = min(resolution[1] / width, resolution[0] / height)
        pixels = min(int(width * growth) * int(height * growth), width * height)
        return pixels, pixels - resolution[0] * resolution[1]

    best = max(resolutions, key=merit)
    return best[0], best[1]


def unpadded(size: Size, canvas: Size) -> Padding:
    """How many rows and columns of cells are left out at each side of a canvas of cells."""
    height, width = size
    rows, columns = canvas
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def picture_box(size: Size, resolution: Size, canvas: Size, padding: Padding) -> Box:
    """What is left of the canvas, as shares of the picture in its middle.

    Whole cells are left out, so some of the padding may stay.
    """
    height, width = size
    growth = min(resolution[1] / width, resolution[0] / height)
    shares = []
    for length, room, cells, left_out in zip(size, resolution, canvas, padding, strict=True):
        shown = room if room / length <= growth else min(math.ceil(length * growth), room)
        start = (room - shown) // 2
        edges = (left_out / cells * room, (1 - left_out / cells) * room)
        shares.append([(edge - start) / shown for edge in edges])
    (top, bottom), (left, right) = shares
    return left, top, right, bottom


LLAVA_NEXT = Family("LLaVA-NeXT", look, patch, None, resized=False, tiles=True)

# --- with video -----------------------------------------------------------------------------------------


def watch_next(shown: Shown) -> list[Looks]:
    """Frames, their centres cropped where the processor does so, pooled."""
    edge = cells_a_side(shown.config) // shown.config.spatial_pool_stride
    videos = shown.inputs["pixel_values_videos"]
    boxes = [WHOLE_IMAGE] * len(videos)
    if crops(getattr(shown.processor, "video_processor", None)):
        boxes = [centre_square(size) for size in shown.sizes_for("LLaVA-NeXT-Video", "crops frames by their size")]
    if len(boxes) != len(videos):  # said by whoever counts them
        boxes = [WHOLE_IMAGE] * len(videos)
    return [(Look((len(frames), edge, edge), box),) for frames, box in zip(videos, boxes, strict=True)]


LLAVA_NEXT_VIDEO = Family("LLaVA-NeXT-Video", look, patch, None, watch_next, resized=False, tiles=True)

# --- LLaVA-OneVision ------------------------------------------------------------------------------------


def look_onevision(shown: Shown) -> list[Looks]:
    """As above; a picture among several of one prompt is shown once, padded to a square."""
    config, sizes = shown.config, _sizes(shown)
    together = shown.inputs.get("batch_num_images")
    alone = [True] * len(sizes) if together is None else [n == 1 for n in together.tolist() for _ in range(n)]
    most_tiles = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
    edge = cells_a_side(config)
    return [
        _whole_and_mosaic(config, size, edge, most_tiles)
        if single
        else (Look((1, edge, edge), padded_to_square(size), end=1),)
        for size, single in zip(sizes, alone, strict=True)
    ]


def watch_onevision(shown: Shown) -> list[Looks]:
    """Frames at half their grid, a line break behind the last."""
    edge = math.ceil(cells_a_side(shown.config) / 2)
    return [(Look((len(frames), edge, edge), end=1),) for frames in shown.inputs["pixel_values_videos"]]


LLAVA_ONEVISION = Family(
    "LLaVA-OneVision", look_onevision, patch, None, watch_onevision, resized=False, tiles=True, nested=True
)

# --- Granite 4 Vision -----------------------------------------------------------------------------------


def look_granite(shown: Shown) -> list[Looks]:
    """As LLaVA-NeXT, but that windows of patches become fewer tokens, which are added at several layers of the decoder."""
    edge = int(cells_a_side(shown.config) * Fraction(shown.config.downsample_rate))
    return [_whole_and_mosaic(shown.config, size, edge) for size in _sizes(shown)]


GRANITE4_VISION = Family("Granite 4 Vision", look_granite, patch, None, resized=False, tiles=True)

FAMILIES = {
    "llava_next": LLAVA_NEXT,
    "llava_next_video": LLAVA_NEXT_VIDEO,
    "llava_onevision": LLAVA_ONEVISION,
    "granite4_vision": GRANITE4_VISION,
}
