"""Tiny Qwen-VL, GLM-V and their kin: real model classes and image processors, their halves joined as `load` joins them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.glm46v.image_processing_pil_glm46v import Glm46VImageProcessorPil

from fastattr.adapters.processors import (
    GLM46_FILMS,
    GLM_FILMS,
    QWEN2_5_FILMS,
    QWEN2_FILMS,
    QWEN3_FILMS,
    FilmProcessor,
    FilmStyle,
    grid_tokens,
)
from tests.engine.family_models import (
    DIM,
    PATCH,
    QWEN_SPECIAL,
    Tiny,
    _chat,
    _finish,
    _llama,
    byte_tokenizer,
    qwen_config,
    qwen_image_processor,
)

LIMITS = (4 * PATCH * PATCH, 256 * 256)  # pixels

QWEN_CHAT = _chat(
    "<|im_start|>{{ message['role'] }}\\n",
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>",
    "<|im_end|>\\n",
    "<|im_start|>assistant\\n",
)
GLM_SPECIAL = (
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|begin_of_image|>",
    "<|image|>",
    "<|end_of_image|>",
    "<|begin_of_video|>",
    "<|video|>",
    "<|end_of_video|>",
)
GLM_CHAT = _chat(
    "<|{{ message['role'] }}|>\\n",
    "<|begin_of_image|><|image|><|end_of_image|>"
    "{% elif part['type'] == 'video' %}<|begin_of_video|><|video|><|end_of_video|>",
    "",
    "<|assistant|>\\n",
)


def joined(images: Any, tokenizer: PreTrainedTokenizerFast, token: str, style: FilmStyle) -> FilmProcessor:
    return FilmProcessor(images, tokenizer, token, grid_tokens(images, token), style, LIMITS)


# --- Qwen ----------------------------------------------------------------------------------------------


def qwen_processor(style: FilmStyle) -> FilmProcessor:
    tokenizer = byte_tokenizer(QWEN_SPECIAL, QWEN_CHAT, eos_token="<|im_end|>", pad_token="<|im_start|>")
    return joined(qwen_image_processor(longest_edge=LIMITS[1]), tokenizer, "<|image_pad|>", style)


def qwen2_vl() -> Tiny:
    processor = qwen_processor(QWEN2_FILMS)
    config = qwen_config("qwen2_vl", processor.tokenizer)
    return Tiny(_finish(transformers.Qwen2VLForConditionalGeneration, config), processor)


def qwen2_5_vl() -> Tiny:
    processor = qwen_processor(QWEN2_5_FILMS)
    config = qwen_config("qwen2_5_vl", processor.tokenizer)
    return Tiny(_finish(transformers.Qwen2_5_VLForConditionalGeneration, config), processor)


def _qwen3(model_class: type, config_class: type, vision: dict[str, Any], **text: Any) -> Tiny:
    processor = qwen_processor(QWEN3_FILMS)
    ids = processor.tokenizer.convert_tokens_to_ids
    body = _llama(384, **{"head_dim": 8, **text})
    body.pop("model_type")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    body["rope_parameters"] = {**rope, **body.pop("rope", {})}
    config = config_class(
        vision_config={
            "depth": 2,
            "hidden_size": DIM,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "out_hidden_size": DIM,
            "num_position_embeddings": 64,
            **vision,
        },
        text_config=body,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    return Tiny(_finish(model_class, config), processor)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {  # one layer of linear attention, one of full attention
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "head_dim": 16,
    "rope": {"partial_rotary_factor": 0.5},
}


def qwen3_vl() -> Tiny:
    deepstack = {"deepstack_visual_indexes": [0, 1]}
    return _qwen3(transformers.Qwen3VLForConditionalGeneration, transformers.Qwen3VLConfig, deepstack)


def qwen3_vl_moe() -> Tiny:
    deepstack = {"deepstack_visual_indexes": [0, 1]}
    return _qwen3(transformers.Qwen3VLMoeForConditionalGeneration, transformers.Qwen3VLMoeConfig, deepstack, **EXPERTS)


def qwen3_5() -> Tiny:
    return _qwen3(transformers.Qwen3_5ForConditionalGeneration, transformers.Qwen3_5Config, {}, **HYBRID)


def qwen3_5_moe() -> Tiny:
    return _qwen3(
        transformers.Qwen3_5MoeForConditionalGeneration,
        transformers.Qwen3_5MoeConfig,
        {},
        **HYBRID,
        **EXPERTS,
        shared_expert_intermediate_size=16,
    )


def qwen4_exp() -> Tiny:
    indexed = {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 256,
        "indexer_compress_ratio": 2,
        "hc_count": 2,
        "hc_lowrank": 8,
    }
    return _qwen3(
        transformers.Qwen4ExpForConditionalGeneration,
        transformers.Qwen4ExpConfig,
        {},
        **HYBRID,
        **EXPERTS,
        **indexed,
        shared_expert_intermediate_size=16,
    )


# --- GLM -----------------------------------------------------------------------------------------------


def glm_processor(image_class: Callable[..., Any], style: FilmStyle) -> FilmProcessor:
    tokenizer = byte_tokenizer(GLM_SPECIAL, GLM_CHAT, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    # GLM counts the two frames of a temporal patch, also of an image
    size = {"shortest_edge": 2 * LIMITS[0], "longest_edge": 2 * LIMITS[1]}
    images = image_class(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)
    return joined(images, tokenizer, "<|image|>", style)


def _glm(model_class: type, config_class: type, processor: FilmProcessor, **text: Any) -> Tiny:
    ids = processor.tokenizer.convert_tokens_to_ids
    body = _llama(384, **{"pad_token_id": 0, "head_dim": 16, "attention_bias": True, **text})
    body.pop("model_type")
    body["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 2],
        "partial_rotary_factor": 0.5,
    }
    config = config_class(
        vision_config={
            "depth": 1,
            "hidden_size": DIM,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": PATCH,
            "image_size": 8 * PATCH,
            "out_hidden_size": DIM,
        },
        text_config=body,
        image_token_id=ids("<|image|>"),
        video_token_id=ids("<|video|>"),
        image_start_token_id=ids("<|begin_of_image|>"),
        image_end_token_id=ids("<|end_of_image|>"),
        video_start_token_id=ids("<|begin_of_video|>"),
        video_end_token_id=ids("<|end_of_video|>"),
        tie_word_embeddings=False,
    )
    return Tiny(_finish(model_class, config), processor)


def glm4v() -> Tiny:
    processor = glm_processor(Glm4vImageProcessorPil, GLM_FILMS)
    return _glm(transformers.Glm4vForConditionalGeneration, transformers.Glm4vConfig, processor)


def glm4v_moe() -> Tiny:
    held = _glm(
        transformers.Glm4vMoeForConditionalGeneration,
        transformers.Glm4vMoeConfig,
        glm_processor(Glm4vImageProcessorPil, GLM_FILMS),
        first_k_dense_replace=1,
        n_shared_experts=1,
        use_qk_norm=True,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    )
    return held


def glm46v() -> Tiny:
    processor = glm_processor(Glm46VImageProcessorPil, GLM46_FILMS)
    return _glm(transformers.Glm46VForConditionalGeneration, transformers.Glm46VConfig, processor)


def glm_ocr() -> Tiny:
    processor = glm_processor(Glm46VImageProcessorPil, GLM46_FILMS)
    return _glm(transformers.GlmOcrForConditionalGeneration, transformers.GlmOcrConfig, processor)
