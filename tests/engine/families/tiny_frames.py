"""Tiny models whose videos are frame after frame, with their real processors.

The video half, which needs torchvision, is stood in for by the image half, cutting nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import make_batched_metadata

from tests.engine.families import tiny_gemma, tiny_patches
from tests.engine.families.tiny_qwen import QWEN_CHAT
from tests.engine.families.tiny_tiles import internvl_tiles, smolvlm_tiles
from tests.engine.family_models import Tiny, _chat


@dataclass
class FrameHalf:
    """Left alone it leaves out every second frame, as a real one samples where it is set to.

    Attributes:
        option: that makes the image half cut no tiles.
        name: of what it makes.
        pads: shorter videos are padded with black frames.
    """

    images: Any
    option: str
    name: str
    pads: bool = False
    num_frames: int = 8
    fps: int = 1
    calls: list[bool] = field(default_factory=list)

    def __call__(self, videos: Any, do_sample_frames: bool = True, **_options: Any) -> dict[str, Any]:
        self.calls.append(do_sample_frames)
        if do_sample_frames:
            videos = [frames[::2] for frames in videos]
        shown = [self.images(list(frames), **{self.option: False}, return_tensors="pt") for frames in videos]
        pixels = [each["pixel_values"].flatten(0, -4) for each in shown]  # [frame channel height width]
        arrays = [np.stack([np.asarray(frame) for frame in frames]) for frames in videos]
        together = nn.utils.rnn.pad_sequence(pixels, batch_first=True) if self.pads else torch.stack(pixels)
        return {self.name: together, "video_metadata": make_batched_metadata(arrays, None)}


def _joint(joint: Callable[..., Any], images: Any, tokenizer: Any, half: Any, **more: Any) -> Any:
    class Joint(joint):  # type: ignore[misc,valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)  # the video half is none of transformers'

    return Joint(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=half,
        chat_template=tokenizer.chat_template,
        **more,
    )


def internvl() -> Tiny:
    held = internvl_tiles()
    images = held.processor.image_processor
    tokenizer = held.processor.tokenizer
    tokenizer.chat_template = _chat(
        "<|im_start|>{{ message['role'] }}\\n",
        "<IMG_CONTEXT>\\n{% elif part['type'] == 'video' %}<video>\\n",
        "<|im_end|>\\n",
        "<|im_start|>assistant\\n",
    )
    half = FrameHalf(images, "crop_to_patches", "pixel_values_videos")
    return Tiny(held.hf_model, _joint(InternVLProcessor, images, tokenizer, half, image_seq_length=4))


def smolvlm() -> Tiny:
    held = smolvlm_tiles()
    images, tokenizer = held.processor.image_processor, held.processor.tokenizer
    # a package of its own writes numbers as words
    processing_smolvlm.num2words = processing_smolvlm.num2words or str
    half = FrameHalf(images, "do_image_splitting", "pixel_values", pads=True)
    return Tiny(held.hf_model, _joint(SmolVLMProcessor, images, tokenizer, half, image_seq_len=4))


# --- Gemma 4 --------------------------------------------------------------------------------------------


@dataclass
class Pooled:
    """The video half: patches of every frame and their places. Left alone it leaves out every second frame."""

    images: Any

    def __call__(self, videos: Any, do_sample_frames: bool = True, **_options: Any) -> dict[str, Any]:
        if do_sample_frames:
            videos = [frames[::2] for frames in videos]
        shown = [self.images(list(frames), return_tensors="pt") for frames in videos]
        return {
            "pixel_values_videos": torch.cat([each["pixel_values"] for each in shown]),
            "video_position_ids": torch.cat([each["image_position_ids"] for each in shown]),
            "num_frames_per_video": torch.tensor([len(frames) for frames in videos]),
            "num_soft_tokens_per_video": [int(each["num_soft_tokens_per_image"][0]) for each in shown],
            "video_metadata": make_batched_metadata(
                [np.stack([np.asarray(f) for f in frames]) for frames in videos], None
            ),
        }


def gemma4() -> Tiny:
    """Sound is left out."""
    held = tiny_gemma.gemma4()
    images, tokenizer = held.processor.image_processor, held.processor.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% else %}", "{% elif part['type'] == 'video' %}<|video|>{% else %}"
    )
    joint = _joint(Gemma4Processor, images, tokenizer, Pooled(images), feature_extractor=object())
    held.hf_model.config.video_token_id = joint.video_token_id
    return Tiny(held.hf_model, joint)


# --- VideoLLaMA 3 ---------------------------------------------------------------------------------------


class Options(VideosKwargs, total=False):  # type: ignore[misc, call-arg]
    use_token_compression: bool


@dataclass
class Merged:
    """The video half: patches of every frame merged two by two, a quarter of the tokens.

    Left alone it leaves out every second frame, and of each but the first the token at the top left, as where nothing
    changes.
    """

    images: Any
    calls: list[tuple[bool, bool]] = field(default_factory=list)
    valid_kwargs = Options

    def __call__(
        self,
        videos: Any,
        do_sample_frames: bool = True,
        use_token_compression: bool = True,
        size: Any = None,
        **_options: Any,
    ) -> dict[str, Any]:
        self.calls.append((do_sample_frames, use_token_compression))
        if do_sample_frames:
            videos = [frames[::2] for frames in videos]
        sized = {"size": size} if size else {}
        shown = [self.images(list(frames), merge_size=2, **sized, return_tensors="pt") for frames in videos]
        grids = [[len(each["image_grid_thw"]), *each["image_grid_thw"][0, 1:].tolist()] for each in shown]
        kept = [torch.ones(t, h * w // 4, dtype=torch.bool) for t, h, w in grids]
        if use_token_compression:
            for each in kept:
                each[1:, 0] = False
        arrays = [np.stack([np.asarray(frame) for frame in frames]) for frames in videos]
        return {
            "pixel_values_videos": torch.cat([each["pixel_values"] for each in shown]),
            "video_grid_thw": torch.tensor(grids),
            "video_merge_sizes": torch.full((len(grids),), 2),
            "video_compression_mask": torch.cat([each.flatten() for each in kept]),
            "video_metadata": make_batched_metadata(arrays, None),
        }


def video_llama_3() -> Tiny:
    held = tiny_patches.video_llama_3()
    images, tokenizer = held.processor.image_processor, held.processor.tokenizer
    tokenizer.chat_template = QWEN_CHAT
    return Tiny(held.hf_model, _joint(VideoLlama3Processor, images, tokenizer, Merged(images)))
