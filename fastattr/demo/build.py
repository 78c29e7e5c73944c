"""The untrained `shapes`: its tokenizer, processor and configuration.

Mistral3 (a Pixtral tower, 2x2 patch merging, a small Mistral decoder) reads images of any size;
`LlavaProcessor` with the PIL image processor needs no torchvision.
"""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from fastattr.demo import scenes

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<user>", "<assistant>")
BASE_SIDE = 96  # pixels of the longer edge at scale 1
PATCH = 8
MERGE = 2
VOCABULARY = 512

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %}<user>"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% else %}<assistant>{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows every word of the scenes as one token and spells out the rest."""
    rng = np.random.default_rng(0)
    corpus = [
        text
        for seed in range(1500)
        for exchange in scenes.exchanges(scenes.make_scene(seed, 32), rng)
        for text in (exchange.prompt, exchange.response)
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>", "user_token": "<user>", "assistant_token": "<assistant>"},
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def build_processor() -> LlavaProcessor:
    """The processor: longer edge to `BASE_SIDE`, sides rounded up to whole merged patches."""
    image_processor = PixtralImageProcessorPil(
        size={"longest_edge": BASE_SIDE}, patch_size={"height": PATCH * MERGE, "width": PATCH * MERGE}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH * MERGE,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=0,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Mistral3ForConditionalGeneration:
    """The model with fresh weights, 2.4 M parameters."""
    torch.manual_seed(seed)
    vision = PixtralVisionConfig(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=5,
        num_attention_heads=4,
        head_dim=32,
        image_size=BASE_SIDE * 4,
        patch_size=PATCH,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # grids are at most tens of patches wide
        initializer_range=0.05,
    )
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=400,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        head_dim=32,
        max_position_embeddings=4096,
        sliding_window=None,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = Mistral3Config(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        spatial_merge_size=MERGE,
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
    )
    model = Mistral3ForConditionalGeneration(config)
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return model
