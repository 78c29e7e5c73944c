"""Tiny Aya Vision, Command A Vision, Ovis2, DeepSeek-VL, Janus, PerceptionLM, FastVLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.utils import is_torchvision_available

from tests.engine import family_models as tiny
from tests.engine.family_models import DIM, PATCH, Tiny

SIDE = 4 * PATCH  # of a tile


def tokenizer(image: str, *special: str, **named: str) -> PreTrainedTokenizerFast:
    """`image` is what the chat template writes for a picture."""
    chat = tiny._chat("<|im_start|>{{ message['role'] }}\\n", image, "<|im_end|>\\n", "<|im_start|>assistant\\n")
    return tiny.byte_tokenizer(
        ("<|im_start|>", "<|im_end|>", *special, *named.values()),
        chat,
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
        **named,
    )


def siglip(**options: Any) -> dict[str, Any]:
    return tiny._tower(
        model_type="siglip_vision_model", image_size=SIDE, patch_size=PATCH, vision_use_head=False, **options
    )


def cohere2_text() -> dict[str, Any]:
    return tiny._llama(
        384,
        model_type="cohere2",
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=24,
        logit_scale=0.25,
        tie_word_embeddings=True,
        layer_norm_eps=1e-5,
    )


# --- Aya Vision, Command A Vision -------------------------------------------------------------------------


def aya_vision() -> Tiny:
    """With the real `AyaVisionProcessor`; two by two patches become one token."""
    special = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL")
    held = tokenizer("<image>", "<image>", *special)
    config = transformers.AyaVisionConfig(
        vision_config={**siglip(), "image_size": 2 * SIDE},
        text_config=cohere2_text(),
        image_token_index=held.convert_tokens_to_ids("<|IMG_PATCH|>"),
        downsample_factor=2,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 2 * SIDE, "width": 2 * SIDE}, max_patches=6)
    processor = transformers.AyaVisionProcessor(
        images, held, patch_size=PATCH, downsample_factor=2, img_size=2 * SIDE, chat_template=held.chat_template
    )
    return Tiny(tiny._local(tiny._finish(transformers.AyaVisionForConditionalGeneration, config)), processor)


@dataclass(frozen=True)
class Duck:
    """A processor that writes what the real ones do.

    Attributes:
        image_processor: `(pictures, **options) -> model inputs`, with the attributes of the real one.
        placeholder: for a picture in the rendered chat.
        expand: `(model inputs, index) -> text` of one picture.
        hidden: what the model does not take.
    """

    tokenizer: PreTrainedTokenizerFast
    image_processor: Any
    placeholder: str
    expand: Callable[[Mapping[str, Any], int], str]
    hidden: tuple[str, ...] = ()

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, **options)

    def batch_decode(self, *args: Any, **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(*args, **options)

    def __call__(
        self, text: Sequence[str], images: Sequence[Image.Image], return_tensors: str = "pt", **options: Any
    ) -> dict[str, Any]:
        seen = dict(self.image_processor(list(images), return_tensors=return_tensors, **options))
        first, *others = text[0].split(self.placeholder)
        shown = first + "".join(self.expand(seen, i) + other for i, other in enumerate(others))
        written = self.tokenizer([shown], add_special_tokens=False, return_tensors=return_tensors)
        return {**written, **{name: value for name, value in seen.items() if name not in self.hidden}}


def pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    """`[3 height width]` of a squeezed picture, between -1 and 1."""
    squeezed = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy(squeezed).permute(2, 0, 1) / 127.5 - 1


def tiles_of(picture: Image.Image, edge: int, rows: int, columns: int) -> Tensor:
    """`[rows * columns 3 edge edge]` of a squeezed picture, row by row."""
    whole = pixels(picture, rows * edge, columns * edge)
    return torch.stack(
        [whole[:, r * edge : (r + 1) * edge, c * edge : (c + 1) * edge] for r in range(rows) for c in range(columns)]
    )


@dataclass(frozen=True)
class CohereImages:
    """The cut of Command A Vision by hand, for want of torchvision: few enough shapes to be listed."""

    max_patches: int = 4
    edge: int = 2 * SIDE

    def __call__(self, pictures: Sequence[Image.Image], return_tensors: str, size: Any = None) -> dict[str, Any]:
        edge = self.edge if size is None else size["height"]
        cut, counts = [], []
        for picture in pictures:
            rows, columns = self.shape(picture.height / edge, picture.width / edge)
            tiles = tiles_of(picture, edge, rows, columns)
            if len(tiles) > 1:
                tiles = torch.cat([tiles, pixels(picture, edge, edge)[None]])
            cut.append(tiles)
            counts.append(len(tiles))
        return {"pixel_values": torch.cat(cut), "num_patches": counts}

    def shape(self, height: float, width: float) -> tuple[int, int]:
        """Of a picture that is `height x width` tiles large: what holds it with the least enlarging, else the least
        shrinking."""
        shapes = ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (4, 1), (2, 2), (1, 4))
        growth = {shape: min(shape[0] / height, shape[1] / width) for shape in shapes}
        holding = [shape for shape in shapes if growth[shape] >= 1]
        return min(holding, key=growth.__getitem__) if holding else max(shapes, key=growth.__getitem__)


def cohere_images() -> Any:
    """The real image processor where it is."""
    if not is_torchvision_available():
        return CohereImages()
    from transformers import Cohere2VisionImageProcessor

    return Cohere2VisionImageProcessor(size={"height": 2 * SIDE, "width": 2 * SIDE}, max_patches=4)


def cohere2_vision() -> Tiny:
    held = tokenizer(
        "<image>", image_token="<image>", boi_token="<boi>", eoi_token="<eoi>", img_line_break_token="<br>"
    )
    config = transformers.Cohere2VisionConfig(
        vision_config={**siglip(), "image_size": 2 * SIDE},
        text_config=cohere2_text(),
        image_token_id=held.convert_tokens_to_ids("<image>"),
        alignment_intermediate_size=2 * DIM,
    )

    def expand(seen: Mapping[str, Any], index: int) -> str:
        return "<boi>" + ("<image>" * 16 + "<br>") * int(seen["num_patches"][index]) + "<eoi>"

    processor = Duck(held, cohere_images(), "<image>", expand, hidden=("num_patches",))
    return Tiny(tiny._local(tiny._finish(transformers.Cohere2VisionForConditionalGeneration, config)), processor)


# --- Ovis2 ------------------------------------------------------------------------------------------------


def ovis2(**image_options: Any) -> Tiny:
    """With the real `Ovis2Processor`, told to cut."""
    special = ("<IMG_ATOM>", "<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>")
    held = tokenizer("<image>", "<image>", *special)
    ids = held.convert_tokens_to_ids(list(special))
    config = transformers.Ovis2Config(
        vision_config=tiny._tower(image_size=2 * SIDE, patch_size=PATCH, vocab_size=64, hidden_stride=2),
        text_config=tiny._llama(384, model_type="qwen2", tie_word_embeddings=True),
        image_token_id=ids[0],
        visual_indicator_token_ids=ids[1:],
        vocab_size=384,
        hidden_size=DIM,
    )
    square = {"height": 2 * SIDE, "width": 2 * SIDE}
    images = Ovis2ImageProcessorPil(size=square, **{"crop_to_patches": True, "max_patches": 6, **image_options})
    processor = transformers.Ovis2Processor(images, held, image_seq_length=16, chat_template=held.chat_template)
    return Tiny(tiny._finish(transformers.Ovis2ForConditionalGeneration, config), processor)


# --- DeepSeek-VL, Janus -----------------------------------------------------------------------------------


def deepseek_vl() -> Tiny:
    held = tokenizer("<image_placeholder>", image_token="<image_placeholder>")
    config = transformers.DeepseekVLConfig(
        vision_config=siglip(),
        text_config=tiny._llama(384),
        image_token_id=held.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    images = DeepseekVLImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = transformers.DeepseekVLProcessor(images, held, num_image_tokens=16, chat_template=held.chat_template)
    return Tiny(tiny._local(tiny._finish(transformers.DeepseekVLForConditionalGeneration, config)), processor)


def deepseek_vl_hybrid() -> Tiny:
    held = tokenizer("<image_placeholder>", image_token="<image_placeholder>")
    config = transformers.DeepseekVLHybridConfig(
        vision_config=siglip(),
        high_res_vision_config=tiny._tower(
            model_type="sam_vision_model",
            image_size=8 * PATCH,
            patch_size=PATCH,
            output_channels=16,
            mlp_dim=48,
            window_size=4,
            global_attn_indexes=[0],
        ),
        text_config=tiny._llama(384),
        image_token_id=held.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    images = DeepseekVLHybridImageProcessorPil(
        size={"height": SIDE, "width": SIDE}, high_res_size={"height": 8 * PATCH, "width": 8 * PATCH}
    )
    processor = transformers.DeepseekVLHybridProcessor(
        images, held, num_image_tokens=16, chat_template=held.chat_template
    )
    return Tiny(tiny._local(tiny._finish(transformers.DeepseekVLHybridForConditionalGeneration, config)), processor)


def janus() -> Tiny:
    held = tokenizer(
        "<image_placeholder>",
        image_token="<image_placeholder>",
        boi_token="<begin_of_image>",
        eoi_token="<end_of_image>",
    )
    config = transformers.JanusConfig(
        vision_config={
            "hidden_size": DIM,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
            "mlp_ratio": 2.0,
            "projection_dim": DIM,
            "num_image_tokens": 16,
        },
        text_config=tiny._llama(384),
        vq_config={
            "embed_dim": 4,
            "num_embeddings": 8,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": DIM,
            "image_token_embed_dim": DIM,
        },
        image_token_id=held.convert_tokens_to_ids("<image_placeholder>"),
        tie_word_embeddings=False,
    )
    images = JanusImageProcessorPil(size={"height": SIDE, "width": SIDE})
    processor = transformers.JanusProcessor(images, held, num_image_tokens=16, chat_template=held.chat_template)
    hf_model = tiny._finish(transformers.JanusForConditionalGeneration, config)
    for name, parameter in hf_model.named_parameters():
        if name.endswith("self_attn.projection_layer.weight"):
            parameter.data *= 0.1  # as `_local` does: its projection has another name here
    return Tiny(hf_model, processor)


# --- PerceptionLM, FastVLM --------------------------------------------------------------------------------


class Patches(nn.Module):
    """In place of a tower of timm: patches embedded one by one, as a row or as a map, with a class token or not."""

    def __init__(self, patch: int, as_map: bool, class_token: bool) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, patch, stride=patch)
        self.as_map, self.class_token = as_map, class_token

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        states = self.embed(pixel_values)
        if not self.as_map:
            states = states.flatten(2).transpose(1, 2)
        if self.class_token:
            states = torch.cat([states.mean(1, keepdim=True), states], dim=1)
        return transformers.modeling_outputs.BaseModelOutputWithPooling(last_hidden_state=states)


def without_timm(model_class: Any, config: Any, tower: Patches) -> transformers.PreTrainedModel:
    """The model with its timm tower replaced."""
    from transformers.models.auto import modeling_auto

    holder = modeling_auto.AutoModel
    real = holder.from_config

    def from_config(config: Any, **options: Any) -> Any:
        return tower if config.model_type == "timm_wrapper" else real(config, **options)

    holder.from_config = from_config
    try:
        return tiny._finish(model_class, config)
    finally:
        holder.from_config = real


@dataclass(frozen=True)
class PerceptionImages:
    """The cut of PerceptionLM by hand, for want of torchvision: up to two tiles a side, or their sides as the picture's."""

    max_num_tiles: int = 4
    edge: int = 2 * SIDE

    def __call__(self, pictures: Sequence[Image.Image], return_tensors: str) -> dict[str, Any]:
        shown = []
        for picture in pictures:
            rows, columns = self.shape(picture.height / self.edge, picture.width / self.edge)
            whole = pixels(picture, self.edge, self.edge)[None]
            shown.append(torch.cat([whole, tiles_of(picture, self.edge, rows, columns)]))
        return {"pixel_values": torch.stack(shown)}

    def shape(self, height: float, width: float) -> tuple[int, int]:
        """Of a picture that is `height x width` tiles large."""
        if max(height, width) > 2:
            raise ValueError("these tests show no picture of more than two by two tiles")
        return 2, 2  # of all that hold it, the one on which its shorter side is largest


def perception_images() -> Any:
    """The real image processor where it is."""
    if not is_torchvision_available():
        return PerceptionImages()
    from transformers import PerceptionLMImageProcessor

    return PerceptionLMImageProcessor(tile_size=2 * SIDE, max_num_tiles=4)


@dataclass(frozen=True)
class FilmDuck(Duck):
    """Shows the frames of videos once each, squeezed."""

    def __call__(
        self,
        text: Sequence[str],
        images: Sequence[Image.Image] = (),
        return_tensors: str = "pt",
        videos: Sequence[Sequence[Image.Image]] = (),
        **options: Any,
    ) -> dict[str, Any]:
        if not videos:
            return super().__call__(text, images, return_tensors, **options)
        edge = 2 * SIDE
        films = torch.stack([torch.stack([pixels(frame, edge, edge) for frame in frames]) for frames in videos])
        written = text[0].replace("<|video|>", "<|video|>" * 16 * films.shape[1])
        ids = self.tokenizer([written], add_special_tokens=False, return_tensors=return_tensors)
        return {**ids, "pixel_values_videos": films}


def perception_lm() -> Tiny:
    held = tokenizer("<|image|>", image_token="<|image|>", video_token="<|video|>")
    shown = "{{ part['text'] if part['type'] == 'text' else '<|video|>' }}"
    held.chat_template = held.chat_template.replace("{{ part['text'] }}", shown)
    config = transformers.PerceptionLMConfig(
        vision_config={"model_type": "timm_wrapper", "architecture": "vit_pe", "model_args": {"embed_dim": DIM}},
        text_config=tiny._llama(384),
        projector_pooling_ratio=2,
        image_token_id=held.convert_tokens_to_ids("<|image|>"),
        video_token_id=held.convert_tokens_to_ids("<|video|>"),
    )
    hf_model = without_timm(
        transformers.PerceptionLMForConditionalGeneration, config, Patches(PATCH, as_map=False, class_token=True)
    )

    def expand(seen: Mapping[str, Any], index: int) -> str:
        return "<|image|>" * 16 * len(seen["pixel_values"][index])

    return Tiny(hf_model, FilmDuck(held, perception_images(), "<|image|>", expand))


def fast_vlm() -> Tiny:
    """With the real `LlavaProcessor`, as FastVLM has it."""
    held = tokenizer("<image>\\n", image_token="<image>")
    config = transformers.FastVlmConfig(
        vision_config={"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "hidden_size": DIM},
        text_config=tiny._llama(384, model_type="qwen2"),
        image_token_index=held.convert_tokens_to_ids("<image>"),
    )
    hf_model = without_timm(
        transformers.FastVlmForConditionalGeneration, config, Patches(PATCH, as_map=True, class_token=False)
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    processor = transformers.LlavaProcessor(
        images, held, patch_size=PATCH, vision_feature_select_strategy="full", chat_template=held.chat_template
    )
    return Tiny(hf_model, processor)


# --- GOT-OCR2 ---------------------------------------------------------------------------------------------


def got_ocr2(**image_options: Any) -> Tiny:
    """The real processor has no chat; four by four patches become one token."""
    held = tokenizer("<imgpad>", image_token="<imgpad>")
    edge = 16 * PATCH
    config = transformers.GotOcr2Config(
        vision_config=tiny._tower(
            image_size=edge, patch_size=PATCH, output_channels=16, mlp_dim=48, window_size=4, global_attn_indexes=[0]
        ),
        text_config=tiny._llama(384, model_type="qwen2"),
        image_token_index=held.convert_tokens_to_ids("<imgpad>"),
    )
    images = GotOcr2ImageProcessorPil(size={"height": edge, "width": edge}, **image_options)

    def expand(seen: Mapping[str, Any], index: int) -> str:
        return "<imgpad>" * 16 * int(seen["num_patches"][index])

    processor = Duck(held, images, "<imgpad>", expand, hidden=("num_patches",))
    hf_model = tiny._local(tiny._finish(transformers.GotOcr2ForConditionalGeneration, config))
    for name, parameter in hf_model.named_parameters():
        if "conv_upsampler" in name:  # of stride 2: the first row and column of the kernel reach over the border
            parameter.data[:, :, 0] *= 0.1
            parameter.data[:, :, :, 0] *= 0.1
    return Tiny(hf_model, processor)


def got_ocr2_cut() -> Tiny:
    return got_ocr2(crop_to_patches=True, max_patches=6)
