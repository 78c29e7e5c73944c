"""The model's inputs equal those of the processor's own `apply_chat_template(tokenize=True)`, also for several pictures."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import ProcessorMixin
from transformers.models.llava_next_video.processing_llava_next_video import LlavaNextVideoProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.minicpmv4_6.processing_minicpmv4_6 import MiniCPMV4_6Processor

import fastattr
from fastattr import adapters
from fastattr.adapters.families import family_of
from fastattr.images import read_visuals
from fastattr.types import OutputHead
from tests.engine.families import test_frames, tiny_llava_next, tiny_qwen, tiny_tiles
from tests.engine.families.table import all_rows
from tests.engine.families.tiny_frames import _joint
from tests.engine.families.tiny_llava_next import SIDE
from tests.engine.families.tiny_video import JOINT, real
from tests.engine.family_models import PATCH, PROMPT, Tiny, llava_pixtral, picture

SIZES = [(67, 91), (150, 40), (130, 131)]


def qwen(kind: str) -> Tiny:
    held: Tiny = getattr(tiny_qwen, kind)()
    return Tiny(held.hf_model, real(JOINT[kind], held.processor))


def with_joint(held: Tiny, joint: Callable[..., Any], **options: Any) -> Tiny:
    """transformers' own joint processor of the same halves; the video half, which needs torchvision, is never called."""
    halves = held.processor
    half = SimpleNamespace(slice_mode=True, downsample_mode="16x")
    return Tiny(held.hf_model, _joint(joint, halves.image_processor, halves.tokenizer, half, **options))


def llava_onevision() -> Tiny:
    options = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
    return with_joint(tiny_llava_next.llava_onevision(), LlavaOnevisionProcessor, **options)


def llava_next_video() -> Tiny:
    options = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return with_joint(tiny_llava_next.llava_next_video(), LlavaNextVideoProcessor, **options)


def minicpm() -> Tiny:
    held = tiny_tiles.minicpm()
    tokenizer = held.processor.tokenizer
    tokenizer.video_token, tokenizer.video_token_id = "<video>", tokenizer.convert_tokens_to_ids("<video>")
    return with_joint(held, MiniCPMV4_6Processor)


# their processors are composed or written here and have no chat path; for most a joint one is below
JOINED = {
    *("exaone4_5", "gemma4", "glm4v", "glm46v", "glm4v_moe", "glm_ocr", "minicpm", "minicpm_canvas", "mistral_large4"),
    *("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "qwen4_exp"),
    *("cohere2_vision", "gemma4_shared", "got_ocr2", "got_ocr2_cut", "internvl_tiles", "llava_next_video"),
    *("llava_onevision", "llava_onevision_shrunk", "mistral3", "perception_lm", "smolvlm_tiles", "video_llava"),
}
MAKERS = {
    **{row.make.__name__: row.make for row in all_rows() if row.make.__name__ not in JOINED},
    **{f"joint_{row.make.__name__}": row.make for row in test_frames.ROWS},
    **{f"joint_{kind}": (lambda kind=kind: qwen(kind)) for kind in JOINT},
    **{f"joint_{make.__name__}": make for make in (llava_onevision, llava_next_video, minicpm)},
}


def model_of(held: Tiny) -> fastattr.Model:
    """As made by `wrap`, but without a forward of the model: no test here reads states."""
    config = held.hf_model.config
    head = OutputHead(held.hf_model.get_output_embeddings().weight.detach())
    return fastattr.Model(held.hf_model, held.processor, config, family_of(config), head, "tiny")


def chat_path(processor: Any, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    shown = [{"type": "image", "image": each} for each in pictures]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": PROMPT}]}]
    made = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    return {name: value for name, value in made.items() if name not in ("attention_mask", "labels")}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of processors, of NumPy 2
@pytest.mark.parametrize("name", MAKERS)
def test_several_pictures_are_shown_as_the_chat_path_shows_them(name: str) -> None:
    held = MAKERS[name]()
    assert isinstance(held.processor, ProcessorMixin)
    model = model_of(held)
    for n in (1, 2, 3):
        sizes = SIZES[:n] if held.hf_model.config.vision_config.model_type != "pixtral" else SIZES[:1] * n
        pictures = [picture(*size, seed=i) for i, size in enumerate(sizes)]
        expected = chat_path(held.processor, pictures)
        encoded = adapters.encode(model, read_visuals(pictures), PROMPT)
        given = {"input_ids": encoded.input_ids[None], **encoded.model_inputs}
        assert set(given) == set(expected)
        for key, value in expected.items():
            assert given[key].shape == value.shape, key
            assert torch.equal(given[key], value.to(given[key].dtype)), key


def test_llava_with_pixtral_has_no_chat_path_for_pictures_of_several_sizes() -> None:
    """It writes the placeholders of the largest padded picture for each, which the model refuses; ours match each picture."""
    held = llava_pixtral()
    pictures = [picture(*size) for size in SIZES[:2]]
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        held.hf_model(**chat_path(held.processor, pictures))
    encoded = adapters.encode(model_of(held), read_visuals(pictures), PROMPT)
    held.hf_model(input_ids=encoded.input_ids[None], **encoded.model_inputs)
