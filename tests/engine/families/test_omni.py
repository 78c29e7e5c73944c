"""The thinkers of Qwen's Omni models, which place their tokens only where an attention mask is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from tests.engine.families.other_ways import prove_other_ways
from tests.engine.families.proof import Row, prove
from tests.engine.families.tiny_omni import qwen2_5_omni_thinker, qwen3_omni_moe_thinker
from tests.engine.family_models import ANSWER, PROMPT, Tiny, picture

MAKES = (qwen2_5_omni_thinker, qwen3_omni_moe_thinker)

ROWS = [  # 67 x 91 pixels in cells of 16: 4.2 x 5.7
    Row(make.__name__, make, [(4, 6)], (1, 4, 6), video=True, stood_in="the video processor, which needs torchvision")
    for make in MAKES
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.model_type)
def test_family(row: Row) -> None:
    prove(row)


def wrapped(held: Tiny) -> fastattr.Model:
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.mark.parametrize("make", MAKES)
def test_a_mask_is_what_places_them(make: Callable[[], Tiny]) -> None:
    """Without one the model counts positions like text, and says something else."""
    model = wrapped(make())
    example = adapters.encode(model, read_visuals(picture()), PROMPT)
    response = adapters.encode_response(model, ANSWER)
    placed = adapters.replay(model, example, response).hidden_states
    counted = adapters.replay(replace(model, family=replace(model.family, masked=False)), example, response)
    behind = example.groups[0].positions[1]  # from the second image token on
    torch.testing.assert_close(counted.hidden_states[: behind - 1], placed[: behind - 1], rtol=1e-3, atol=1e-3)
    assert (counted.hidden_states[behind:] - placed[behind:]).abs().max() > 0.1


@pytest.mark.parametrize("make", MAKES)
def test_a_batch_and_a_decoder_read_what_a_replay_reads(make: Callable[[], Tiny]) -> None:
    prove_other_ways(wrapped(make()), [picture(), picture(101, 58), [[picture(), picture(seed=1)]]])


@pytest.mark.parametrize("make", MAKES)
def test_a_video_between_images(make: Callable[[], Tiny]) -> None:
    """Its time steps are told apart by their seconds, which the processor gives; capture is replay."""
    model = wrapped(make())
    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": PROMPT}, {"type": "image"}]
    chat = fastattr.Chat([{"role": "user", "content": parts}])
    shown = [picture(), [picture(48, 64, seed) for seed in range(4)], picture(32, 48)]
    example = adapters.encode(model, read_visuals(shown), chat)
    assert [group.grid for group in example.groups] == [(1, 4, 6), (2, 3, 4), (1, 2, 3)]
    first, film, last = (group.positions for group in example.groups)
    assert first[-1] < film[0] < film[-1] < last[0]
    assert "video_second_per_grid" in example.model_inputs
    inputs = {**example.model_inputs, "input_ids": example.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    never = [*model.placeholder_ids, *range(model.head.vocab, len(model.head.weight))]
    with fastattr.capture(model) as states:
        out = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=5, suppress_tokens=never)
    why = states.attribute(out, image=shown, prompt=chat)
    again = fastattr.attribute(model, shown, chat, why.token_ids, scales=(1.0,), evidence=False)
    assert why.source == "capture"
    for captured, replayed in zip(why.image, again.image, strict=True):
        torch.testing.assert_close(captured, replayed, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(why.log_prob, again.log_prob, rtol=1e-3, atol=1e-3)


def test_of_a_speaking_model_the_thinker_is_explained() -> None:
    held = qwen2_5_omni_thinker()
    whole = transformers.Qwen2_5OmniForConditionalGeneration(
        transformers.Qwen2_5OmniConfig(thinker_config=held.hf_model.config.to_dict(), enable_audio_output=False)
    ).eval()
    with pytest.raises(fastattr.UnsupportedModelError, match=r"wrap\(hf_model.thinker, processor\)"):
        fastattr.wrap(whole, held.processor)
    why = fastattr.attribute(fastattr.wrap(whole.thinker, held.processor), picture(), PROMPT, ANSWER, scales=(1.0,))
    assert why.grids[0][0] == (1, 4, 6)
