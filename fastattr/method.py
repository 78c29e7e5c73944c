"""The method on states that are already read: activations, interference, scales, normalisation, filter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fastattr import ops
from fastattr.arc import counting, interference, rankings
from fastattr.compat import tam_slots
from fastattr.errors import InputError, TokenLayoutError
from fastattr.maps import (
    check_finite,
    check_states,
    context_activations,
    image_activations,
    is_degenerate,
    joint_range,
    log_probs_of_all,
    normalise_maps,
    normalise_scores,
    score_range,
)
from fastattr.memory import Disk, Shape, plan
from fastattr.msea import aggregate, base_scale, common_grids, scale_weights, split_images
from fastattr.types import AttributionConfig, Grid, OutputHead, ScaleStates, TokenMaps


@torch.no_grad()
def explain_states(
    readings: Sequence[ScaleStates],
    head: OutputHead,
    config: AttributionConfig,
    *,
    targets: Sequence[int] | None = None,
    memory_limit: int | None = None,
) -> TokenMaps:
    """The method on states that are already read, a block of targets at a time.

    Args:
        readings: one for each scale of `config.scales`, in that order.
        targets: response tokens that are explained, ascending; the others' maps are zeros and cost nothing. None for all.
        memory_limit: bytes that results and work may take beside states and model, see `fastattr.memory`; results that
            do not fit lie in a temporary file.

    Returns:
        maps and scores on the CPU.

    Raises:
        BackendError: the backend was asked for by name and cannot run.
        StatesError, TokenLayoutError, InputError: see `check_states`, `common_grids`, `rankings` and `memory.plan`.
        SaveError: results do not fit on the disk either.
    """
    return explain_responses([readings], head, config, targets=[targets], memory_limit=memory_limit)[0]


@torch.no_grad()
def explain_responses(
    rows: Sequence[Sequence[ScaleStates]],
    head: OutputHead,
    config: AttributionConfig,
    *,
    targets: Sequence[Sequence[int] | None],
    memory_limit: int | None = None,
) -> list[TokenMaps]:
    """`explain_states` of several responses; what needs the vocabulary is done for all of them at once."""
    config = config.resolve(config.known_scales, head.vocab)
    for readings in rows:
        for reading in readings:
            check_states(reading, head)
        if config.compat is not None and any(group.views for each in readings for group in each.layout.images):
            raise InputError(
                "compat='tam' knows whole pictures only, but the layout holds views (tiles); leave compat out"
            )
        common_grids([reading.layout for reading in readings])
        check_responses(readings)
    if config.compat is not None and (memory_limit is not None or any(each is not None for each in targets)):
        raise InputError(
            "compat='tam' explains all tokens in memory, as the reference does; leave memory_limit and targets out"
        )
    predicted = predict(rows, head, config)
    return [
        _explain(readings, head, config, mine, chosen, memory_limit)
        for readings, mine, chosen in zip(rows, predicted, targets, strict=True)
    ]


def _explain(
    readings: Sequence[ScaleStates],
    head: OutputHead,
    config: AttributionConfig,
    predicted: Predicted,
    targets: Sequence[int] | None,
    memory_limit: int | None,
) -> TokenMaps:
    """One response whose readings were checked."""
    base = readings[base_scale(config.known_scales)]
    grids = common_grids([reading.layout for reading in readings])
    device, layout = base.hidden_states.device, base.layout
    n_targets, n_context = layout.n_targets, len(layout.context)
    shape = Shape(
        targets=n_targets,
        context=n_context,
        pixels=sum(t * h * w for t, h, w in grids),
        image=sum(reading.layout.n_image for reading in readings),
        rankings=config.known_top_k if config.method == "arc" else 0,
        dim=base.hidden_states.shape[1],
    )
    cut = plan(shape, device, memory_limit)
    shared = share_work(readings, head, config, grids, predicted, keep_lit=cut.chunk is None)

    disk = Disk() if cut.on_disk else None
    zeros = partial(torch.zeros, device=device) if disk is None else disk.zeros
    image = tuple(zeros(n_targets, *grid) for grid in grids)
    context = zeros(n_targets, n_context)
    relevance = zeros(n_targets, n_context) if config.method == "arc" else None
    raw_range, residual = torch.zeros(n_targets, 2, device=device), torch.zeros(n_targets, device=device)
    for block in target_blocks(range(n_targets) if targets is None else targets, cut.block):
        found = explain_block(shared, block, cut.chunk)
        seen = found.context.shape[1]
        for whole, part in zip(image, found.image, strict=True):
            whole[block] = part
        context[block, :seen] = found.context
        if relevance is not None and found.relevance is not None:
            relevance[block, :seen] = found.relevance
        raw_range[block], residual[block] = found.raw_range, found.residual
        if disk is not None:
            disk.settle()
    if config.compat == "tam":
        slots = tam_slots(base, head, filtered=config.filter is not False, backend=shared.backend)
        image, context, raw_range = slots.image, slots.context, slots.raw_range

    check_finite(log_prob=shared.log_prob, maps=raw_range)
    degenerate = is_degenerate(raw_range).cpu()
    if targets is not None:  # of the others nothing is known
        asked = torch.zeros(n_targets, dtype=torch.bool)
        asked[list(targets)] = True
        degenerate &= asked
    return TokenMaps(
        image=tuple(each.cpu() for each in image),
        context=context.cpu(),
        relevance=None if relevance is None else relevance.cpu(),
        log_prob=shared.log_prob[:, shared.base].cpu(),
        agreement=shared.agreement.cpu(),
        raw_range=raw_range.cpu(),
        residual=residual.cpu(),
        degenerate=degenerate,
        backend=shared.backend,
    )


@dataclass(frozen=True)
class Shared:
    """What all blocks of targets share.

    Attributes:
        base: index of the scale nearest to 1.
        grids: for each image the grid all scales are brought to.
        ranked: int32 `[context k]`, see `rankings`; None but for ARC.
        log_prob, agreement, weights: `[target scale]`.
        lit: for each scale `[context image]`, see `image_activations`; None where they are computed when needed.
    """

    readings: tuple[ScaleStates, ...]
    head: OutputHead
    config: AttributionConfig
    backend: str
    base: int
    grids: tuple[Grid, ...]
    ranked: Tensor | None
    log_prob: Tensor
    agreement: Tensor
    weights: Tensor
    lit: tuple[Tensor, ...] | None

    @property
    def n_prompt(self) -> int:
        return len(self.readings[self.base].layout.prompt)

    def image(self, scale: int, block: slice) -> Tensor:
        """The targets' own activations at one scale, `[target image]`."""
        rows = slice(self.n_prompt + block.start, self.n_prompt + block.stop)
        if self.lit is not None:
            return self.lit[scale][rows]
        return image_activations(self.readings[scale], self.head, rows)

    def context_mean(self, scale: int, suspicion: Tensor, n_before: int, chunk: int | None) -> Tensor:
        """What the context lights up on average at one scale, `[target image]`.

        Args:
            suspicion: `[target context]`, how much each context token counts as interference.
            n_before: context tokens before the first of these targets.
        """
        n_context = suspicion.shape[1]
        if self.lit is not None or chunk is None:
            lit = self.lit[scale] if self.lit is not None else image_activations(self.readings[scale], self.head)
            return ops.context_mean(lit[:n_context], suspicion, n_before=n_before, backend=self.backend)
        # the mean of means, each weighing as much as its context does
        total = suspicion.sum(dim=1, keepdim=True)
        mean = torch.zeros(len(suspicion), self.readings[scale].layout.n_image, device=suspicion.device)
        for start in range(0, n_context, chunk):
            part = slice(start, min(n_context, start + chunk))
            lit = image_activations(self.readings[scale], self.head, part)
            weight = suspicion[:, part].contiguous()
            mean.addcmul_(ops.context_mean(lit, weight, backend=self.backend), weight.sum(dim=1, keepdim=True))
            del lit  # before the next is made
        return mean.div_(torch.where(total > 0, total, 1.0))

    def aggregate(self, flat_maps: Sequence[Tensor], block: slice) -> Tensor:
        """`[target image]` of every scale to one `[target pixel]`, all images side by side."""
        layouts = [reading.layout for reading in self.readings]
        if len(flat_maps) == 1:  # on its own grid, with a weight of 1
            if not any(group.views for group in layouts[0].images):
                return flat_maps[0]
            return torch.cat([each.flatten(1) for each in split_images(flat_maps[0], layouts[0])], dim=1)
        maps = aggregate(flat_maps, layouts, self.weights[block], self.grids, self.config.scale_mean, self.backend)
        return torch.cat([each.flatten(1) for each in maps], dim=1)


@dataclass(frozen=True)
class Predicted:
    """What the model predicts of one response.

    Attributes:
        ranked: int32 `[context k]`, see `rankings`; None but for ARC.
        log_prob: `[target scale]` in nats.
    """

    ranked: Tensor | None
    log_prob: Tensor


def predict(rows: Sequence[Sequence[ScaleStates]], head: OutputHead, config: AttributionConfig) -> list[Predicted]:
    """What the model predicts of each response: one pass over the vocabulary for the base scale of all, one for the rest.

    Args:
        rows: of each response one reading for each scale.
    """
    base = base_scale(config.known_scales)
    bases = [readings[base] for readings in rows]
    ranked: Sequence[Tensor | None] = [None] * len(rows)
    if config.method == "arc":
        backend = ops.resolve(config.backend, bases[0].hidden_states.device)
        ranked, own = zip(*rankings(bases, head, config.known_top_k, backend), strict=True)
    else:
        own = tuple(log_probs_of_all(bases, head))
    others = iter(log_probs_of_all([each for row in rows for s, each in enumerate(row) if s != base], head))
    return [
        Predicted(
            ids, torch.stack([mine if s == base else next(others) for s in range(len(config.known_scales))], dim=1)
        )
        for ids, mine in zip(ranked, own, strict=True)
    ]


def share_work(
    readings: Sequence[ScaleStates],
    head: OutputHead,
    config: AttributionConfig,
    grids: tuple[Grid, ...],
    predicted: Predicted,
    *,
    keep_lit: bool,
) -> Shared:
    """What the model predicts, how far its decision holds at every scale, and what all context lights up."""
    index = base_scale(config.known_scales)
    agreement = (predicted.log_prob - predicted.log_prob[:, [index]]).exp()
    return Shared(
        readings=tuple(readings),
        head=head,
        config=config,
        backend=ops.resolve(config.backend, readings[index].hidden_states.device),
        base=index,
        grids=grids,
        ranked=predicted.ranked,
        log_prob=predicted.log_prob,
        agreement=agreement,
        weights=scale_weights(agreement, config),
        lit=tuple(image_activations(each, head) for each in readings) if keep_lit else None,
    )


def target_blocks(targets: Sequence[int], size: int) -> Iterator[slice]:
    """Ascending targets as slices of consecutive ones, at most `size` each."""
    start = 0
    for i in range(1, len(targets) + 1):
        if i == len(targets) or targets[i] != targets[i - 1] + 1 or i - start == size:
            yield slice(targets[start], targets[i - 1] + 1)
            start = i


@dataclass(frozen=True)
class Block:
    """Finished results of some targets.

    Attributes:
        image: for each image `[target t h w]`.
        context: `[target context]`, of the context up to the last of these targets.
        relevance: `[target context]`, or None but for ARC.
        raw_range: `[target 2]`.
        residual: `[target]`.
    """

    image: tuple[Tensor, ...]
    context: Tensor
    relevance: Tensor | None
    raw_range: Tensor
    residual: Tensor


def explain_block(shared: Shared, block: slice, chunk: int | None = None) -> Block:
    """The method for a block of targets: which context interferes, the maps without it, on one range.

    Args:
        chunk: context tokens whose activations are computed together, where `shared` keeps none.
    """
    config, readings = shared.config, shared.readings
    base = readings[shared.base]
    n_before, n_context = shared.n_prompt + block.start, shared.n_prompt + block.stop
    device = base.hidden_states.device
    ids = base.input_ids[torch.tensor(base.layout.context[:n_context], device=device)]
    order = torch.arange(n_context, device=device)
    causal = order < order[n_before:, None]

    each_scores = [context_activations(reading, shared.head, block, n_context) for reading in readings]
    scores = sum_scales(each_scores, shared.weights[block])
    counts = counting(ids, causal, shared.n_prompt, config)
    ranked = None if shared.ranked is None else shared.ranked[:n_context]
    weighed = [scores] if config.aggregate == "before" else each_scores
    found = [interference(each, counts, ranked, n_before, config, shared.backend) for each in weighed]
    relevance = found[0][0]  # the same for all
    suspicions = [suspicion for _, suspicion in found] * (len(readings) // len(found))

    def mean(scale: int) -> Tensor:
        return shared.context_mean(scale, suspicions[scale], n_before, chunk)

    images = [shared.image(s, block) for s in range(len(readings))]
    maps, image_range, residual = without_interference(shared, block, images, mean)
    raw_range = joint_range(image_range, score_range(scores, causal))
    parts = maps.split([t * h * w for t, h, w in shared.grids], dim=1)
    on_grids = [part.unflatten(1, grid) for part, grid in zip(parts, shared.grids, strict=True)]
    return Block(
        image=normalise_maps(on_grids, raw_range, filtered=config.filter, backend=shared.backend),
        context=normalise_scores(scores, causal, raw_range),
        relevance=relevance,
        raw_range=raw_range,
        residual=residual,
    )


def without_interference(
    shared: Shared, block: slice, images: Sequence[Tensor], mean: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of a block of targets, all scales brought together.

    Args:
        images: for each scale `[target image]`.
        mean: of a scale, what its context lights up on average, `[target image]`.

    Returns:
        `[target pixel]`, all images side by side; their extremes `[target 2]`; the share of the activation left
        `[target]`.
    """
    every = range(len(images))
    if shared.config.method == "lens":
        maps = shared.aggregate(images, block)
        return maps, extremes(maps), torch.ones(len(maps), device=maps.device)
    if shared.config.aggregate == "before":
        raw = shared.aggregate(images, block)
        mixed = shared.aggregate([mean(s) for s in every], block)
        maps, _, image_range = ops.remove_interference(raw, mixed, backend=shared.backend)
        return maps, image_range, share(maps, raw)
    cleaned = [ops.remove_interference(images[s], mean(s), backend=shared.backend)[0] for s in every]
    maps = shared.aggregate(cleaned, block)
    shares = [share(clean, image)[:, None] for clean, image in zip(cleaned, images, strict=True)]
    return maps, extremes(maps), sum_scales(shares, shared.weights[block])[:, 0]


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
