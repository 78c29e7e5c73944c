"""The operations as registered torch operators, so that `torch.compile` can keep them whole.

Each takes `backend`; see `fastattr_kernels.backend`. What an operation means is written in `reference.py`.

Outside a graph the plain function runs: the first call of any registered operator imports torch's compiler, which
takes longer than most explanations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.library import custom_op

from fastattr_kernels import reference
from fastattr_kernels.backend import resolve


def lm_head_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Ordered top-k of the full vocabulary; see `reference.lm_head_topk`."""
    run = _lm_head_operator if is_compiling() else _lm_head
    ids, values, _ = run(hidden, weight, k, bias, logit_scale, softcap, valid_vocab, False, backend)
    return ids, values


def lm_head_summary(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    valid_vocab: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Ordered top-k and log-sum-exp from one pass over the vocabulary; see `reference.lm_head_summary`."""
    run = _lm_head_operator if is_compiling() else _lm_head
    return run(hidden, weight, k, bias, logit_scale, softcap, valid_vocab, True, backend)


def _lm_head(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    valid_vocab: int | None,
    with_logsumexp: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    summary, topk = reference.lm_head_summary, reference.lm_head_topk
    if resolve(backend, hidden.device) == "triton":
        from fastattr_kernels.gpu import lm_head_topk as gpu

        summary, topk = gpu.lm_head_summary, gpu.lm_head_topk
    if with_logsumexp:
        return summary(hidden, weight, k, bias, logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab)
    ids, values = topk(hidden, weight, k, bias, logit_scale=logit_scale, softcap=softcap, valid_vocab=valid_vocab)
    return ids, values, hidden.new_empty(0, dtype=torch.float32)


_lm_head_operator = custom_op("fastattr::lm_head", mutates_args=())(_lm_head)


@_lm_head_operator.register_fake
def _(hidden, weight, k, bias, logit_scale, softcap, valid_vocab, with_logsumexp, backend):  # type: ignore[no-untyped-def]
    reference.vocabulary(weight, valid_vocab, k)
    positions = hidden.shape[0]
    return (
        hidden.new_empty((positions, k), dtype=torch.int32),
        hidden.new_empty((positions, k), dtype=torch.float32),
        hidden.new_empty(positions if with_logsumexp else 0, dtype=torch.float32),
    )


def rank_overlap(
    left: Tensor, right: Tensor, persistence: float, *, n_before: int | None = None, backend: str = "auto"
) -> Tensor:
    """Rank-biased overlap of every pair of rankings; see `reference.rank_overlap`."""
    run = _rank_overlap_operator if is_compiling() else _rank_overlap
    return run(left, right, persistence, n_before, backend)


def _rank_overlap(left: Tensor, right: Tensor, persistence: float, n_before: int | None, backend: str) -> Tensor:
    if resolve(backend, left.device) == "triton":
        from fastattr_kernels.gpu.rank_overlap import rank_overlap

        return rank_overlap(left, right, persistence, n_before=n_before)
    return reference.rank_overlap(left, right, persistence, n_before=n_before)


_rank_overlap_operator = custom_op("fastattr::rank_overlap", mutates_args=())(_rank_overlap)


@_rank_overlap_operator.register_fake
def _(left, right, persistence, n_before, backend):  # type: ignore[no-untyped-def]
    return left.new_empty((left.shape[0], right.shape[0]), dtype=torch.float32)


def arc_weight(
    left: Tensor,
    right: Tensor,
    persistence: float,
    counts: Tensor,
    scores: Tensor | None = None,
    *,
    n_before: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Relevance and the weight of interference in one pass; see `reference.arc_weight`."""
    run = _arc_weight_operator if is_compiling() else _arc_weight
    return run(left, right, persistence, counts, scores, n_before, backend)


def _arc_weight(
    left: Tensor,
    right: Tensor,
    persistence: float,
    counts: Tensor,
    scores: Tensor | None,
    n_before: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if resolve(backend, left.device) == "triton":
        from fastattr_kernels.gpu.rank_overlap import arc_weight

        return arc_weight(left, right, persistence, counts, scores, n_before=n_before)
    return reference.arc_weight(left, right, persistence, counts, scores, n_before=n_before)


_arc_weight_operator = custom_op("fastattr::arc_weight", mutates_args=())(_arc_weight)


@_arc_weight_operator.register_fake
def _(left, right, persistence, counts, scores, n_before, backend):  # type: ignore[no-untyped-def]
    shape = (left.shape[0], right.shape[0])
    return left.new_empty(shape, dtype=torch.float32), left.new_empty(shape, dtype=torch.float32)


def context_mean(
    context_activation: Tensor, weight: Tensor, *, n_before: int | None = None, backend: str = "auto"
) -> Tensor:
    """What the context lights up on average; see `reference.context_mean`."""
    run = _context_mean_operator if is_compiling() else _context_mean
    return run(context_activation, weight, n_before, backend)


def _context_mean(context_activation: Tensor, weight: Tensor, n_before: int | None, backend: str) -> Tensor:
    if resolve(backend, weight.device) == "triton":
        from fastattr_kernels.gpu.interference import context_mean

        return context_mean(context_activation, weight, n_before=n_before)
    return reference.context_mean(context_activation, weight, n_before=n_before)


_context_mean_operator = custom_op("fastattr::context_mean", mutates_args=())(_context_mean)


@_context_mean_operator.register_fake
def _(context_activation, weight, n_before, backend):  # type: ignore[no-untyped-def]
    return weight.new_empty((weight.shape[0], context_activation.shape[1]), dtype=torch.float32)


def remove_interference(activation: Tensor, mean: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Subtract from each map its best-fitting multiple of the context's; see `reference.remove_interference`."""
    run = _remove_interference_operator if is_compiling() else _remove_interference
    return run(activation, mean, backend)


def _remove_interference(activation: Tensor, mean: Tensor, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if resolve(backend, activation.device) == "triton":
        from fastattr_kernels.gpu.interference import remove_interference

        return remove_interference(activation, mean)
    return reference.remove_interference(activation, mean)


_remove_interference_operator = custom_op("fastattr::remove_interference", mutates_args=())(_remove_interference)


@_remove_interference_operator.register_fake
def _(activation, mean, backend):  # type: ignore[no-untyped-def]
    cleaned = torch.empty_like(activation, dtype=torch.float32)
    return cleaned, cleaned.new_empty(len(activation)), cleaned.new_empty((len(activation), 2))


def rank_gaussian(maps: Tensor, span: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Normalise, then the rank-Gaussian filter; see `reference.rank_gaussian`."""
    run = _rank_gaussian_operator if is_compiling() else _rank_gaussian
    return run(maps, span, backend)


def _rank_gaussian(maps: Tensor, span: Tensor | None, backend: str) -> Tensor:
    if resolve(backend, maps.device) == "triton":
        from fastattr_kernels.gpu.rank_gaussian import rank_gaussian

        return rank_gaussian(maps, span)
    return reference.rank_gaussian(maps, span)


_rank_gaussian_operator = custom_op("fastattr::rank_gaussian", mutates_args=())(_rank_gaussian)


@_rank_gaussian_operator.register_fake
def _(maps, span, backend):  # type: ignore[no-untyped-def]
    return torch.empty_like(maps, memory_format=torch.contiguous_format)


def multiscale(
    maps: Sequence[Tensor],
    weights: Tensor,
    size: tuple[int, int],
    *,
    dtype: torch.dtype = torch.float32,
    span: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Upsample the maps of every scale and sum them, with the extremes; see `reference.multiscale`."""
    run = _multiscale_operator if is_compiling() else _multiscale
    return run(list(maps), weights, list(size), dtype, span, backend)


def _multiscale(
    maps: Sequence[Tensor],
    weights: Tensor,
    size: Sequence[int],
    dtype: torch.dtype,
    span: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    height, width = size
    if maps and resolve(backend, weights.device) == "triton":
        from fastattr_kernels.gpu.multiscale import multiscale

        return multiscale(maps, weights, (height, width), dtype=dtype, span=span)
    return reference.multiscale(maps, weights, (height, width), dtype=dtype, span=span)


_multiscale_operator = custom_op("fastattr::multiscale", mutates_args=())(_multiscale)


@_multiscale_operator.register_fake
def _(maps, weights, size, dtype, span, backend):  # type: ignore[no-untyped-def]
    targets, frames = maps[0].shape[:2]
    return weights.new_empty((targets, frames, *size), dtype=dtype), weights.new_empty((targets, 2))
