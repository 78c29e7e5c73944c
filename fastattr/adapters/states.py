"""Hidden states from one teacher-forced forward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from fastattr.adapters.encode import EncodedExample, alike, along, collate, encode, stackable
from fastattr.adapters.hooks import (
    decoder_of,
    interpolated_positions,
    layer_modules,
    record_output,
    through_norm,
    undisturbed,
)
from fastattr.adapters.model import Model
from fastattr.chat import Prompt
from fastattr.errors import FastattrError, InputError, StatesError
from fastattr.images import Visual
from fastattr.maps import log_probs_of_all
from fastattr.types import ScaleStates


def replay(model: Model, encoded: EncodedExample, response_ids: Tensor, *, layer: int = -1) -> ScaleStates:
    """States of prompt and response from one forward that keeps only the layers asked for and the last logits.

    Returns:
        `hidden_states [seq - 1, dim]`: the last response token is never fed. Of an earlier layer it comes with
        the last layer's states beside it.
    """
    return replay_batch(model, [encoded], [response_ids], layer=layer)[0]


def replay_batch(
    model: Model, encoded: Sequence[EncodedExample], responses: Sequence[Tensor], *, layer: int = -1
) -> list[ScaleStates]:
    """`replay` of several prompts and responses of any length, in as few forwards as their images allow.

    Sequences are padded behind their end, where nothing looks. Images that a family does not stack, being of different
    sizes, are read in forwards of their own.

    Args:
        encoded: all at one scale.
        responses: int `[target]` of each.
    """
    read: list[ScaleStates | None] = [None] * len(encoded)
    home = model.head.weight.device  # with a device map the last layer may lie elsewhere than the embeddings
    for members in stackable(model, encoded):
        sequences = [torch.cat([encoded[i].input_ids, responses[i]]) for i in members]
        interpolate = model.family.interpolates and encoded[members[0]].scale != 1.0
        last, chosen = _forward_ragged(model, [encoded[i] for i in members], sequences, layer, interpolate)
        last, chosen = last.to(home), chosen.to(home)
        for row, i in enumerate(members):
            n = len(sequences[row]) - 1
            read[i] = ScaleStates(
                chosen[row, :n],
                sequences[row].to(home),
                encoded[i].layout(len(responses[i])),
                encoded[i].scale,
                last_states=None if chosen is last else last[row, :n],
            )
    return [each for each in read if each is not None]


def _forward_ragged(
    model: Model, examples: Sequence[EncodedExample], sequences: Sequence[Tensor], layer: int, interpolate: bool
) -> tuple[Tensor, Tensor]:
    """`forward` of sequences of different lengths, each fed without its last token."""
    lengths = [len(sequence) - 1 for sequence in sequences]
    longest = max(lengths)
    fed = torch.stack([nn.functional.pad(each[:-1], (0, longest + 1 - len(each))) for each in sequences])
    mask = None
    if min(lengths) < longest:
        places, ends = (torch.tensor(each, device=fed.device) for each in (range(longest), lengths))
        mask = (places < ends[:, None]).long()
    return forward(model, fed, collate(model, examples, longest), layer, interpolate, mask)


def log_probs_of_images(
    model: Model, variants: Iterable[Sequence[Visual]], prompt: Prompt, response_ids: Tensor, batch_size: int = 4
) -> Tensor:
    """Log-probabilities of one response to one prompt for many variants of the images.

    Args:
        variants: the images of each, taken one batch at a time, so that a generator keeps few of them in memory.
        response_ids: int `[target]`, from `encode_response` or `generate`.
        batch_size: variants in one forward; variants that come out as different shapes have one each. More is not
            always faster: a Pixtral tower's attention spans the whole batch, so its cost grows with the square.

    Returns:
        float32 `[variant target]` in nats, on the CPU.

    Raises:
        InputError: `batch_size` is less than 1; otherwise as `encode` and `replay`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, expected at least 1")
    rows = [torch.empty(0, len(response_ids), dtype=torch.float32, device="cpu")]
    remaining = iter(variants)
    while batch := [encode(model, images, prompt) for images in islice(remaining, batch_size)]:
        for examples in [batch] if model.family.stacks and alike(batch) else [[each] for each in batch]:
            rows.append(_batch_log_probs(model, examples, response_ids))
    return torch.cat(rows)


def _batch_log_probs(model: Model, examples: Sequence[EncodedExample], response_ids: Tensor) -> Tensor:
    """`[variant target]` of examples that are alike, from one forward."""
    ids = torch.cat([examples[0].input_ids, response_ids])
    fed = ids[:-1].repeat(len(examples), 1)
    last, _ = forward(model, fed, collate(model, examples, fed.shape[1]), -1, interpolate=False)
    layout = examples[0].layout(len(response_ids))
    home = model.head.weight.device
    states = [ScaleStates(each.to(home), ids.to(home), layout) for each in last]
    return torch.stack(log_probs_of_all(states, model.head)).cpu()


@torch.no_grad()
def forward(
    model: Model,
    fed_ids: Tensor,
    model_inputs: Mapping[str, Tensor],
    layer: int,
    interpolate: bool,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """States `[batch seq dim]` of the last layer and of `layer` through the final norm, from one forward.

    Args:
        fed_ids: int `[batch seq]`, sequences of one length or padded behind their end.
        attention_mask: `[batch seq]`, 0 where they are; None where none is.
    """
    hf_model = model.hf_model
    module, norm = layer_modules(hf_model, layer)
    inputs = {name: along(model, name, value, fed_ids.shape[1]) for name, value in model_inputs.items()}
    if attention_mask is None and model.family.masked:
        attention_mask = torch.ones_like(fed_ids)
    if attention_mask is not None:
        inputs.setdefault("attention_mask", attention_mask)
    with (
        undisturbed(model.states),
        record_output(decoder_of(hf_model)) as last,
        record_output(module) as chosen,
        interpolated_positions(hf_model, interpolate),
        named_failures(model, {"input_ids": fed_ids, **inputs}),
    ):
        hf_model(input_ids=fed_ids, **inputs, use_cache=False, logits_to_keep=1)
    final = last[-1]
    return final, final if norm is None else through_norm(norm, chosen[-1])


@contextmanager
def named_failures(model: Model, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Turn failures of the model's forward into errors that name its inputs.

    Raises:
        StatesError: the forward failed, but not for lack of memory.
    """
    try:
        yield
    except (torch.OutOfMemoryError, FastattrError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items() if name != "input_ids")
        raise StatesError(
            f"{type(model.hf_model).__name__} ({model.family.name}) fails on {inputs['input_ids'].shape[1]} tokens with "
            f"{shapes}: {error}; some models cannot read images this small or this large, and a registered family may count "
            "other tokens than the model has"
        ) from error
