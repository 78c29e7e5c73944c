"""Which context is interference, and what is left of a map without it. Pure functions of tensors.

TAM weights a context token by how active the target's class is where it stands. ARC (arXiv
2509.22415, section 3.3) asks how differently it predicts: context that predicts like the target is
coherent and kept, context that does not is interference and is suppressed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattr import ops
from fastattr.errors import InputError
from fastattr.types import AttributionConfig, OutputHead, ScaleStates, TokenLayout


def rankings(predictions: Tensor, head: OutputHead, top_k: int) -> Tensor:
    """Ordered ids of the likeliest tokens, int32 `[position k]`, for states `[position dim]`."""
    ids, _ = ops.lm_head_topk(
        predictions,
        head.weight,
        top_k,
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        valid_vocab=head.valid_vocab,
    )
    return ids


def relevance(states: ScaleStates, head: OutputHead, *, top_k: int, rbo_p: float) -> Tensor:
    """Rank-biased overlap of what target and context token predict, `[target context]` in [0, 1].

    Context tokens that do not stand before the target get 0.

    Raises:
        InputError: when `top_k` is larger than the vocabulary.
    """
    if top_k > head.vocab:
        raise InputError(f"top_k is {top_k}, expected at most {head.vocab}, the size of the vocabulary")
    layout = states.layout
    ranked = rankings(states.predictions, head, top_k)
    overlap = ops.rank_overlap(ranked[len(layout.prompt) :], ranked, rbo_p)
    return torch.where(layout.causal().to(overlap.device), overlap, 0.0)


def interference_weights(
    scores: Tensor, relevance: Tensor | None, same_id: Tensor, layout: TokenLayout, config: AttributionConfig
) -> Tensor:
    """How much each context token counts as interference, `[target context]`, not negative.

    Args:
        scores: `[target context]`, see `Activations.scores`.
        relevance: `[target context]`; needed for ARC.
        same_id: bool `[target context]`; a token with the target's own id never counts against it.
    """
    if config.method == "arc":
        if relevance is None:
            raise InputError("method 'arc' needs relevance, got None")
        suspicion = 1.0 - relevance
        weight = suspicion * scores if config.arc_weight == "product" else suspicion
    else:
        weight = scores
    counts = layout.causal().to(scores.device) & ~same_id
    n_prompt = len(layout.prompt)
    if config.context == "prompt":
        counts[:, n_prompt:] = False
    elif config.context == "response":
        counts[:, :n_prompt] = False
    return torch.where(counts, weight, 0.0)
