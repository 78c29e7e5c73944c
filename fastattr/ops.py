"""The one door to the kernels: Triton or torch, decided by `backend` and where the tensors are."""

from __future__ import annotations

import fastattr_kernels
import torch
from fastattr_kernels import (
    arc_weight,
    context_mean,
    lens,
    lm_head_log_prob,
    lm_head_logit,
    lm_head_summary,
    lm_head_topk,
    multiscale,
    rank_gaussian,
    remove_interference,
    stretch,
)

from fastattr.errors import BackendError

__all__ = [
    "arc_weight",
    "context_mean",
    "lens",
    "lm_head_log_prob",
    "lm_head_logit",
    "lm_head_summary",
    "lm_head_topk",
    "multiscale",
    "rank_gaussian",
    "remove_interference",
    "resolve",
    "stretch",
]


def resolve(backend: str, device: torch.device) -> str:
    """`triton` or `torch`: what `backend` comes to for tensors on `device`.

    `auto` falls back to torch; a backend asked for by name runs or explains.

    Raises:
        BackendError: `triton` was asked for and cannot run there.
    """
    try:
        return fastattr_kernels.resolve(backend, device)
    except fastattr_kernels.BackendError as error:
        raise BackendError(str(error)) from error
