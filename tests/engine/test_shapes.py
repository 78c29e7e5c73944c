"""The bundled model: small, right often enough, and explained where its words stand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fastattr
from fastattr.adapters import Model
from fastattr.demo import scenes
from fastattr.demo.evaluate import FIRST_SEED as HELD_OUT
from fastattr.demo.evaluate import content_word_accuracy

SHAPES = Path(fastattr.__file__).parent / "demo" / "shapes"


@pytest.fixture(scope="module")
def model() -> Model:
    return fastattr.load("shapes")


def test_it_is_small(model: Model) -> None:
    assert sum(parameter.numel() for parameter in model.hf_model.parameters()) <= 4_000_000
    assert (SHAPES / "model.safetensors").stat().st_size <= 8_000_000


@pytest.mark.parametrize(("scale", "least"), [(1.0, 0.94), (1.5, 0.94), (2.0, 0.88)])
def test_content_words_on_scenes_it_never_saw(model: Model, scale: float, least: float) -> None:
    assert HELD_OUT > scenes.HELD_OUT
    assert content_word_accuracy(model, range(HELD_OUT, HELD_OUT + 25), scale)["all"] >= least


def test_words_light_their_own_object(model: Model) -> None:
    """The mass of a shape word's map lies on its object far more than the object's share of the picture."""
    gains = []
    for seed in range(HELD_OUT, HELD_OUT + 8):
        scene = scenes.make_scene(seed)
        said = scenes.describe(scene)
        why = fastattr.attribute(model, scene.image, said.prompt, said.response, evidence=False)
        for item, mask in zip(scene.objects, scene.masks, strict=True):
            if sum(other.shape == item.shape for other in scene.objects) == 1:
                coarse = why[item.shape].map[None]
                heat = torch.nn.functional.interpolate(coarse, size=mask.shape, mode="bilinear")[0, 0]
                on_object = float(heat[torch.from_numpy(mask)].sum() / heat.sum().clamp(min=1e-9))
                gains.append(on_object / mask.mean())
    assert np.median(gains) > 4


def test_evidence_tells_true_words_from_forced_false_ones(model: Model) -> None:
    """The picture speaks for the colour that is there and against the one that is not."""
    differences = []
    for seed in range(HELD_OUT, HELD_OUT + 8):
        scene = scenes.make_scene(seed, n_objects=1)
        item = scene.objects[0]
        wrong = next(color for color in scenes.COLORS if color != item.color)
        prompt = f"What color is the {item.shape}?"
        scores = [
            fastattr.attribute(model, scene.image, prompt, f"The {item.shape} is {color}.", scales=(1.0,))[color].score
            for color in (item.color, wrong)
        ]
        assert scores[0] is not None and scores[1] is not None
        differences.append(scores[0] - scores[1])
    assert np.median(differences) > 1.0


def test_the_background_is_seen_too(model: Model) -> None:
    """Blanking the picture must not leave its colour behind."""
    scene = next(s for s in map(scenes.make_scene, range(HELD_OUT, HELD_OUT + 50)) if s.background == "brown")
    said = "The background is brown."
    why = fastattr.attribute(model, scene.image, "What color is the background?", said, scales=(1.0,))
    assert why["brown"].score is not None and why["brown"].score > 1.0


def test_the_answer_can_be_generated_and_explained_again_from_its_ids(model: Model) -> None:
    scene = scenes.make_scene(HELD_OUT)
    said = fastattr.attribute(model, scene.image, "Describe the image.", max_new_tokens=24)
    again = fastattr.attribute(model, scene.image, "Describe the image.", said.token_ids)
    assert again.response == said.response
    assert torch.equal(again.image[0], said.image[0])


def test_an_earlier_layer_moves_the_maps_and_never_the_predictions(model: Model) -> None:
    scene = scenes.make_scene(HELD_OUT)
    said = scenes.describe(scene)
    last, earlier = (
        fastattr.attribute(model, scene.image, said.prompt, said.response, layer=layer) for layer in (-1, -2)
    )
    assert not torch.equal(last.image[0], earlier.image[0])
    for name in ("log_prob", "evidence", "agreement", "relevance"):
        assert torch.equal(getattr(last, name), getattr(earlier, name)), name
