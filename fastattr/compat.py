"""The reference TAM, quirks included, in closed form: `compat="tam"`.

The reference differs from the method as published in three ways, reproduced here and nowhere else:
slot 0 takes the most likely id at the first prompt position as its class instead of the token's own;
the first answer slot takes the last prefill token's id as its class, while repeats are still excluded
by the answer token's text; and the first answer map is the map of slot 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastattr import ops
from fastattr.errors import TokenLayoutError
from fastattr.maps import check_ids, class_activations, joint_range, normalise_maps, normalise_scores, score_range
from fastattr.msea import split_images
from fastattr.types import OutputHead, ScaleStates


@dataclass(frozen=True)
class TamSlots:
    """What the reference keeps. A slot is a prompt token or an answer token, in order.

    Attributes:
        raw: `[slot image]`, activations.
        cleaned: `[slot image]`, after interference removal.
        text_scores: `[slot slot]`, the class of a slot at earlier slots and its own; 0 above the diagonal.
        image: for each image `[answer t h w]` in [0, 1], filtered.
        context: `[answer slot]` in [0, 1], the text scores each map was normalised with.
        raw_range: `[answer 2]`.
    """

    raw: Tensor
    cleaned: Tensor
    text_scores: Tensor
    image: tuple[Tensor, ...]
    context: Tensor
    raw_range: Tensor


def tam_slots(states: ScaleStates, head: OutputHead, *, filtered: bool = True, backend: str = "torch") -> TamSlots:
    """Every intermediate the reference computes, for parity checks.

    Raises:
        TokenLayoutError: when the layout has no prompt token, which the reference needs for its first map.
    """
    layout, hidden, ids = states.layout, states.hidden_states, states.input_ids
    n_prompt = len(layout.prompt)
    if n_prompt == 0:
        raise TokenLayoutError(
            "compat='tam' needs at least one prompt token: the reference explains it in place of the first answer token"
        )
    check_ids(ids[[layout.response[0] - 1]], head)
    predictors = torch.tensor(layout.context_predictors, device=hidden.device)
    texts = ids[torch.tensor(layout.context, device=ids.device)]
    classes = texts.clone()
    classes[0] = likeliest(hidden[predictors[:1]], head)[0]
    classes[n_prompt] = ids[layout.response[0] - 1]

    raw = class_activations(hidden[torch.tensor(layout.image_positions, device=hidden.device)], head, classes)
    text_scores = class_activations(hidden[predictors], head, classes).tril()
    repeats = texts[:, None] == texts[None, :]
    weight = torch.where(repeats, 0.0, text_scores).tril(-1)
    mean = ops.context_mean(raw, weight, n_before=0, backend=backend)
    cleaned, _, image_range = ops.remove_interference(raw, mean, backend=backend)

    # the first answer map is slot 0's, every other one its own slot's
    shown = torch.arange(n_prompt, len(texts), device=hidden.device)
    shown[0] = 0
    # a slot's own score takes no part in its normalisation, except slot 0's, which has no other
    counted = torch.ones_like(text_scores, dtype=torch.bool).tril(-1)
    counted[0, 0] = True
    raw_range = joint_range(image_range[shown], score_range(text_scores[shown], counted[shown]))
    return TamSlots(
        raw,
        cleaned,
        text_scores,
        image=normalise_maps(split_images(cleaned[shown], layout), raw_range, filtered=filtered, backend=backend),
        context=normalise_scores(text_scores[shown], counted[shown], raw_range),
        raw_range=raw_range,
    )


def likeliest(predictions: Tensor, head: OutputHead) -> Tensor:
    """The most likely id at each position, `[position]` for `[position dim]`."""
    ids, _ = ops.lm_head_topk(
        predictions,
        head.weight,
        1,
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        valid_vocab=head.valid_vocab,
        backend="torch",
    )
    return ids[:, 0]
