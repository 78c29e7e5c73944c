"""What a map looks like in four numbers: monitors that cost nothing, to be read beside the evidence.

They describe; they do not judge. Position in the response and repetition move them too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MASS = 0.85


@dataclass(frozen=True)
class Descriptors:
    """One number a target; all of them 0 where the map is dark.

    Attributes:
        image_share: `[target]` in [0, 1], the images' part of the joint mass of image and context.
        peak_ratio: `[target]`, the largest value over the mean one.
        entropy: `[target]` in [0, 1], of the map as a distribution over its cells; 1 is perfectly flat.
        area: `[target]` in [0, 1], the smallest share of the cells that holds 85 % of the mass.
    """

    image_share: Tensor
    peak_ratio: Tensor
    entropy: Tensor
    area: Tensor


def describe_levels(levels: np.ndarray, context: np.ndarray) -> Descriptors:
    """`describe_maps` of maps kept as bytes, from how often each of the 256 levels occurs: a third of the time.

    Args:
        levels: uint8 `[target cell]`, all images side by side; 255 stands for 1.
        context: `[target]`, the mass of the context.
    """
    targets, n = levels.shape
    offsets = 256 * np.arange(targets, dtype=np.int32)[:, None]
    counts = np.bincount((levels + offsets).ravel(), minlength=256 * targets).reshape(targets, 256)[:, ::-1]
    value = np.arange(255, -1, -1) / 255  # brightest first, as the counts are
    above = np.cumsum(counts * value, axis=1)
    mass = above[:, -1]
    lit = mass > 0
    whole = np.where(lit, mass, 1.0)
    # the level at which what is at least as bright holds the mass, and how many cells of it that takes
    wanted = (MASS - 1e-9) * mass
    level = (above >= wanted[:, None]).argmax(axis=1)
    row = np.arange(targets)
    missing = wanted - (above[row, level] - counts[row, level] * value[level])
    brighter = np.cumsum(counts, axis=1)[row, level] - counts[row, level]
    needed = brighter + np.ceil(missing / np.where(value[level] > 0, value[level], 1.0) - 1e-9)
    surprise = counts @ (value * np.log(np.where(value > 0, value, 1.0))) / whole
    entropy = (np.log(whole) - surprise) / (math.log(n) if n > 1 else 1.0)
    joint = mass + context

    def known(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.where(lit, values, 0.0).astype(np.float32))

    return Descriptors(
        image_share=known(mass / np.where(lit, joint, 1.0)),
        peak_ratio=known(value[(counts > 0).argmax(axis=1)] * n / whole),
        entropy=known(entropy),
        area=known(needed / n),
    )


def describe_maps(image: Sequence[Tensor], context: Tensor) -> Descriptors:
    """Describe the maps of every target, all images together.

    Args:
        image: for each image `[target t h w]` in [0, 1].
        context: `[target context]` in [0, 1], normalised with the maps.
    """
    cells = torch.cat([maps.flatten(1) for maps in image], dim=1).float().cpu()
    n = cells.shape[1]
    ordered = torch.from_numpy(np.sort(cells.numpy(), axis=1))  # ten times as fast as torch's
    below = ordered.cumsum(dim=1, dtype=torch.float64)
    mass = below[:, -1]
    lit = mass > 0
    whole = torch.where(lit, mass, 1.0)
    # cells that may go, smallest first, while what stays holds the level; rounding must not ask for one more
    spare = torch.searchsorted(below, (1 - MASS + 1e-9) * mass[:, None], right=True)[:, 0]
    share = cells / whole[:, None].float()
    surprise = share.clamp_min(1e-30).log_().mul_(share)  # x log x, 0 at 0
    entropy = -surprise.sum(dim=1) / (math.log(n) if n > 1 else 1.0)
    joint = mass + context.cpu().sum(dim=1, dtype=torch.float64)

    def known(values: Tensor) -> Tensor:
        return torch.where(lit, values, 0.0).float()

    return Descriptors(
        image_share=known(mass / torch.where(lit, joint, 1.0)),
        peak_ratio=known(ordered[:, -1] * n / whole),
        entropy=known(entropy),
        area=known((n - spare) / n),
    )
