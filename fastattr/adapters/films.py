"""Videos from an image processor alone: the size of their frames and their patches, two frames in one.

transformers' video processors need torchvision. What they make of a video is what its image processor makes of the
frames, but for the limits of size and for time: a temporal patch holds as many frames that follow each other as an image's
holds copies of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

Size = tuple[int, int]  # (height, width) in pixels
Limits = tuple[int, int]  # at least and at most so many pixels
LONGEST = 200  # times the shorter side, where transformers' processors end


def frame_size(size: Size, n_frames: int, cell: int, limits: Limits, *, counts_all: bool) -> Size:
    """The size at which a video's frames are shown: whole cells, about as wide as high as before, within the limits.

    Args:
        size: of the frames as they are.
        cell: the side of what becomes one token, in pixels.
        counts_all: limits count the pixels of all frames together, as Qwen3-VL and GLM-4V do, else of one frame.

    Raises:
        ValueError: frames are so long that transformers refuses them.
    """
    height, width = size
    if max(size) > LONGEST * min(size):
        raise ValueError(f"a frame of {width} x {height} pixels is more than {LONGEST} times as long as wide")
    if counts_all and min(size) < cell:
        height, width = (int(side * cell / min(size)) for side in size)
    frames, even = (n_frames, 2 * round(n_frames / 2)) if counts_all else (1, 1)
    rows, columns = round(height / cell), round(width / cell)
    shown = even * rows * columns * cell**2
    least, most = limits
    if shown > most:
        shrink = math.sqrt(frames * height * width / most)
        rows, columns = (max(1, math.floor(side / shrink / cell)) for side in (height, width))
    elif shown < least:
        grow = math.sqrt(least / (frames * height * width))
        rows, columns = (math.ceil(side * grow / cell) for side in (height, width))
    return rows * cell, columns * cell


def film_patches(image_processor: Any, frames: Sequence[Image.Image], size: Size) -> tuple[Tensor, list[int]]:
    """What a vision tower takes of a video shown at `size`.

    Args:
        image_processor: of the Qwen2-VL kind: a patch is `(channel, time, row, column)`.
        frames: of one size; where a temporal patch is not full, the last one is repeated.

    Returns:
        `pixel_values_videos [patch values]` and its grid `[t, h, w]` in patches.
    """
    depth = image_processor.temporal_patch_size
    filled = [*frames, *[frames[-1]] * (-len(frames) % depth)]
    height, width = size
    resized = [frame.resize((width, height), image_processor.resample) for frame in filled]
    made = image_processor(resized, do_resize=False, return_tensors="pt")
    _, h, w = made["image_grid_thw"][0].tolist()
    # every frame fills a temporal patch with copies of itself; of the k-th frame in a patch the k-th copy is kept
    copies = made["pixel_values"].unflatten(1, (3, depth, -1)).unflatten(0, (-1, depth, h * w))
    kept = torch.stack([copies[:, k, :, :, k] for k in range(depth)], dim=3)  # [t cell channel time values]
    return kept.flatten(2).flatten(0, 1), [len(filled) // depth, h, w]


def step_seconds(seconds: Sequence[float], depth: int) -> list[tuple[float, float]]:
    """When the first and the last frame of every temporal patch were taken, in seconds.

    Args:
        seconds: when each frame was taken.
        depth: number of frames in a temporal patch.
    """
    last = len(seconds) - 1
    return [(seconds[first], seconds[min(first + depth - 1, last)]) for first in range(0, len(seconds), depth)]
