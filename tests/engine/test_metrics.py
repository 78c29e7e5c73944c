"""Plausibility against hand-computed values and a brute-force threshold search."""

from __future__ import annotations

import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastattr import metrics
from fastattr.errors import InputError
from fastattr.metrics import Noun, NounScores, Plausibility
from fastattr.metrics.plausibility import NOUN_SCORES, SCORES


def brute_force_otsu(levels: np.ndarray) -> int:
    """The lowest level with the smallest variance within the two classes, from the definition in exact fractions."""
    values = [int(level) for level in levels.ravel()]
    within = {}
    for threshold in range(255):
        classes = [[v for v in values if v <= threshold], [v for v in values if v > threshold]]
        if all(classes):
            within[threshold] = sum(sum(v * v for v in c) - Fraction(sum(c) ** 2, len(c)) for c in classes)
    return min(within, key=lambda threshold: (within[threshold], threshold)) if within else 0


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
@example([31, 31, 95, 95, 127, 127, 159, 159, 191, 255])  # a tie of 95 and 127 that rounding would give to 127
def test_otsu_is_the_best_of_all_thresholds(values: list[int]) -> None:
    levels = np.array(values, np.uint8)
    assert metrics.otsu_threshold(levels) == brute_force_otsu(levels)


def test_otsu_of_two_levels_is_the_lower_and_of_a_constant_map_zero() -> None:
    assert metrics.otsu_threshold(np.array([[10, 10], [10, 200]], np.uint8)) == 10
    assert metrics.otsu_threshold(np.full((3, 3), 77, np.uint8)) == 0


@pytest.mark.parametrize("values", [np.array([0.2, 0.8]), np.zeros((0, 4), np.uint8)])
def test_otsu_refuses_what_is_not_a_quantised_map(values: np.ndarray) -> None:
    with pytest.raises(InputError, match="quantise"):
        metrics.otsu_threshold(values)


def test_quantise_truncates_and_interpolates_between_half_pixel_centres() -> None:
    maps = torch.tensor([[[0.0, 1.0]]])
    # centres of four output pixels fall at -0.25, 0.25, 0.75 and 1.25 of the two input pixels
    assert metrics.quantise(maps, (1, 4)).tolist() == [[[0, 63, 191, 255]]]


def test_no_map_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no values"):
        metrics.quantise(torch.zeros(0, 3), (2, 2))


@pytest.mark.parametrize("bad", [1.01, -0.01, math.nan])
def test_maps_outside_the_unit_interval_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match=r"expected \[\.\.\. h w\] in \[0, 1\]"):
        metrics.quantise(torch.tensor([[0.5, bad]]), (2, 2))


def test_obj_iou_by_hand() -> None:
    # foreground is the left column (2 pixels); the mask is the top row (2 pixels); they share 1 of 3
    noun_map = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    mask = np.array([[True, True], [False, False]])
    assert metrics.obj_iou(noun_map, mask) == pytest.approx(1 / 3)


def test_obj_iou_upsamples_the_map_to_the_mask() -> None:
    noun_map = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    mask = np.zeros((4, 8), dtype=bool)
    # levels of a row: 255 191 63 0 ...; Otsu splits below 191, so the first two columns are foreground
    mask[:, :2] = True
    assert metrics.obj_iou(noun_map, mask) == 1.0


def test_obj_iou_of_an_all_zero_map_is_zero() -> None:
    assert metrics.obj_iou(torch.zeros(3, 3), np.eye(3, dtype=bool)) == 0.0


def test_obj_iou_refuses_a_mask_that_is_empty_or_not_bool() -> None:
    with pytest.raises(InputError, match="without a single pixel"):
        metrics.obj_iou(torch.zeros(2, 2), np.zeros((2, 2), dtype=bool))
    with pytest.raises(InputError, match=r"expected bool \[H W\]"):
        metrics.obj_iou(torch.zeros(2, 2), np.ones((2, 2)))


def scores_by_loops(values: list[list[float]], mask: list[list[bool]]) -> NounScores:
    """The definitions, pixel by pixel, for a map that is already of the mask's size."""
    levels = np.array([[int(value * 255) for value in row] for row in values], np.uint8)
    threshold = brute_force_otsu(levels)
    pixels = [
        (value, int(level) > threshold, inside)
        for rows in zip(values, levels, mask, strict=True)
        for value, level, inside in zip(*rows, strict=True)
    ]
    both = sum(found and inside for _, found, inside in pixels)
    either = sum(found or inside for _, found, inside in pixels)
    n_found = sum(found for _, found, _ in pixels)
    total, peak = sum(value for value, _, _ in pixels), max(value for value, _, _ in pixels)
    at_peak = [inside for value, _, inside in pixels if value == peak]
    return NounScores(
        obj=both / either,
        precision=both / n_found if n_found else 0.0,
        recall=both / sum(inside for _, _, inside in pixels),
        soft_iou=sum(min(v, i) for v, _, i in pixels) / sum(max(v, i) for v, _, i in pixels),
        pointing=sum(at_peak) / len(at_peak) if peak else 0.0,
        mass=sum(value for value, _, inside in pixels if inside) / total if total else 0.0,
    )


def scores_of(scores: NounScores | Plausibility) -> list[float]:
    return [getattr(scores, name) for name in NOUN_SCORES]


@st.composite
def maps_and_masks(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]]]:
    """A small map in eighths, which floats hold exactly, and a mask that is not empty."""
    height, width = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    eighths = draw(st.lists(st.integers(0, 8), min_size=height * width, max_size=height * width))
    flags = draw(st.lists(st.booleans(), min_size=height * width, max_size=height * width).filter(any))
    rows = range(0, height * width, width)
    return [[v / 8 for v in eighths[i : i + width]] for i in rows], [flags[i : i + width] for i in rows]


def test_noun_scores_by_hand() -> None:
    # levels 204 102 0 / 51 153 0; Otsu splits above 51, so the foreground is three pixels, two of them in the mask
    noun_map = torch.tensor([[0.8, 0.4, 0.0], [0.2, 0.6, 0.0]])
    mask = np.array([[True, True, False], [False, False, False]])
    scores = metrics.noun_scores(noun_map, mask)
    assert (scores.obj, scores.precision, scores.recall) == pytest.approx((2 / 3, 2 / 3, 1))
    assert scores.soft_iou == pytest.approx((0.8 + 0.4) / (1 + 1 + 0.2 + 0.6))
    assert (scores.pointing, scores.mass) == pytest.approx((1, 1.2 / 2))


@given(maps_and_masks())
def test_noun_scores_follow_the_definitions(case: tuple[list[list[float]], list[list[bool]]]) -> None:
    values, mask = case
    scores = metrics.noun_scores(torch.tensor(values), np.array(mask))
    assert scores_of(scores) == pytest.approx(scores_of(scores_by_loops(values, mask)))


def test_a_map_that_is_the_mask_scores_one_everywhere_and_its_inverse_zero() -> None:
    mask = np.array([[True, False, False], [True, True, False]])
    exact = torch.tensor(mask).float()
    assert scores_of(metrics.noun_scores(exact, mask)) == [1.0] * 6
    assert scores_of(metrics.noun_scores(1 - exact, mask)) == [0.0] * 6


@pytest.mark.parametrize("mask", [np.eye(6, dtype=bool), np.ones((6, 6), dtype=bool)])
def test_an_all_zero_map_scores_zero_everywhere(mask: np.ndarray) -> None:
    assert scores_of(metrics.noun_scores(torch.zeros(3, 3), mask)) == [0.0] * 6


def test_a_map_too_dark_for_a_single_level_still_points() -> None:
    # below 1/255 nothing is foreground, yet where the map is strongest and where its sum lies are known
    scores = metrics.noun_scores(torch.tensor([[1e-3, 0.0], [0.0, 3e-3]]), np.array([[False, False], [False, True]]))
    assert (scores.obj, scores.precision, scores.recall) == (0, 0, 0)
    assert (scores.pointing, scores.mass) == pytest.approx((1, 0.75))


@pytest.mark.parametrize("width", [48, 77, 84, 336, 448])
def test_equal_peaks_tie_in_an_upsampled_map(width: int) -> None:
    peaks = torch.zeros(1, 12)
    peaks[0, 2] = peaks[0, 9] = 0.7  # mirror images of each other
    left = np.arange(width)[None].repeat(2, axis=0) < width / 2 - 1
    assert metrics.noun_scores(peaks, left).pointing == 0.5


@given(maps_and_masks(), st.integers(1, 12))
def test_brightness_moves_neither_pointing_nor_mass(
    case: tuple[list[list[float]], list[list[bool]]], halvings: int
) -> None:
    noun_map, mask = torch.tensor(case[0]), np.array(case[1]).repeat(3, axis=0).repeat(2, axis=1)
    bright, dark = metrics.noun_scores(noun_map, mask), metrics.noun_scores(noun_map * 0.5**halvings, mask)
    assert (dark.pointing, dark.mass) == pytest.approx((bright.pointing, bright.mass))


def test_noun_scores_refuses_several_maps() -> None:
    with pytest.raises(InputError, match=r"expected \[h w\]; pass one word's map"):
        metrics.noun_scores(torch.zeros(2, 3, 3), np.eye(3, dtype=bool))


def test_func_iou_is_the_share_at_or_below_the_threshold() -> None:
    levels = np.array([[10, 20], [30, 40]], np.uint8)
    assert metrics.func_iou(levels, 20.0) == 0.5
    assert metrics.func_iou(levels, 9.5) == 0.0


@pytest.mark.parametrize("threshold", [0.0, 100.0])
def test_func_iou_of_an_all_zero_map_is_one(threshold: float) -> None:
    assert metrics.func_iou(np.zeros((5, 5), np.uint8), threshold) == 1.0


def test_f1_is_the_harmonic_mean() -> None:
    assert metrics.f1_iou(0.25, 0.75) == pytest.approx(0.375)
    assert metrics.f1_iou(0.0, 0.0) == 0.0
    assert math.isnan(metrics.f1_iou(0.5, math.nan))


def test_plausibility_by_hand() -> None:
    maps = torch.tensor(
        [
            [[0.8, 0.0], [0.2, 0.0]],  # first half of the noun "circle": threshold 0, three quarters of it wrong
            [[0.8, 0.8], [0.2, 0.2]],  # second half: threshold 51, exactly the top row
            [[0.4, 0.4], [0.8, 0.8]],  # the noun "square": threshold 102, the bottom row
            [[0.1, 0.3], [0.5, 0.9]],  # first half of "the": levels 25 76 127 229
            [[0.1, 0.1], [0.1, 0.9]],  # second half
            [[0.0, 0.0], [0.0, 0.0]],  # "is"
        ]
    )
    top, left = np.array([[True, True], [False, False]]), np.array([[True, False], [True, False]])
    score = metrics.plausibility(maps, [Noun((0, 1), top), Noun((2,), left)], [(3, 4), (5,)])
    # "circle" is as good as its better half, which is exact; "square" shares 1 of 3 pixels. The mean threshold is
    # (51 + 102) / 2, so of "the" a half and three quarters are background, and all of "is"
    assert score.obj == pytest.approx((1 + 1 / 3) / 2)
    assert score.func == pytest.approx((5 / 8 + 1) / 2)
    assert score.f1 == pytest.approx(2 * (2 / 3) * (13 / 16) / (2 / 3 + 13 / 16))
    assert (score.n_nouns, score.n_functions, score.n_dropped) == (2, 2, 0)
    # "circle" is .8 on its two pixels and .2 beside; "square" has .4 + .8 inside and as much outside
    assert (score.precision, score.recall) == pytest.approx(((1 + 1 / 2) / 2, (1 + 1 / 2) / 2))
    assert score.soft_iou == pytest.approx((1.6 / 2.4 + 1.2 / (2 + 1.2)) / 2)
    assert (score.pointing, score.mass) == pytest.approx(((1 + 1 / 2) / 2, (0.8 + 1 / 2) / 2))


def test_the_means_of_a_response_are_those_of_the_best_tokens_of_its_nouns() -> None:
    maps = torch.rand(4, 5, 6, generator=torch.Generator().manual_seed(1))
    masks = np.random.default_rng(1).random((3, 20, 18)) < 0.3
    nouns = [Noun((0,), masks[0]), Noun((1, 2), masks[1]), Noun((3,), masks[2])]
    alone = [
        max((metrics.noun_scores(maps[target], noun.mask) for target in noun.targets), key=lambda scores: scores.obj)
        for noun in nouns
    ]
    means = np.mean([scores_of(scores) for scores in alone], axis=0)
    assert scores_of(metrics.plausibility(maps, nouns, [(1,)])) == pytest.approx(means)


def test_words_that_cannot_be_scored_are_counted() -> None:
    maps = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(0))
    seen, hidden = np.eye(4, dtype=bool), np.zeros((4, 4), dtype=bool)
    score = metrics.plausibility(maps, [Noun((0,), seen), Noun((1,), hidden), Noun((), seen)], [(2,), ()])
    assert (score.n_nouns, score.n_functions, score.n_dropped) == (1, 1, 3)
    alone = metrics.plausibility(maps, [Noun((0,), seen)], [(2,)])
    assert (score.obj, score.func, score.f1) == (alone.obj, alone.func, alone.f1)


def test_without_a_noun_function_words_have_no_threshold_and_are_dropped() -> None:
    score = metrics.plausibility(torch.zeros(2, 3, 3), [], [(0,), (1,)])
    assert (score.n_nouns, score.n_functions, score.n_dropped) == (0, 0, 2)
    assert math.isnan(score.obj) and math.isnan(score.func) and math.isnan(score.f1)


def test_plausibility_refuses_words_and_masks_that_do_not_fit() -> None:
    maps, mask = torch.zeros(2, 3, 3), np.eye(3, dtype=bool)
    with pytest.raises(InputError, match=r"target indices \(2,\), expected 0 to 1"):
        metrics.plausibility(maps, [Noun((2,), mask)], [])
    with pytest.raises(InputError, match="expected one size"):
        metrics.plausibility(maps, [Noun((0,), mask), Noun((1,), np.eye(4, dtype=bool))], [])
    with pytest.raises(InputError, match=r"expected \[target h w\]"):
        metrics.plausibility(maps[None], [Noun((0,), mask)], [])


def test_pooling_counts_every_word_once() -> None:
    small = Plausibility(1.0, 0.5, 2 / 3, n_nouns=1, n_functions=2, n_dropped=1)
    large = Plausibility(0.2, 0.8, 0.32, n_nouns=3, n_functions=2, n_dropped=2)
    empty = Plausibility(math.nan, math.nan, math.nan, 0, 0, n_dropped=4)
    pooled = metrics.pool([small, large, empty])
    assert pooled.obj == pytest.approx((1.0 + 3 * 0.2) / 4)
    assert pooled.func == pytest.approx((2 * 0.5 + 2 * 0.8) / 4)
    assert pooled.f1 == pytest.approx(metrics.f1_iou(0.4, 0.65))
    assert (pooled.n_nouns, pooled.n_functions, pooled.n_dropped) == (4, 4, 7)


def test_pooled_scores_are_the_means_over_all_nouns() -> None:
    maps = torch.rand(6, 4, 4, generator=torch.Generator().manual_seed(2))
    masks = np.random.default_rng(2).random((6, 12, 12)) < 0.4
    nouns = [Noun((i,), mask) for i, mask in enumerate(masks)]
    scenes = [metrics.plausibility(maps, part, [(0,)]) for part in (nouns[:1], nouns[1:4], [], nouns[4:])]
    means = np.mean([scores_of(metrics.noun_scores(maps[i], mask)) for i, mask in enumerate(masks)], axis=0)
    assert scores_of(metrics.pool(scenes)) == pytest.approx(means)


def test_scores_that_were_not_measured_are_not_made_up() -> None:
    pooled = metrics.pool([Plausibility(0.5, 0.5, 0.5, 1, 1, 0)])
    assert pooled.obj == 0.5 and math.isnan(pooled.mass)


def scenes_around(shift: float, rng: np.random.Generator) -> list[Plausibility]:
    def draw() -> float:
        return float(rng.uniform(0, 0.5)) + shift

    return [
        Plausibility(draw(), draw(), 0.0, 1 + i % 4, 2 + i % 3, 0, draw(), draw(), draw(), draw(), draw())
        for i in range(12)
    ]


@pytest.mark.parametrize("score", SCORES)
def test_a_difference_agrees_with_a_plain_loop_over_resamples(score: str) -> None:
    rng = np.random.default_rng(5)
    a, b = scenes_around(0.2, rng), scenes_around(0.0, rng)

    def pooled(scenes: list[Plausibility], chosen: np.ndarray) -> float:
        return float(getattr(metrics.pool([scenes[i] for i in chosen]), score))

    draws = np.random.default_rng(9).integers(12, size=(50, 12))
    differences = [pooled(a, row) - pooled(b, row) for row in draws]
    interval = metrics.difference(a, b, score, n=50, seed=9)
    assert interval.mean == pytest.approx(pooled(a, np.arange(12)) - pooled(b, np.arange(12)))
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
    if score == "f1":
        assert metrics.f1_difference(a, b, n=50, seed=9) == interval


def test_a_difference_in_no_known_score_is_refused() -> None:
    scene = Plausibility(0.5, 0.5, 0.5, 1, 1, 0)
    with pytest.raises(InputError, match="no score 'iou'; choose one of obj, precision"):
        metrics.difference([scene], [scene], "iou")


def test_the_package_stays_light() -> None:
    """Scores of finished maps need no model: nothing that runs one is loaded with them."""
    code = (
        "import sys, fastattr.metrics\n"
        "heavy = {'transformers', 'matplotlib', 'scipy', 'sklearn'} | "
        "{f'fastattr.metrics.{name}' for name in ('faithfulness', 'invention')}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
