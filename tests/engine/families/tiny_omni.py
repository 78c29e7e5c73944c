"""Tiny thinkers of Qwen's Omni models, with their real processors; the video half, which needs torchvision, is stood in for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import transformers
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from transformers.models.qwen3_omni_moe.processing_qwen3_omni_moe import Qwen3OmniMoeProcessor

from tests.engine.families.tiny_qwen import EXPERTS, LIMITS, QWEN_CHAT
from tests.engine.families.tiny_video import VideoHalf
from tests.engine.family_models import (
    DIM,
    PATCH,
    QWEN_SPECIAL,
    Tiny,
    _finish,
    _llama,
    byte_tokenizer,
    qwen_image_processor,
)

NAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "audio_token": "<|audio_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "audio_bos_token": "<|audio_start|>",
    "audio_eos_token": "<|audio_end|>",
}
SPECIAL = (*QWEN_SPECIAL, "<|audio_pad|>", "<|audio_start|>", "<|audio_end|>")
SOUND = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 16, "output_dim": DIM}


class OmniVideoHalf(VideoHalf):
    """As Omni processors call it."""

    def __call__(self, videos: Any, **options: Any) -> dict[str, Any]:
        known = ("do_sample_frames", "size", "do_resize", "return_metadata", "return_tensors")
        return super().__call__(videos, **{name: options[name] for name in known if name in options})


def processor_of(joint: Callable[..., Any]) -> Any:
    class Joint(joint):  # type: ignore[misc,valid-type]
        videos_kwargs: ClassVar = {"size": {"shortest_edge": LIMITS[0], "longest_edge": LIMITS[1]}}

        def check_argument_for_proper_class(self, name: str, argument: Any) -> type:
            return type(argument)  # the video half is none of transformers'

    tokenizer = byte_tokenizer(SPECIAL, QWEN_CHAT, eos_token="<|im_end|>", pad_token="<|im_start|>", **NAMED)
    images = qwen_image_processor(longest_edge=LIMITS[1])
    half = OmniVideoHalf(images, counts_all=False)
    return Joint(images, half, transformers.WhisperFeatureExtractor(), tokenizer, chat_template=QWEN_CHAT)


def _thinker(model_class: type, config_class: type, processor: Any, vision: dict[str, Any], **text: Any) -> Tiny:
    ids = processor.tokenizer.convert_tokens_to_ids
    body = _llama(384, **text)
    body.pop("model_type")
    body["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = config_class(
        vision_config={
            "depth": 2,
            "hidden_size": DIM,
            "out_hidden_size": DIM,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            **vision,
        },
        audio_config=SOUND,
        text_config=body,
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        audio_start_token_id=ids("<|audio_start|>"),
        audio_end_token_id=ids("<|audio_end|>"),
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        audio_token_id=ids("<|audio_pad|>"),
    )
    return Tiny(_finish(model_class, config), processor)


def qwen2_5_omni_thinker() -> Tiny:
    return _thinker(
        transformers.Qwen2_5OmniThinkerForConditionalGeneration,
        transformers.Qwen2_5OmniThinkerConfig,
        processor_of(Qwen2_5OmniProcessor),
        {"window_size": 32, "fullatt_block_indexes": [1]},
    )


def qwen3_omni_moe_thinker() -> Tiny:
    return _thinker(
        transformers.Qwen3OmniMoeThinkerForConditionalGeneration,
        transformers.Qwen3OmniMoeThinkerConfig,
        processor_of(Qwen3OmniMoeProcessor),
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        head_dim=8,
        **EXPERTS,
    )
