"""Token activation maps and their joint normalisation. Pure functions of tensors and layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastattr import ops
from fastattr.errors import InputError, StatesError, TokenLayoutError
from fastattr.types import OutputHead, ScaleStates


def image_activations(states: ScaleStates, head: OutputHead, context: slice = slice(None)) -> Tensor:
    """How active the class of each context token is at each image position (TAM, section 3.1), `[context image]`.

    Response tokens are context tokens too, the last ones: their rows are the targets' own activations.

    Args:
        context: which context tokens.
    """
    layout, hidden = states.layout, states.hidden_states
    ids = states.input_ids[_index(layout.context[context], hidden)]
    return class_activations(hidden[_index(layout.image_positions, hidden)], head, ids)


def context_activations(states: ScaleStates, head: OutputHead, targets: slice, n_context: int) -> Tensor:
    """How active the targets' classes are where each of the first `n_context` context tokens stands, `[target context]`."""
    layout, hidden = states.layout, states.hidden_states
    read = hidden[_index(layout.context_predictors[:n_context], hidden)]
    return class_activations(read, head, states.target_ids[targets])


def class_activations(hidden_states: Tensor, head: OutputHead, ids: Tensor) -> Tensor:
    """`relu(logit)` of classes `ids [target]` at `hidden_states [position dim]`: `[target position]`."""
    bias = None if head.bias is None else head.bias[ids]
    return ops.lens(hidden_states, head.weight[ids], bias, logit_scale=head.logit_scale, softcap=head.softcap)


def log_probs(states: ScaleStates, head: OutputHead) -> Tensor:
    """Log-probability (nats) of every target where it was predicted, `[target]`."""
    return log_probs_of_all([states], head)[0]


def log_probs_of_all(rows: Sequence[ScaleStates], head: OutputHead) -> list[Tensor]:
    """`log_probs` of each of several readings, from one pass over the vocabulary."""
    if not rows:
        return []
    predicting = torch.cat([row.predictions[len(row.layout.prompt) :] for row in rows])
    found = log_prob_of(predicting, head, torch.cat([row.target_ids for row in rows]))
    return list(found.split([row.layout.n_targets for row in rows]))


def log_prob_of(states: Tensor, head: OutputHead, ids: Tensor) -> Tensor:
    """Log-probability (nats) of `ids [n]`, each predicted with one of `states [n dim]`, `[n]`."""
    return ops.lm_head_log_prob(
        states,
        head.weight,
        ids,
        head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        valid_vocab=head.valid_vocab,
    )


def score_range(scores: Tensor, counted: Tensor) -> Tensor:
    """Least and greatest counted score of each target, `[target 2]`; beyond all scores where none counts.

    Args:
        scores: `[target context]`.
        counted: bool `[target context]`.
    """
    out_of_reach = (~counted).float() * torch.finfo(torch.float32).max
    return torch.stack([(scores + out_of_reach).amin(1), (scores - out_of_reach).amax(1)], dim=1)


def joint_range(image_range: Tensor, scores: Tensor) -> Tensor:
    """What a target's maps and scores span together, `[target 2]`, from the `[target 2]` of both."""
    low, high = torch.minimum(image_range[:, 0], scores[:, 0]), torch.maximum(image_range[:, 1], scores[:, 1])
    return torch.stack([low, high], dim=1)


FILTER_FROM = 16  # cells a side; measured in benchmarks/results/rank_filter.jsonl


def normalise_maps(
    image: Sequence[Tensor], raw_range: Tensor, *, filtered: bool | None, backend: str
) -> tuple[Tensor, ...]:
    """Min-max over all of a target's maps and scores together, then the filter (TAM, section 3.3).

    A function word that looks at nothing then stays dark. All-equal scores give zeros.

    Args:
        image: for each image `[target t h w]`.
        raw_range: `[target 2]`, see `joint_range`.
        filtered: whether the rank-Gaussian filter is applied; None leaves it out where a grid has fewer than
            `FILTER_FROM` cells a side.

    Returns:
        for each image `[target t h w]` in [0, 1].
    """
    return tuple(
        ops.rank_gaussian(maps, raw_range, backend=backend)
        if (min(maps.shape[-2:]) >= FILTER_FROM if filtered is None else filtered)
        else ops.stretch(maps, raw_range)
        for maps in image
    )


def normalise_scores(scores: Tensor, counted: Tensor, raw_range: Tensor) -> Tensor:
    """The same min-max for scores `[target context]`; those that do not count come out as 0."""
    return ops.stretch(scores, raw_range).mul_(counted)


def is_degenerate(raw_range: Tensor) -> Tensor:
    """bool `[target]`: all maps and scores of the target are equal, and come out as zeros."""
    return raw_range[:, 1] <= raw_range[:, 0]


def check_states(states: ScaleStates, head: OutputHead) -> None:
    """Refuse anything that would give a wrong map.

    Raises:
        StatesError: shapes, devices or values of states and output embeddings are unusable.
        TokenLayoutError: the layout does not fit `input_ids`.
        InputError: ids outside the vocabulary.
    """
    hidden, ids, layout = states.hidden_states, states.input_ids, states.layout
    at = f" at scale {states.scale:g}"
    if hidden.ndim != 2 or not hidden.is_floating_point():
        raise StatesError(
            f"hidden_states{at} is {hidden.dtype} {list(hidden.shape)}, expected floating point [seq dim]"
        )
    if head.weight.ndim != 2 or head.weight.shape[1] != hidden.shape[1]:
        raise StatesError(
            f"output_embeddings is {list(head.weight.shape)}, expected [vocab {hidden.shape[1]}] "
            f"to fit hidden_states {list(hidden.shape)}"
        )
    if head.bias is not None and head.bias.shape != head.weight.shape[:1]:
        raise StatesError(
            f"the head's bias is {list(head.bias.shape)}, expected [{head.weight.shape[0]}], one for each id"
        )
    if not (hidden.device == head.weight.device == ids.device):
        raise StatesError(
            f"hidden_states{at} is on {hidden.device}, input_ids on {ids.device} and output_embeddings on "
            f"{head.weight.device}; move them to one device"
        )
    if ids.ndim != 1 or ids.dtype not in (torch.int64, torch.int32):
        raise TokenLayoutError(f"input_ids{at} is {ids.dtype} {list(ids.shape)}, expected int64 or int32 [seq]")
    start, stop = layout.response
    if len(ids) != stop:
        raise TokenLayoutError(
            f"input_ids{at} holds {len(ids)} tokens but the layout's response spans ({start}, {stop}) and must end the sequence"
        )
    if len(hidden) not in (stop - 1, stop):
        raise StatesError(
            f"hidden_states{at} holds {len(hidden)} positions, expected {stop - 1} (or {stop}) for {stop} input_ids: "
            "the last token of the response is never fed back"
        )
    check_ids(ids[_index(layout.context, ids)], head, at)
    read = hidden[_index((*layout.image_positions, *layout.context_predictors), hidden)]
    if read.numel() and not all(math.isfinite(float(end)) for end in (read.amin(), read.amax())):
        bad = int((~torch.isfinite(read)).any(dim=1).sum())
        raise StatesError(
            f"hidden_states{at} holds NaN or Inf at {bad} of {len(read)} positions that are read; "
            "run the model in bfloat16 or float32 rather than float16"
        )


def check_head(head: OutputHead) -> None:
    """Refuse output embeddings that are not finite: every log-probability reads all of them.

    Reading them takes as long as a short answer's rankings, so they are checked where they enter, not at each use.

    Raises:
        StatesError: some are NaN or Inf.
    """
    for name, values in (("output_embeddings", head.weight), ("the head's bias", head.bias)):
        if values is not None and not all(math.isfinite(float(end)) for end in torch.aminmax(values)):
            raise StatesError(f"{name} {list(values.shape)} holds NaN or Inf, expected finite numbers")


def check_ids(ids: Tensor, head: OutputHead, at: str = "") -> None:
    """Refuse ids that have no row.

    Raises:
        InputError: an id is outside the vocabulary.
    """
    wrong = ids[(ids < 0) | (ids >= head.vocab)]
    if len(wrong):
        raise InputError(
            f"input_ids{at} holds ids {sorted(set(wrong.tolist()))[:5]}, expected 0 to {head.vocab - 1}, the rows of the "
            "output embeddings"
        )


def check_finite(**results: Tensor) -> None:
    """Refuse results that overflowed.

    Raises:
        StatesError: some are NaN or Inf.
    """
    for name, values in results.items():
        if not bool(torch.isfinite(values).all()):
            raise StatesError(
                f"{name} came out as NaN or Inf: hidden states and output embeddings are finite, but their products "
                "overflow float32; check that both come from the same model, the states after its final norm"
            )


def _index(positions: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(positions, dtype=torch.long, device=like.device)
