"""Processors as transformers has them, so with their own text of videos, and a video half in place of the torchvision one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.glm4v.image_processing_pil_glm4v import smart_resize as size_of_all
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as size_of_one
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import make_batched_metadata

from fastattr.adapters.processors import FilmProcessor
from tests.engine.families.tiny_qwen import LIMITS
from tests.engine.family_models import PATCH

CELL = 2 * PATCH


def patches_by_hand(frames: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Patches `[t * h * w, 3 * 2 * PATCH * PATCH]` of frames whose sides are whole cells: each cell's four, row by row."""
    pixels = np.stack([(np.asarray(frame) / 255 - mean) / std for frame in frames])  # [frame row column channel]
    rows, columns = pixels.shape[1] // CELL, pixels.shape[2] // CELL
    found = []
    for pair in range(0, len(frames), 2):
        two = pixels[[pair, min(pair + 1, len(frames) - 1)]]
        for row, column, below, beside in np.ndindex(rows, columns, 2, 2):
            top, left = row * CELL + below * PATCH, column * CELL + beside * PATCH
            block = two[:, top : top + PATCH, left : left + PATCH]
            found.append(block.transpose(3, 0, 1, 2).ravel())
    return np.stack(found)


class PixelOptions(VideosKwargs, total=False):  # type: ignore[misc, call-arg]
    min_pixels: int
    max_pixels: int


@dataclass
class VideoHalf:
    """The video processor of a joint one. Left alone it leaves out every second frame, as the real ones sample.

    Attributes:
        images: the image half, whose colours it shares.
        counts_all: see `FilmStyle`.
        calls: options of every call.
    """

    images: Any
    counts_all: bool
    calls: list[dict[str, Any]] = field(default_factory=list)
    merge_size = 2
    temporal_patch_size = 2
    valid_kwargs = PixelOptions

    def __call__(
        self,
        videos: Any,
        do_sample_frames: bool = True,
        size: Any = None,
        do_resize: bool = True,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        return_metadata: bool = False,
        return_tensors: str | None = None,
        video_metadata: Any = None,
    ) -> dict[str, Any]:
        self.calls.append({"do_sample_frames": do_sample_frames, "size": size})
        if do_sample_frames:
            videos = [frames[::2] for frames in videos]
        least, most = (size["shortest_edge"], size["longest_edge"]) if size else LIMITS
        least, most = min_pixels or least, max_pixels or most  # come before `size`, as in the real ones
        patches, grids = [], []
        for frames in videos:
            width, height = frames[0].size
            high, wide = height, width
            if do_resize and self.counts_all:
                high, wide = size_of_all(len(frames), height, width, 2, CELL, least, most)
            elif do_resize:
                high, wide = size_of_one(height, width, CELL, least, most)
            resized = [frame.resize((wide, high), Image.Resampling.BICUBIC) for frame in frames]
            patches.append(patches_by_hand(resized, self.images.image_mean, self.images.image_std))
            grids.append([(len(frames) + 1) // 2, high // PATCH, wide // PATCH])
        made: dict[str, Any] = {
            "pixel_values_videos": torch.from_numpy(np.concatenate(patches)).float(),
            "video_grid_thw": torch.tensor(grids),
        }
        if return_metadata:  # as transformers fills it in where nobody gives any
            arrays = [np.stack([np.asarray(frame) for frame in frames]) for frames in videos]
            made["video_metadata"] = make_batched_metadata(arrays, video_metadata)
        return made


def real(joint: Callable[..., Any], films: FilmProcessor) -> Any:
    """transformers' own joint processor, of the same halves as ours."""
    half = VideoHalf(films.image_processor, films.style.counts_all)

    class Joint(joint):  # type: ignore[misc,valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)  # the video half is none of transformers'

    chat = films.tokenizer.chat_template
    built: ProcessorMixin = Joint(films.image_processor, films.tokenizer, half, chat_template=chat)
    return built


JOINT: dict[str, Callable[..., Any]] = {
    "qwen2_vl": Qwen2VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
    "qwen3_vl": Qwen3VLProcessor,
    "glm4v": Glm4vProcessor,
    "glm46v": Glm46VProcessor,
}
