"""Tiny random models of every family, from real transformers classes, with tokenizers trained on the spot.

Nothing is downloaded: configurations, image processors (PIL backends) and fast tokenizers are built here. The models
know nothing, but their image tokens lie on the picture exactly as in the real ones.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from fastattr.adapters.processors import ComposedProcessor

PROMPT = "Where is the red circle?"
ANSWER = "The red circle is at the top left."

CORPUS = [
    PROMPT,
    ANSWER,
    "Describe the image.",
    "user assistant User Assistant USER ASSISTANT model",
    "a blue square",
] * 4

PATCH = 8  # pixels
DIM = 32


# --- tokenizers ------------------------------------------------------------------------------------


def byte_tokenizer(special: Sequence[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as in Qwen, Llama 3, Mistral and InternVL. `named` are `bos_token`, `image_token`, ..."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, special, template, named)


def sentence_piece_tokenizer(special: Sequence[str], template: str, **named: str) -> PreTrainedTokenizerFast:
    """BPE over words with their leading space as in Llama 2 and Gemma, with `bos_token` put first by itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *special],
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    bos = named["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return _fast(tokenizer, ["<unk>", *special], template, named)


def _fast(
    tokenizer: Tokenizer, special: Sequence[str], template: str, named: Mapping[str, str]
) -> PreTrainedTokenizerFast:
    known = {
        name: token for name, token in named.items() if name in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    extra = {name: token for name, token in named.items() if name not in known}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=extra, **known)
    fast.add_special_tokens(
        {"extra_special_tokens": [t for t in special if t not in named.values()]}, replace_extra_special_tokens=False
    )
    fast.chat_template = template
    return fast


def _chat(before: str, image: str, after: str, answer: str) -> str:
    """A chat template: how a turn opens, what stands for an image, how the turn ends, how the answer opens."""
    return (
        "{% for message in messages %}" + before + "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}"
        + image
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        + after
        + "{% endfor %}{% if add_generation_prompt %}"
        + answer
        + "{% endif %}"
    )


# --- processors ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DuckProcessor:
    """Somebody's own processor: the four members that `wrap` asks for, and nothing else."""

    tokenizer: PreTrainedTokenizerFast
    read_images: Callable[[Sequence[Image.Image]], Mapping[str, torch.Tensor]]
    placeholder: str
    expand: Callable[[Mapping[str, torch.Tensor], int], str]

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = False, tokenize: bool = True) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=tokenize
        )

    def __call__(
        self, text: Sequence[str], images: Sequence[Image.Image], return_tensors: str = "pt"
    ) -> dict[str, Any]:
        seen = self.read_images(images)
        first, *others = text[0].split(self.placeholder)
        shown = first + "".join(self.expand(seen, i) + other for i, other in enumerate(others))
        return {**self.tokenizer([shown], add_special_tokens=False, return_tensors=return_tensors), **seen}

    def batch_decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(rows)


# --- families --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A model and the processor that goes with it, as a user would hold them."""

    hf_model: transformers.PreTrainedModel
    processor: Any


def _llama(vocab: int, **options: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": DIM,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **options,
    }


def _tower(**options: Any) -> dict[str, Any]:
    return {"hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, **options}


def _finish(model_class: type, config: Any, seed: int = 0) -> transformers.PreTrainedModel:
    torch.manual_seed(seed)
    hf_model = model_class(config).eval()
    hf_model.generation_config.eos_token_id = None
    hf_model.generation_config.pad_token_id = 0
    return hf_model


def _local(hf_model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Turn attention down where a SigLIP tower starts with so much of it that a patch is felt everywhere."""
    for name, parameter in hf_model.named_parameters():
        if name.endswith("self_attn.out_proj.weight"):
            parameter.data *= 0.1
    return hf_model


QWEN_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_CHAT = _chat(
    "<|im_start|>{{ message['role'] }}\\n",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<|im_end|>\\n",
    "<|im_start|>assistant\\n",
)


def qwen_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(QWEN_SPECIAL, QWEN_CHAT, eos_token="<|im_end|>", pad_token="<|im_start|>")


def qwen_image_processor(longest_edge: int) -> Qwen2VLImageProcessorPil:
    """Images of at most `longest_edge` pixels in all, as the option is called there."""
    size = {"shortest_edge": 4 * PATCH * PATCH, "longest_edge": longest_edge}
    return Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, size=size)


def qwen_duck(image_processor: Qwen2VLImageProcessorPil) -> DuckProcessor:
    def read(pictures: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        return dict(image_processor(list(pictures), return_tensors="pt"))

    def expand(seen: Mapping[str, torch.Tensor], index: int) -> str:
        return "<|image_pad|>" * (int(seen["image_grid_thw"][index].prod()) // 4)

    return DuckProcessor(qwen_tokenizer(), read, "<|image_pad|>", expand)


def qwen_config(kind: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> Any:
    vision: dict[str, Any] = {
        "depth": 1,
        "num_heads": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if kind == "qwen2_vl":
        vision |= {"embed_dim": DIM, "hidden_size": DIM, "mlp_ratio": 2}
        config_class = transformers.Qwen2VLConfig
    else:
        vision |= {
            "hidden_size": DIM,
            "out_hidden_size": DIM,
            "intermediate_size": 48,
            "depth": 2,
            "window_size": 32,  # pixels; the first layer attends within windows, the second everywhere
            "fullatt_block_indexes": [1],
        }
        config_class = transformers.Qwen2_5_VLConfig
    text = _llama(384, **{"tie_word_embeddings": False, **options})
    text.pop("model_type")
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    ids = tokenizer.convert_tokens_to_ids
    return config_class(
        vision_config=vision,
        text_config=text,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def qwen2_vl(**options: Any) -> Tiny:
    """With a duck-typed processor."""
    processor = qwen_duck(qwen_image_processor(longest_edge=256 * 256))
    return Tiny(
        _finish(transformers.Qwen2VLForConditionalGeneration, qwen_config("qwen2_vl", processor.tokenizer, **options)),
        processor,
    )


def qwen2_5_vl() -> Tiny:
    """With the halves of its processor joined, as `load` does without torchvision, and an image limit that must be lifted."""
    images = qwen_image_processor(longest_edge=96 * 96)
    duck = qwen_duck(images)
    processor = ComposedProcessor(images, duck.tokenizer, duck.placeholder, duck.expand)
    config = qwen_config("qwen2_5_vl", duck.tokenizer)
    return Tiny(_finish(transformers.Qwen2_5_VLForConditionalGeneration, config), processor)


def llava_clip(**image_options: Any) -> Tiny:
    """LLaVA-1.5: a CLIP tower that drops its class token, images cropped to their centre."""
    special = ("<s>", "</s>", "<image>", "<pad>")
    chat = _chat("{{ message['role'] | upper }}: ", "<image>\\n", " ", "ASSISTANT:")
    tokenizer = sentence_piece_tokenizer(
        special, chat, bos_token="<s>", eos_token="</s>", pad_token="<pad>", image_token="<image>"
    )
    side = 4 * PATCH
    config = transformers.LlavaConfig(
        vision_config=_tower(model_type="clip_vision_model", image_size=side, patch_size=PATCH, num_hidden_layers=2),
        text_config=_llama(256),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    sizes = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}, **image_options}
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(**sizes),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat,
    )
    return Tiny(_finish(transformers.LlavaForConditionalGeneration, config), processor)


def llava_siglip() -> Tiny:
    """LLaVA with a SigLIP tower, which has no class token and sees the whole picture squeezed to a square."""
    held = llava_clip()
    side = 4 * PATCH
    config = transformers.LlavaConfig(
        vision_config=_tower(
            model_type="siglip_vision_model", image_size=side, patch_size=PATCH, vision_use_head=False
        ),
        text_config=_llama(256),
        image_token_index=held.hf_model.config.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    processor = transformers.LlavaProcessor(
        SiglipImageProcessorPil(size={"height": side, "width": side}),
        held.processor.tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=held.processor.chat_template,
    )
    return Tiny(_local(_finish(transformers.LlavaForConditionalGeneration, config)), processor)


PIXTRAL_SPECIAL = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")


def pixtral_tokenizer() -> PreTrainedTokenizerFast:
    chat = _chat("<s>[INST]", "[IMG]", "[/INST]", "")
    return byte_tokenizer(PIXTRAL_SPECIAL, chat, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def llava_pixtral_config(tokenizer: PreTrainedTokenizerFast) -> transformers.LlavaConfig:
    return transformers.LlavaConfig(
        vision_config=_tower(model_type="pixtral", image_size=256, patch_size=PATCH),
        text_config=_llama(384),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def mistral3_config(tokenizer: PreTrainedTokenizerFast) -> transformers.Mistral3Config:
    return transformers.Mistral3Config(
        vision_config=_tower(model_type="pixtral", image_size=256, patch_size=PATCH),
        text_config=_llama(384, model_type="mistral", head_dim=8, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )


def pixtral_image_processor(cell: int, longest_edge: int) -> PixtralImageProcessorPil:
    return PixtralImageProcessorPil(patch_size={"height": cell, "width": cell}, size={"longest_edge": longest_edge})


def pixtral_duck(cell: int, images: Any = None) -> DuckProcessor:
    images = images or pixtral_image_processor(cell, longest_edge=400)

    def read(pictures: Sequence[Image.Image]) -> Mapping[str, torch.Tensor]:
        return dict(images(list(pictures), return_tensors="pt"))

    def expand(seen: Mapping[str, torch.Tensor], index: int) -> str:
        height, width = (int(side) // cell for side in seen["image_sizes"][index])
        return "[IMG_BREAK]".join(["[IMG]" * width] * height) + "[IMG_END]"

    return DuckProcessor(pixtral_tokenizer(), read, "[IMG]", expand)


def llava_pixtral() -> Tiny:
    """With the real `LlavaProcessor`, which writes no row breaks."""
    tokenizer = pixtral_tokenizer()
    images = pixtral_image_processor(PATCH, longest_edge=64)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token="[IMG]",
        chat_template=tokenizer.chat_template,
    )
    return Tiny(_finish(transformers.LlavaForConditionalGeneration, llava_pixtral_config(tokenizer)), processor)


def mistral3() -> Tiny:
    """With row breaks between the image tokens, and a duck-typed processor."""
    processor = pixtral_duck(2 * PATCH)
    return Tiny(_finish(transformers.Mistral3ForConditionalGeneration, mistral3_config(processor.tokenizer)), processor)


IDEFICS_SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
)


def _idefics(model_class: type, config_class: type) -> tuple[transformers.PreTrainedModel, PreTrainedTokenizerFast]:
    chat = _chat(
        "<|begin_of_text|>{{ message['role'] | capitalize }}:", "<image>", "<end_of_utterance>\\n", "Assistant:"
    )
    tokenizer = byte_tokenizer(
        IDEFICS_SPECIAL, chat, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", pad_token="<|end_of_text|>"
    )
    config = config_class(
        vision_config=_tower(image_size=8 * PATCH, patch_size=PATCH),
        text_config=_llama(384, pad_token_id=1),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return _finish(model_class, config), tokenizer


def idefics3() -> Tiny:
    """With the real `Idefics3Processor`, which writes a fixed number of placeholders."""
    hf_model, tokenizer = _idefics(transformers.Idefics3ForConditionalGeneration, transformers.Idefics3Config)
    side = {"longest_edge": 8 * PATCH}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side)  # one tile
    return Tiny(
        hf_model,
        transformers.Idefics3Processor(images, tokenizer, image_seq_len=16, chat_template=tokenizer.chat_template),
    )


@dataclass(frozen=True)
class SizedDuck:
    """A duck-typed processor whose image half takes options, as needed where the model's image size must be lifted."""

    tokenizer: PreTrainedTokenizerFast
    images: Any
    used: tuple[str, ...]
    placeholder: str
    expanded: str

    def apply_chat_template(self, messages: Any, add_generation_prompt: bool = False, tokenize: bool = True) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=tokenize
        )

    def __call__(
        self, text: Sequence[str], images: Sequence[Image.Image], return_tensors: str = "pt", **options: Any
    ) -> Any:
        seen = self.images(list(images), return_tensors=return_tensors, **options)
        shown = text[0].replace(self.placeholder, self.expanded)
        encoded = self.tokenizer([shown], add_special_tokens=False, return_tensors=return_tensors)
        return {**encoded, **{name: seen[name] for name in self.used}}

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        return self.tokenizer.batch_decode(rows, **options)


def smolvlm() -> Tiny:
    """`SmolVLMProcessor` itself needs torchvision for video."""
    hf_model, tokenizer = _idefics(transformers.SmolVLMForConditionalGeneration, transformers.SmolVLMConfig)
    side = {"longest_edge": 8 * PATCH}
    images = SmolVLMImageProcessorPil(size=side, max_image_size=side)  # one tile
    around = "<fake_token_around_image>"
    expanded = f"{around}<global-img>{'<image>' * 16}{around}"
    return Tiny(hf_model, SizedDuck(tokenizer, images, ("pixel_values", "pixel_attention_mask"), "<image>", expanded))


def internvl() -> Tiny:
    """`InternVLProcessor` itself needs torchvision for video."""
    special = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    chat = _chat(
        "<|im_start|>{{ message['role'] }}\\n", "<IMG_CONTEXT>\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n"
    )
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = byte_tokenizer(special, chat, eos_token="<|im_end|>", pad_token="<|im_start|>", **named)
    side = 8 * PATCH
    config = transformers.InternVLConfig(
        vision_config=_tower(image_size=side, patch_size=PATCH),
        text_config=_llama(384, model_type="qwen2", tie_word_embeddings=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    images = GotOcr2ImageProcessorPil(size={"height": side, "width": side}, crop_to_patches=True, max_patches=1)
    expanded = f"<img>{'<IMG_CONTEXT>' * 16}</img>"
    processor = SizedDuck(tokenizer, images, ("pixel_values",), "<IMG_CONTEXT>", expanded)
    return Tiny(_finish(transformers.InternVLForConditionalGeneration, config), processor)


def gemma3(softcap: float | None = 5.0) -> Tiny:
    """A SigLIP tower pooled to a fixed number of tokens; the soft-cap is the one of Gemma 2 and 3n, set low enough to bend."""
    special = (
        "<pad>",
        "<eos>",
        "<bos>",
        "<start_of_turn>",
        "<end_of_turn>",
        "<start_of_image>",
        "<end_of_image>",
        "<image_soft_token>",
    )
    chat = _chat(
        "<bos><start_of_turn>{{ message['role'] }}\\n",
        "<start_of_image>",
        "<end_of_turn>\\n",
        "<start_of_turn>model\\n",
    )
    tokenizer = sentence_piece_tokenizer(
        special,
        chat,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        boi_token="<start_of_image>",
        eoi_token="<end_of_image>",
        image_token="<image_soft_token>",
    )
    side = 8 * PATCH
    text = _llama(
        256,
        head_dim=8,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=24,  # prompts outgrow it
        final_logit_softcapping=softcap,
    )
    text.pop("model_type")
    config = transformers.Gemma3Config(
        vision_config=_tower(model_type="siglip_vision_model", image_size=side, patch_size=PATCH),
        text_config={**text, "pad_token_id": 1, "tie_word_embeddings": True},
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        mm_tokens_per_image=16,
    )
    images = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=16, chat_template=chat)
    hf_model = _finish(transformers.Gemma3ForConditionalGeneration, config)
    torch.nn.init.normal_(
        hf_model.model.multi_modal_projector.mm_input_projection_weight, std=0.2
    )  # zeros from scratch
    return Tiny(_local(hf_model), processor)


TINY: Mapping[str, Callable[[], Tiny]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "llava_clip": llava_clip,
    "llava_siglip": llava_siglip,
    "llava_pixtral": llava_pixtral,
    "mistral3": mistral3,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "internvl": internvl,
    "gemma3": gemma3,
}


def installed_half(processor: Any, directory: Path, **settings: Any) -> Any:
    """The processor with the image half that transformers itself loads from there: torchvision's where it is installed,
    which resizes otherwise than Pillow."""
    images = transformers.AutoImageProcessor.from_pretrained(directory, **settings)
    if is_dataclass(processor) and not isinstance(processor, type):
        return replace(processor, image_processor=images)
    as_loaded = copy.copy(processor)
    as_loaded.image_processor = images
    return as_loaded


def picture(height: int = 67, width: int = 91, seed: int = 0) -> Image.Image:
    """Coloured noise, smooth enough to survive resizing."""
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
