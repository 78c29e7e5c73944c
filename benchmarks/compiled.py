"""Interference and filter written plainly in torch, for `torch.compile` to make fast.

The engine's own forms are arranged by hand for running operation by operation (blocks that fit the cache, buffers used
again), which is in a compiler's way: compiled, they are slower than plain ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@cache
def compiled() -> dict[str, Callable[..., Any]]:
    """The two operations by the names the engine knows them by. The first call of each compiles."""
    interference, filtered = torch.compile(remove_interference), torch.compile(rank_gaussian)
    return {
        "remove_interference": lambda activation, mean, backend="auto": interference(activation, mean),
        "rank_gaussian": lambda maps, span, backend="auto": filtered(maps, span),
    }


def remove_interference(activation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`relu(A - lam M)` with the best-fitting `lam`; also `lam` and the extremes. For `[target position]`."""
    norm = (mean * mean).sum(1)
    scale = torch.where(norm > 0, (activation * mean).sum(1) / norm.clamp(min=1e-30), 0.0)
    left = activation - scale[:, None] * mean
    cleaned = torch.where(left > 1e-6 * activation, left, 0.0)
    return cleaned, scale, torch.stack([cleaned.amin(1), cleaned.amax(1)], dim=1)


def rank_gaussian(maps: Tensor, span: Tensor) -> Tensor:
    """Stretch `[target t h w]` by `span [target 2]`, then weigh the nine values of each window by their rank."""
    low, high = span[:, 0, None, None, None], span[:, 1, None, None, None]
    unit = torch.where(high > low, (maps - low) / (high - low).clamp(min=1e-30), 0.0).clamp(0, 1)
    padded = F.pad(unit, (1, 1, 1, 1), mode="reflect")
    height, width = maps.shape[2:]
    ranked = [padded[..., i : i + height, j : j + width] for i in range(3) for j in range(3)]
    mean = sum(ranked) / 9
    variance = sum((each - mean) ** 2 for each in ranked) / 9
    for turn in range(9):  # odd-even sort
        for i in range(turn % 2, 8, 2):
            ranked[i], ranked[i + 1] = torch.minimum(ranked[i], ranked[i + 1]), torch.maximum(ranked[i], ranked[i + 1])
    narrow = mean**2 / (2 * variance.clamp(min=1e-30))
    weights = [torch.where(variance > 0, torch.exp(-((i - 4) ** 2) * narrow), float(i == 4)) for i in range(9)]
    return sum(w * each for w, each in zip(weights, ranked, strict=True)) / sum(weights)
