"""Multi-scale explanation aggregation (MSEA, arXiv 2509.22415, section 3.2): many scales, one grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastattr import ops
from fastattr.errors import TokenLayoutError
from fastattr.types import AttributionConfig, Grid, TokenLayout
from fastattr.views import place

DARK = 0.01  # of a target's highest activation, counts as dark in a geometric mean


def base_scale(scales: Sequence[float]) -> int:
    """Index of the scale nearest to 1: the model as it is used."""
    return min(range(len(scales)), key=lambda s: abs(scales[s] - 1.0))


def common_grids(layouts: Sequence[TokenLayout]) -> tuple[Grid, ...]:
    """For each image the finest grid among the scales.

    Raises:
        TokenLayoutError: when the scales disagree about images, frames or the response's length.
    """
    first = layouts[0]
    for layout in layouts[1:]:
        if len(layout.images) != len(first.images) or any(
            ours.grid[0] != theirs.grid[0] for ours, theirs in zip(layout.images, first.images, strict=True)
        ):
            frames = [[group.grid[0] for group in each.images] for each in (first, layout)]
            raise TokenLayoutError(
                f"two scales hold images with {frames[0]} and {frames[1]} frames, expected the same at every scale"
            )
        if layout.n_targets != first.n_targets or len(layout.prompt) != len(first.prompt):
            raise TokenLayoutError(
                f"two scales hold {first.n_targets} and {layout.n_targets} response tokens, {len(first.prompt)} and "
                f"{len(layout.prompt)} prompt tokens, expected the same text at every scale"
            )
    return tuple(
        max((layout.images[image].grid for layout in layouts), key=lambda grid: grid[1] * grid[2])
        for image in range(len(first.images))
    )


def scale_weights(agreement: Tensor, config: AttributionConfig) -> Tensor:
    """Weights of the scales, `[target scale]`, each row summing to one.

    By default a scale weighs as many tokens as it shows an image with, `scale^2`: every image token counts
    the same. Coarse maps are wide, and equal weights let them drown the fine ones.

    With `decision_weight` a scale counts, for each target, by how far the model makes the same decision
    there: its probability of the target relative to the base scale's, at most 1.
    """
    given = config.scale_weights or tuple(scale**2 for scale in config.known_scales)
    weights = torch.tensor(given, device=agreement.device).expand_as(agreement)
    if config.decision_weight:
        weights = weights * agreement.clamp(max=1.0)
    total = weights.sum(dim=1, keepdim=True)
    # a target that no weighted scale agrees on falls back to the weights as given
    plain = torch.tensor(given, device=agreement.device) / sum(given)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), plain)


def split_images(flat: Tensor, layout: TokenLayout) -> tuple[Tensor, ...]:
    """`[target image]` of all images side by side to one `[target t h w]` for each, tiles laid onto their picture."""
    sizes = [len(group.positions) for group in layout.images]
    parts = flat.split(sizes, dim=1)
    return tuple(place(part, group) for part, group in zip(parts, layout.images, strict=True))


def aggregate(
    flat_maps: Sequence[Tensor],
    layouts: Sequence[TokenLayout],
    weights: Tensor,
    grids: Sequence[Grid],
    mean: Literal["arithmetic", "geometric"],
    backend: str,
) -> tuple[Tensor, ...]:
    """Bring the maps of every scale to the common grid of each image and take their weighted mean.

    The geometric mean is our own. Coarse maps are wide and fine ones scattered; their sum is both, their geometric
    mean is lit where all are. It is the sum of logarithms, taken and interpolated above a floor of `DARK` of the
    target's highest activation, so that a single dark cell weighs as much as the brightest but not infinitely more.

    Args:
        flat_maps: for each scale `[target image]`, not negative.
        weights: `[target scale]`, rows sum to one.
        grids: for each image `(t, h, w)`.
        mean: how the scales are brought together.

    Returns:
        for each image `[target t h w]`.
    """
    if mean == "geometric":
        top = torch.stack([flat.amax(dim=1) for flat in flat_maps]).amax(dim=0)
        floor = torch.where(top > 0, DARK * top, 1.0)  # a target that lights nothing: the logarithm of 1
        logs = [(flat + floor[:, None]).log_() for flat in flat_maps]
        summed = aggregate(logs, layouts, weights, grids, "arithmetic", backend)
        return tuple((maps.exp_() - floor[:, None, None, None]).clamp_(min=0) for maps in summed)
    split = [split_images(flat, layout) for flat, layout in zip(flat_maps, layouts, strict=True)]
    return tuple(
        ops.multiscale([maps[image] for maps in split], weights, (grid[1], grid[2]), backend=backend)[0]
        for image, grid in enumerate(grids)
    )
