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


def rankings(states: ScaleStates, head: OutputHead, top_k: int, backend: str) -> tuple[Tensor, Tensor]:
    """What the model ranks highest where each context token is read, and what it made of the targets.

    One pass over the vocabulary gives both.

    Returns:
        ordered ids int32 `[context k]` and the targets' log-probabilities in nats `[target]`.

    Raises:
        InputError: when `top_k` is larger than the vocabulary.
    """
    if top_k > head.vocab:
        raise InputError(f"top_k is {top_k}, expected at most {head.vocab}, the size of the vocabulary")
    predictions = states.predictions
    ids, _, logsumexp = ops.lm_head_summary(
        predictions,
        head.weight,
        top_k,
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        valid_vocab=head.valid_vocab,
        backend=backend,
    )
    n_prompt = len(states.layout.prompt)
    own = ops.lm_head_logit(
        predictions[n_prompt:],
        head.weight,
        states.target_ids,
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
    )
    return ids, own - logsumexp[n_prompt:]


def interference(
    scores: Tensor,
    counts: Tensor,
    ranked: Tensor | None,
    layout: TokenLayout,
    config: AttributionConfig,
    backend: str,
) -> tuple[Tensor | None, Tensor]:
    """How much each context token counts as interference, and (ARC) how alike it and the target predict.

    Args:
        scores: `[target context]`, see `Activations.scores`.
        counts: bool `[target context]`, see `counting`.
        ranked: int32 `[context k]`, see `rankings`; None for TAM.

    Returns:
        relevance in [0, 1] (None for TAM), and weights, not negative, both `[target context]`; relevance is 0 where
        the context does not stand before the target, weights where it does not count.
    """
    if ranked is None:
        return None, scores * counts
    n_prompt = len(layout.prompt)
    return ops.arc_weight(
        ranked[n_prompt:],
        ranked,
        config.rbo_p,
        counts,
        scores if config.arc_weight == "product" else None,
        n_before=n_prompt,
        backend=backend,
    )


def counting(states: ScaleStates, causal: Tensor, config: AttributionConfig) -> Tensor:
    """bool `[target context]`: which context tokens may be interference.

    They stand before the target (`causal`, bool `[target context]`), are of the part `config.context` names, and do not repeat the target's id.
    """
    layout = states.layout
    n_prompt = len(layout.prompt)
    ids = states.input_ids[torch.tensor(layout.context, device=states.input_ids.device)]
    counts = causal & (ids[n_prompt:, None] != ids[None, :])
    if config.context == "prompt":
        counts[:, n_prompt:] = False
    elif config.context == "response":
        counts[:, :n_prompt] = False
    return counts
