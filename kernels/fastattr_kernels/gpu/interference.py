"""What the context lights up on average, and its removal: a matrix product and one pass over rows.

Residues below a millionth of an activation count as nothing (`reference.ROUNDING`), so products are in full
float32: the rounded inputs of TF32 would leave a thousand times more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastattr_kernels import backend, reference

TOGETHER = 256  # context tokens summed one by one; thousands would lose more than `reference.ROUNDING`


@dataclass(frozen=True)
class Tile:
    """One program makes `[target position]` of the mean, from `context` tokens at a time."""

    target: int
    position: int
    context: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Row:
    """One program cleans one row, this many positions at a time."""

    position: int
    warps: int


# by architecture; (small, large): large tiles reuse more, small ones fill the device when there are few
TILES: dict[str, tuple[Tile, Tile]] = {}
DEFAULT_TILES = (
    Tile(target=32, position=32, context=16, warps=4, stages=3),
    Tile(target=64, position=64, context=16, warps=4, stages=3),
)
MANY_TILES = 512  # large tiles, from which on they fill a device

# by architecture; (short, long) rows
ROWS: dict[str, tuple[Row, Row]] = {}
DEFAULT_ROWS = (Row(position=1024, warps=4), Row(position=2048, warps=8))


@backend.on_device_of(0)
def context_mean(context_activation: Tensor, weight: Tensor, *, n_before: int | None = None) -> Tensor:
    """What the context around a target lights up on average; see `reference.context_mean`."""
    (targets, context), positions, device = weight.shape, context_activation.shape[1], weight.device
    context_activation, weight = context_activation.contiguous(), weight.contiguous()
    mean = torch.empty(targets, positions, dtype=torch.float32, device=device)
    small, large = TILES.get(backend.architecture(device), DEFAULT_TILES)
    many = triton.cdiv(targets, large.target) * triton.cdiv(positions, large.position) >= MANY_TILES
    tile = large if many else small
    _context_mean_kernel[triton.cdiv(positions, tile.position), triton.cdiv(targets, tile.target)](
        context_activation,
        weight,
        mean,
        targets,
        context,
        positions,
        context if n_before is None else n_before,
        BLOCK_TARGET=tile.target,
        BLOCK_POSITION=tile.position,
        BLOCK_CONTEXT=tile.context,
        TOGETHER=TOGETHER,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return mean


@backend.on_device_of(0)
def remove_interference(activation: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Subtract from each map its best-fitting multiple of the context's; see `reference.remove_interference`.

    A NaN anywhere in a target's maps makes all of that target's results NaN.
    """
    targets, positions = activation.shape
    activation, mean = activation.contiguous(), mean.contiguous()
    cleaned = torch.empty_like(activation, dtype=torch.float32)
    scale = cleaned.new_empty(targets)
    span = cleaned.new_empty(targets, 2)
    short, long = ROWS.get(backend.architecture(activation.device), DEFAULT_ROWS)
    row = short if positions <= short.position else long
    _remove_interference_kernel[(targets,)](
        activation,
        mean,
        cleaned,
        scale,
        span,
        positions,
        ROUNDING=reference.ROUNDING,
        BLOCK=row.position,
        num_warps=row.warps,
    )
    return cleaned, scale, span


# Compute-bound: 2 * target * context * position FLOPs, half of it where the context is causal. Weights are read
# position / BLOCK_POSITION times and activations target / BLOCK_TARGET times, mostly from the L2 cache; the mean
# (4 bytes) is written once.
@triton.jit(do_not_specialize=["targets", "n_before"])
def _context_mean_kernel(
    context_activation,  # [context position]
    weight,  # [target context]
    mean,  # [target position]
    targets,
    context,
    positions,
    n_before,
    BLOCK_TARGET: tl.constexpr,
    BLOCK_POSITION: tl.constexpr,
    BLOCK_CONTEXT: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # later targets see more context: the longest work first
    target = block * BLOCK_TARGET + tl.arange(0, BLOCK_TARGET)
    position = tl.program_id(0) * BLOCK_POSITION + tl.arange(0, BLOCK_POSITION)
    product = tl.zeros((BLOCK_TARGET, BLOCK_POSITION), tl.float32)
    recent = tl.zeros_like(product)
    total = tl.zeros((BLOCK_TARGET, BLOCK_CONTEXT), tl.float32)
    last = tl.minimum(targets, (block + 1) * BLOCK_TARGET) - 1
    seen = tl.minimum(context, n_before + last)
    for start in range(0, seen, BLOCK_CONTEXT):
        token = start + tl.arange(0, BLOCK_CONTEXT)
        w = tl.load(
            weight + target.to(tl.int64)[:, None] * context + token[None, :],
            mask=(target[:, None] < targets) & (token[None, :] < seen),
            other=0.0,
        ).to(tl.float32)
        a = tl.load(
            context_activation + token.to(tl.int64)[:, None] * positions + position[None, :],
            mask=(token[:, None] < seen) & (position[None, :] < positions),
            other=0.0,
        ).to(tl.float32)
        recent = tl.dot(w, a, recent, input_precision="ieee")
        total += w
        if (start + BLOCK_CONTEXT) % TOGETHER == 0:
            product += recent
            recent = tl.zeros_like(product)
    product += recent
    all_weight = tl.sum(total, axis=1)
    all_weight = tl.where(all_weight == 0, 1.0, all_weight)
    tl.store(
        mean + target.to(tl.int64)[:, None] * positions + position[None, :],
        tl.div_rn(product, tl.broadcast_to(all_weight[:, None], product.shape)),
        mask=(target[:, None] < targets) & (position[None, :] < positions),
    )


# Activation and mean (4 bytes each) are read from memory once (the second pass finds its row in a cache) and the
# cleaned map (4 bytes) is written once.
@triton.jit
def _remove_interference_kernel(
    activation,  # [target position]
    mean,  # [target position]
    cleaned,  # [target position]
    scale,  # [target]
    span,  # [target 2]
    positions,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.program_id(0)
    activation += target.to(tl.int64) * positions
    mean += target.to(tl.int64) * positions
    cleaned += target.to(tl.int64) * positions

    shared = tl.zeros((BLOCK,), tl.float32)
    norm = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        a = tl.load(activation + position, mask=position < positions, other=0.0).to(tl.float32)
        m = tl.load(mean + position, mask=position < positions, other=0.0).to(tl.float32)
        shared += a * m
        norm += m * m
    norms = tl.sum(norm, axis=0)
    lam = tl.where(norms == 0, 0.0, tl.div_rn(tl.sum(shared, axis=0), tl.where(norms == 0, 1.0, norms)))

    least = tl.full((BLOCK,), float("inf"), tl.float32)
    greatest = tl.zeros((BLOCK,), tl.float32)  # of what is not negative
    for start in range(0, positions, BLOCK):
        position = start + tl.arange(0, BLOCK)
        a = tl.load(activation + position, mask=position < positions, other=0.0).to(tl.float32)
        m = tl.load(mean + position, mask=position < positions, other=0.0).to(tl.float32)
        left = a - lam * m
        left = tl.where(left <= ROUNDING * a, 0.0, left)  # a NaN stays one
        tl.store(cleaned + position, left, mask=position < positions)
        least = tl.minimum(least, tl.where(position < positions, left, float("inf")))
        greatest = tl.maximum(greatest, left)
    tl.store(scale + target, lam)
    # minima drop NaN, so it is put back
    tl.store(span + 2 * target, tl.min(least, axis=0) + 0.0 * lam)
    tl.store(span + 2 * target + 1, tl.max(greatest, axis=0) + 0.0 * lam)
