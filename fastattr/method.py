"""The method on states that are already read: activations, interference, scales, normalisation, filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattr import ops
from fastattr.arc import interference_weights, relevance
from fastattr.compat import tam_slots
from fastattr.errors import TokenLayoutError
from fastattr.maps import activations, check_finite, check_head, check_states, log_probs, normalise_jointly, same_id
from fastattr.msea import aggregate, base_scale, common_grids, scale_weights
from fastattr.types import AttributionConfig, OutputHead, ScaleStates, TokenMaps


@torch.no_grad()
def explain_states(readings: Sequence[ScaleStates], head: OutputHead, config: AttributionConfig) -> TokenMaps:
    """The method on states that are already read, all targets together.

    Args:
        readings: one for each scale of `config.scales`, in that order.

    Returns:
        maps and scores on the CPU.

    Raises:
        StatesError, TokenLayoutError, InputError: see `check_states`, `common_grids` and `relevance`.
    """
    for reading in readings:
        check_states(reading, head)
    check_head(head)
    base_index = base_scale(config.scales)
    base = readings[base_index]
    layouts = [reading.layout for reading in readings]
    grids = common_grids(layouts)
    check_responses(readings)
    log_prob = torch.stack([log_probs(reading, head) for reading in readings], dim=1)
    agreement = (log_prob - log_prob[:, [base_index]]).exp()
    weights = scale_weights(agreement, config)
    causal = base.layout.causal().to(weights.device)

    coherent = relevance(base, head, top_k=config.top_k, rbo_p=config.rbo_p) if config.method == "arc" else None
    lenses = [activations(reading, head) for reading in readings]
    scores = sum_scales([lens.scores for lens in lenses], weights)

    if config.method == "lens":
        maps = aggregate([lens.image for lens in lenses], layouts, weights, grids)
        residual = torch.ones(len(weights))
    elif config.aggregate == "before":
        suspicion = interference_weights(scores, coherent, same_id(base), base.layout, config)
        means = [ops.context_mean(lens.context_image, suspicion) for lens in lenses]
        raw = aggregate([lens.image for lens in lenses], layouts, weights, grids)
        mean = aggregate(means, layouts, weights, grids)
        maps, residual = clean(raw, mean)
    else:
        cleaned, residuals = [], []
        for reading, lens in zip(readings, lenses, strict=True):
            suspicion = interference_weights(lens.scores, coherent, same_id(reading), reading.layout, config)
            mean_here = ops.context_mean(lens.context_image, suspicion)
            cleaned.append(ops.remove_interference(lens.image, mean_here)[0])
            residuals.append(share(cleaned[-1], lens.image))
        maps = aggregate(cleaned, layouts, weights, grids)
        residual = sum_scales([r[:, None] for r in residuals], weights)[:, 0]

    normalised = normalise_jointly(maps, scores, causal)
    shown = tam_slots(base, head, filtered=False) if config.compat == "tam" else normalised
    image = tuple(ops.rank_gaussian(each) for each in shown.image) if config.filter else shown.image
    check_finite(log_prob=log_prob, maps=shown.raw_range)
    return TokenMaps(
        image=tuple(each.cpu() for each in image),
        context=shown.context.cpu(),
        relevance=None if coherent is None else coherent.cpu(),
        log_prob=log_prob[:, base_index].cpu(),
        agreement=agreement.cpu(),
        raw_range=shown.raw_range.cpu(),
        residual=residual.cpu(),
        degenerate=shown.degenerate.cpu(),
    )


def check_responses(readings: Sequence[ScaleStates]) -> None:
    """Refuse scales that were not given the same response.

    Raises:
        TokenLayoutError: their response ids differ.
    """
    first, *others = [reading.input_ids[slice(*reading.layout.response)] for reading in readings]
    for response in others:
        if not torch.equal(first, response):
            raise TokenLayoutError(
                f"two scales hold the responses {first[-8:].tolist()} and {response[-8:].tolist()} (last ids), expected the "
                "same ids at every scale"
            )


def sum_scales(values: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of `[target n]` over scales with `weights [target scale]`."""
    return torch.stack([value * weights[:, [s]] for s, value in enumerate(values)]).sum(dim=0)


def clean(raw: Sequence[Tensor], mean: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Tensor]:
    """Remove interference from the maps of all images of a target together; also the share that is left."""
    flat = torch.cat([maps.flatten(1) for maps in raw], dim=1)
    cleaned, _ = ops.remove_interference(flat, torch.cat([maps.flatten(1) for maps in mean], dim=1))
    parts = cleaned.split([maps[0].numel() for maps in raw], dim=1)
    return tuple(part.view(maps.shape) for part, maps in zip(parts, raw, strict=True)), share(cleaned, flat)


def share(cleaned: Tensor, activation: Tensor) -> Tensor:
    """Norm of the cleaned map relative to the activation's, `[target]`; 0 where there was none."""
    norm = activation.norm(dim=1)
    return torch.where(norm > 0, cleaned.norm(dim=1) / torch.where(norm > 0, norm, 1.0), 0.0)
