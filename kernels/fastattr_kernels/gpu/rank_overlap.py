"""Rank-biased overlap of all pairs of rankings, read from a table of ranks.

For every id that a block of context ranks, the table holds its rank in each of the block's rankings. A target
reads one line of it for each of its k ids: one byte and one look-up for each (target, context, rank).

An id's line is where it occurs last in the context read so far. That numbers the ids without sorting or counting
them, and an id that occurs last before the block is one that the block does not rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from fastattr_kernels import backend, reference

TABLE_BYTES = 16 * 2**20  # of ranks, for one block of context: it should stay in the L2 cache
ALIGNED = 16  # lines of the table start at multiples of this, so that a thread reads its ranks at once


@dataclass(frozen=True)
class Tile:
    """One program covers one target and this many context tokens."""

    context: int
    warps: int


# by architecture; shapes need no buckets, for every program does the same: it reads k lines
TILES: dict[str, Tile] = {"gfx942": Tile(context=512, warps=1)}
DEFAULT_TILE = Tile(context=256, warps=1)  # eight ranks a thread


def rank_overlap(left: Tensor, right: Tensor, persistence: float, *, n_before: int | None = None) -> Tensor:
    """Rank-biased overlap of every pair of rankings; see `reference.rank_overlap`."""
    relevance, _ = _overlap(left, right, persistence, None, None, n_before)
    return relevance


def arc_weight(
    left: Tensor,
    right: Tensor,
    persistence: float,
    counts: Tensor,
    scores: Tensor | None = None,
    *,
    n_before: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Relevance and the weight of interference in one pass; see `reference.arc_weight`."""
    return _overlap(left, right, persistence, counts, scores, n_before)


def _overlap(
    left: Tensor,
    right: Tensor,
    persistence: float,
    counts: Tensor | None,
    scores: Tensor | None,
    n_before: int | None,
) -> tuple[Tensor, Tensor]:
    greatest = right.max()  # asked for first: `worth` is made while the device answers
    worth = _worth(left.shape[1], persistence, left.device)
    return launch(left, right, worth, int(greatest) + 1, counts, scores, n_before)


@lru_cache(maxsize=8)
def _worth(k: int, persistence: float, device: torch.device) -> Tensor:
    """What an id is worth by the deeper of its ranks, and at the end 0 for an absent one: int32 `[k+1]`."""
    return F.pad(reference.overlap_table(k, persistence, torch.device("cpu")), (0, 1)).to(device)


@backend.on_device_of(0)
def launch(
    left: Tensor,
    right: Tensor,
    worth: Tensor,
    n_ids: int,
    counts: Tensor | None = None,
    scores: Tensor | None = None,
    n_before: int | None = None,
) -> tuple[Tensor, Tensor]:
    """All that depends on shapes only, given that the ids of `right` are below `n_ids`.

    Returns:
        relevance and weight, float32 `[target context]` each; without `counts`, relevance twice.
    """
    (targets, k), context, device = left.shape, len(right), left.device
    tile = TILES.get(backend.architecture(device), DEFAULT_TILE)
    dtype = next(d for d in (torch.uint8, torch.int16, torch.int32) if k <= torch.iinfo(d).max)  # k is "absent"
    limit = math.isqrt(TABLE_BYTES // (k * dtype.itemsize))  # a block of b rankings has up to b * k ids
    step = tile.context if limit >= tile.context else ALIGNED
    block = min(max(limit // step * step, ALIGNED), triton.cdiv(context, ALIGNED) * ALIGNED)

    ranks = torch.empty(block * k + 1, block, dtype=dtype, device=device)  # the last line is for absent ids
    rank = torch.arange(k, dtype=dtype, device=device)[:, None].expand(k, block)
    last = torch.full((n_ids + 1,), -1, device=device)  # and one for greater ids
    occurrence = torch.arange(context * k, device=device)
    left, right = left.contiguous(), right.long()
    relevance = torch.empty(targets, context, dtype=torch.float32, device=device)
    weight = relevance if counts is None else torch.empty_like(relevance)
    counts_or_any = relevance if counts is None else counts.contiguous()
    scores_or_any = relevance if scores is None else scores.contiguous()

    for start in range(0, context, block):
        part = right[start : start + block]
        first = start * k
        last.scatter_reduce_(0, part.flatten(), occurrence[first : first + part.numel()], "amax")
        ranks.fill_(k).scatter_(0, last[part.T] - first, rank[:, : len(part)])
        _overlap_kernel[targets, triton.cdiv(len(part), tile.context)](
            left,
            last,
            ranks,
            worth,
            counts_or_any,
            scores_or_any,
            relevance,
            weight,
            n_ids,
            context if n_before is None else n_before,
            context,
            start,
            len(part),
            block,
            K=k,
            ONE=reference.ONE,
            HAS_COUNTS=counts is not None,
            HAS_SCORES=scores is not None,
            BLOCK=tile.context,
            num_warps=tile.warps,
        )
    return relevance, weight


# For each (target, context) pair: k bytes of ranks (2k from k = 256 on), from the L2 cache; from memory, counts
# (1 byte) and scores (4) are read and relevance and weight (4 each) are written, once. The table itself is
# written once per block of context, up to TABLE_BYTES.
@triton.jit(do_not_specialize=["n_ids", "n_before", "start", "part"])
def _overlap_kernel(
    left,  # [target k]
    last,  # [id]
    ranks,  # [line block]
    worth,  # [k+1]
    counts,  # [target context]
    scores,  # [target context]
    relevance,  # [target context]
    weight,  # [target context]
    n_ids,
    n_before,
    context,
    start,
    part,
    block,
    K: tl.constexpr,
    ONE: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = n_before + target - start
    overlap = tl.zeros((BLOCK,), tl.int32)
    if tl.program_id(1) * BLOCK < seen:  # else nothing here stands before the target
        left += target * K
        for a in tl.range(K, loop_unroll_factor=4):
            line = tl.load(last + tl.minimum(tl.load(left + a), n_ids)) - start * K
            line = tl.where(line < 0, block * K, line)
            b = tl.load(ranks + line * block + column, mask=column < block, other=0).to(tl.int32)
            overlap += tl.load(worth + tl.maximum(a, b))

    r = tl.where(column < seen, overlap.to(tl.float32) / ONE, 0.0)
    pair = target * context + start + column
    inside = column < part
    tl.store(relevance + pair, r, mask=inside)
    if HAS_COUNTS:
        w = 1.0 - r
        if HAS_SCORES:
            w *= tl.load(scores + pair, mask=inside, other=0.0).to(tl.float32)
        w = tl.where(tl.load(counts + pair, mask=inside, other=0), w, 0.0)
        tl.store(weight + pair, w, mask=inside)
