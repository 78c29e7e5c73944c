"""Plausibility against hand-computed values and a brute-force threshold search."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastattr import metrics
from fastattr.errors import InputError
from fastattr.metrics import Noun, Plausibility


def brute_force_otsu(levels: np.ndarray) -> int:
    """The lowest level with the smallest within-class variance, from the definition."""
    best, best_threshold = math.inf, 0
    for threshold in range(255):
        classes = [levels[levels <= threshold].astype(np.float64), levels[levels > threshold].astype(np.float64)]
        if any(c.size == 0 for c in classes):
            continue
        within = sum(c.size * c.var() for c in classes)
        if within < best - 1e-9 * (1 + within):
            best, best_threshold = within, threshold
    return best_threshold


@given(st.lists(st.integers(0, 255), min_size=1, max_size=40))
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
            [[0.8, 0.0], [0.0, 0.0]],  # first half of the noun "circle"
            [[0.0, 0.8], [0.0, 0.0]],  # second half: together the top row
            [[0.4, 0.4], [0.8, 0.8]],  # the noun "square": threshold 102, the bottom row
            [[0.1, 0.3], [0.5, 0.9]],  # "the": levels 25 76 127 229
            [[0.0, 0.0], [0.0, 0.0]],  # "is"
        ]
    )
    top, left = np.array([[True, True], [False, False]]), np.array([[True, False], [True, False]])
    score = metrics.plausibility(maps, [Noun((0, 1), top), Noun((2,), left)], [(3,), (4,)])
    # "circle" is exact (threshold 0); "square" shares 1 of 3 pixels (threshold 102). The mean threshold is 51, so
    # one pixel of four of "the" is background, and all of "is"
    assert score.obj == pytest.approx((1 + 1 / 3) / 2)
    assert score.func == pytest.approx((1 / 4 + 1) / 2)
    assert score.f1 == pytest.approx(2 * (2 / 3) * (5 / 8) / (2 / 3 + 5 / 8))
    assert (score.n_nouns, score.n_functions, score.n_dropped) == (2, 2, 0)


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


def test_bootstrap_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        scene = rng.normal(0, 5, size=60)  # shared by both methods, so pairing must cancel it
        interval = metrics.paired_bootstrap(scene + rng.normal(0.3, 1, 60), scene, n=400, seed=seed)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_of_a_constant_difference_has_no_width() -> None:
    b = np.random.default_rng(1).normal(size=50)
    interval = metrics.paired_bootstrap(b + 0.25, b)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_is_decided_by_its_seed() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 40))
    assert metrics.paired_bootstrap(a, b, seed=3) == metrics.paired_bootstrap(a, b, seed=3)
    assert metrics.paired_bootstrap(a, b, seed=3) != metrics.paired_bootstrap(a, b, seed=4)


def test_bootstrap_refuses_scenes_that_do_not_pair() -> None:
    with pytest.raises(InputError, match="the same scenes in both"):
        metrics.paired_bootstrap(np.zeros(3), np.zeros(4))


def test_f1_difference_agrees_with_a_plain_loop_over_resamples() -> None:
    rng = np.random.default_rng(5)

    def scenes(shift: float) -> list[Plausibility]:
        return [
            Plausibility(float(rng.uniform(0, 0.5)) + shift, float(rng.uniform(0.5, 1)), 0.0, 1 + i % 4, 2 + i % 3, 0)
            for i in range(12)
        ]

    a, b = scenes(0.2), scenes(0.0)
    draws = np.random.default_rng(9).integers(12, size=(50, 12))
    differences = [metrics.pool([a[i] for i in row]).f1 - metrics.pool([b[i] for i in row]).f1 for row in draws]
    interval = metrics.f1_difference(a, b, n=50, seed=9)
    assert interval.mean == pytest.approx(metrics.pool(a).f1 - metrics.pool(b).f1)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(differences, [0.025, 0.975])))
