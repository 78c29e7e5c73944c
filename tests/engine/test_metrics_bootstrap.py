"""The bootstrap covers what it says, pairs what it is given and repeats itself."""

from __future__ import annotations

import numpy as np
import pytest

from fastattr.errors import InputError
from fastattr.metrics import paired_bootstrap


def test_bootstrap_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        scene = rng.normal(0, 5, size=60)  # shared by both methods, so pairing must cancel it
        interval = paired_bootstrap(scene + rng.normal(0.3, 1, 60), scene, n=400, seed=seed)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_bootstrap_of_a_constant_difference_has_no_width() -> None:
    b = np.random.default_rng(1).normal(size=50)
    interval = paired_bootstrap(b + 0.25, b)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_bootstrap_is_decided_by_its_seed() -> None:
    a, b = np.random.default_rng(2).normal(size=(2, 40))
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)


def test_bootstrap_refuses_scenes_that_do_not_pair() -> None:
    with pytest.raises(InputError, match="the same scenes in both"):
        paired_bootstrap(np.zeros(3), np.zeros(4))
