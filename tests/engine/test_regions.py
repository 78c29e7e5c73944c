"""Regional evidence: windows cover every cell alike, falls land where they were hidden, and maps are weighed by them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import fastattr
from fastattr.adapters import encode, encode_response, log_probs_of_images, replay
from fastattr.demo.scenes import HELD_OUT, describe, make_scene
from fastattr.images import BLANK, Visual
from fastattr.pipeline import regional_evidence
from fastattr.regions import DARK, SLIGHT_NATS, spread, weigh, windows

WHOLE = (0.0, 0.0, 1.0, 1.0)
sides = st.integers(1, 7)


@given(sides)
def test_every_place_is_hidden_by_four_windows(n: int) -> None:
    boxes = windows(n, WHOLE)
    assert len(boxes) == (n + 1) ** 2
    for row in range(n):
        for column in range(n):
            x, y = (column + 0.5) / n, (row + 0.5) / n
            assert sum(left < x < right and top < y < bottom for left, top, right, bottom in boxes) == 4


def test_windows_stay_inside_what_the_maps_cover() -> None:
    boxes = np.array(windows(3, (0.25, 0.0, 0.75, 0.5)))
    assert boxes[:, 0].min() == 0.25 and boxes[:, 2].max() == 0.75
    assert boxes[:, 1].min() == 0.0 and boxes[:, 3].max() == 0.5


@given(sides, st.integers(0, 2**32 - 1))
def test_a_cell_has_the_mean_of_the_windows_that_hide_it(n: int, seed: int) -> None:
    falls = torch.from_numpy(np.random.default_rng(seed).random((2, (n + 1) ** 2))).float()
    cells = spread(falls, (1, n, n))
    boxes = windows(n, WHOLE)
    for row in range(n):
        for column in range(n):
            x, y = (column + 0.5) / n, (row + 0.5) / n
            hiding = [k for k, (left, top, right, bottom) in enumerate(boxes) if left < x < right and top < y < bottom]
            torch.testing.assert_close(cells[:, 0, row, column], falls[:, hiding].mean(1))
    assert spread(falls, (3, 2 * n, n)).shape == (2, 3, 2 * n, n)


def test_maps_are_lit_where_the_word_falls() -> None:
    maps = torch.tensor([[[[0.8, 0.8, 0.4]]]] * 3 + [[[[0.0, 0.0, 0.0]]]])
    falls = torch.tensor([[[[4.0, 0.0, 4.0]]], [[[0.0, 0.0, 0.0]]], [[[0.05, 0.0, 0.0]]], [[[4.0, 0.0, 0.0]]]])
    (weighed,) = weigh([maps], [falls])

    def both(light: float, fall: float) -> float:
        return (light + DARK) * (fall + DARK) - DARK**2

    # the peak stays; where the word does not fall, about a hundredth is left
    expected = [0.8 * both(light, fall) / both(1, 1) for light, fall in ((1, 1), (1, 0), (0.5, 1))]
    assert weighed[0].flatten().tolist() == pytest.approx(expected, rel=1e-4)
    # no window matters to it: the map stays
    torch.testing.assert_close(weighed[1], maps[1])
    # a slight fall weighs by what it is of SLIGHT_NATS
    slight = 0.05 / SLIGHT_NATS
    expected = [0.8 * both(light, fall) / both(1, slight) for light, fall in ((1, slight), (1, 0), (0.5, 0))]
    assert weighed[2].flatten().tolist() == pytest.approx(expected, rel=1e-4)
    assert weighed[3].max() == 0  # nothing was lit


def test_images_are_weighed_together() -> None:
    maps = [torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 3)]
    falls = [torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 1, 3), 1.0)]
    near, far = weigh(maps, falls)
    assert near.max() == 1.0
    expected = ((1 + DARK) * (0.5 + DARK) - DARK**2) / ((1 + DARK) ** 2 - DARK**2)
    assert far.max() == pytest.approx(expected)


def test_a_box_is_painted_over_and_nothing_else() -> None:
    frames = tuple(Image.new("RGB", (20, 10), color) for color in ("red", "blue"))
    hidden = Visual(frames).hide((0.25, 0.2, 0.5, 1.0))
    for frame, before in zip(hidden.frames, frames, strict=True):
        pixels, old = np.asarray(frame), np.asarray(before)
        inside = np.zeros((10, 20), bool)
        inside[2:10, 5:10] = True
        assert (pixels[inside] == BLANK).all()
        assert (pixels[~inside] == old[~inside]).all()


@pytest.fixture(scope="module")
def model() -> fastattr.Model:
    return fastattr.load("shapes")


def test_falls_are_those_of_single_forwards(model: fastattr.Model) -> None:
    """Two images: every window of the first, then of the second, each read alone and one by one."""
    scenes = [make_scene(HELD_OUT + 5, 96), make_scene(HELD_OUT + 6, 64, 96)]
    visuals = [Visual((scene.image,)) for scene in scenes]
    ids = encode_response(model, "A large red circle is at the top.")
    prompt = "Describe the image."
    reading = replay(model, encode(model, visuals, prompt), ids)
    falls = regional_evidence(model, visuals, prompt, reading, 1)
    assert [each.shape for each in falls] == [(len(ids), 4)] * 2
    whole = log_probs_of_images(model, [visuals], prompt, ids)[0]
    for image in range(2):
        for k, box in enumerate(windows(1, WHOLE)):
            shown = [visual.hide(box) if i == image else visual for i, visual in enumerate(visuals)]
            alone = log_probs_of_images(model, [shown], prompt, ids)[0]
            torch.testing.assert_close(falls[image][:, k], (whole - alone).clamp(min=0), rtol=1e-4, atol=1e-4)


def test_regions_point_at_the_object_the_word_needs(model: fastattr.Model) -> None:
    scene = make_scene(HELD_OUT + 3, n_objects=3)
    text = describe(scene).response
    why = fastattr.attribute(model, scene.image, "Describe the image.", text, regions=6, evidence=False)
    plain = fastattr.attribute(model, scene.image, "Describe the image.", text, evidence=False)
    assert why.config.regions == 6 and why.image[0].shape == plain.image[0].shape
    h, w = why.image[0].shape[2:]
    for item, mask in zip(scene.objects, scene.masks, strict=True):
        small = np.asarray(Image.fromarray(mask).resize((w, h), Image.Resampling.BOX), float)
        heat, before = (np.asarray(each[item.name].map)[0] for each in (why, plain))
        assert (heat * small).sum() / heat.sum() > (before * small).sum() / before.sum()
