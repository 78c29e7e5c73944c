"""What the Triton kernels are launched with: representative workloads, with the work that each cannot avoid.

The tensors live on the meta device: they have shapes, types and alignment, and no data. Rankings are the
exception, for their launcher asks for the greatest id.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from fastattr_kernels.gpu import interference, lm_head_topk, multiscale, rank_gaussian, rank_overlap
from torch import Tensor

BYTES_PER_S = 3.0e12  # ceilings of an H100: copy and matrix products, as measured elsewhere
FLOPS_PER_S = {"bf16": 800e12, "fp32": 60e12}


@dataclass(frozen=True)
class Workload:
    """One op at one shape."""

    op: str
    shape: str
    launch: partial[object]  # a launcher and its arguments
    flops: float
    bytes: float  # read and written once each
    unit: Literal["bf16", "fp32"] = "fp32"  # what the products run on

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    def model(self) -> dict[str, Any]:
        """The roofline of an H100: what no implementation can beat. Modelled, not measured."""
        memory_ms, compute_ms = 1e3 * self.bytes / BYTES_PER_S, 1e3 * self.flops / FLOPS_PER_S[self.unit]
        return {
            "op": self.op,
            "shape": self.shape,
            "flops": self.flops,
            "bytes": self.bytes,
            "modelled_ms": max(memory_ms, compute_ms),
            "bound": "memory" if memory_ms >= compute_ms else "compute",
        }


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _lm_head(
    road: str, positions: int, k: int = 50, *, dim: int = 3584, vocab: int = 152_064, **options: Any
) -> Workload:
    """The embeddings and the hidden states are read once, ids and values are written."""
    hidden, weight = (_meta(rows, dim, dtype=torch.bfloat16) for rows in (positions, vocab))
    return Workload(
        op=road,
        shape=" ".join([f"N={positions} D={dim} V={vocab} k={k}", *options]),
        launch=partial(getattr(lm_head_topk, road), hidden, weight, k, **options),
        flops=2.0 * positions * dim * vocab,
        bytes=2.0 * dim * (vocab + positions) + 8.0 * positions * k,
        unit="bf16",
    )


def _overlap(
    op: str, targets: int, context: int, k: int, *, scores: bool = False, n_before: int | None = None
) -> Workload:
    """Written once for each pair are relevance (4 bytes) and weight (4), read are counts (1) and scores (4).

    An operation is a comparison or an addition, of which a rank takes one each.
    """
    left, right = (torch.arange(rows)[:, None] * 7 + torch.arange(k, dtype=torch.int32) for rows in (targets, context))
    arguments: tuple[Any, ...] = (left.int(), right.int(), 0.9)
    if op == "arc_weight":
        arguments += (_meta(targets, context, dtype=torch.bool), _meta(targets, context) if scores else None)
    pair_bytes = 4 + 5 * (op == "arc_weight") + 4 * scores
    return Workload(
        op=op,
        shape=f"{targets}x{context} k={k}" + " scores" * scores + (" causal" if n_before is not None else ""),
        launch=partial(getattr(rank_overlap, op), *arguments, n_before=n_before),
        flops=2.0 * targets * context * k,
        bytes=float(pair_bytes) * targets * context + 4.0 * k * (targets + context),
    )


def _context_mean(targets: int, context: int, positions: int, *, n_before: int | None = None) -> Workload:
    """Activation and weight are read once and the mean is written; under the causal edge lies half of the products."""
    return Workload(
        op="context_mean",
        shape=f"{targets}x{context}x{positions}" + (" causal" if n_before is not None else ""),
        launch=partial(
            interference.context_mean, _meta(context, positions), _meta(targets, context), n_before=n_before
        ),
        flops=2.0 * targets * positions * (context if n_before is None else n_before + targets / 2),
        bytes=4.0 * (context * positions + targets * context + targets * positions),
    )


def _remove_interference(targets: int, positions: int) -> Workload:
    """Activation and mean are read from memory once and the cleaned maps are written."""
    return Workload(
        op="remove_interference",
        shape=f"{targets}x{positions}",
        launch=partial(interference.remove_interference, _meta(targets, positions), _meta(targets, positions)),
        flops=8.0 * targets * positions,
        bytes=12.0 * targets * positions,
    )


def _rank_gaussian(targets: int, frames: int, height: int, width: int, *, span: bool) -> Workload:
    """A map is read once and written once; a pixel takes 50 minima and maxima, and 60 sums and products."""
    pixels = targets * frames * height * width
    return Workload(
        op="rank_gaussian",
        shape=f"{targets}x{frames}x{height}x{width}" + " span" * span,
        launch=partial(
            rank_gaussian.rank_gaussian, _meta(targets, frames, height, width), _meta(targets, 2) if span else None
        ),
        flops=110.0 * pixels,
        bytes=8.0 * pixels,
    )


def _multiscale(targets: int, grids: tuple[int, ...], size: int, dtype: torch.dtype, *, span: bool = False) -> Workload:
    """The maps are read once and the sum is written: all scales together are one product and sum a pixel."""
    maps = [_meta(targets, 1, grid, grid) for grid in grids]
    pixels = targets * size * size
    return Workload(
        op="multiscale",
        shape=f"{targets}x({'+'.join(map(str, grids))})->{size} {dtype}".replace("torch.", "") + " span" * span,
        launch=partial(
            multiscale.multiscale,
            maps,
            _meta(targets, len(grids)),
            (size, size),
            dtype=dtype,
            span=_meta(targets, 2) if span else None,
        ),
        flops=2.0 * pixels,
        bytes=4.0 * sum(each.numel() for each in maps) + float(dtype.itemsize) * pixels,
    )


SCALES = (16, 24, 32)
WORKLOADS: tuple[Workload, ...] = (
    _lm_head("filtered_summary", 1024),
    _lm_head("filtered_summary", 128),
    _lm_head("filtered_summary", 16),
    _lm_head("filtered_summary", 1024, 200),
    _lm_head("filtered_summary", 128, bias=_meta(152_064, dtype=torch.bfloat16), logit_scale=0.1, softcap=30.0),
    _lm_head("lm_head_topk", 1024),
    _lm_head("fused_summary", 1024),
    _lm_head("fused_summary", 128),
    _lm_head("fused_summary", 16),
    _lm_head("fused_summary", 128, bias=_meta(152_064, dtype=torch.bfloat16), logit_scale=0.1, softcap=30.0),
    _overlap("rank_overlap", 1024, 1024, 50),
    _overlap("rank_overlap", 256, 256, 260),
    _overlap("arc_weight", 512, 542, 50, scores=True, n_before=30),
    _overlap("arc_weight", 1024, 1024, 50),
    _context_mean(512, 542, 576),
    _context_mean(512, 542, 576, n_before=30),
    _context_mean(4096, 4128, 4096, n_before=32),
    _context_mean(511, 541, 575, n_before=30),  # numbers of image tokens that align with nothing
    _remove_interference(512, 576),
    _remove_interference(511, 575),
    _remove_interference(4096, 4096),
    _rank_gaussian(512, 3, 24, 24, span=True),
    _rank_gaussian(512, 1, 36, 36, span=False),
    _rank_gaussian(511, 1, 23, 25, span=True),
    _multiscale(511, (15, 23), 447, torch.uint8),
    _multiscale(512, SCALES, 32, torch.float32),
    _multiscale(512, SCALES, 448, torch.float32),
    _multiscale(512, SCALES, 448, torch.float16),
    _multiscale(512, SCALES, 448, torch.uint8),
    _multiscale(512, SCALES, 448, torch.uint8, span=True),
)
