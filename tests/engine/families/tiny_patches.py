"""Tiny models whose pictures are grids of patches as in Qwen-VL, with the real processors of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import Ernie4_5_VLMoeImageProcessorPil
from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor
from transformers.models.hunyuan_vl.image_processing_pil_hunyuan_vl import HunYuanVLImageProcessorPil
from transformers.models.hunyuan_vl.processing_hunyuan_vl import HunYuanVLProcessor
from transformers.models.kimi_k25.processing_kimi_k25 import Kimi_K25Processor
from transformers.models.lighton_ocr.processing_lighton_ocr import LightOnOcrProcessor
from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
from transformers.models.paddleocr_vl.processing_paddleocr_vl import PaddleOCRVLProcessor
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.video_llama_3.image_processing_pil_video_llama_3 import VideoLlama3ImageProcessorPil
from transformers.models.video_llama_3.processing_video_llama_3 import VideoLlama3Processor
from transformers.processing_utils import ImagesKwargs
from transformers.utils import is_torchvision_available

from fastattr.adapters.processors import QWEN2_FILMS, ComposedProcessor
from tests.engine.families.tiny_qwen import LIMITS, qwen_processor
from tests.engine.family_models import (
    DIM,
    PATCH,
    PIXTRAL_SPECIAL,
    QWEN_CHAT,
    QWEN_SPECIAL,
    Tiny,
    _chat,
    _finish,
    _llama,
    _local,
    _tower,
    byte_tokenizer,
    pixtral_duck,
    pixtral_image_processor,
)

SIZE = {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}


def text(**options: Any) -> dict[str, Any]:
    body = _llama(384, **{"pad_token_id": 0, **options})
    body.pop("model_type")
    return body


LATENT = {  # attention with latent keys and values, and experts, as in DeepSeek-V3
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
}


def rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, **more}


def without_videos(joint: Callable[..., Any], images: Any, tokenizer: Any) -> Any:
    """A joint processor that asks for a video half, which needs torchvision, and is not given any videos."""

    class Joint(joint):  # type: ignore[misc,valid-type]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)

    return Joint(images, tokenizer, object(), chat_template=tokenizer.chat_template)


def exaone4_5() -> Tiny:
    processor = qwen_processor(QWEN2_FILMS)
    ids = processor.tokenizer.convert_tokens_to_ids
    config = transformers.Exaone4_5_Config(
        vision_config={
            "depth": 2,
            "hidden_size": DIM,
            "out_hidden_size": DIM,
            "intermediate_size": 48,
            "num_heads": 2,
            "num_key_value_heads": 1,
            "patch_size": PATCH,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        text_config={
            **text(),
            "model_type": "exaone4",
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
    )
    return Tiny(_finish(transformers.Exaone4_5_ForConditionalGeneration, config), processor)


def paddleocr_vl() -> Tiny:
    special = ("<s>", "</s>", "<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>", "<|VIDEO_PLACEHOLDER|>")
    chat = _chat("<s>User: ", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>", "\\n", "Assistant: ")
    tokenizer = byte_tokenizer(special, chat, bos_token="<s>", eos_token="</s>", image_token="<|IMAGE_PLACEHOLDER|>")
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.PaddleOCRVLConfig(
        vision_config=_tower(patch_size=PATCH, image_size=8 * PATCH),
        text_config=text(head_dim=8, rope_parameters=rope(mrope_section=[1, 1, 2])),
        image_token_id=ids("<|IMAGE_PLACEHOLDER|>"),
        video_token_id=ids("<|VIDEO_PLACEHOLDER|>"),
        vision_start_token_id=ids("<|IMAGE_START|>"),
        vision_end_token_id=ids("<|IMAGE_END|>"),
        tie_word_embeddings=False,
    )
    images = PaddleOCRVLImageProcessorPil(patch_size=PATCH, merge_size=2, size=SIZE)
    hf_model = _finish(transformers.PaddleOCRVLForConditionalGeneration, config)
    return Tiny(_local(hf_model), PaddleOCRVLProcessor(images, tokenizer, chat_template=chat))


def ernie4_5_vl_moe() -> Tiny:
    named = {
        f"{kind}_{part}token": f"<|{kind.upper()}_{part.upper()}TOKEN|>"
        for kind in ("image", "video")
        for part in ("", "start_", "end_")
    }
    shown = named["image_start_token"] + named["image_token"] + named["image_end_token"]
    chat = _chat("User: ", shown, "\\n", "Assistant: ")
    tokenizer = byte_tokenizer(("<s>", "</s>", *named.values()), chat, eos_token="</s>", pad_token="<s>", **named)
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.Ernie4_5_VLMoeConfig(
        vision_config={
            "depth": 1,
            "hidden_size": DIM,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
        },
        text_config=text(
            moe_num_experts=4,
            moe_k=2,
            moe_intermediate_size=[16, 16],
            moe_num_shared_experts=1,
            rope_parameters=rope(mrope_section=[1, 1, 2]),
        ),
        tie_word_embeddings=False,
        **{f"{name}_id": ids(token) for name, token in named.items()},
    )
    images = Ernie4_5_VLMoeImageProcessorPil(patch_size=PATCH, merge_size=2, size=SIZE)
    hf_model = _finish(transformers.Ernie4_5_VLMoeForConditionalGeneration, config)
    return Tiny(hf_model, without_videos(Ernie4_5_VLMoeProcessor, images, tokenizer))


def hunyuan_vl() -> Tiny:
    named = {"image_start_token": "<img>", "image_token": "<image>", "image_end_token": "</img>"}
    chat = _chat("<s>", "<img><image></img>", "<user>", "")
    special = ("<s>", "</s>", "<user>", *named.values())
    tokenizer = byte_tokenizer(special, chat, bos_token="<s>", eos_token="</s>", pad_token="</s>", **named)
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.HunYuanVLConfig(
        vision_config=_tower(patch_size=PATCH, max_image_size=8 * PATCH, text_hidden_size=DIM, out_hidden_size=DIM),
        text_config=text(head_dim=8, rope_parameters=rope(mrope_section=[1, 1, 2])),
        image_token_id=ids("<image>"),
        im_start_id=ids("<img>"),
        im_end_id=ids("</img>"),
        tie_word_embeddings=False,
    )
    images = HunYuanVLImageProcessorPil(patch_size=PATCH, merge_size=2, size=SIZE)
    hf_model = _finish(transformers.HunYuanVLForConditionalGeneration, config)
    return Tiny(hf_model, HunYuanVLProcessor(images, tokenizer, chat_template=chat))


def lighton_ocr() -> Tiny:
    chat = _chat("<s>[INST]", "[IMG]", "[/INST]", "")
    named = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    tokenizer = byte_tokenizer(PIXTRAL_SPECIAL, chat, bos_token="<s>", eos_token="</s>", pad_token="<pad>", **named)
    config = transformers.LightOnOcrConfig(
        vision_config=_tower(model_type="pixtral", image_size=256, patch_size=PATCH),
        text_config={**text(head_dim=8), "model_type": "qwen3"},
        image_token_id=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    cell = 2 * PATCH
    images = PixtralImageProcessorPil(patch_size={"height": cell, "width": cell}, size={"longest_edge": 400})
    processor = LightOnOcrProcessor(images, tokenizer, patch_size=PATCH, spatial_merge_size=2, chat_template=chat)
    return Tiny(_finish(transformers.LightOnOcrForConditionalGeneration, config), processor)


class KimiOptions(ImagesKwargs, total=False):  # type: ignore[misc,call-arg]
    max_patches: int


def mistral_large4() -> Tiny:
    duck = pixtral_duck(2 * PATCH)
    config = transformers.MistralLarge4Config(
        vision_config=_tower(model_type="pixtral", image_size=256, patch_size=PATCH),
        text_config=text(**LATENT, q_lora_rank=8, qk_rope_head_dim=8, head_dim=8, index_head_dim=8, index_n_heads=2),
        image_token_index=duck.tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    images = pixtral_image_processor(2 * PATCH, longest_edge=400)
    processor = ComposedProcessor(images, duck.tokenizer, duck.placeholder, duck.expand)
    return Tiny(_finish(transformers.MistralLarge4ForConditionalGeneration, config), processor)


@dataclass
class KimiImages:
    """Kimi's image processor, which only torchvision has: shrink, pad with black below and right, cut into patches."""

    max_patches: int = 16384
    merge_size: int = 2
    longest: int = 512
    valid_kwargs = KimiOptions

    @property
    def size(self) -> Mapping[str, int]:
        return {"max_height": self.longest, "max_width": self.longest}

    def fetch_images(self, pictures: Sequence[Image.Image]) -> Sequence[Image.Image]:
        return pictures

    def __call__(
        self,
        pictures: Sequence[Image.Image],
        size: Mapping[str, int] | None = None,
        max_patches: int | None = None,
        return_tensors: str = "pt",
    ) -> dict[str, torch.Tensor]:
        side, most = (size or self.size)["max_height"], max_patches or self.max_patches
        patches, grids = [], []
        nested = [each if isinstance(each, list) else [each] for each in pictures]
        for picture in (each for of_prompt in nested for each in of_prompt):
            count = max(1, picture.height // PATCH) * max(1, picture.width // PATCH)
            share = min(1.0, math.sqrt(most / count), side * PATCH / picture.height, side * PATCH / picture.width)
            shown = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.BICUBIC)
            rows, columns = -(-shown.height // (2 * PATCH)) * 2, -(-shown.width // (2 * PATCH)) * 2
            canvas = Image.new("RGB", (columns * PATCH, rows * PATCH))
            canvas.paste(shown, (0, 0))
            pixels = torch.from_numpy(np.asarray(canvas) / 127.5 - 1).float()
            patches += [
                pixels[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].permute(2, 0, 1)
                for row in range(rows)
                for column in range(columns)
            ]
            grids.append([1, rows, columns])
        return {"pixel_values": torch.stack(patches), "image_grid_thw": torch.tensor(grids)}


def kimi_images(max_patches: int = 16384, longest: int = 512) -> Any:
    """The real one where it is."""
    if not is_torchvision_available():
        return KimiImages(max_patches, longest=longest)
    from transformers import Kimi_K25ImageProcessor

    size = {"max_height": longest, "max_width": longest}
    return Kimi_K25ImageProcessor(max_patches=max_patches, patch_size=PATCH, size=size)


def kimi_k25(**limits: int) -> Tiny:
    media = ("<|media_begin|>", "<|media_pad|>", "<|media_end|>", "<|kimi_k25_video_placeholder|>")
    special = ("<|im_user|>", "<|im_assistant|>", "<|im_end|>", *media)
    chat = _chat("<|im_user|>", "<|media_begin|><|media_pad|><|media_end|>", "<|im_end|>", "<|im_assistant|>")
    tokenizer = byte_tokenizer(special, chat, eos_token="<|im_end|>", pad_token="<|im_end|>")
    ids = tokenizer.convert_tokens_to_ids
    body = text(**LATENT, q_lora_rank=8, qk_rope_head_dim=8, first_k_dense_replace=1, n_shared_experts=1)
    config = transformers.Kimi_K25Config(
        vision_config=_tower(patch_size=PATCH, pos_emb_height=8, pos_emb_width=8),
        text_config={**body, "model_type": "deepseek_v3"},
        projection_hidden_size=DIM,
        image_token_id=ids("<|media_pad|>"),
        video_token_id=ids("<|kimi_k25_video_placeholder|>"),
        tie_word_embeddings=False,
    )
    hf_model = _finish(transformers.Kimi_K25ForConditionalGeneration, config)
    return Tiny(hf_model, without_videos(Kimi_K25Processor, kimi_images(**limits), tokenizer))


def video_llama_3() -> Tiny:
    tokenizer = byte_tokenizer(QWEN_SPECIAL, QWEN_CHAT, eos_token="<|im_end|>", pad_token="<|im_start|>")
    ids = tokenizer.convert_tokens_to_ids
    config = transformers.VideoLlama3Config(
        vision_config=_tower(patch_size=PATCH),
        text_config={**text(), "model_type": "qwen2"},
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        tie_word_embeddings=False,
    )
    images = VideoLlama3ImageProcessorPil(patch_size=PATCH, size=SIZE)
    hf_model = _finish(transformers.VideoLlama3ForConditionalGeneration, config)
    return Tiny(_local(hf_model), without_videos(VideoLlama3Processor, images, tokenizer))
