"""Tiny models that read large pictures in tiles: Idefics3, SmolVLM, InternVL, Qianfan-OCR, MiniCPM-V."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.granite_docling.image_processing_pil_granite_docling import GraniteDoclingImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from fastattr.adapters.processors import ComposedProcessor, join_internvl, join_minicpm, join_smolvlm
from tests.engine import family_models as tiny
from tests.engine.families.tiny_qwen import HYBRID
from tests.engine.family_models import PATCH, Tiny

TILE = 4 * PATCH  # pixels; 2 x 2 tokens


def _idefics(model_class: type, config_class: type) -> tuple[Any, PreTrainedTokenizerFast]:
    tokenizer = tiny.idefics3().processor.tokenizer
    config = config_class(
        vision_config=tiny._tower(image_size=TILE, patch_size=PATCH),
        text_config=tiny._llama(384, pad_token_id=1),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    return tiny._finish(model_class, config), tokenizer


def idefics3_tiles() -> Tiny:
    """With the real `Idefics3Processor`: the longer side is four tiles."""
    hf_model, tokenizer = _idefics(transformers.Idefics3ForConditionalGeneration, transformers.Idefics3Config)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 4 * TILE}, max_image_size={"longest_edge": TILE})
    return Tiny(
        hf_model,
        transformers.Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template),
    )


def smolvlm_tiles() -> Tiny:
    """With the halves of its processor joined, as `load` does without torchvision: the longer side is three tiles."""
    hf_model, tokenizer = _idefics(transformers.SmolVLMForConditionalGeneration, transformers.SmolVLMConfig)
    images = SmolVLMImageProcessorPil(
        size={"longest_edge": 3 * TILE}, max_image_size={"longest_edge": TILE}, return_row_col_info=True
    )
    return Tiny(hf_model, join_smolvlm(images, tokenizer))


def internvl_tiles() -> Tiny:
    """With the halves of its processor joined, as `load` does without torchvision: at most six tiles."""
    tokenizer = tiny.internvl().processor.tokenizer
    config = transformers.InternVLConfig(
        vision_config=tiny._tower(image_size=TILE, patch_size=PATCH),
        text_config=tiny._llama(384, model_type="qwen2", tie_word_embeddings=True),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = GotOcr2ImageProcessorPil(
        size={"height": TILE, "width": TILE}, crop_to_patches=True, min_patches=1, max_patches=6
    )
    hf_model = tiny._finish(transformers.InternVLForConditionalGeneration, config)
    return Tiny(hf_model, join_internvl(images, tokenizer))


def qianfan_ocr() -> Tiny:
    """With the real `QianfanOCRProcessor`: InternVL's tiles, a placeholder of its own in the chat."""
    special = ("<|im_start|>", "<|im_end|>", "<image>", "<img>", "</img>", "<IMG_CONTEXT>")
    chat = tiny._chat("<|im_start|>{{ message['role'] }}\\n", "<image>\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n")
    tokenizer = tiny.byte_tokenizer(
        special,
        chat,
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
    )
    config = transformers.QianfanOCRConfig(
        vision_config=tiny._tower(image_size=TILE, patch_size=PATCH),
        text_config=tiny._llama(384, model_type="qwen3", head_dim=8),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    images = GotOcr2ImageProcessorPil(size={"height": TILE, "width": TILE}, min_patches=1, max_patches=6)
    processor = transformers.QianfanOCRProcessor(images, tokenizer, image_seq_length=4, chat_template=chat)
    return Tiny(tiny._finish(transformers.QianfanOCRForConditionalGeneration, config), processor)


def minicpm() -> Tiny:
    """With the halves of its processor joined, as `load` does without torchvision: slices of about 64 x 64 pixels."""
    processor = _minicpm_processor()
    config = transformers.MiniCPMV4_6Config(**_minicpm_config(processor.tokenizer))
    hf_model = tiny._finish(transformers.MiniCPMV4_6ForConditionalGeneration, config)
    return Tiny(tiny._local(hf_model), processor)


def minicpm_canvas() -> Tiny:
    """MiniCPM-V 4.7, whose positions say where on the picture a slice lies."""
    processor = _minicpm_processor()
    ids = processor.tokenizer.convert_tokens_to_ids
    config = transformers.MiniCPMV4_7Config(
        **_minicpm_config(processor.tokenizer),
        image_start_id=ids("<image>"),
        image_end_id=ids("</image>"),
        slice_start_id=ids("<slice>"),
        slice_end_id=ids("</slice>"),
        newline_id=processor.tokenizer("\n", add_special_tokens=False)["input_ids"][0],
    )
    hf_model = tiny._finish(transformers.MiniCPMV4_7ForConditionalGeneration, config)
    return Tiny(tiny._local(hf_model), processor)


def _minicpm_processor() -> ComposedProcessor:
    special = ("<|im_start|>", "<|im_end|>", "<image>", "</image>", "<slice>", "</slice>", "<unk>", "<video>")
    chat = tiny._chat("<|im_start|>{{ message['role'] }}\\n", "<unk>\\n", "<|im_end|>\\n", "<|im_start|>assistant\\n")
    tokenizer = tiny.byte_tokenizer(
        special,
        chat,
        eos_token="<|im_end|>",
        pad_token="<|im_start|>",
        image_token="<unk>",
        video_token="<video>",
        image_start_token="<image>",
        image_end_token="</image>",
        slice_start_token="<slice>",
        slice_end_token="</slice>",
        image_id_start_token="<id>",
        image_id_end_token="</id>",
    )
    images = MiniCPMV4_6ImageProcessorPil(patch_size=PATCH, scale_resolution=2 * TILE, max_slice_nums=6)
    return join_minicpm(images, tokenizer)


def _minicpm_config(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """With a decoder of one layer of linear and one of full attention."""
    text = tiny._llama(384, **HYBRID)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text |= {"model_type": "qwen3_5_text", "rope_parameters": {**rope, **text.pop("rope")}}
    return {
        "vision_config": tiny._tower(image_size=4 * TILE, patch_size=PATCH, num_hidden_layers=2),
        "text_config": text,
        "insert_layer_id": 0,
        "image_token_id": tokenizer.convert_tokens_to_ids("<unk>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<video>"),
    }


def granite_docling(*, fine: bool = False) -> Tiny:
    """With the real `GraniteDoclingProcessor`; features of two layers of the tower enter the decoder."""
    special = ("<|start_of_role|>", "<|end_of_text|>", "<fake_token_around_image>", "<image>", "<global-img>")
    chat = tiny._chat("<|start_of_role|>{{ message['role'] }}\\n", "<image>", "<|end_of_text|>\\n", "<|start_of_role|>")
    tokenizer = tiny.byte_tokenizer(
        special, chat, eos_token="<|end_of_text|>", pad_token="<|end_of_text|>", image_token="<image>"
    )
    text = tiny._llama(384, num_hidden_layers=3)
    text.pop("model_type")
    config = transformers.GraniteDoclingConfig(
        vision_config=tiny._tower(
            image_size=2 * TILE,
            patch_size=PATCH,
            num_hidden_layers=2,
            out_hidden_size=tiny.DIM,
            scale_factor=4,
            deepstack_visual_indexes=[0, 1],
        ),
        text_config={**text, "pad_token_id": 1},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    images = GraniteDoclingImageProcessorPil(
        size={"height": 2 * TILE, "width": 2 * TILE}, max_patches=6, fine_route=fine
    )
    processor = transformers.GraniteDoclingProcessor(images, tokenizer, image_seq_len=4, chat_template=chat)
    hf_model = tiny._finish(transformers.GraniteDoclingForConditionalGeneration, config)
    return Tiny(tiny._local(hf_model), processor)


def granite_docling_fine() -> Tiny:
    """By its fine route, with four times as many tokens a tile."""
    return granite_docling(fine=True)
