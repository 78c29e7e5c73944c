"""A response explained as it is written is explained as the whole of it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastattr
from fastattr import adapters
from fastattr.adapters import Decoder
from fastattr.adapters.decoding import cache_name
from fastattr.demo.scenes import make_scene
from fastattr.images import read_visuals
from fastattr.types import AttributionConfig
from tests.engine.family_models import PROMPT, TINY, picture

LENS = AttributionConfig(method="lens", scales=(1.0,), filter=False)


@pytest.fixture(scope="module", params=list(TINY))
def tiny(request: pytest.FixtureRequest) -> fastattr.Model:
    held = TINY[request.param]()
    return fastattr.wrap(held.hf_model, held.processor)


@pytest.fixture(scope="module")
def shapes() -> fastattr.Model:
    return fastattr.load("shapes")


def words(model: fastattr.Model, n: int) -> list[int]:
    return [i for i in range(model.head.vocab) if i not in model.placeholder_ids][7 : 7 + 3 * n : 3]


def close(ours: fastattr.Attribution, whole: fastattr.Attribution, tolerance: float = 1e-3) -> None:
    """Everything; of maps the mean, since ranks in the filter and ARC turn the last bit of a state into another cell."""
    assert (ours.token_ids, ours.tokens, ours.spans) == (whole.token_ids, whole.tokens, whole.spans)
    assert (ours.context_tokens, ours.grids, ours.config) == (whole.context_tokens, whole.grids, whole.config)
    assert (ours.notes, ours.model, ours.prompt) == (whole.notes, whole.model, whole.prompt)
    torch.testing.assert_close(ours.log_prob, whole.log_prob, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.agreement, whole.agreement, rtol=1e-2, atol=1e-4)
    if whole.evidence is not None:
        assert ours.evidence is not None
        torch.testing.assert_close(ours.evidence, whole.evidence, rtol=1e-3, atol=1e-3)
    for one, other in zip((*ours.image, ours.context), (*whole.image, whole.context), strict=True):
        assert float((one - other).abs().mean()) < tolerance
    if whole.relevance is not None:
        assert ours.relevance is not None
        assert float((ours.relevance - whole.relevance).abs().mean()) < tolerance


# --- states -----------------------------------------------------------------------------------------------


def test_a_decoder_reads_what_a_replay_reads(tiny: fastattr.Model) -> None:
    """Two readings of different pictures take turns on one model."""
    wide = picture(seed=3).resize((picture().width * 2, picture().height))
    examples = [adapters.encode(tiny, read_visuals(shown), PROMPT) for shown in (picture(), wide)]
    ids = words(tiny, 6)
    decoders = [Decoder(tiny, each) for each in examples]
    for token_id in ids[:-1]:
        for decoder in decoders:
            decoder.feed(token_id)
    for decoder, example in zip(decoders, examples, strict=True):
        whole = adapters.replay(tiny, example, torch.tensor(ids)).hidden_states
        torch.testing.assert_close(decoder.hidden_states, whole, rtol=1e-4, atol=1e-5)
        assert torch.equal(decoder.next_state, decoder.hidden_states[-1:])


class OldName(nn.Module):
    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...


class NewName(nn.Module):
    def forward(self, input_ids: Any, cache: Any = None, use_cache: bool = True) -> None: ...


class NoCache(nn.Module):
    def forward(self, input_ids: Any) -> None: ...


def test_the_cache_has_the_name_the_model_uses() -> None:
    """Old remote code may still use the former name under a newer transformers."""
    assert (cache_name(OldName()), cache_name(NewName())) == ("past_key_values", "cache")
    with pytest.raises(fastattr.UnsupportedModelError, match=r"NoCache.forward has no argument for a cache"):
        cache_name(NoCache())


def test_an_earlier_layer_comes_with_the_last(shapes: fastattr.Model) -> None:
    example = adapters.encode(shapes, read_visuals(make_scene(1).image), PROMPT)
    decoder, ids = Decoder(shapes, example, layer=-2), words(shapes, 4)
    for token_id in ids[:-1]:
        decoder.feed(token_id)
    whole = adapters.replay(shapes, example, torch.tensor(ids), layer=-2)
    assert decoder.last_states is not None and whole.last_states is not None
    torch.testing.assert_close(decoder.hidden_states, whole.hidden_states, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decoder.last_states, whole.last_states, rtol=1e-4, atol=1e-4)


# --- explanations -----------------------------------------------------------------------------------------


def test_every_family_streams(tiny: fastattr.Model) -> None:
    ids = words(tiny, 5)
    images = [picture(), [picture(seed=1), picture(seed=2)]]
    streaming = fastattr.stream(tiny, images, PROMPT, ids, config=LENS)
    assert [step.token_id for step in streaming] == ids
    close(
        streaming.attribution(),
        fastattr.attribute(tiny, images, PROMPT, ids, method="lens", scales=(1.0,), filter=False),
    )


@pytest.mark.parametrize(
    "config",
    [
        AttributionConfig(),
        AttributionConfig(method="tam", scales=(1.0,), evidence=False),
        AttributionConfig(scales=(1.0, 1.5), aggregate="after", context="response"),
        AttributionConfig(scales=(1.5, 2.0), scale_mean="geometric", context="prompt", layer=-2, decision_weight=True),
    ],
    ids=["defaults", "tam", "after", "ours"],
)
def test_it_is_the_explanation_of_the_whole(shapes: fastattr.Model, config: AttributionConfig) -> None:
    scene = make_scene(5)
    streaming = fastattr.stream(shapes, scene.image, "Describe the image.", config=config)
    steps = list(streaming)
    why = streaming.attribution()
    options = {name: getattr(config, name) for name in vars(config) if name != "compat"}
    whole = fastattr.attribute(shapes, scene.image, "Describe the image.", list(why.token_ids), **options)
    close(why, whole, 5e-3)
    answer = fastattr.attribute(shapes, scene.image, "Describe the image.", scales=(1.0,), evidence=False)
    assert why.response == answer.response  # what the model answers by itself
    assert "".join(step.text for step in steps) == why.response
    for t, step in enumerate(steps):
        assert step.index == t and step.token_id == why.token_ids[t]
        assert all(torch.equal(one, other[t]) for one, other in zip(step.image, why.image, strict=True))
        seen = len(step.context)
        assert torch.equal(step.context, why.context[t, :seen]) and not why.context[t, seen:].any()
        assert step.log_prob == pytest.approx(float(why.log_prob[t]))
        if why.evidence is not None:
            assert step.evidence == pytest.approx(float(why.evidence[t]))


def test_what_was_said_before_does_not_change(shapes: fastattr.Model) -> None:
    streaming = fastattr.stream(shapes, make_scene(5).image, "Describe the image.")
    first = [next(streaming) for _ in range(4)]
    early = streaming.attribution()
    assert len(early) == 4
    list(streaming)
    late = streaming.attribution()
    assert len(late) > 4
    for t, step in enumerate(first):
        assert torch.equal(step.image[0], late.image[0][t]) and torch.equal(early.image[0][t], late.image[0][t])


def test_tokens_of_a_transformers_streamer(shapes: fastattr.Model) -> None:
    """`generate` runs in a thread of its own and is explained as it goes."""
    scene = make_scene(6)
    encoded = adapters.encode(shapes, read_visuals(scene.image), "Describe the image.")
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    expected = shapes.hf_model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, len(encoded.input_ids) :]
    tokens = fastattr.TokenStream()
    options: dict[str, Any] = {**inputs, "do_sample": False, "max_new_tokens": 12, "streamer": tokens}
    thread = threading.Thread(target=shapes.hf_model.generate, kwargs=options)
    thread.start()
    streaming = fastattr.stream(shapes, scene.image, "Describe the image.", tokens, config=LENS)
    said = [step.token_id for step in streaming]
    thread.join()
    assert said == expected.tolist()
    whole = fastattr.attribute(
        shapes, scene.image, "Describe the image.", said, method="lens", scales=(1.0,), filter=False
    )
    close(streaming.attribution(), whole)


def test_each_token_is_one_forward_of_one_token_a_reading(shapes: fastattr.Model) -> None:
    fed: list[int] = []

    def count(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        fed.append(kwargs["input_ids"].shape[1])

    handle = shapes.hf_model.register_forward_pre_hook(count, with_kwargs=True)
    streaming = fastattr.stream(shapes, make_scene(5).image, "Describe the image.", [5, 6, 7, 8])
    n_prefills = len(fed)
    list(streaming)
    handle.remove()
    assert n_prefills == 4  # three scales, and the blank
    assert fed[n_prefills:] == [1] * 3 * 4  # the last token is never fed


# --- what is refused --------------------------------------------------------------------------------------


def test_what_cannot_be_streamed(shapes: fastattr.Model) -> None:
    image = make_scene(5).image
    with pytest.raises(fastattr.InputError, match=r"needs the whole response \(regions=2\)"):
        fastattr.stream(shapes, image, "x", config=replace(LENS, regions=2))
    streaming = fastattr.stream(shapes, image, "Describe the image.", [5, shapes.image_token_id], config=LENS)
    with pytest.raises(fastattr.InputError, match="nothing was said yet"):
        streaming.attribution()
    next(streaming)
    with pytest.raises(fastattr.InputError, match=r"token 1 is the image placeholder"):
        next(streaming)
    with pytest.raises(fastattr.InputError, match="holds ids"):
        next(fastattr.stream(shapes, image, "Describe the image.", [10**6], config=LENS))
    with pytest.raises(fastattr.InputError, match="top_k is 100000, expected at most"):
        fastattr.stream(shapes, image, "Describe the image.", [5], config=AttributionConfig(top_k=100_000))
    assert list(fastattr.stream(shapes, image, "Describe the image.", [], config=LENS)) == []


@pytest.mark.parametrize(
    ("tokens", "told"),
    [
        ("red", "tokens is text, expected token ids"),
        (5, "tokens is a int, expected token ids"),
        ([5.5], r"token 0 is 5\.5, expected a token id"),
        (["red"], "token 0 is 'red', expected a token id"),
        ([5, None], "token 1 is None, expected a token id"),
        (torch.tensor([[5, 6]]), r"token 0 is tensor\(\[5, 6\]\), expected a token id"),
        (torch.tensor([5.0]), r"token 0 is tensor\(5\.\), expected a token id"),
    ],
)
def test_tokens_are_ids(shapes: fastattr.Model, tokens: Any, told: str) -> None:
    with pytest.raises(fastattr.InputError, match=told):
        list(fastattr.stream(shapes, make_scene(5).image, PROMPT, tokens, "lens@1", evidence=False))


@pytest.mark.parametrize("ids", [torch.tensor([38, 7]), np.array([38, 7]), [np.int64(38), torch.tensor(7)]])
def test_ids_of_any_kind(shapes: fastattr.Model, ids: Any) -> None:
    steps = fastattr.stream(shapes, make_scene(5).image, PROMPT, ids, "lens@1", evidence=False)
    assert [step.token_id for step in steps] == [38, 7]
