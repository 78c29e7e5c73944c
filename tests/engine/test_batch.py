"""Several responses in one forward are explained as if each had been alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import fastattr
from fastattr import adapters
from fastattr.images import read_visuals
from fastattr.types import AttributionConfig
from tests.engine.family_models import PROMPT, TINY, picture


@pytest.fixture(scope="module", params=list(TINY))
def model(request: pytest.FixtureRequest) -> fastattr.Model:
    held = TINY[request.param]()
    return fastattr.wrap(held.hf_model, held.processor)


def words(model: fastattr.Model, n: int, seed: int) -> list[int]:
    """Random ids that are text."""
    generator = torch.Generator().manual_seed(seed)
    allowed = [i for i in range(model.head.vocab) if i not in model.placeholder_ids]
    return [allowed[i] for i in torch.randint(len(allowed), (n,), generator=generator).tolist()]


def rows(model: fastattr.Model) -> list[tuple[Any, str, list[int]]]:
    """Different pictures, two sizes, prompts and lengths; two pictures in one row."""
    wide = picture(seed=3).resize((picture().width * 2, picture().height))
    return [
        (picture(seed=0), PROMPT, words(model, 5, 0)),
        (picture(seed=1), PROMPT + " " + PROMPT, words(model, 2, 1)),
        (wide, PROMPT, words(model, 7, 2)),
        ([picture(seed=4), picture(seed=5)], PROMPT, words(model, 3, 3)),
    ]


def assert_same(ours: fastattr.Attribution, alone: fastattr.Attribution) -> None:
    assert (ours.token_ids, ours.tokens, ours.context_tokens) == (alone.token_ids, alone.tokens, alone.context_tokens)
    assert (ours.grids, ours.extents, ours.picture_sizes) == (alone.grids, alone.extents, alone.picture_sizes)
    names = ("context", "log_prob", "agreement", "evidence")
    for name in names:
        torch.testing.assert_close(getattr(ours, name), getattr(alone, name), rtol=1e-3, atol=1e-4)
    for one, other in zip(ours.image, alone.image, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_batch_is_its_rows_one_by_one(model: fastattr.Model) -> None:
    # without the filter and interference, whose ranks turn the last bit of a state into another map
    config = AttributionConfig(method="lens", scales=(1.0,), filter=False)
    given = rows(model)
    together = fastattr.attribute_batch(model, given, config)
    for (image, prompt, response), why in zip(given, together, strict=True):
        alone = fastattr.attribute(model, image, prompt, response, method="lens", scales=(1.0,), filter=False)
        assert_same(why, alone)


def test_states_of_a_batch_are_those_of_a_replay(model: fastattr.Model) -> None:
    examples = [adapters.encode(model, read_visuals(image), prompt) for image, prompt, _ in rows(model)]
    responses = [torch.tensor(ids) for _, _, ids in rows(model)]
    for read, example, ids in zip(adapters.replay_batch(model, examples, responses), examples, responses, strict=True):
        alone = adapters.replay(model, example, ids)
        assert torch.equal(read.input_ids, alone.input_ids)
        torch.testing.assert_close(read.hidden_states, alone.hidden_states, rtol=1e-4, atol=1e-5)


def test_one_forward_reads_rows_of_one_image_size(model: fastattr.Model) -> None:
    calls = []
    handle = model.hf_model.register_forward_hook(lambda *_: calls.append(1))
    some = rows(model)[:2]
    examples = [adapters.encode(model, read_visuals(image), prompt) for image, prompt, _ in some]
    adapters.replay_batch(model, examples, [torch.tensor(ids) for _, _, ids in some])
    handle.remove()
    assert len(calls) == 1


def test_scales_layers_and_answers_of_the_models_own() -> None:
    """The bundled model: every option that reads the model, and rows without a response."""
    from fastattr.demo.scenes import make_scene

    shapes = fastattr.load("shapes")
    config = AttributionConfig(scales=(1.0, 1.5), layer=-2, regions=2)
    given = [(make_scene(seed).image, "Describe the image.", None) for seed in (1, 2, 3)]
    for (image, prompt, _), why in zip(given, fastattr.attribute_batch(shapes, given, config), strict=True):
        alone = fastattr.attribute(shapes, image, prompt, scales=(1.0, 1.5), layer=-2, regions=2)
        assert why.response == alone.response and why.config == alone.config == replace(config, top_k=50)
        for one, other in zip(why.image, alone.image, strict=True):
            assert float((one - other).abs().mean()) < 1e-3


def test_what_cannot_be_a_batch() -> None:
    shapes = fastattr.load("shapes")
    with pytest.raises(fastattr.InputError, match="got no rows, expected at least one"):
        fastattr.attribute_batch(shapes, [])
    with pytest.raises(fastattr.InputError, match="compat='tam' is for attribute_states"):
        fastattr.attribute_batch(shapes, [], AttributionConfig(method="tam", scales=(1.0,), compat="tam"))
