"""The post-processing as one would first write it: a Python loop for every token, pixel and pair.

Written from the papers (TAM arXiv 2506.23270, MSEA and ARC arXiv 2509.22415) in numpy, with a scalar
minimiser per token as the reference TAM has. It is the yardstick of `postprocessing.py` and shares no code
with fastattr. Handicaps are in its favour: it reads only the rows of the output embeddings it needs,
where the reference computes full-vocabulary logits at every position. Everything runs on one thread: products
of matrix and vector are `einsum`, because the threads of a BLAS would be charged for waiting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Slot:
    """A text token that is explained, or explains others.

    Attributes:
        position: where it is read: its own position in the prompt, the predicting one in the response.
        class_id: the id whose activation is read.
        text_id: the id that decides whether another token repeats it.
    """

    position: int
    class_id: int
    text_id: int


@dataclass(frozen=True)
class Reading:
    """What the loops below need of the model's states.

    Attributes:
        hidden_states: `[seq dim]`.
        output_embeddings: `[vocab dim]`.
        image: image positions, row-major on `grid = (h, w)`.
        slots: text tokens in order.
    """

    hidden_states: np.ndarray
    output_embeddings: np.ndarray
    image: np.ndarray
    grid: tuple[int, int]
    slots: tuple[Slot, ...]


def activation(reading: Reading, slot: Slot) -> np.ndarray:
    """`relu(h_v . W[x])` over image positions, `[image]`."""
    row = reading.output_embeddings[slot.class_id]
    logits = np.einsum("vd,d->v", reading.hidden_states[reading.image], row)
    return np.maximum(logits, 0)


def scores(reading: Reading, t: int) -> list[float]:
    """How active the class of slot `t` is where the earlier slots stand."""
    row = reading.output_embeddings[reading.slots[t].class_id]
    return [max(0.0, float(reading.hidden_states[slot.position] @ row)) for slot in reading.slots[:t]]


def tam_weights(reading: Reading, t: int, scores: Sequence[float]) -> list[float]:
    """The scores of the earlier slots; 0 for a repeat of the target."""
    slots = reading.slots
    return [0.0 if slots[j].text_id == slots[t].text_id else score for j, score in enumerate(scores)]


def arc_weights(weights: Sequence[float], rankings: Sequence[Sequence[int]], persistence: float) -> list[float]:
    """TAM's weights times `1 - relevance`, one rank-biased overlap a pair; the last ranking is the target's."""
    own = rankings[-1]
    best = rank_biased_overlap(own, own, persistence)
    return [w * (1 - rank_biased_overlap(own, r, persistence) / best) for w, r in zip(weights, rankings, strict=False)]


def top_ids(reading: Reading, k: int) -> list[list[int]]:
    """The `k` most likely ids at each slot's position, ties by lower id."""
    rankings = []
    for slot in reading.slots:
        logits = np.einsum("vd,d->v", reading.output_embeddings, reading.hidden_states[slot.position])
        rankings.append(np.argsort(-logits, kind="stable")[:k].tolist())
    return rankings


def rank_biased_overlap(left: Sequence[int], right: Sequence[int], persistence: float) -> float:
    """Rank-biased overlap truncated at the depth of the rankings, with a set for each side."""
    seen_left: set[int] = set()
    seen_right: set[int] = set()
    total = 0.0
    for depth, (a, b) in enumerate(zip(left, right, strict=True), start=1):
        seen_left.add(a)
        seen_right.add(b)
        total += persistence ** (depth - 1) * len(seen_left & seen_right) / depth
    return (1 - persistence) * total


def remove_interference(own: np.ndarray, earlier: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Subtract as much of the weighted mean of earlier maps as fits the map best, `[image]`."""
    total = sum(weights)
    if total == 0:
        return own
    own = own.astype(np.float64)  # a float32 sum of squares would leave the minimiser four digits
    mean = np.zeros_like(own)
    for weight, other in zip(weights, earlier, strict=True):
        mean += weight / total * other
    norm = float(np.linalg.norm(mean))
    if norm == 0:
        return own

    def misfit(scale: float) -> float:
        return float(np.sum((own - scale * mean) ** 2))

    # the best scale is not negative, and by Cauchy-Schwarz at most the ratio of the norms
    best = minimise(misfit, 0.0, float(np.linalg.norm(own)) / norm)
    return np.maximum(own - best * mean, 0)


def minimise(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-8) -> float:
    """Golden-section search of a function with one minimum in `[low, high]`."""
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


def normalise_jointly(own: np.ndarray, text_scores: Sequence[float]) -> np.ndarray:
    """Min-max of a map together with its target's text scores."""
    values = np.concatenate([own, np.array(text_scores, own.dtype)])
    low, high = values.min(), values.max()
    return np.zeros_like(own) if high == low else (own - low) / (high - low)


def rank_gaussian(image: np.ndarray) -> np.ndarray:
    """The rank-Gaussian filter `[h w]`, one 3x3 window at a time."""
    padded = pad_side(pad_side(image).T).T
    filtered = np.zeros_like(image)
    for y in range(image.shape[0]):
        for x in range(image.shape[1]):
            window = np.sort(padded[y : y + 3, x : x + 3].ravel())
            mean, deviation = window.mean(), window.std()
            if mean == 0 or deviation == 0:
                filtered[y, x] = window[4]
                continue
            weight = np.exp(-((np.arange(9) - 4) ** 2) / (2 * (deviation / mean) ** 2))
            filtered[y, x] = (window * weight).sum() / weight.sum()
    return filtered


def pad_side(image: np.ndarray) -> np.ndarray:
    """One row more on both sides: reflected, or repeated where there is but one."""
    return np.pad(image, ((1, 1), (0, 0)), "reflect" if len(image) > 1 else "edge")


def finish(reading: Reading, cleaned: np.ndarray, text_scores: Sequence[float]) -> np.ndarray:
    """A cleaned map normalised and filtered, `[h w]` in [0, 1]."""
    return rank_gaussian(normalise_jointly(cleaned, text_scores).reshape(reading.grid))
