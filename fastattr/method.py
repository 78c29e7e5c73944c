"""The method on states that are already read: activations, interference, scales, normalisation, filter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastattr import ops
from fastattr.arc import counting, interference, rankings
from fastattr.compat import tam_slots
from fastattr.errors import TokenLayoutError
from fastattr.maps import (
    Activations,
    activations,
    check_finite,
    check_states,
    is_degenerate,
    joint_range,
    log_probs,
    normalise_maps,
    normalise_scores,
    score_range,
)
from fastattr.msea import aggregate, base_scale, common_grids, scale_weights
from fastattr.types import AttributionConfig, Grid, OutputHead, ScaleStates, TokenLayout, TokenMaps

# of one block of targets' maps, of which a few live at once
CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 2**21, 2**26


@torch.no_grad()
def explain_states(readings: Sequence[ScaleStates], head: OutputHead, config: AttributionConfig) -> TokenMaps:
    """The method on states that are already read, all targets together.

    Args:
        readings: one for each scale of `config.scales`, in that order.

    Returns:
        maps and scores on the CPU.

    Raises:
        BackendError: the backend was asked for by name and cannot run.
        StatesError, TokenLayoutError, InputError: see `check_states`, `common_grids` and `rankings`.
    """
    for reading in readings:
        check_states(reading, head)
    base_index = base_scale(config.scales)
    base = readings[base_index]
    layouts = tuple(reading.layout for reading in readings)
    grids = common_grids(layouts)
    check_responses(readings)
    device = base.hidden_states.device
    backend = ops.resolve(config.backend, device)

    # what the model predicts
    if config.method == "arc":
        ranked, own_log_prob = rankings(base, head, config.top_k, backend)
    else:
        ranked, own_log_prob = None, log_probs(base, head)
    log_prob = torch.stack([own_log_prob if each is base else log_probs(each, head) for each in readings], dim=1)
    agreement = (log_prob - own_log_prob[:, None]).exp()
    weights = scale_weights(agreement, config)

    # where its classes are active, and which context interferes
    lenses = tuple(activations(reading, head) for reading in readings)
    scores = sum_scales([lens.scores for lens in lenses], weights)
    causal = base.layout.causal(device)
    counts = counting(base, causal, config)
    weighed = [scores] if config.aggregate == "before" else [lens.scores for lens in lenses]
    found = [interference(each, counts, ranked, base.layout, config, backend) for each in weighed]
    relevance = found[0][0]  # the same for all
    suspicions = tuple(suspicion for _, suspicion in found) * (len(lenses) // len(found))

    # the maps, a block of targets at a time
    scales = Scales(lenses, suspicions, layouts, grids, weights, config, backend)
    targets = base.layout.n_targets
    image = tuple(torch.empty(targets, *grid, device=device) for grid in grids)
    raw_range, residual = score_range(scores, causal), torch.empty(targets, device=device)
    for block in target_blocks(targets, grids, device):
        maps, image_range, residual[block] = block_maps(scales, block)
        raw_range[block] = joint_range(image_range, raw_range[block])
        shown = normalise_maps(maps, raw_range[block], filtered=config.filter, backend=backend)
        for whole, part in zip(image, shown, strict=True):
            whole[block] = part
    context = normalise_scores(scores, causal, raw_range)
    if config.compat == "tam":
        slots = tam_slots(base, head, filtered=config.filter is not False, backend=backend)
        image, context, raw_range = slots.image, slots.context, slots.raw_range

    check_finite(log_prob=log_prob, maps=raw_range)
    return TokenMaps(
        image=tuple(each.cpu() for each in image),
        context=context.cpu(),
        relevance=None if relevance is None else relevance.cpu(),
        log_prob=own_log_prob.cpu(),
        agreement=agreement.cpu(),
        raw_range=raw_range.cpu(),
        residual=residual.cpu(),
        degenerate=is_degenerate(raw_range).cpu(),
        backend=backend,
    )


@dataclass(frozen=True)
class Scales:
    """What all blocks of targets share.

    Attributes:
        lenses, layouts: one for each scale.
        suspicions: for each scale `[target context]`, how much context counts as interference.
        grids: for each image the grid all scales are brought to.
        weights: `[target scale]`.
    """

    lenses: tuple[Activations, ...]
    suspicions: tuple[Tensor, ...]
    layouts: tuple[TokenLayout, ...]
    grids: tuple[Grid, ...]
    weights: Tensor
    config: AttributionConfig
    backend: str

    def aggregate(self, flat_maps: Sequence[Tensor], block: slice) -> Tensor:
        """`[target image]` of every scale to one `[target pixel]`, all images side by side."""
        if len(flat_maps) == 1:  # on its own grid already, with a weight of 1
            return flat_maps[0]
        maps = aggregate(flat_maps, self.layouts, self.weights[block], self.grids, self.config.scale_mean, self.backend)
        return torch.cat([each.flatten(1) for each in maps], dim=1)

    def context_mean(self, scale: int, block: slice) -> Tensor:
        """What the context lights up at one scale, `[target image]`; only context before the block's end is read."""
        n_before = len(self.layouts[scale].prompt) + block.start
        seen = len(self.layouts[scale].prompt) + block.stop
        return ops.context_mean(
            self.lenses[scale].context_image[:seen],
            self.suspicions[scale][block, :seen],
            n_before=n_before,
            backend=self.backend,
        )


def target_blocks(targets: int, grids: Sequence[Grid], device: torch.device) -> Iterator[slice]:
    """Ranges of targets whose maps fit the block's bytes."""
    limit = CPU_BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES
    most = max(1, limit // (4 * sum(t * h * w for t, h, w in grids)))
    size = math.ceil(targets / math.ceil(targets / most))  # blocks of about the same size
    for start in range(0, targets, size):
        yield slice(start, min(targets, start + size))


def block_maps(scales: Scales, block: slice) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Maps of a block of targets on the common grids, without interference.

    Returns:
        for each image `[target t h w]`; their extremes `[target 2]`; the share of the activation left `[target]`.
    """
    images = [lens.image[block] for lens in scales.lenses]
    every = range(len(images))
    if scales.config.method == "lens":
        maps = scales.aggregate(images, block)
        image_range, residual = extremes(maps), torch.ones(len(maps), device=maps.device)
    elif scales.config.aggregate == "before":
        raw = scales.aggregate(images, block)
        mean = scales.aggregate([scales.context_mean(s, block) for s in every], block)
        maps, _, image_range = ops.remove_interference(raw, mean, backend=scales.backend)
        residual = share(maps, raw)
    else:
        cleaned = [
            ops.remove_interference(images[s], scales.context_mean(s, block), backend=scales.backend)[0] for s in every
        ]
        maps = scales.aggregate(cleaned, block)
        image_range = extremes(maps)
        shares = [share(clean, image)[:, None] for clean, image in zip(cleaned, images, strict=True)]
        residual = sum_scales(shares, scales.weights[block])[:, 0]
    parts = maps.split([t * h * w for t, h, w in scales.grids], dim=1)
    return tuple(part.unflatten(1, grid) for part, grid in zip(parts, scales.grids, strict=True)), image_range, residual


def extremes(maps: Tensor) -> Tensor:
    """Least and greatest value of each target's maps, `[target 2]` for `[target pixel]`."""
    return torch.stack(maps.aminmax(dim=1), dim=1)


def check_responses(readings: Sequence[ScaleStates]) -> None:
    """Refuse scales that were not given the same response.

    Raises:
        TokenLayoutError: their response ids differ.
    """
    first, *others = [reading.target_ids for reading in readings]
    for response in others:
        if not torch.equal(first, response):
            raise TokenLayoutError(
                f"two scales hold the responses {first[-8:].tolist()} and {response[-8:].tolist()} (last ids), expected the "
                "same ids at every scale"
            )


def sum_scales(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of `[target n]` over scales with `weights [target scale]`."""
    total = values[0] * weights[:, [0]]
    for s, value in enumerate(values[1:], start=1):
        total.addcmul_(value, weights[:, [s]])
    return total


def share(cleaned: Tensor, activation: Tensor) -> Tensor:
    """Norm of the cleaned map relative to the activation's, `[target]`; 0 where there was none."""
    norm = activation.norm(dim=1)
    return torch.where(norm > 0, cleaned.norm(dim=1) / torch.where(norm > 0, norm, 1.0), 0.0)
