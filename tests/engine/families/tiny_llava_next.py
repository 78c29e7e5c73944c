"""Tiny LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision: a square and a mosaic of tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from tests.engine import family_models as tiny
from tests.engine.family_models import PATCH, Tiny

SIDE = 4 * PATCH  # of the square and of a tile
RESOLUTIONS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]


def tokenizer() -> PreTrainedTokenizerFast:
    chat = (
        "{% for message in messages %}{{ message['role'] | upper }}: {% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<' + part['type'] + '>\\n' }}{% endif %}"
        "{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    special = ("<s>", "</s>", "<image>", "<video>", "<pad>")
    return tiny.sentence_piece_tokenizer(
        special,
        chat,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        image_token="<image>",
        video_token="<video>",
    )


def clip() -> dict[str, Any]:
    return tiny._tower(model_type="clip_vision_model", image_size=SIDE, patch_size=PATCH, num_hidden_layers=2)


def next_images(resolutions: Sequence[Sequence[int]]) -> LlavaNextImageProcessorPil:
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=list(resolutions)
    )


def llava_next(resolutions: Sequence[Sequence[int]] = RESOLUTIONS) -> Tiny:
    """With the real `LlavaNextProcessor`."""
    held = tokenizer()
    config = transformers.LlavaNextConfig(
        vision_config=clip(),
        text_config=tiny._llama(256),
        image_token_index=held.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=list(resolutions),
    )
    processor = transformers.LlavaNextProcessor(
        next_images(resolutions),
        held,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=held.chat_template,
    )
    return Tiny(tiny._finish(transformers.LlavaNextForConditionalGeneration, config), processor)


@dataclass(frozen=True)
class VideoDuck:
    """What the real processors with a `video_processor` write, which need torchvision.

    Attributes:
        frames: the PIL image processor that does with a frame what `video_processor` does.
        video_tokens: number of frames to placeholders.
    """

    tokenizer: PreTrainedTokenizerFast
    image_processor: Any
    frames: Any
    video_tokens: Callable[[int], int]

    @property
    def video_processor(self) -> Any:
        return SimpleNamespace(size=self.frames.size, do_center_crop=self.frames.do_center_crop)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **options)

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Image.Image] = (),
        videos: Sequence[Sequence[Image.Image]] = (),
        return_tensors: str = "pt",
    ) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        written = text[0].replace("<image>", "<image><image>")  # one for each look, which `encode` fits
        if images:
            seen |= self.image_processor(list(images), return_tensors=return_tensors)
        if videos:
            pixels = [self.frames(list(video), return_tensors=return_tensors)["pixel_values"] for video in videos]
            seen["pixel_values_videos"] = torch.stack(pixels)
            written = written.replace("<video>", "<video>" * self.video_tokens(len(videos[0])))
        return {**self.tokenizer([written], return_tensors=return_tensors), **seen}


def llava_next_video() -> Tiny:
    held = tokenizer()
    config = transformers.LlavaNextVideoConfig(
        vision_config=clip(),
        text_config=tiny._llama(256),
        image_token_index=held.convert_tokens_to_ids("<image>"),
        video_token_index=held.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=RESOLUTIONS,
    )
    frames = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = VideoDuck(held, next_images(RESOLUTIONS), frames, lambda n: n * 4)
    return Tiny(tiny._finish(transformers.LlavaNextVideoForConditionalGeneration, config), processor)


def llava_onevision(most_tiles: int = 9) -> Tiny:
    held = tokenizer()
    config = transformers.LlavaOnevisionConfig(
        vision_config=tiny._tower(
            model_type="siglip_vision_model", image_size=SIDE, patch_size=PATCH, vision_use_head=False
        ),
        text_config=tiny._llama(256, model_type="qwen2"),
        image_token_index=held.convert_tokens_to_ids("<image>"),
        video_token_index=held.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=RESOLUTIONS,
        vision_aspect_ratio=f"anyres_max_{most_tiles}",
    )
    square = {"height": SIDE, "width": SIDE}
    images = LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=RESOLUTIONS)
    frames = SiglipImageProcessorPil(size=square, image_mean=images.image_mean, image_std=images.image_std)
    processor = VideoDuck(held, images, frames, lambda n: n * 4 + 1)
    return Tiny(tiny._local(tiny._finish(transformers.LlavaOnevisionForConditionalGeneration, config)), processor)


def llava_onevision_shrunk() -> Tiny:
    """Mosaics of more than two tiles' worth of tokens are shrunk."""
    return llava_onevision(most_tiles=2)


MULTIPLIERS = {  # of every published Granite
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}


def granite4_vision() -> Tiny:
    """With the real processor; two by two patches become one token, at layers 0 to 4 of the decoder."""
    held = tokenizer()
    edge = 2 * SIDE
    resolutions = [[4 * edge, 2 * edge]]
    config = transformers.Granite4VisionConfig(
        vision_config={**clip(), "image_size": edge, "hidden_size": 64},
        text_config={**tiny._llama(256, num_hidden_layers=5), "model_type": "granite4_vision_text", **MULTIPLIERS},
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "use_qformer_text_input": False,
        },
        image_token_index=held.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=resolutions,
        downsample_rate="1/2",
        deepstack_layer_map=[[-1, 0]],
        spatial_target_layers=[1, 2, 3, 4],
    )
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, image_grid_pinpoints=resolutions
    )
    processor = transformers.Granite4VisionProcessor(
        images,
        held,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        downsample_rate="1/2",
        chat_template=held.chat_template,
    )
    return Tiny(tiny._finish(transformers.Granite4VisionForConditionalGeneration, config), processor)
