"""How well a map agrees with what people see: plausibility in the protocol of TAM (arXiv 2506.23270, section 4.1).

A noun should light up its object (Obj-IoU), a function word should light up nothing (Func-IoU). An all-zero
map is perfect for a function word, so the two are always shown beside their harmonic mean (F1-IoU).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastattr.errors import InputError

LEVELS = 256


@dataclass(frozen=True)
class Noun:
    """A word that names something in the image.

    Attributes:
        targets: the response tokens that spell it; empty if it could not be found in the response.
        mask: bool `[H W]`, where the thing is.
    """

    targets: tuple[int, ...]
    mask: np.ndarray


@dataclass(frozen=True)
class Plausibility:
    """Scores in [0, 1] of one response, or of many pooled word by word.

    Attributes:
        obj: mean Obj-IoU of the nouns; NaN without nouns.
        func: mean Func-IoU of the function words; NaN without function words.
        f1: harmonic mean of the two; NaN if either is.
        n_nouns, n_functions: words behind the means.
        n_dropped: words that could not be scored: no tokens, an empty mask, or no noun to set the threshold.
    """

    obj: float
    func: float
    f1: float
    n_nouns: int
    n_functions: int
    n_dropped: int


@dataclass(frozen=True)
class Interval:
    """A difference and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def otsu_threshold(levels: np.ndarray) -> float:
    """The level that best splits a uint8 map into background (up to it) and foreground (above it).

    Maximises the variance between the two classes, as OpenCV's `THRESH_OTSU` does: the lowest level wins a tie,
    and a constant map, which cannot be split, gives 0.

    Args:
        levels: uint8, any shape, not empty.

    Returns:
        a whole number from 0 to 254.

    Raises:
        InputError: when `levels` is not uint8 or is empty.
    """
    if levels.dtype != np.uint8 or levels.size == 0:
        raise InputError(
            f"otsu_threshold got {levels.dtype} values of shape {levels.shape}, expected a map of uint8 levels that is "
            "not empty; turn a map in [0, 1] into levels with `quantise`"
        )
    counts = np.bincount(levels.ravel(), minlength=LEVELS).astype(np.float64)
    below = counts.cumsum()[:-1]  # up to and including each candidate
    above = levels.size - below
    sum_below = (counts * np.arange(LEVELS)).cumsum()
    sum_above = sum_below[-1] - sum_below[:-1]
    split = (below > 0) & (above > 0)
    distance = sum_below[:-1] / np.where(split, below, 1) - sum_above / np.where(split, above, 1)
    return float(np.where(split, below * above * distance**2, 0.0).argmax())


def quantise(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Upsample maps to an image's size and cut them to 256 levels.

    Args:
        maps: `[... h w]` in [0, 1].
        size: `(H, W)` of the image.

    Returns:
        uint8 `[... H W]`; bilinear with half-pixel centres, then `* 255` truncated.

    Raises:
        InputError: when a value is outside [0, 1] or not a number.
    """
    maps = torch.as_tensor(maps).detach().float().cpu()
    if maps.ndim < 2 or not bool(((maps >= 0) & (maps <= 1)).all()):
        found = f"[{maps.min():.4g}, {maps.max():.4g}]" if maps.numel() else "no values"
        raise InputError(
            f"quantise got maps of shape {tuple(maps.shape)} with values in {found}, expected [... h w] in [0, 1]; "
            "pass the normalised maps of an attribution"
        )
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    # interpolation may round to just above 1, which would wrap to level 0
    levels = (resized.clamp_(0, 1) * (LEVELS - 1)).to(torch.uint8)
    return levels.reshape(*maps.shape[:-2], *size).numpy()


def obj_iou(noun_map: Tensor, mask: np.ndarray) -> float:
    """Overlap of a noun's foreground (above its Otsu threshold) with its object.

    Args:
        noun_map: `[h w]` in [0, 1]; it is upsampled to the mask.
        mask: bool `[H W]`.

    Raises:
        InputError: when the mask is not bool `[H W]`, or empty, or the map is not in [0, 1].
    """
    _check_mask(mask)
    if not mask.any():
        raise InputError("obj_iou got a mask without a single pixel, expected an object; count such words as dropped")
    levels = quantise(noun_map, _size(mask))
    return _iou(levels > otsu_threshold(levels), mask)


def func_iou(levels: np.ndarray, threshold: float) -> float:
    """Share of a function word's map that is not foreground: at or below the mean threshold of the nouns.

    An all-zero map scores 1.0 whatever the threshold.

    Args:
        levels: uint8 `[H W]`, from `quantise`.
        threshold: 0 to 255.
    """
    return float((levels <= threshold).mean())


def f1_iou(obj: float, func: float) -> float:
    """Harmonic mean of Obj-IoU and Func-IoU; 0 when both are 0, NaN when either is."""
    return 0.0 if obj + func == 0 else 2 * obj * func / (obj + func)


def plausibility(maps: Tensor, nouns: Sequence[Noun], functions: Sequence[Sequence[int]]) -> Plausibility:
    """Score the maps of one response over one image.

    A word of several tokens gets the maximum of their maps. The threshold of the function words is the mean of the
    Otsu thresholds of this response's nouns.

    Args:
        maps: `[target h w]` in [0, 1]; the grid covers the whole image, or the masks are cropped to what it covers.
        nouns: the words that name something, with masks of one size.
        functions: the target indices of each function word.

    Raises:
        InputError: when a target is not in the maps, the masks differ in size, or the maps are not in [0, 1].
    """
    if maps.ndim != 3:
        raise InputError(f"plausibility got maps of shape {tuple(maps.shape)}, expected [target h w]; pass one frame")
    for targets in [noun.targets for noun in nouns] + list(functions):
        if any(not 0 <= target < len(maps) for target in targets):
            raise InputError(f"a word has target indices {tuple(targets)}, expected 0 to {len(maps) - 1}, one map each")
    for noun in nouns:
        _check_mask(noun.mask)
    sizes = {noun.mask.shape for noun in nouns}
    if len(sizes) > 1:
        raise InputError(f"plausibility got masks of sizes {sorted(sizes)}, expected one size: that of the image")

    scored = [noun for noun in nouns if noun.targets and noun.mask.any()]
    spelled = [targets for targets in functions if targets] if scored else []
    n_dropped = len(nouns) - len(scored) + len(functions) - len(spelled)
    if not scored:
        return Plausibility(math.nan, math.nan, math.nan, 0, 0, n_dropped)

    words = [noun.targets for noun in scored] + list(spelled)
    levels = quantise(torch.stack([maps[list(targets)].amax(0) for targets in words]), _size(scored[0].mask))
    thresholds = [otsu_threshold(word) for word in levels[: len(scored)]]
    objs = [_iou(word > t, noun.mask) for word, t, noun in zip(levels, thresholds, scored, strict=False)]
    funcs = [func_iou(word, float(np.mean(thresholds))) for word in levels[len(scored) :]]
    obj = float(np.mean(objs))
    func = float(np.mean(funcs)) if funcs else math.nan
    return Plausibility(obj, func, f1_iou(obj, func), len(objs), len(funcs), n_dropped)


def pool(scenes: Sequence[Plausibility]) -> Plausibility:
    """One score for many responses: every word counts once."""
    obj, func, f1 = (float(value) for value in _pooled(_sums(scenes)))
    return Plausibility(
        obj,
        func,
        f1,
        sum(scene.n_nouns for scene in scenes),
        sum(scene.n_functions for scene in scenes),
        sum(scene.n_dropped for scene in scenes),
    )


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


def f1_difference(a: Sequence[Plausibility], b: Sequence[Plausibility], n: int = 2000, seed: int = 0) -> Interval:
    """Difference in pooled F1-IoU of two methods on the same scenes; Obj, Func and F1 are recomputed in each resample.

    Raises:
        InputError: when `a` and `b` do not hold the same scenes, or none.
    """
    return paired_bootstrap(_sums(a), _sums(b), n, seed, lambda sums: _pooled(sums)[2])


def _mean_over_scenes(values: np.ndarray) -> np.ndarray:
    return values.mean(axis=1)


def _sums(scenes: Sequence[Plausibility]) -> np.ndarray:
    """float64 `[scene 4]`: summed Obj, nouns, summed Func, function words."""
    rows = [
        (
            s.obj * s.n_nouns if s.n_nouns else 0.0,  # the mean of no words is NaN
            s.n_nouns,
            s.func * s.n_functions if s.n_functions else 0.0,
            s.n_functions,
        )
        for s in scenes
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


def _pooled(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Obj, Func and F1 `[...]` of the scenes in `[... scene 4]`; NaN where there is no word to score."""
    obj_sum, nouns, func_sum, functions = np.moveaxis(sums.sum(axis=-2), -1, 0)
    obj = np.where(nouns > 0, obj_sum / np.maximum(nouns, 1), np.nan)
    func = np.where(functions > 0, func_sum / np.maximum(functions, 1), np.nan)
    total = obj + func
    return obj, func, np.where(total == 0, 0.0, 2 * obj * func / np.where(total == 0, 1.0, total))


def _iou(foreground: np.ndarray, mask: np.ndarray) -> float:
    return float((foreground & mask).sum() / (foreground | mask).sum())


def _check_mask(mask: np.ndarray) -> None:
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise InputError(f"a mask is {mask.dtype} of shape {mask.shape}, expected bool [H W]; threshold it first")


def _size(mask: np.ndarray) -> tuple[int, int]:
    height, width = mask.shape
    return height, width
