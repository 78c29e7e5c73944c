"""Hidden states: one teacher-forced forward (`replay`), or read along with `generate` (`capture`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastattr.adapters.encode import EncodedExample, alike, collate, encode, group_images, user_text
from fastattr.adapters.families import extent_of, grids_of
from fastattr.adapters.hooks import decoder_of, interpolated_positions, layer_modules, record_output, unwrap_peft
from fastattr.adapters.model import Model
from fastattr.errors import InputError, StatesError
from fastattr.images import Visual
from fastattr.maps import log_probs
from fastattr.types import WHOLE_IMAGE, ScaleStates, TokenLayout

logger = logging.getLogger("fastattr")


@torch.no_grad()
def generate(model: Model, encoded: EncodedExample, *, max_new_tokens: int) -> Tensor:
    """Greedy response ids `[target]`, without the end token.

    Raises:
        InputError: the model ends at once, so there is nothing to explain.
    """
    inputs = {**encoded.model_inputs, "input_ids": encoded.input_ids[None]}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # padding rows of the output embeddings and the placeholder of images are no text
    never = [model.image_token_id, *range(model.head.vocab, len(model.head.weight))]
    sequence = model.hf_model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, suppress_tokens=never)[
        0
    ]
    response = sequence[len(encoded.input_ids) :]
    ends = model.hf_model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    while len(response) and int(response[-1]) in ends:
        response = response[:-1]
    if len(response) == 0:
        raise InputError(
            f"{model.name} answers nothing to this prompt, so there is nothing to explain; pass a response"
        )
    return response


def replay(model: Model, encoded: EncodedExample, response_ids: Tensor, *, layer: int = -1) -> ScaleStates:
    """States of prompt and response from one forward that keeps only the layers asked for and the last logits.

    Returns:
        `hidden_states [seq - 1, dim]`: the last response token is never fed. Of an earlier layer it comes with
        the last layer's states beside it.
    """
    ids = torch.cat([encoded.input_ids, response_ids])
    interpolate = model.family.interpolates and encoded.scale != 1.0
    last, chosen = _forward(model.hf_model, ids[None, :-1], encoded.model_inputs, layer, interpolate)
    layout = encoded.layout(len(response_ids))
    return ScaleStates(chosen[0], ids, layout, encoded.scale, last_states=None if chosen is last else last[0])


def log_probs_of_images(
    model: Model, variants: Iterable[Sequence[Visual]], prompt: str, response_ids: Tensor, batch_size: int = 4
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
    rows = [torch.empty(0, len(response_ids))]
    remaining = iter(variants)
    while batch := [encode(model, images, prompt) for images in islice(remaining, batch_size)]:
        for examples in [batch] if alike(batch) else [[each] for each in batch]:
            rows.append(_batch_log_probs(model, examples, response_ids))
    return torch.cat(rows)


def _batch_log_probs(model: Model, examples: Sequence[EncodedExample], response_ids: Tensor) -> Tensor:
    """`[variant target]` of examples that are alike, from one forward."""
    ids = torch.cat([examples[0].input_ids, response_ids])
    fed = ids[:-1].repeat(len(examples), 1)
    last, _ = _forward(model.hf_model, fed, collate(examples), -1, interpolate=False)
    layout = examples[0].layout(len(response_ids))
    return torch.stack([log_probs(ScaleStates(states, ids, layout), model.head) for states in last]).cpu()


@torch.no_grad()
def _forward(
    hf_model: Any, fed_ids: Tensor, model_inputs: Mapping[str, Tensor], layer: int, interpolate: bool
) -> tuple[Tensor, Tensor]:
    """States `[batch seq dim]` of the last layer and of `layer` through the final norm, from one forward.

    Args:
        fed_ids: int `[batch seq]`, sequences of one length.
    """
    module, norm = layer_modules(hf_model, layer)
    inputs = {
        # per-token inputs (token types) grow with the sequence; what follows the prompt is text
        name: nn.functional.pad(value, (0, fed_ids.shape[1] - value.shape[1]))
        if name.endswith("token_type_ids")
        else value
        for name, value in model_inputs.items()
    }
    with (
        record_output(decoder_of(hf_model)) as last,
        record_output(module) as chosen,
        interpolated_positions(hf_model, interpolate),
    ):
        try:
            hf_model(input_ids=fed_ids, **inputs, use_cache=False, logits_to_keep=1)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise StatesError(
                f"{type(hf_model).__name__} fails on {fed_ids.shape[1]} tokens with {shapes}: {error}; some models cannot "
                "read images this small or this large"
            ) from error
    final = last[-1]
    return final, final if norm is None else norm(chosen[-1])


@dataclass
class CapturedStates:
    """Last-layer states of one `generate` call, filled while it runs.

    Attributes:
        model: what was captured.
        model_inputs: what the model was given besides `input_ids`.
        prompt_ids: `[n]`, what it was given; None until it runs.
        fed: ids of every step, `[1 n]` each.
        hidden: states of every step, `[1 n dim]` each.
    """

    model: Model
    model_inputs: dict[str, Tensor] = field(default_factory=dict)
    prompt_ids: Tensor | None = None
    fed: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def attribute(self, out: Any, **options: Any) -> Any:
        """Explain what `generate` returned. Options as in `fastattr.attribute_captured`."""
        from fastattr.pipeline import attribute_captured

        return attribute_captured(self, out, **options)

    def prompt(self) -> Tensor:
        """Ids `[n]` that the model was given.

        Raises:
            InputError: nothing was captured.
        """
        if self.prompt_ids is None or not self.fed:
            raise InputError("nothing was captured: call generate of the captured model inside the with block")
        return self.prompt_ids

    def read(self, sequence: Tensor) -> tuple[Tensor, str]:
        """`hidden_states [seq - 1, dim]` of `sequence [seq]`, and `capture` or `replay`.

        Falls back to one forward where the captured steps are not exactly the sequence (beams,
        assisted decoding, no cache, a hook lost to compilation).
        """
        complete = all(each.shape[0] == 1 for each in (*self.fed, *self.hidden))
        if complete:
            fed, hidden = torch.cat(self.fed, dim=1)[0], torch.cat(self.hidden, dim=1)[0]
            if len(fed) == len(hidden) == len(sequence) - 1 and torch.equal(fed, sequence[:-1]):
                return hidden, "capture"
        rows = sum(each.shape[0] * each.shape[1] for each in self.hidden)
        logger.warning(
            "captured %d states where %d are expected; reading them again in one forward", rows, len(sequence) - 1
        )
        last, _ = _forward(self.model.hf_model, sequence[None, :-1], self.model_inputs, -1, interpolate=False)
        return last[0], "replay"


def captured_reading(
    states: CapturedStates, out: Any, *, visuals: Sequence[Visual], prompt: str | None
) -> tuple[ScaleStates, str]:
    """States and layout of a captured generation, and where they come from (`capture` or `replay`).

    Without `prompt`, every token before the response that is no image and no special token counts as user text.

    Raises:
        InputError: nothing was captured, `out` is not one sequence that begins with the captured prompt, or the
            images are not as many as were captured.
        TokenLayoutError: the captured inputs do not fit the model's grids.
    """
    model = states.model
    sequences = out if isinstance(out, Tensor) else getattr(out, "sequences", None)
    if not isinstance(sequences, Tensor):
        raise InputError(f"out is a {type(out).__name__}, expected what generate returned: sequences [1 seq]")
    if sequences.ndim != 2 or sequences.shape[0] != 1:
        raise InputError(
            f"generate returned sequences {list(sequences.shape)}, expected [1 seq]; explain them one at a time"
        )
    prefill = states.prompt()
    sequence = sequences[0].to(prefill.device)
    start = len(prefill)
    if not torch.equal(sequence[:start], prefill):
        raise InputError(
            f"out holds {len(sequence)} tokens that do not begin with the {start} tokens the captured model was given; "
            "pass what generate returned, with the prompt in front"
        )
    hidden, source = states.read(sequence)
    grids = grids_of(model.family, model.config, states.model_inputs)
    n_frames = sum(len(visual.frames) for visual in visuals)
    if visuals and n_frames != len(grids):
        raise InputError(f"image holds {n_frames} images, but generate was given {len(grids)}; pass the same, or none")
    shown = [(len(v.frames), extent_of(model.family, model.processor, v.size)) for v in visuals]
    extents = shown or [(1, WHOLE_IMAGE)] * len(grids)
    groups = group_images(prefill, model, extents, grids)
    if prompt is None:
        special = {*model.processor.tokenizer.all_special_ids, model.image_token_id}
        positions = tuple(i for i, token in enumerate(prefill.tolist()) if token not in special)
    else:
        positions = user_text(model, prompt, prefill)
    return ScaleStates(hidden, sequence, TokenLayout(groups, positions, (start, len(sequence)))), source


@contextmanager
def capture(model: Model) -> Iterator[CapturedStates]:
    """Read last-layer states along with the user's own `generate`.

        with fastattr.capture(model) as states:
            out = hf_model.generate(**inputs)
        why = states.attribute(out)

    One block captures one `generate`, so that states can never be those of another image. No hook is left behind,
    also after an exception.
    """
    states = CapturedStates(model)
    base = unwrap_peft(model.hf_model)
    generate, own = base.generate, base.__dict__.get("generate")
    runs = 0

    def keep_given(ids: Tensor, kwargs: Mapping[str, Any]) -> None:
        states.prompt_ids = ids[0].detach()
        states.model_inputs = {
            name: value
            for name, value in kwargs.items()
            if isinstance(value, Tensor)
            and name not in ("input_ids", "attention_mask", "position_ids", "cache_position")
        }

    def recording(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise InputError("generate ran twice in one capture block, expected once; open a block for each run")
        ids = kwargs.get("input_ids") if inputs is None else inputs
        if ids is None:
            raise InputError(
                f"generate was given {', '.join(kwargs) or 'nothing'}, expected input_ids: fastattr reads ids"
            )
        # generate may encode the images before the first forward, so its own arguments are what counts
        keep_given(ids, kwargs)
        return generate(inputs, *args, **kwargs)

    def keep_fed(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            if states.prompt_ids is None:  # a decoding loop of the user's own
                keep_given(ids, kwargs)
            states.fed.append(ids.detach())

    handle = base.register_forward_pre_hook(keep_fed, with_kwargs=True)
    base.generate = recording
    try:
        with record_output(decoder_of(base)) as states.hidden:
            yield states
    finally:
        if own is None:
            del base.generate
        else:
            base.generate = own
        handle.remove()
