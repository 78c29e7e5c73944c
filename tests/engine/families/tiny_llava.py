"""Tiny LLaVA and ViP-LLaVA: one square a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine import family_models as tiny
from tests.engine.families.tiny_llava_next import tokenizer
from tests.engine.family_models import PATCH, PROMPT, Tiny

SIDE = 4 * PATCH


def llava_padded() -> Tiny:
    """With a processor that pads pictures to a square, as some LLaVA directories ask for."""
    held = tiny.llava_clip()
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    held.processor.image_processor = LlavaImageProcessorPil(do_pad=True, **sizes)
    return held


def vip_llava() -> Tiny:
    """Features of several layers of a CLIP tower side by side."""
    held = tiny.llava_clip()
    config = transformers.VipLlavaConfig(
        vision_config=tiny._tower(
            model_type="clip_vision_model", image_size=SIDE, patch_size=PATCH, num_hidden_layers=3
        ),
        text_config=tiny._llama(256),
        image_token_index=held.hf_model.config.image_token_id,
        vision_feature_layer=[-1, -2, 1],
    )
    return Tiny(tiny._finish(transformers.VipLlavaForConditionalGeneration, config), held.processor)


def video_llava() -> Tiny:
    """Pictures, and videos as their frames: `VideoLlavaProcessor` itself needs torchvision for video."""
    held = tokenizer()
    config = transformers.VideoLlavaConfig(
        vision_config=tiny._tower(
            model_type="clip_vision_model", image_size=SIDE, patch_size=PATCH, num_hidden_layers=2
        ),
        text_config=tiny._llama(256),
        image_token_index=held.convert_tokens_to_ids("<image>"),
        video_token_index=held.convert_tokens_to_ids("<video>"),
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})

    hf_model = tiny._finish(transformers.VideoLlavaForConditionalGeneration, config)
    return Tiny(hf_model, tiny.SizedDuck(held, images, ("pixel_values",), "<image>", "<image>" * 16))


def captured(model: fastattr.Model, pictures: Sequence[Image.Image | list[Image.Image]]) -> tuple[Any, torch.Tensor]:
    """States captured while the model answers `PROMPT` by itself, and what `generate` returned."""
    encoded = adapters.encode(model, read_visuals(list(pictures)), PROMPT)
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            do_sample=False,
            max_new_tokens=3,
            suppress_tokens=never,
        )
    return states, out
