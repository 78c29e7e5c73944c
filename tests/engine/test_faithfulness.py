"""Deletion, insertion, sufficiency and necessity on models that can be computed by hand, then on real ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import fastattr
from fastattr import adapters
from fastattr.adapters.states import log_probs_of_images
from fastattr.demo import scenes
from fastattr.errors import InputError
from fastattr.images import BLANK, Visual
from fastattr.maps import log_probs
from fastattr.metrics.faithfulness import (
    Patches,
    Score,
    cut_picture,
    deletion,
    faithfulness,
    insertion,
    map_order,
    mask_order,
    necessity,
    random_order,
    reversed_order,
    sufficiency,
)
from tests.engine.family_models import ANSWER, PROMPT, TINY, picture

SIDE = 4  # pixels of a patch of the pictures made here


def colourful(h: int, w: int, *, frames: int = 1) -> Visual:
    """Every patch in one colour, none of them grey."""
    levels = np.arange(frames * h * w, dtype=np.uint8).reshape(frames, h, w)
    pixels = levels.repeat(SIDE, 1).repeat(SIDE, 2)[..., None] * np.array([1, 0, 0], np.uint8)
    return Visual(tuple(Image.fromarray(frame) for frame in pixels))


def patches_of(h: int, w: int, *, frames: int = 1) -> Patches:
    return cut_picture(colourful(h, w, frames=frames), (frames, h, w))


@dataclass
class Oracle:
    """A model whose probabilities are a function of which patches can be seen, read off the pixels."""

    prob: Callable[[list[bool]], Sequence[float]]  # of the visible patches, for every target
    seen: list[tuple[bool, ...]] = field(default_factory=list)

    def __call__(self, versions: Iterable[Visual]) -> Tensor:
        rows = []
        for version in versions:
            pixels = np.stack([np.asarray(frame) for frame in version.frames])
            corners = pixels[:, ::SIDE, ::SIDE].reshape(-1, 3)
            visible = [tuple(corner) != BLANK for corner in corners.tolist()]
            self.seen.append(tuple(visible))
            rows.append([math.log(p) for p in self.prob(visible)])
        return torch.tensor(rows, dtype=torch.float64)


def additive(weights: Sequence[float]) -> Oracle:
    """One target that becomes likelier with every patch, by the patch's weight."""
    return Oracle(lambda visible: [0.05 + sum(w for w, v in zip(weights, visible, strict=True) if v)])


# --- patches -----------------------------------------------------------------------------------------


def changed(patches: Patches, hide: Sequence[int]) -> np.ndarray:
    """bool `[t H W]`: the pixels that hiding these patches changes."""
    visible = torch.ones(len(patches), dtype=torch.bool)
    visible[list(hide)] = False
    pairs = zip(patches.visual.frames, patches.show(visible).frames, strict=True)
    return np.stack([(np.asarray(before) != np.asarray(after)).any(axis=2) for before, after in pairs])


def test_a_hidden_patch_is_grey_and_nothing_else_changes() -> None:
    patches = patches_of(2, 3)
    expected = np.zeros((1, 2 * SIDE, 3 * SIDE), bool)
    expected[0, :SIDE, SIDE : 2 * SIDE] = True
    expected[0, SIDE:, 2 * SIDE :] = True
    assert (changed(patches, [1, 5]) == expected).all()
    shown = patches.show(torch.zeros(6, dtype=torch.bool))
    assert (np.asarray(shown.frames[0]) == BLANK).all()


def test_the_extent_of_the_grid_is_respected() -> None:
    """A processor that crops a wide picture to its middle: 2 x 2 patches over pixels 3 to 9 of 12."""
    patches = cut_picture(Visual((Image.new("RGB", (12, 6)),)), (1, 2, 2), (0.25, 0.0, 0.75, 1.0))
    expected = np.zeros((1, 6, 12), bool)
    expected[0, 3:, 3:6] = True
    assert (changed(patches, [2]) == expected).all()
    expected[0, :, 3:9] = True
    assert (changed(patches, [0, 1, 2, 3]) == expected).all()


@given(st.integers(1, 7), st.integers(1, 7), st.integers(8, 40), st.integers(8, 40))
def test_patches_tile_the_picture(h: int, w: int, height: int, width: int) -> None:
    patches = cut_picture(Visual((Image.new("RGB", (width, height)),)), (1, h, w))
    times = sum(changed(patches, [patch]).astype(int) for patch in range(h * w))
    assert (times == 1).all()
    for sides, pixels in ((np.diff(patches.rows), height), (np.diff(patches.columns), width)):
        assert sides.sum() == pixels
        assert sides.max() - sides.min() <= 1


def test_patches_of_a_video_are_of_one_frame() -> None:
    patches = patches_of(1, 2, frames=3)
    expected = np.zeros((3, SIDE, 2 * SIDE), bool)
    expected[1, :, SIDE:] = True
    assert (changed(patches, [3]) == expected).all()


def test_frames_of_one_time_step_are_hidden_together() -> None:
    """A model that reads two frames in one step: four frames, two steps."""
    frames = tuple(Image.new("RGB", (2 * SIDE, SIDE)) for _ in range(4))
    expected = np.zeros((4, SIDE, 2 * SIDE), bool)
    expected[2:, :, SIDE:] = True
    assert (changed(cut_picture(Visual(frames), (2, 1, 2)), [3]) == expected).all()


def test_other_fills() -> None:
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[:, 20:] = (200, 100, 51)
    visual = Visual((Image.fromarray(pixels),))
    nothing = torch.zeros(4, dtype=torch.bool)
    mean = np.asarray(cut_picture(visual, (1, 2, 2), fill="mean").show(nothing).frames[0])
    assert (mean == (100, 50, 26)).all()
    blurred = np.asarray(cut_picture(visual, (1, 2, 2), fill="blur").show(nothing).frames[0]).astype(int)
    assert blurred[20, :, 0].tolist() == sorted(blurred[20, :, 0].tolist())  # the edge is a slope
    assert 90 <= blurred[20, 19:21, 0].mean() <= 110
    assert 0 < blurred[20, 15, 0] < 90


# --- orders ------------------------------------------------------------------------------------------


def test_a_map_is_ordered_from_hot_to_cold_with_ties_row_by_row() -> None:
    assert map_order(torch.tensor([[0.5, 1.0, 0.0], [0.5, 0.0, 0.75]])).tolist() == [1, 5, 0, 3, 2, 4]
    assert map_order(torch.zeros(2, 3, 4)).tolist() == list(range(24))


def test_a_mask_is_ordered_by_the_share_of_each_patch_inside_it() -> None:
    mask = np.zeros((2 * SIDE, 3 * SIDE), bool)
    mask[0, SIDE] = True  # one pixel of patch 1
    mask[SIDE:, SIDE:] = True  # patches 4 and 5
    mask[-1, -1] = False
    assert mask_order(patches_of(2, 3), mask).tolist() == [4, 5, 1, 0, 2, 3]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_mask_order_against_counted_pixels(h: int, w: int, seed: int) -> None:
    """Patches of unequal sizes in the middle of the picture: shares by a loop."""
    mask = np.random.default_rng(seed).random((11, 13)) < 0.5
    patches = cut_picture(Visual((Image.new("RGB", (13, 11)),)), (1, h, w), (0.2, 0.1, 0.8, 0.9))
    shares = [mask[changed(patches, [patch])[0]].mean() for patch in range(h * w)]
    expected = sorted(range(h * w), key=lambda patch: (-shares[patch], patch))
    assert mask_order(patches, mask).tolist() == expected


def test_a_random_order_follows_from_its_seed() -> None:
    first, again, other = (random_order(50, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert sorted(first) == list(range(50))


# --- curves by hand ----------------------------------------------------------------------------------


def test_curves_by_hand() -> None:
    """Four patches that add .4, .3, .2 and .05 to a probability of .05, hidden in the order 2 0 3 1."""
    score, patches, order = additive([0.4, 0.3, 0.2, 0.05]), patches_of(2, 2), torch.tensor([2, 0, 3, 1])
    deleted = deletion(score, patches, [order], [[0]], steps=4)
    assert deleted.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert deleted.prob[0].tolist() == pytest.approx([1.0, 0.8, 0.4, 0.35, 0.05])
    assert deleted.log_prob[0].tolist() == pytest.approx([math.log(p) for p in (1.0, 0.8, 0.4, 0.35, 0.05)])
    assert deleted.auc.tolist() == pytest.approx([0.25 * (1.0 / 2 + 0.8 + 0.4 + 0.35 + 0.05 / 2)])

    inserted = insertion(score, patches, [order], [[0]], steps=2)
    assert inserted.prob[0].tolist() == pytest.approx([0.05, 0.65, 1.0])
    assert inserted.auc.tolist() == pytest.approx([0.5 * (0.05 / 2 + 0.65 + 1.0 / 2)])

    assert sufficiency(score, patches, [order], [[0]], top=0.5).tolist() == pytest.approx([math.log(0.65)])
    assert necessity(score, patches, [order], [[0]], top=0.5).tolist() == pytest.approx([-math.log(0.4)])
    assert necessity(score, patches, [order], [[0]], top=0.1).tolist() == pytest.approx([-math.log(0.8)])  # one patch


def test_steps_that_do_not_divide_the_patches() -> None:
    """Five patches in two steps: halves are rounded up, and the area is under the shares that were really hidden."""
    curve = deletion(additive([0.1] * 5), patches_of(1, 5), [torch.arange(5)], [[0]], steps=2)
    assert curve.share.tolist() == [0, 0.6, 1]
    assert curve.auc.tolist() == pytest.approx([0.6 * (0.55 + 0.25) / 2 + 0.4 * (0.25 + 0.05) / 2])


def test_a_word_that_does_not_depend_on_the_picture() -> None:
    judged = faithfulness(Oracle(lambda _: [0.3]), patches_of(2, 2), [torch.arange(4)], [[0]], steps=4)
    assert judged.deletion.auc.tolist() == judged.insertion.auc.tolist() == pytest.approx([0.3])
    assert judged.sufficiency.tolist() == judged.necessity.tolist() == pytest.approx([0.0])


def test_the_log_probability_of_a_word_is_the_sum_of_its_tokens() -> None:
    score = Oracle(lambda visible: [0.5, 0.9 if visible[0] else 0.1, 0.8 if visible[1] else 0.2])
    curve = deletion(score, patches_of(1, 2), [torch.tensor([0, 1]), torch.tensor([1, 0])], [[1, 2], [0]], steps=2)
    assert curve.prob[0].tolist() == pytest.approx([0.9 * 0.8, 0.1 * 0.8, 0.1 * 0.2])
    assert curve.prob[1].tolist() == pytest.approx([0.5, 0.5, 0.5])


def test_patches_of_a_video_are_deleted_by_their_frames() -> None:
    weights = [0.1, 0.0, 0.3, 0.2]  # two frames of two patches
    score, patches = additive(weights), patches_of(1, 2, frames=2)
    order = map_order(torch.tensor(weights).view(2, 1, 2))
    assert deletion(score, patches, [order], [[0]], steps=4).prob[0].tolist() == pytest.approx(
        [0.65, 0.35, 0.15, 0.05, 0.05]
    )


def test_equal_versions_are_read_once() -> None:
    orders = [torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 3]), torch.tensor([3, 2, 1, 0])]
    score = Oracle(lambda visible: [0.1 + 0.1 * sum(visible)] * 3)
    judged = faithfulness(score, patches_of(2, 2), orders, [[0], [1], [2]], steps=4, top=0.25)
    # hiding from one end is showing from the other: all 5 + 3 versions but for whole and nothing are shared
    expected = {tuple(p >= k for p in range(4)) for k in range(5)} | {tuple(p < k for p in range(4)) for k in range(5)}
    assert len(score.seen) == len(expected) == judged.n_versions
    assert set(score.seen) == expected
    assert judged.deletion.n_versions == judged.insertion.n_versions == len(expected)

    score.seen.clear()
    assert deletion(score, patches_of(2, 2), orders[:2], [[0], [1]], steps=4).n_versions == len(score.seen) == 5


# --- properties --------------------------------------------------------------------------------------

WEIGHTS = st.lists(st.integers(0, 20).map(lambda n: n / 200), min_size=6, max_size=6)
ORDERS = st.permutations(range(6)).map(torch.tensor)


@given(WEIGHTS, ORDERS, st.integers(1, 6))
def test_the_order_of_the_weights_is_best_and_its_reverse_worst(
    weights: list[float], order: Tensor, steps: int
) -> None:
    score, patches = additive(weights), patches_of(2, 3)
    best = map_order(torch.tensor(weights).view(2, 3))
    orders, words = [best, order, reversed_order(best)], [[0]] * 3
    deleted, inserted = (curve(score, patches, orders, words, steps=steps) for curve in (deletion, insertion))
    assert (deleted.prob.diff(dim=1) <= 1e-12).all()
    assert (inserted.prob.diff(dim=1) >= -1e-12).all()
    assert (deleted.auc.diff() >= -1e-12).all()
    assert (inserted.auc.diff() <= 1e-12).all()
    judged = faithfulness(score, patches, orders, words, steps=steps, top=0.4)
    assert (judged.necessity.diff() <= 1e-12).all()
    assert (judged.sufficiency.diff() <= 1e-12).all()


@given(WEIGHTS, ORDERS)
def test_deleting_an_order_is_inserting_its_reverse_backwards(weights: list[float], order: Tensor) -> None:
    score, patches = additive(weights), patches_of(2, 3)
    deleted = deletion(score, patches, [order], [[0]], steps=6)
    inserted = insertion(score, patches, [reversed_order(order)], [[0]], steps=6)
    torch.testing.assert_close(deleted.log_prob, inserted.log_prob.flip(1))
    torch.testing.assert_close(deleted.auc, inserted.auc)


@given(WEIGHTS, ORDERS, ORDERS, st.integers(1, 6), st.floats(0.01, 0.99))
def test_all_at_once_is_one_by_one(weights: list[float], a: Tensor, b: Tensor, steps: int, top: float) -> None:
    score, patches = Oracle(lambda v: [0.05 + np.dot(weights, v), 0.9 - np.dot(weights, v) / 2]), patches_of(2, 3)
    judged = faithfulness(score, patches, [a, b], [[0], [0, 1]], steps=steps, top=top)
    assert judged.n_versions == len(score.seen)
    for together, curve in ((judged.deletion, deletion), (judged.insertion, insertion)):
        alone = curve(score, patches, [a, b], [[0], [0, 1]], steps=steps)
        assert together.share.tolist() == alone.share.tolist()
        assert together.log_prob.tolist() == alone.log_prob.tolist()
        assert together.n_versions == alone.n_versions
    assert judged.sufficiency.tolist() == sufficiency(score, patches, [a, b], [[0], [0, 1]], top=top).tolist()
    assert judged.necessity.tolist() == necessity(score, patches, [a, b], [[0], [0, 1]], top=top).tolist()


# --- bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "options", "said"),
    [
        ((2, 2, 2), {}, r"has 1 frames but the grid .* = \(2, 2, 2\) has 2"),
        ((1, 9, 2), {}, r"8 x 8 pixels.*9 rows of 2 patches"),
        ((1, 2, 2), {"extent": (0.5, 0.5, 0.6, 0.6)}, r"with at least one pixel each"),
        ((1, 2, 2), {"fill": "black"}, r"fill is 'black', expected 'grey', 'mean' or 'blur'"),
    ],
)
def test_pictures_that_cannot_be_cut(grid: tuple[int, int, int], options: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        cut_picture(colourful(2, 2), grid, **options)  # type: ignore[arg-type]


def test_orders_that_cannot_be_made() -> None:
    with pytest.raises(InputError, match=r"shape \(1, 2\) with NaN"):
        map_order(torch.tensor([[0.0, math.nan]]))
    with pytest.raises(InputError, match="no values"):
        map_order(torch.zeros(0, 3))
    with pytest.raises(InputError, match=r"mask of bool \(2, 2\), expected bool \(8, 8\)"):
        mask_order(patches_of(2, 2), np.ones((2, 2), bool))
    with pytest.raises(InputError, match="mask of float64"):
        mask_order(patches_of(2, 2), np.ones((8, 8)))


ORDER = torch.arange(4)


@pytest.mark.parametrize(
    ("orders", "words", "options", "said"),
    [
        ([], [], {}, "0 orders for 0 words"),
        ([ORDER], [[0], [0]], {}, "1 orders for 2 words"),
        ([ORDER[:3]], [[0]], {}, "each number from 0 once"),
        ([torch.zeros(4, dtype=torch.long)], [[0]], {}, "each number from 0 once"),
        ([ORDER], [[1]], {}, r"target indices \(1,\), expected at least one of 0 to 0"),
        ([ORDER], [[-1]], {}, r"target indices \(-1,\)"),
        ([ORDER], [[]], {}, r"target indices \(\)"),
        ([ORDER], [[0]], {"steps": 0}, "steps is 0, expected 1 to 4"),
        ([ORDER], [[0]], {"steps": 5}, "steps is 5, expected 1 to 4"),
        ([ORDER], [[0]], {"top": 0.0}, "top is 0.0, expected a share"),
        ([ORDER], [[0]], {"top": math.nan}, "top is nan, expected a share"),
    ],
)
def test_bad_questions(orders: list[Tensor], words: list[list[int]], options: dict[str, float], said: str) -> None:
    with pytest.raises(InputError, match=said):
        faithfulness(Oracle(lambda _: [0.5]), patches_of(2, 2), orders, words, **{"steps": 2, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda versions: torch.zeros(len(list(versions)) - 1, 3), r"shape \[2, 3\]"),
        (lambda versions: torch.zeros(len(list(versions))), r"shape \[3\]"),
        (lambda versions: torch.full((len(list(versions)), 1), math.nan), "NaN among them"),
    ],
)
def test_bad_scores(score: Score, said: str) -> None:
    with pytest.raises(InputError, match=rf"3 versions of the picture came with {said}"):
        deletion(score, patches_of(2, 2), [ORDER], [[0]], steps=2)


# --- real models -------------------------------------------------------------------------------------


def wrapped(family: str) -> fastattr.Model:
    held = TINY[family]()
    return fastattr.wrap(held.hf_model, held.processor)


def one_by_one(model: fastattr.Model, variants: Sequence[Sequence[Visual]], prompt: str, ids: Tensor) -> Tensor:
    readings = [adapters.replay(model, adapters.encode(model, images, prompt), ids) for images in variants]
    return torch.stack([log_probs(reading, model.head) for reading in readings])


@pytest.mark.parametrize("family", list(TINY))
def test_a_batch_is_one_by_one_in_every_family(family: str) -> None:
    """Two images of different sizes, of which either changes."""
    model = wrapped(family)
    variants = [
        [Visual((picture(seed=a),)), Visual((picture(48, 80, seed=b),))] for a, b in ((0, 1), (2, 1), (0, 3), (4, 5))
    ]
    ids = adapters.encode_response(model, ANSWER)
    expected = one_by_one(model, variants, PROMPT, ids)
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # the images matter
    for batch_size in (1, 3, 4):
        found = log_probs_of_images(model, variants, PROMPT, ids, batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_vl", "llava_pixtral"])
def test_images_of_different_sizes_are_read_one_by_one(family: str) -> None:
    model = wrapped(family)
    variants = [[Visual((picture(height, width),))] for height, width in ((67, 91), (91, 67), (40, 40))]
    ids = adapters.encode_response(model, ANSWER)
    found = log_probs_of_images(model, variants, PROMPT, ids, 3)
    torch.testing.assert_close(found, one_by_one(model, variants, PROMPT, ids), rtol=1e-4, atol=1e-4)


def test_images_are_taken_a_batch_at_a_time() -> None:
    model = wrapped("llava_clip")
    forwards: list[int] = []
    handle = model.hf_model.register_forward_pre_hook(lambda *_: forwards.append(taken))
    taken = 0

    def variants() -> Iterator[list[Visual]]:
        nonlocal taken
        for seed in range(5):
            taken += 1
            yield [Visual((picture(seed=seed),))]

    ids = adapters.encode_response(model, ANSWER)
    assert log_probs_of_images(model, variants(), PROMPT, ids, 2).shape == (5, len(ids))
    assert forwards == [2, 4, 5]
    handle.remove()
    assert log_probs_of_images(model, [], PROMPT, ids).shape == (0, len(ids))
    with pytest.raises(InputError, match="batch_size is 0"):
        log_probs_of_images(model, variants(), PROMPT, ids, 0)


@pytest.fixture(scope="module")
def shapes() -> fastattr.Model:
    return fastattr.load("shapes")


def score_of(model: fastattr.Model, exchange: scenes.Exchange, ids: Tensor, batch_size: int = 4) -> Score:
    def score(versions: Iterable[Visual]) -> Tensor:
        return log_probs_of_images(model, ([version] for version in versions), exchange.prompt, ids, batch_size)

    return score


@pytest.mark.parametrize("seed", [scenes.HELD_OUT + 30_000_000 + n for n in range(3)])
def test_hiding_the_object_hurts_more_than_hiding_the_rest(shapes: fastattr.Model, seed: int) -> None:
    scene = scenes.make_scene(seed)
    exchange = scenes.list_objects(scene)
    encoded = shapes.processor.tokenizer(exchange.response, add_special_tokens=False, return_offsets_mapping=True)
    words, best, end = [], [], 0
    visual = Visual((scene.image,))
    patches = cut_picture(visual, (1, 12, 12))
    for item, mask in zip(scene.objects, scene.masks, strict=True):
        start = exchange.response.index(item.name, end)
        end = start + len(item.name)
        words.append([t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a < end and b > start])
        best.append(mask_order(patches, mask))
    ids = adapters.encode_response(shapes, exchange.response)
    worst = [reversed_order(order) for order in best]
    score = score_of(shapes, exchange, ids)
    good, bad = (faithfulness(score, patches, orders, words, steps=8) for orders in (best, worst))
    assert (good.deletion.auc < bad.deletion.auc - 0.2).all()
    assert (good.insertion.auc > bad.insertion.auc + 0.2).all()
    assert (good.necessity > bad.necessity).all()
    assert (good.sufficiency > bad.sufficiency).all()

    # whole and empty pictures are what they are elsewhere
    whole = log_probs(adapters.replay(shapes, adapters.encode(shapes, [visual], exchange.prompt), ids), shapes.head)
    blank = log_probs(
        adapters.replay(shapes, adapters.encode(shapes, [visual.blank()], exchange.prompt), ids), shapes.head
    )
    for ends, expected in ((good.deletion.log_prob[:, 0], whole), (good.deletion.log_prob[:, -1], blank)):
        spoken = torch.stack([expected[word].sum() for word in words]).double()
        torch.testing.assert_close(ends, spoken, rtol=1e-4, atol=1e-4)

    alone = faithfulness(score_of(shapes, exchange, ids, batch_size=1), patches, best, words, steps=8)
    torch.testing.assert_close(alone.deletion.log_prob, good.deletion.log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone.insertion.log_prob, good.insertion.log_prob, rtol=1e-4, atol=1e-4)
