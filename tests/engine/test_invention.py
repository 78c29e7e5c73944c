"""AUROC and average precision against values by hand and plain loops over pairs and thresholds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastattr.errors import InputError
from fastattr.metrics import invention

Word = tuple[float, bool, int, int]  # score, label, bin, scene


def both_classes(words: list[Word]) -> bool:
    return len({label for _, label, _, _ in words}) == 2


# few distinct scores, so that ties are common
WORDS = st.lists(
    st.tuples(
        st.sampled_from([-math.inf, -2.5, 0.0, 0.1, 3.0, math.inf]), st.booleans(), st.integers(0, 2), st.integers(0, 4)
    ),
    min_size=2,
    max_size=25,
).filter(both_classes)


def columns(words: list[Word]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    scores, labels, bins, scenes = zip(*words, strict=True)
    return np.array(scores), np.array(labels), np.array(bins), np.array(scenes)


def loop_auroc(words: list[Word], *, within: bool = False) -> float:
    """From the definition; NaN without a pair."""
    outcomes = [
        1.0 if a[0] > b[0] else 0.5 if a[0] == b[0] else 0.0
        for a in words
        for b in words
        if a[1] and not b[1] and (not within or a[2] == b[2])
    ]
    return sum(outcomes) / len(outcomes) if outcomes else math.nan


def loop_average_precision(words: list[Word]) -> float:
    """For each True word, the precision among all that score at least as much."""
    precisions = []
    for score, label, _, _ in words:
        if label:
            passed = [other[1] for other in words if other[0] >= score]
            precisions.append(sum(passed) / len(passed))
    return sum(precisions) / len(precisions)


def test_auroc_by_hand() -> None:
    # True: 3, 1; False: 2, 1. Pairs: 3>2, 3>1, 1<2, 1=1
    assert invention.auroc(np.array([3, 1, 2, 1]), np.array([True, True, False, False])) == (1 + 1 + 0 + 0.5) / 4


def test_average_precision_by_hand() -> None:
    # in order: True (1/1), False, True (2/3), then a True and a False that pass together (3/5)
    scores = np.array([9, 8, 7, 6, 6])
    labels = np.array([True, False, True, True, False])
    assert invention.average_precision(scores, labels) == pytest.approx((1 + 2 / 3 + 3 / 5) / 3)


def test_bins_hide_what_position_alone_explains() -> None:
    # the score is the position; in each bin True and False words stand at the same places
    scores = np.array([0, 1, 0, 1, 8, 9, 8, 9, 8, 9])
    labels = np.array([True, True, False, False, True, True, True, True, False, False])
    bins = np.array([0] * 4 + [1] * 6)
    assert invention.auroc_within(scores, labels, bins) == 0.5
    # across bins 4 * 2 pairs are won and 2 * 2 lost
    assert invention.auroc(scores, labels) == pytest.approx((0.5 * (4 + 8) + 8) / 24)


@given(WORDS)
def test_auroc_is_the_share_of_pairs_in_order(words: list[Word]) -> None:
    scores, labels, bins, _ = columns(words)
    assert invention.auroc(scores, labels) == pytest.approx(loop_auroc(words))
    within = loop_auroc(words, within=True)
    if math.isnan(within):
        with pytest.raises(InputError, match="no pair to compare"):
            invention.auroc_within(scores, labels, bins)
    else:
        assert invention.auroc_within(scores, labels, bins) == pytest.approx(within)


@given(WORDS)
def test_average_precision_is_the_mean_precision_of_the_true_words(words: list[Word]) -> None:
    scores, labels, _, _ = columns(words)
    assert invention.average_precision(scores, labels) == pytest.approx(loop_average_precision(words))


@given(WORDS, st.randoms())
def test_only_the_order_of_scores_counts(words: list[Word], random: object) -> None:
    scores, labels, _, _ = columns(words)
    stretched = np.arctan(scores) * 7 - 3
    assert invention.auroc(stretched, labels) == invention.auroc(scores, labels)
    assert invention.average_precision(stretched, labels) == invention.average_precision(scores, labels)
    random.shuffle(words)  # type: ignore[attr-defined]
    shuffled, relabelled, _, _ = columns(words)
    assert invention.auroc(shuffled, relabelled) == pytest.approx(invention.auroc(scores, labels))
    assert invention.average_precision(shuffled, relabelled) == pytest.approx(
        invention.average_precision(scores, labels)
    )


@given(WORDS)
def test_flipping_score_or_labels_turns_auroc_round(words: list[Word]) -> None:
    scores, labels, _, _ = columns(words)
    value = invention.auroc(scores, labels)
    assert invention.auroc(-scores, labels) == pytest.approx(1 - value)
    assert invention.auroc(-scores, ~labels) == pytest.approx(value)


@given(WORDS)
def test_intervals_agree_with_a_loop_that_copies_the_drawn_scenes(words: list[Word]) -> None:
    scores, labels, bins, scenes = columns(words)
    names = sorted(set(scenes.tolist()))
    counts = np.random.default_rng(7).multinomial(len(names), [1 / len(names)] * len(names), size=12)
    drawn = [
        [word for name, count in zip(names, row, strict=True) for word in words * count if word[3] == name]
        for row in counts.tolist()
    ]
    for within in (False, True):
        values = [value for copies in drawn if not math.isnan(value := loop_auroc(copies, within=within))]
        given_bins = bins if within else None
        if not values or math.isnan(loop_auroc(words, within=within)):
            with pytest.raises(InputError, match="pair to compare"):
                invention.auroc_interval(scores, labels, scenes, given_bins, n=12, seed=7)
            continue
        interval = invention.auroc_interval(scores, labels, scenes, given_bins, n=12, seed=7)
        assert interval.mean == pytest.approx(loop_auroc(words, within=within))
        assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])))


def test_interval_covers_the_true_auroc_as_often_as_it_says_though_words_of_a_scene_agree() -> None:
    rng = np.random.default_rng(0)
    scenes = np.repeat(np.arange(60), 6)
    labels = np.tile([True, False, False] * 2, 60)

    def won(variance: float) -> float:
        """How often a normal difference of mean 1 is above 0."""
        return 0.5 * (1 + math.erf(1 / math.sqrt(2 * variance)))

    truth = 59 / 60 * won(2 * (1.5 + 1)) + 1 / 60 * won(2 * 1)  # words of one scene share its part
    covered = 0
    for seed in range(200):
        shared = rng.normal(0, math.sqrt(1.5), 60)[scenes]
        scores = shared + rng.normal(0, 1, 360) + labels
        interval = invention.auroc_interval(scores, labels, scenes, n=200, seed=seed)
        covered += interval.low <= truth <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_a_difference_pairs_the_scenes() -> None:
    rng = np.random.default_rng(1)
    scenes, labels = np.repeat(np.arange(30), 4), np.tile([True, False, False, False], 30)
    a, b = rng.normal(size=120) + 2 * labels, rng.normal(size=120) + labels
    same = invention.auroc_difference(a, 3 * a + 1, labels, scenes)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    interval = invention.auroc_difference(a, b, labels, scenes, seed=3)
    assert interval.mean == pytest.approx(invention.auroc(a, labels) - invention.auroc(b, labels))
    assert interval.low < interval.mean < interval.high
    assert interval == invention.auroc_difference(a, b, labels, scenes, seed=3)
    assert interval != invention.auroc_difference(a, b, labels, scenes, seed=4)
    back = invention.auroc_difference(b, a, labels, scenes, seed=3)
    assert (back.mean, back.low, back.high) == pytest.approx((-interval.mean, -interval.high, -interval.low))


def test_combination_by_hand() -> None:
    # surprise 2 with the image and 8 without: a quarter is left; then 2 of 2, all is left; then more than before
    assert invention.combine(np.array([6.0, 0.0, -3.0]), np.array([-2.0, -2.0, -4.0])) == pytest.approx(
        [-math.sqrt(2 * 1 / 4), -math.sqrt(2 * 1), -math.sqrt(4 * 4 / 1)]
    )
    # certain with and without the image
    assert invention.combine(np.array([0.0]), np.array([0.0])).tolist() == [0.0]


@given(st.floats(-20, -0.1), st.floats(0, 20), st.floats(0.1, 5))
def test_combination_falls_with_either_score(log_prob: float, blank_surprise: float, step: float) -> None:
    def combined(log_prob: float, evidence: float) -> float:
        return float(invention.combine(np.array([evidence]), np.array([log_prob]))[0])

    evidence = blank_surprise + log_prob
    assert combined(log_prob, evidence) <= combined(log_prob, evidence + step) < 0
    assert combined(log_prob - step, evidence - step) < combined(log_prob, evidence)  # as likely without the image


def test_position_bins_hold_equal_shares_and_never_split_a_position() -> None:
    assert invention.position_bins(np.arange(8), 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert invention.position_bins(np.array([0, 1, 1, 2]), 2).tolist() == [0, 1, 1, 1]  # on an edge: the later bin
    assert len(set(invention.position_bins(np.array([5, 5, 5, 5]), 4).tolist())) == 1
    positions = np.array([1, 9, 1, 2, 9, 1, 7])
    bins = invention.position_bins(positions, 3)
    order = np.argsort(positions, kind="stable")
    assert (np.diff(bins[order]) >= 0).all()
    assert all(len(set(bins[positions == p].tolist())) == 1 for p in positions)


SCORES, LABELS = np.array([1.0, 2.0]), np.array([True, False])


def test_what_cannot_be_compared_is_refused() -> None:
    for measure in (invention.auroc, invention.average_precision):
        with pytest.raises(InputError, match="0 words labelled True and 2 labelled False"):
            measure(SCORES, np.array([False, False]))
        with pytest.raises(InputError, match="1 of 2 scores are NaN"):
            measure(np.array([math.nan, 1.0]), LABELS)
        with pytest.raises(InputError, match="labels are int64, expected bool"):
            measure(SCORES, np.array([1, 0]))
        with pytest.raises(InputError, match=r"scores of shape \(2,\) and labels of shape \(3,\)"):
            measure(SCORES, np.array([True, False, True]))
    with pytest.raises(InputError, match="bins of shape"):
        invention.auroc_within(SCORES, LABELS, np.zeros(3, int))
    with pytest.raises(InputError, match="scenes of shape"):
        invention.auroc_interval(SCORES, LABELS, np.zeros(3, int))
    with pytest.raises(InputError, match="asked for 0 draws"):
        invention.auroc_interval(SCORES, LABELS, np.zeros(2, int), n=0)
    with pytest.raises(InputError, match="1 of 2 words have evidence or log_prob that is not finite"):
        invention.combine(SCORES, np.array([0.0, -math.inf]))
    with pytest.raises(InputError, match="log_prob of shape"):
        invention.combine(SCORES, np.zeros(3))
    with pytest.raises(InputError, match="at least one word and one bin"):
        invention.position_bins(np.array([]))
