"""Models that cannot be explained say why, and what would be needed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

import fastattr
from fastattr.adapters.families import FAMILIES, family_of
from fastattr.adapters.families.unsupported import REASONS
from tests.engine.family_models import llava_clip


@pytest.mark.parametrize("model_type", sorted(REASONS))
def test_says_why(model_type: str) -> None:
    config = AutoConfig.for_model(model_type) if model_type != "vision-encoder-decoder" else encoder_decoder()
    assert config.model_type == model_type  # the name that transformers gives it
    with pytest.raises(fastattr.UnsupportedModelError) as raised:
        family_of(config)
    said = str(raised.value)
    assert said.startswith(f"model_type '{model_type}' cannot be explained: ")
    assert re.search(r"would be needed|nothing to map onto|no words|with attribute_states", said)


def encoder_decoder() -> Any:
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(), transformers.GPT2Config()
    )


class Crossed(nn.Module):
    """What `wrap` looks at before it looks at the family."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def get_output_embeddings(self) -> nn.Module:
        return nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.MllamaConfig, "cross-attention layers and has no tokens in the sequence"),
        (transformers.Idefics2Config, "its perceiver resampler reads the image into learned queries"),
        (transformers.Pix2StructConfig, "the image is in the encoder"),
    ],
)
def test_wrap_says_so_before_anything_is_read(config: type, why: str) -> None:
    with pytest.raises(fastattr.UnsupportedModelError, match=why):
        fastattr.wrap(Crossed(config()).eval(), llava_clip().processor)


def test_no_type_is_both_explained_and_refused() -> None:
    assert not set(FAMILIES) & set(REASONS)
    assert len(REASONS) > 15


def test_every_name_is_one_of_transformers() -> None:
    """A name that nobody gives, by a slip, would never be found."""
    known = {
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        *transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES,
    }
    assert set(REASONS) <= known
    assert set(FAMILIES) <= known


def test_a_type_that_nobody_classified_keeps_the_general_error() -> None:
    config = transformers.LlavaConfig()
    config.model_type = "stranger"
    with pytest.raises(
        fastattr.UnsupportedModelError, match=r"no adapter is known for model_type 'stranger'.*attribute_states"
    ):
        family_of(config)
