"""Attribution kernels on plain tensors. Imports torch, and triton where a Triton form runs; nothing else.

>>> from fastattr_kernels import lm_head_topk
>>> ids, values = lm_head_topk(hidden, weight, k=50)  # [position dim], [vocab dim] -> [position k] twice
"""

from fastattr_kernels.backend import Backend, BackendError, resolve
from fastattr_kernels.library import (
    arc_weight,
    context_mean,
    lm_head_summary,
    lm_head_topk,
    multiscale,
    rank_gaussian,
    rank_overlap,
    remove_interference,
)
from fastattr_kernels.reference import lens, lm_head_log_prob, lm_head_logit, stretch

__all__ = [
    "Backend",
    "BackendError",
    "arc_weight",
    "context_mean",
    "lens",
    "lm_head_log_prob",
    "lm_head_logit",
    "lm_head_summary",
    "lm_head_topk",
    "multiscale",
    "rank_gaussian",
    "rank_overlap",
    "remove_interference",
    "resolve",
    "stretch",
]
