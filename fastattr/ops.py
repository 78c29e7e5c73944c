"""The one door to the kernels. Here every operation is the torch form; faster ones may stand in later."""

from __future__ import annotations

from fastattr_kernels import (
    context_mean,
    lens,
    lm_head_log_prob,
    lm_head_topk,
    multiscale,
    rank_gaussian,
    rank_overlap,
    remove_interference,
)

__all__ = [
    "context_mean",
    "lens",
    "lm_head_log_prob",
    "lm_head_topk",
    "multiscale",
    "rank_gaussian",
    "rank_overlap",
    "remove_interference",
]
