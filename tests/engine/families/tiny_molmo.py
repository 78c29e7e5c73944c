"""Tiny Molmo2 with its real processor and what its image and video halves do, which need torchvision: all but resizing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_backends import PilBackend
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.models.molmo2.processing_molmo2 import Molmo2Processor
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available
from transformers.video_utils import make_batched_metadata

from tests.engine.families.borrowed import borrow
from tests.engine.family_models import DIM, PATCH, Tiny, _chat, _finish, _llama, byte_tokenizer

MARGINS = [1, 1]  # patches of a crop that another one shows
SHOWN = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": 0.5, "image_std": 0.5}


def _resized(
    _half: Any, images: torch.Tensor, output_size: Sequence[int], *_args: Any, **_options: Any
) -> torch.Tensor:
    """The one step that needs torchvision: `[n channel height width]` from 0 to 255 in, -1 to 1 out."""
    return nn.functional.interpolate(images.float(), list(output_size), mode="bilinear") / 127.5 - 1


PICTURES = borrow(
    "transformers.models.molmo2.image_processing_molmo2",
    "select_tiling",
    "compute_crop_geometry",
    "batch_pixels_to_patches",
    "arange_for_pooling",
    "build_resized_image",
    "_build_overlapping_crops",
    "_image_batch_to_patches_and_grids",
    "_preprocess",
    resize_and_normalize_image=_resized,
    group_images_by_shape=group_images_by_shape,
    reorder_images=reorder_images,
    BatchFeature=BatchFeature,
)
FILMS = borrow(
    "transformers.models.molmo2.video_processing_molmo2",
    "batch_pixels_to_patches",
    "arange_for_pooling",
    "build_resized_image",
    "_build_video_patches",
    "_preprocess",
    resize_and_normalize_image=_resized,
    BatchFeature=BatchFeature,
)


class Options(ImagesKwargs, total=False):  # type: ignore[misc, call-arg]
    max_crops: int


class Crops(PilBackend):  # type: ignore[misc]
    valid_kwargs = Options
    model_input_names = ("pixel_values", "image_token_pooling", "image_grids", "image_num_crops")
    do_resize = do_rescale = do_normalize = do_convert_rgb = True
    resample = PILImageResampling.BILINEAR
    image_mean = image_std = (0.5, 0.5, 0.5)
    max_crops = 6
    pooling_size = (2, 2)
    _build_overlapping_crops = PICTURES["_build_overlapping_crops"]
    _image_batch_to_patches_and_grids = PICTURES["_image_batch_to_patches_and_grids"]

    def _preprocess(self, images: list[np.ndarray], size: SizeDict, max_crops: int, **_options: Any) -> Any:
        return PICTURES["_preprocess"](
            self,
            [torch.from_numpy(np.ascontiguousarray(image)) for image in images],
            do_resize=True,
            size=size,
            resample=self.resample,
            do_convert_rgb=True,
            max_crops=max_crops,
            overlap_margins=MARGINS,
            patch_size=PATCH,
            pooling_size=list(self.pooling_size),
            disable_grouping=False,
            return_tensors="pt",
            **SHOWN,
        )


def crops(side: int) -> Any:
    """The real image processor where it is."""
    size = {"height": side, "width": side}
    if not is_torchvision_available():
        return Crops(size=size)
    return transformers.Molmo2ImageProcessor(size=size, max_crops=6, overlap_margins=MARGINS, patch_size=PATCH)


@dataclass
class Frames:
    """The video half. Left alone it leaves out every second frame, as the real one samples."""

    side: int
    pooling_size: tuple[int, int] = (3, 3)
    max_fps: int = 2
    calls: list[bool] = field(default_factory=list)
    _build_video_patches = FILMS["_build_video_patches"]

    def __call__(self, videos: Any, do_sample_frames: bool = True, **_options: Any) -> Any:
        self.calls.append(do_sample_frames)
        if do_sample_frames:
            videos = [frames[::2] for frames in videos]
        arrays = [np.stack([np.asarray(frame) for frame in frames]) for frames in videos]
        made = FILMS["_preprocess"](
            self,
            [torch.from_numpy(array).permute(0, 3, 1, 2) for array in arrays],
            size=SizeDict(height=self.side, width=self.side),
            resample=PILImageResampling.BILINEAR,
            patch_size=PATCH,
            pooling_size=list(self.pooling_size),
            return_tensors="pt",
            **SHOWN,
        )
        made["video_metadata"] = make_batched_metadata(arrays, None)
        return made


NAMED = {"image_token": "<|image|>", "video_token": "<|video|>"}
MARKS = (
    "<im_start>",
    "<im_end>",
    "<im_patch>",
    "<im_col>",
    "<low_res_im_start>",
    "<frame_start>",
    "<frame_end>",
    "<im_low>",
)


def molmo2(edge: int = 6) -> Tiny:
    """With a square and crops of `edge` patches a side."""
    chat = _chat(
        "<|im_start|>{{ message['role'] }}\\n",
        "<|image|>{% elif part['type'] == 'video' %}<|video|>",
        "<|im_end|>\\n",
        "<|im_start|>assistant\\n",
    )
    special = ("<|im_start|>", "<|im_end|>", *NAMED.values())
    tokenizer = byte_tokenizer(special, chat, eos_token="<|im_end|>", pad_token="<|im_start|>", **NAMED)
    n_said = len(tokenizer)  # what stands for patches is read and never said: the output head has no rows for it
    tokenizer.add_special_tokens({"extra_special_tokens": list(MARKS)}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids
    body = _llama(n_said, additional_vocab_size=len(MARKS), head_dim=8)
    body.pop("model_type")
    tower = {
        "hidden_size": DIM,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "initializer_range": 0.2,
    }
    config = transformers.Molmo2Config(
        vision_config={**tower, "num_hidden_layers": 2, "image_size": [edge * PATCH] * 2, "patch_size": PATCH},
        adapter_config={**tower, "vision_feature_layer": [1, 0], "text_hidden_size": DIM},
        text_config=body,
        image_start_token_id=ids("<im_start>"),
        low_res_image_start_token_id=ids("<low_res_im_start>"),
        image_end_token_id=ids("<im_end>"),
        image_patch_id=ids("<im_patch>"),
        frame_start_token_id=ids("<frame_start>"),
        frame_end_token_id=ids("<frame_end>"),
    )

    class Joint(Molmo2Processor):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)  # the halves are none of transformers'

    processor = Joint(crops(edge * PATCH), Frames(edge * PATCH), tokenizer, chat_template=chat)
    hf_model = _finish(transformers.Molmo2ForConditionalGeneration, config)
    for name, parameter in hf_model.model.vision_tower.named_parameters():
        if name.endswith("self_attn.o_proj.weight"):  # or a patch would be felt everywhere
            parameter.data *= 0.1
    return Tiny(hf_model, processor)
