"""Which context is interference, and what is left of a map without it. Pure functions of tensors.

TAM weights a context token by how active the target's class is where it stands. ARC (arXiv
2509.22415, section 3.3) asks how differently it predicts: context that predicts like the target is
coherent and kept, context that does not is interference and is suppressed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastattr import ops
from fastattr.types import AttributionConfig, OutputHead, ScaleStates


def rankings(rows: Sequence[ScaleStates], head: OutputHead, top_k: int, backend: str) -> list[tuple[Tensor, Tensor]]:
    """What the model ranks highest where each context token is read, and what it made of the targets.

    One pass over the vocabulary gives both, for all rows: the output embeddings, the largest thing there is, are read
    once.

    Returns:
        of each row ordered ids int32 `[context k]` and the targets' log-probabilities in nats `[target]`.
    """
    predictions = [row.predictions for row in rows]
    ids, logsumexp = rank(torch.cat(predictions), head, top_k, backend)
    n_targets = [row.layout.n_targets for row in rows]
    own = ops.lm_head_logit(
        torch.cat([each[-n:] for each, n in zip(predictions, n_targets, strict=True)]),
        head.weight,
        torch.cat([row.target_ids for row in rows]),
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )
    sizes = [len(each) for each in predictions]
    return [
        (of_row, logits - total[-len(logits) :])
        for of_row, total, logits in zip(ids.split(sizes), logsumexp.split(sizes), own.split(n_targets), strict=True)
    ]


def rank(states: Tensor, head: OutputHead, top_k: int, backend: str) -> tuple[Tensor, Tensor]:
    """The ids the model ranks highest in each of `states [n dim]`, int32 `[n k]` in order, and logsumexp `[n]`."""
    ids, _, logsumexp = ops.lm_head_summary(
        states,
        head.weight,
        top_k,
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        valid_vocab=head.valid_vocab,
        backend=backend,
    )
    return ids, logsumexp


def rank_and_score(
    states: Tensor, head: OutputHead, token_ids: Tensor, top_k: int, backend: str
) -> tuple[Tensor, Tensor]:
    """The ids the model ranks highest in each of `states [n dim]`, and its log-probabilities of `token_ids [n]`.

    Returns:
        ordered ids int32 `[n k]`, and log-probabilities in nats `[n]`.
    """
    ids, logsumexp = rank(states, head, top_k, backend)
    logits = ops.lm_head_logit(
        states, head.weight, token_ids, head.bias, logit_scale=head.logit_scale, softcap=head.softcap
    )
    return ids, logits - logsumexp


def interference(
    scores: Tensor,
    counts: Tensor,
    ranked: Tensor | None,
    n_before: int,
    config: AttributionConfig,
    backend: str,
) -> tuple[Tensor | None, Tensor]:
    """How much each context token counts as interference, and (ARC) how alike it and the target predict.

    Args:
        scores: `[target context]`, see `context_activations`; the targets are the last of the context tokens.
        counts: bool `[target context]`, see `counting`.
        ranked: int32 `[context k]`, see `rankings`; None for TAM.
        n_before: context tokens before the first of these targets.

    Returns:
        relevance in [0, 1] (None for TAM), and weights, not negative, both `[target context]`; relevance is 0 where
        the context does not stand before the target, weights where it does not count.
    """
    if ranked is None:
        return None, scores * counts
    return ops.arc_weight(
        ranked[n_before:],
        ranked,
        config.rbo_p,
        counts,
        scores if config.arc_weight == "product" else None,
        n_before=n_before,
        backend=backend,
    )


def counting(ids: Tensor, causal: Tensor, n_prompt: int, config: AttributionConfig) -> Tensor:
    """bool `[target context]`: which context tokens may be interference.

    They stand before the target, are of the part `config.context` names, and do not repeat the target's id.

    Args:
        ids: `[context]`, the last of them the targets'.
        causal: bool `[target context]`, whether the context token stands before the target.
        n_prompt: context tokens of the user's text.
    """
    counts = causal & (ids[-len(causal) :, None] != ids[None, :])
    if config.context == "prompt":
        counts[:, n_prompt:] = False
    elif config.context == "response":
        counts[:, :n_prompt] = False
    return counts
