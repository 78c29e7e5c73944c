"""Attribution kernels on plain tensors. Imports torch (and, later, triton) only."""

from fastattr_kernels.reference import (
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
