"""The post-processing as one would first write it: a Python loop for every token, pixel and pair.

Written from the papers (TAM arXiv 2506.23270, MSEA and ARC arXiv 2509.22415) in numpy, with a scalar minimiser per
token and the full vocabulary's logits of every position, image positions included, as the reference TAM has them. It
shares no code with fastattr; only the matrix product is torch's, so that no ratio is about which library multiplies.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

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
        prefill: how many positions the model is given at once; every further one is a round.
    """

    hidden_states: np.ndarray
    output_embeddings: np.ndarray
    image: np.ndarray
    grid: tuple[int, int]
    slots: tuple[Slot, ...]
    prefill: int


def product(left: np.ndarray, right: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """`left @ right.T` for float32 `[row dim]`."""
    to = None if out is None else torch.from_numpy(out)
    return torch.mm(torch.from_numpy(left), torch.from_numpy(right).T, out=to).numpy()


def full_logits(reading: Reading) -> np.ndarray:
    """Logits `[seq vocab]`: the prompt and its images in one product, then every new position in its own."""
    hidden = reading.hidden_states
    logits = np.empty((len(hidden), len(reading.output_embeddings)), np.float32)
    product(hidden[: reading.prefill], reading.output_embeddings, out=logits[: reading.prefill])
    for position in range(reading.prefill, len(hidden)):
        product(hidden[[position]], reading.output_embeddings, out=logits[position : position + 1])
    return logits


def activation(reading: Reading, logits: np.ndarray, slot: Slot) -> np.ndarray:
    """`relu(h_v . W[x])` over image positions, `[image]`."""
    return np.maximum(logits[reading.image, slot.class_id], 0)


def scores(reading: Reading, logits: np.ndarray, t: int) -> list[float]:
    """How active the class of slot `t` is where the earlier slots stand."""
    class_id = reading.slots[t].class_id
    return [max(0.0, float(logits[slot.position, class_id])) for slot in reading.slots[:t]]


def log_prob(logits: np.ndarray, slot: Slot) -> float:
    """Log-probability of the slot's own id where it was predicted, in nats."""
    row = logits[slot.position].astype(np.float64)
    return float(row[slot.text_id] - row.max() - np.log(np.exp(row - row.max()).sum()))


def top_ids(logits: np.ndarray, k: int) -> list[int]:
    """The `k` most likely ids by their logits `[vocab]`, ties by lower id."""
    return np.argsort(-logits, kind="stable")[:k].tolist()


def tam_weights(reading: Reading, t: int, scores: Sequence[float]) -> list[float]:
    """The scores of the earlier slots; 0 for a repeat of the target."""
    slots = reading.slots
    return [0.0 if slots[j].text_id == slots[t].text_id else score for j, score in enumerate(scores)]


def arc_weights(weights: Sequence[float], rankings: Sequence[Sequence[int]], persistence: float) -> list[float]:
    """TAM's weights times `1 - relevance`, one rank-biased overlap a pair; the last ranking is the target's."""
    own = rankings[-1]
    best = rank_biased_overlap(own, own, persistence)
    return [w * (1 - rank_biased_overlap(own, r, persistence) / best) for w, r in zip(weights, rankings, strict=False)]


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


def upsample(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with half-pixel centres, `[h w]` to `size`, one pixel at a time."""
    (height, width), (out_height, out_width) = image.shape, size
    out = np.empty(size, image.dtype)
    for y in range(out_height):
        for x in range(out_width):
            at_y = max(0.0, (y + 0.5) * height / out_height - 0.5)
            at_x = max(0.0, (x + 0.5) * width / out_width - 0.5)
            top, left = int(at_y), int(at_x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            down, across = at_y - top, at_x - left
            above = image[top, left] * (1 - across) + image[top, right] * across
            below = image[bottom, left] * (1 - across) + image[bottom, right] * across
            out[y, x] = above * (1 - down) + below * down
    return out


def finish(reading: Reading, cleaned: np.ndarray, text_scores: Sequence[float]) -> np.ndarray:
    """A cleaned map normalised and filtered, `[h w]` in [0, 1]."""
    return rank_gaussian(normalise_jointly(cleaned, text_scores).reshape(reading.grid))
