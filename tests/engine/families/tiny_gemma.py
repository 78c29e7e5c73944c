"""Tiny Gemma 3 with pan and scan, and PaliGemma 1 and 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from fastattr.adapters.processors import join_gemma4
from tests.engine import family_models as tiny
from tests.engine.family_models import DIM, PATCH, Tiny

SIDE = 4 * PATCH


def gemma3_scanned() -> Tiny:
    """With crops of a long picture behind it."""
    held = tiny.gemma3()
    held.processor.images_kwargs = {
        **held.processor.images_kwargs,
        "do_pan_and_scan": True,
        "pan_and_scan_min_crop_size": 16,
        "pan_and_scan_max_num_crops": 4,
    }
    return held


def shieldgemma2() -> Tiny:
    """Gemma 3 under another name, as transformers loads it for text."""
    held = tiny.gemma3()
    parts = {name: each for name, each in held.hf_model.config.to_dict().items() if name != "model_type"}
    hf_model = transformers.Gemma3ForConditionalGeneration(transformers.ShieldGemma2Config(**parts)).eval()
    hf_model.load_state_dict(held.hf_model.state_dict())
    hf_model.generation_config = held.hf_model.generation_config
    return Tiny(hf_model, held.processor)


def paligemma(kind: str = "gemma", **options: object) -> Tiny:
    special = ("<pad>", "<eos>", "<bos>", "<image>")
    chat = tiny._chat("", "<image>", "", "")
    tokenizer = tiny.sentence_piece_tokenizer(
        special, chat, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", image_token="<image>"
    )
    tokenizer._tokenizer.post_processor = None  # the processor writes the first token itself, behind the pictures
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer, chat_template=chat)
    config = transformers.PaliGemmaConfig(
        vision_config=tiny._tower(
            model_type="siglip_vision_model", image_size=SIDE, patch_size=PATCH, vision_use_head=False
        ),
        text_config=tiny._llama(len(tokenizer), model_type=kind, head_dim=8, **options),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=DIM,
        hidden_size=DIM,
    )
    return Tiny(tiny._local(tiny._finish(transformers.PaliGemmaForConditionalGeneration, config)), processor)


def paligemma2() -> Tiny:
    """With a window, which the prompt outgrows, and a soft-cap."""
    return paligemma(
        "gemma2", sliding_window=12, final_logit_softcapping=5.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=8
    )


class Squares(nn.Module):
    """In place of a tower of timm: one vector a square of the picture, `[batch channel height width]`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, config.hidden_size, PATCH, PATCH)

    def forward(self, pixel_values: torch.Tensor, **options: Any) -> transformers.modeling_outputs.BaseModelOutput:
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=self.patches(pixel_values))


SPECIAL = ("<pad>", "<eos>", "<bos>", "<turn>", "<boi>", "<eoi>", "<image_soft>", "<audio_soft>", "<boa>", "<eoa>")
CHAT = tiny._chat("<bos><turn>{{ message['role'] }}\\n", "<image_soft>", "<turn>\\n", "<turn>model\\n")


def _tokenizer() -> Any:
    return tiny.sentence_piece_tokenizer(
        SPECIAL,
        CHAT,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        boi_token="<boi>",
        eoi_token="<eoi>",
        image_token="<image_soft>",
        audio_token="<audio_soft>",
        boa_token="<boa>",
        eoa_token="<eoa>",
    )


def gemma3n() -> Tiny:
    """With the real `Gemma3nProcessor` and a tower of our own; sound is left out."""
    from unittest.mock import patch

    tokenizer = _tokenizer()
    text = tiny._llama(
        256,
        head_dim=8,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=24,
        vocab_size_per_layer_input=256,
        hidden_size_per_layer_input=4,
        altup_num_inputs=4,
        laurel_rank=4,
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0],
        final_logit_softcapping=5.0,
    )
    text.pop("model_type")
    config = transformers.Gemma3nConfig(
        vision_config=transformers.Gemma3nVisionConfig(hidden_size=DIM, vocab_offset=256, vocab_size=8),
        text_config={**text, "pad_token_id": 1},
        audio_config={"hidden_size": DIM, "vocab_offset": 264, "vocab_size": 8, "conf_num_hidden_layers": 1},
        vision_soft_tokens_per_image=16,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("boi", "eoi", "boa", "eoa")},
        image_token_id=tokenizer.image_token_id,
        audio_token_id=tokenizer.audio_token_id,
    )
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = transformers.Gemma3nProcessor(
        transformers.Gemma3nAudioFeatureExtractor(), images, tokenizer, chat_template=CHAT, image_seq_length=16
    )
    towers = {"gemma3n_vision": Squares, "gemma3n_audio": lambda config: nn.Identity()}
    real = transformers.AutoModel.from_config

    def from_config(part: Any, **options: Any) -> Any:
        return towers[part.model_type](part) if part.model_type in towers else real(part, **options)

    with patch.object(transformers.AutoModel, "from_config", from_config):
        hf_model = tiny._finish(transformers.Gemma3nForConditionalGeneration, config)
    return Tiny(hf_model, processor)


SHARED = {  # of the published E2B and E4B: the last layers reuse the keys and values of the last ones of their kind
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "vocab_size_per_layer_input": 256,
    "hidden_size_per_layer_input": 4,
    "use_bidirectional_attention": None,
}
EXPERTS = {  # of the published 26B-A4B; the 31B is like it, without experts
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "use_bidirectional_attention": "vision",
}


def gemma4() -> Tiny:
    """As the large ones: some tokens of an image see each other in both directions."""
    return _gemma4(EXPERTS, standardize=True)


def gemma4_shared() -> Tiny:
    """As the small ones."""
    return _gemma4(SHARED, use_clipped_linears=True)


def _gemma4(options: Mapping[str, Any], **vision: bool) -> Tiny:
    """With the halves of its processor joined; sound is left out. Prompts outgrow the window."""
    tokenizer = _tokenizer()
    n_layers = options.get("num_hidden_layers", 2)
    text = tiny._llama(
        256,
        **{
            "head_dim": 8,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * (n_layers // 2),
            "sliding_window": 24,
            "final_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
            **options,
        },
    )
    text.pop("model_type")
    tower = {"patch_size": PATCH, "pooling_kernel_size": 3, "head_dim": 16, "num_key_value_heads": 2, **vision}
    config = transformers.Gemma4Config(
        vision_config=tiny._tower(**tower),
        text_config={**text, "pad_token_id": 1},
        audio_config=None,
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("boi", "eoi", "boa")},
        image_token_id=tokenizer.image_token_id,
        audio_token_id=tokenizer.audio_token_id,
        video_token_id=None,
    )
    images = Gemma4ImageProcessorPil(patch_size=PATCH, max_soft_tokens=70, pooling_kernel_size=3)
    return Tiny(
        tiny._local(tiny._finish(transformers.Gemma4ForConditionalGeneration, config)), join_gemma4(images, tokenizer)
    )
