"""How well a map agrees with what people see: plausibility in the protocol of TAM (arXiv 2506.23270, section 4.1).

A noun should light up its object (Obj-IoU), a function word should light up nothing (Func-IoU). An all-zero
map is perfect for a function word, so the two are always shown beside their harmonic mean (F1-IoU).

The IoUs depend on a threshold. Beside them stand scores of a noun's map that do not: soft-IoU, the pointing game
(Zhang et al., arXiv 1608.00507, here without its tolerance of some pixels) and the mass inside the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastattr.errors import InputError
from fastattr.metrics.bootstrap import Interval, paired_bootstrap

LEVELS = 256
OTSU_TIE = 1e-12  # of the largest variance: what rounding may set between equal ones
PEAK_TIE = 1e-4  # of the peak: pixels this near to it tie; float32 interpolation sets equal peaks about 1e-5 apart


@dataclass(frozen=True)
class Noun:
    """A word that names something in the image.

    Attributes:
        targets: the response tokens that spell it, by their characters as in `attribution.find(word).targets`, never
            by tokenising the word again; empty if it could not be found in the response.
        mask: bool `[H W]`, where the thing is.
    """

    targets: tuple[int, ...]
    mask: np.ndarray


@dataclass(frozen=True)
class NounScores:
    """How well one noun's map lies on its object, each in [0, 1]; an all-zero map gets 0 everywhere.

    The first three are of the foreground, the pixels above the map's Otsu threshold. The others need no threshold.

    Attributes:
        obj: Obj-IoU, the overlap of foreground and mask.
        precision: share of the foreground that is inside the mask; 0 without a foreground.
        recall: share of the mask that is foreground.
        soft_iou: sum over pixels of the minimum of map and mask, over the sum of their maximum.
        pointing: 1 if the map's maximum is inside the mask; if several pixels tie, the share of them inside.
        mass: share of the map's sum that is inside the mask.
    """

    obj: float
    precision: float
    recall: float
    soft_iou: float
    pointing: float
    mass: float


@dataclass(frozen=True)
class Plausibility:
    """Scores in [0, 1] of one response, or of many pooled word by word.

    Attributes:
        obj: mean Obj-IoU of the nouns; NaN without nouns.
        func: mean Func-IoU of the function words; NaN without function words.
        f1: harmonic mean of the two; NaN if either is.
        n_nouns, n_functions: words behind the means.
        n_dropped: words that could not be scored: no tokens, an empty mask, or no noun to set the threshold.
        precision, recall, soft_iou, pointing, mass: means over the nouns, see `NounScores`; NaN without nouns or where
            they were not measured.
    """

    obj: float
    func: float
    f1: float
    n_nouns: int
    n_functions: int
    n_dropped: int
    precision: float = math.nan
    recall: float = math.nan
    soft_iou: float = math.nan
    pointing: float = math.nan
    mass: float = math.nan


NOUN_SCORES = tuple(field.name for field in fields(NounScores))
SCORES = (*NOUN_SCORES, "func", "f1")


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
    variance = np.where(split, below * above * distance**2, 0.0)
    return float((variance >= variance.max() * (1 - OTSU_TIE)).argmax())


def quantise(maps: Tensor, size: tuple[int, int]) -> np.ndarray:
    """Upsample maps to an image's size and cut them to 256 levels.

    Args:
        maps: `[... h w]` in [0, 1].
        size: `(H, W)` of the image.

    Returns:
        uint8 `[... H W]`; bilinear with half-pixel centres, then `* 255` truncated.

    Raises:
        InputError: when a value is outside [0, 1] or not a number, or there is none.
    """
    return _levels(_upsample(maps, size))


def noun_scores(noun_map: Tensor, mask: np.ndarray) -> NounScores:
    """How well a noun's map lies on its object.

    Args:
        noun_map: `[h w]` in [0, 1]; it is upsampled to the mask.
        mask: bool `[H W]`.

    Raises:
        InputError: when the mask is not bool `[H W]`, or empty, or the map is not `[h w]` in [0, 1].
    """
    _check_mask(mask)
    if not mask.any():
        raise InputError("a noun has a mask without a single pixel, expected an object; count such words as dropped")
    upsampled = _upsample(noun_map, _size(mask))
    if upsampled.ndim != 2:
        raise InputError(f"noun_scores got a map of shape {tuple(noun_map.shape)}, expected [h w]; pass one word's map")
    levels = _levels(upsampled)
    return _noun_scores(upsampled, levels > otsu_threshold(levels), mask)


def obj_iou(noun_map: Tensor, mask: np.ndarray) -> float:
    """Overlap of a noun's foreground (above its Otsu threshold) with its object: see `noun_scores`."""
    return noun_scores(noun_map, mask).obj


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

    As in the protocol, a noun of several tokens has the scores of the token whose Obj-IoU is best and the highest of
    their Otsu thresholds, a function word the mean over its tokens. The threshold of the function words is the mean
    over this response's nouns.

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
    spelled = [list(targets) for targets in functions if targets] if scored else []
    n_dropped = len(nouns) - len(scored) + len(functions) - len(spelled)
    if not scored:
        return Plausibility(math.nan, math.nan, math.nan, 0, 0, n_dropped)

    scores, thresholds = [], []
    for noun in scored:
        upsampled = _upsample(maps[list(noun.targets)], _size(noun.mask))
        levels = _levels(upsampled)
        splits = [otsu_threshold(token) for token in levels]
        tokens = zip(upsampled, levels, splits, strict=True)
        each = [_noun_scores(heat, level > split, noun.mask) for heat, level, split in tokens]
        scores.append(max(each, key=lambda score: score.obj))
        thresholds.append(max(splits))
    size, threshold = _size(scored[0].mask), float(np.mean(thresholds))
    funcs = [
        float(np.mean([func_iou(token, threshold) for token in quantise(maps[targets], size)])) for targets in spelled
    ]
    means = {name: float(np.mean([getattr(score, name) for score in scores])) for name in NOUN_SCORES}
    func = float(np.mean(funcs)) if funcs else math.nan
    return Plausibility(
        **means,
        func=func,
        f1=f1_iou(means["obj"], func),
        n_nouns=len(scored),
        n_functions=len(funcs),
        n_dropped=n_dropped,
    )


def pool(scenes: Sequence[Plausibility]) -> Plausibility:
    """One score for many responses: every word counts once."""
    return Plausibility(
        **{name: float(value) for name, value in _pooled(_sums(scenes)).items()},
        n_nouns=sum(scene.n_nouns for scene in scenes),
        n_functions=sum(scene.n_functions for scene in scenes),
        n_dropped=sum(scene.n_dropped for scene in scenes),
    )


def difference(
    a: Sequence[Plausibility], b: Sequence[Plausibility], score: str, n: int = 2000, seed: int = 0
) -> Interval:
    """Difference in a pooled score of two methods on the same scenes; the score is pooled anew in each resample.

    Args:
        score: `obj`, `func`, `f1`, `precision`, `recall`, `soft_iou`, `pointing` or `mass`.
        n, seed: see `paired_bootstrap`.

    Raises:
        InputError: when there is no such score, or `a` and `b` do not hold the same scenes, or none.
    """
    if score not in SCORES:
        raise InputError(f"there is no score {score!r}; choose one of {', '.join(SCORES)}")
    return paired_bootstrap(_sums(a), _sums(b), n, seed, lambda sums: _pooled(sums)[score])


def f1_difference(a: Sequence[Plausibility], b: Sequence[Plausibility], n: int = 2000, seed: int = 0) -> Interval:
    """Difference in pooled F1-IoU of two methods on the same scenes: see `difference`."""
    return difference(a, b, "f1", n, seed)


def _noun_scores(upsampled: Tensor, foreground: np.ndarray, mask: np.ndarray) -> NounScores:
    """Scores of one noun from its map `[H W]` in [0, 1] and bool `[H W]` foreground and mask, the mask not empty."""
    values = upsampled.double().numpy()
    hits, found, n_mask = int((foreground & mask).sum()), int(foreground.sum()), int(mask.sum())
    inside, outside, peak = values[mask].sum(), values[~mask].sum(), values.max()
    peaks = values >= peak * (1 - PEAK_TIE)
    return NounScores(
        obj=hits / (found + n_mask - hits),
        precision=hits / found if found else 0.0,
        recall=hits / n_mask,
        soft_iou=float(inside / (n_mask + outside)),  # the mask is 0 or 1: the minimum is the map inside it
        pointing=float(mask[peaks].mean()) if peak > 0 else 0.0,
        mass=float(inside / (inside + outside)) if peak > 0 else 0.0,
    )


def _sums(scenes: Sequence[Plausibility]) -> np.ndarray:
    """float64 `[scene 3 + score]`: nouns, function words, summed Func, then each of `NOUN_SCORES` summed."""
    rows = [
        (
            s.n_nouns,
            s.n_functions,
            s.func * s.n_functions if s.n_functions else 0.0,  # the mean of no words is NaN
            *(getattr(s, name) * s.n_nouns if s.n_nouns else 0.0 for name in NOUN_SCORES),
        )
        for s in scenes
    ]
    return np.array(rows, np.float64).reshape(-1, 3 + len(NOUN_SCORES))


def _pooled(sums: np.ndarray) -> dict[str, np.ndarray]:
    """Every score `[...]` of the scenes in `[... scene 3 + score]`; NaN where there is no word to score."""
    nouns, functions, func_sum, *noun_sums = np.moveaxis(sums.sum(axis=-2), -1, 0)
    means = {name: _mean(total, nouns) for name, total in zip(NOUN_SCORES, noun_sums, strict=True)}
    obj, func = means["obj"], _mean(func_sum, functions)
    total = obj + func
    f1 = np.where(total == 0, 0.0, 2 * obj * func / np.where(total == 0, 1.0, total))
    return means | {"func": func, "f1": f1}


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """float32 `[... H W]` in [0, 1] on the CPU. Raises `InputError`, see `quantise`."""
    maps = torch.as_tensor(maps, device="cpu").detach().float()
    if maps.ndim < 2 or maps.numel() == 0 or not bool(((maps >= 0) & (maps <= 1)).all()):
        found = f"[{maps.min():.4g}, {maps.max():.4g}]" if maps.numel() else "no values"
        raise InputError(
            f"maps have shape {tuple(maps.shape)} and values in {found}, expected [... h w] in [0, 1]; pass the "
            "normalised maps of an attribution"
        )
    flat = maps.reshape(1, -1, *maps.shape[-2:])
    resized = F.interpolate(flat, size=size, mode="bilinear", align_corners=False)
    return resized.clamp_(0, 1).reshape(*maps.shape[:-2], *size)  # interpolation may round to just above 1


def _levels(upsampled: Tensor) -> np.ndarray:
    """uint8, see `quantise`."""
    return (upsampled * (LEVELS - 1)).to(torch.uint8).numpy()


def _check_mask(mask: np.ndarray) -> None:
    if mask.dtype != np.bool_ or mask.ndim != 2:
        raise InputError(f"a mask is {mask.dtype} of shape {mask.shape}, expected bool [H W]; threshold it first")


def _size(mask: np.ndarray) -> tuple[int, int]:
    height, width = mask.shape
    return height, width
