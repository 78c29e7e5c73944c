"""How sure a difference is: intervals from drawing the scenes again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastattr.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    n: int = 2000,
    seed: int = 0,
    statistic: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Interval:
    """95 % percentile interval of `statistic(a) - statistic(b)` when the same scenes are drawn for both.

    Args:
        a, b: `[scene ...]`, one row a scene, in the same order.
        n: number of resamples.
        seed: decides the draws; equal seeds give equal intervals.
        statistic: from `[... scene column]` to `[...]`, for a figure that is not a mean of scenes such as a pooled
            F1; the mean over scenes when None.

    Raises:
        InputError: when `a` and `b` do not hold the same scenes, or none.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.size == 0:
        raise InputError(
            f"paired_bootstrap got {a.shape} and {b.shape} values, expected the same scenes in both, at least one"
        )
    measure = _mean_over_scenes if statistic is None else statistic
    draws = np.random.default_rng(seed).integers(len(a), size=(n, len(a)))
    low, high = np.quantile(measure(a[draws]) - measure(b[draws]), [0.025, 0.975])
    return Interval(float(measure(a[None])[0] - measure(b[None])[0]), float(low), float(high))


def _mean_over_scenes(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=1)
