"""The post-processing as a good engineer writes it in numpy: vectorised, one target at a time.

No loop over pixels or pairs, interference in closed form, only the rows of the output embeddings that are needed. It
works on the `Reading` of `naive.py` and is checked against the loops there. Products of a vector and a matrix are
`einsum`, because the threads of a BLAS would be charged for waiting.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.naive import Reading, pad_side, product

RANK = (np.arange(9) - 4) ** 2


@dataclass(frozen=True)
class Products:
    """What is read from the output embeddings, for all slots at once.

    Attributes:
        activation: `[slot image]`.
        scores: `[slot slot]`, the class of the first at the position of the second.
        logits: `[slot vocab]`, at the slots' positions.
    """

    activation: np.ndarray
    scores: np.ndarray
    logits: np.ndarray


def products(reading: Reading) -> Products:
    """One matrix product each."""
    rows = reading.output_embeddings[[slot.class_id for slot in reading.slots]]
    states = reading.hidden_states[[slot.position for slot in reading.slots]]
    return Products(
        np.maximum(product(rows, reading.hidden_states[reading.image]), 0),
        np.maximum(product(rows, states), 0),
        product(states, reading.output_embeddings),
    )


def top_ids(logits: np.ndarray, k: int) -> np.ndarray:
    """The `k` most likely ids by their logits `[vocab]`, ties by lower id, without sorting them all."""
    bound = np.partition(logits, -k)[-k]
    candidates = np.flatnonzero(logits >= bound)
    return candidates[np.argsort(-logits[candidates], kind="stable")[:k]]


def log_prob(logits: np.ndarray, token_id: int) -> float:
    """Log-probability of an id by the logits `[vocab]`, in nats."""
    high = logits.max()
    return float(logits[token_id] - high - np.log(np.exp(logits - high).sum()))


def relevance(own: np.ndarray, others: np.ndarray, persistence: float) -> np.ndarray:
    """Rank-biased overlap of a ranking `[k]` with others `[context k]`, relative to its own: `[context]`."""
    k = len(own)
    depth = np.arange(1, k + 1)
    worth = np.append(np.cumsum((persistence ** (depth - 1) / depth)[::-1])[::-1], 0.0)  # by the deeper of two ranks
    rank_of = np.full(1 + max(own.max(), others.max(initial=0)), k)
    rank_of[own] = np.arange(k)
    return worth[np.maximum(rank_of[others], np.arange(k))].sum(axis=1) / worth[:-1].sum()


def remove_interference(own: np.ndarray, earlier: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Subtract from `own [image]` its best-fitting multiple of the weighted sum of `earlier [context image]`."""
    total = np.einsum("c,ci->i", weights, earlier)
    norm = total @ total
    return own if norm == 0 else np.maximum(own - (own @ total) / norm * total, 0)


def normalise_jointly(own: np.ndarray, text_scores: np.ndarray) -> np.ndarray:
    """Min-max of a map together with its target's text scores."""
    low, high = min(own.min(), text_scores.min(initial=np.inf)), max(own.max(), text_scores.max(initial=-np.inf))
    return np.zeros_like(own) if high == low else (own - low) / (high - low)


def rank_gaussian(image: np.ndarray) -> np.ndarray:
    """The rank-Gaussian filter `[h w]`, all windows of a map at once."""
    padded = pad_side(pad_side(image).T).T
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3)).reshape(-1, 9)
    windows = np.sort(windows, axis=1)
    mean, deviation = windows.mean(axis=1), windows.std(axis=1)
    flat = deviation == 0
    with np.errstate(over="ignore"):  # hardly any spread: infinitely narrow, which is the median
        narrow = (mean / np.where(flat, 1, deviation)) ** 2 / 2
    weight = np.exp(-RANK * np.minimum(narrow, 1e4)[:, None])
    filtered = (windows * weight).sum(axis=1) / weight.sum(axis=1)
    return np.where(flat, windows[:, 4], filtered).reshape(image.shape)


def upsample(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with half-pixel centres, `[h w]` to `size`."""
    for length in size:  # down, then across
        at = np.maximum((np.arange(length) + 0.5) * len(image) / length - 0.5, 0)
        low = at.astype(int)
        share = (at - low).astype(image.dtype)[:, None]
        image = (image[low] * (1 - share) + image[np.minimum(low + 1, len(image) - 1)] * share).T
    return image
