"""The bundled model opened up: pixels or image embeddings in, log-probabilities of a forced response out.

What is here holds for a decoder of Mistral's form behind a tower that gives one embedding an image token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import fastattr
from fastattr.adapters import EncodedExample, encode
from fastattr.adapters.hooks import decoder_of
from fastattr.images import Visual

BATCH = 4  # pictures in one forward: a Pixtral tower's attention spans the whole batch


@dataclass(frozen=True, eq=False)
class Case:
    """A response forced on the model beside one picture.

    Attributes:
        response_ids: int `[target]`.
    """

    model: fastattr.Model
    visual: Visual
    prompt: str
    response_ids: Tensor


@dataclass(frozen=True, eq=False)
class Reading:
    """A case at scale 1, ready to be read in other versions.

    Attributes:
        hf_model: the transformers model.
        encoded: the picture and the prompt.
        fed_ids: int `[seq]`, prompt and response without its last token, which predicts nothing.
        response_ids: int `[target]`.
    """

    hf_model: Any
    encoded: EncodedExample
    fed_ids: Tensor
    response_ids: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """`(h, w)` of the image tokens."""
        _, h, w = self.encoded.groups[0].grid
        return h, w

    @property
    def pixels(self) -> Tensor:
        """`[1 3 H W]`, the picture as the tower takes it."""
        return self.encoded.model_inputs["pixel_values"]

    @property
    def image_positions(self) -> Tensor:
        return torch.tensor(self.encoded.groups[0].positions)

    @property
    def predictors(self) -> Tensor:
        """int `[target]`, the position that predicts each response token: the last ones fed."""
        return torch.arange(len(self.fed_ids) - len(self.response_ids), len(self.fed_ids))


@dataclass
class Passes:
    """Sequences that went through the decoder, a batch of n counted n times."""

    forwards: int = 0
    backwards: int = 0


def read(case: Case) -> Reading:
    """Encode a case at scale 1."""
    encoded = encode(case.model, [case.visual], case.prompt)
    fed = torch.cat([encoded.input_ids, case.response_ids])[:-1]
    return Reading(case.model.hf_model, encoded, fed, case.response_ids)


def blanked(case: Case) -> Case:
    """The same with the picture in middle grey."""
    return replace(case, visual=case.visual.blank())


# --- what the model says ---------------------------------------------------------------------------


@torch.no_grad()
def log_probs_of_pixels(reading: Reading, pixels: Tensor) -> Tensor:
    """Log-probability (nats) of every target for versions `[version 3 H W]` of the picture, `[version target]`."""
    sizes = reading.encoded.model_inputs["image_sizes"]
    rows = []
    for batch in pixels.split(BATCH):
        logits = reading.hf_model(
            input_ids=reading.fed_ids.repeat(len(batch), 1),
            pixel_values=batch,
            image_sizes=sizes.repeat(len(batch), 1),
            use_cache=False,
            logits_to_keep=len(reading.response_ids),
        ).logits
        rows.append(_of_targets(reading, logits.log_softmax(-1)))
    return torch.cat(rows)


@torch.no_grad()
def image_embeddings(reading: Reading) -> Tensor:
    """What enters the decoder at the image positions, `[image dim]`."""
    return torch.cat(list(reading.hf_model.get_image_features(**reading.encoded.model_inputs).pooler_output))


def decode(reading: Reading, image: Tensor, **options: Any) -> Any:
    """The decoder's output for image embeddings `[version image dim]`, differentiable in them.

    Args:
        options: what to record besides the last states, such as `output_attentions`.
    """
    text = reading.hf_model.get_input_embeddings()(reading.fed_ids).detach()
    embeddings = text.repeat(len(image), 1, 1).index_copy(1, reading.image_positions, image)
    return decoder_of(reading.hf_model)(inputs_embeds=embeddings, use_cache=False, **options)


def target_logits(reading: Reading, states: Tensor) -> Tensor:
    """Logit of every target where it is predicted, `[version target]` from the last states `[version seq dim]`."""
    return _of_targets(reading, _logits(reading, states))


def target_log_probs(reading: Reading, states: Tensor) -> Tensor:
    """Log-probability (nats) of every target, `[version target]` from the last states `[version seq dim]`."""
    return _of_targets(reading, _logits(reading, states).log_softmax(-1))


def _logits(reading: Reading, states: Tensor) -> Tensor:
    return reading.hf_model.get_output_embeddings()(states[:, reading.predictors])


def _of_targets(reading: Reading, values: Tensor) -> Tensor:
    """The targets' own column of `[version target vocab]`."""
    return values[:, torch.arange(len(reading.response_ids)), reading.response_ids]


# --- what a `with` block changes and puts back -----------------------------------------------------


@contextmanager
def counted(hf_model: nn.Module) -> Iterator[Passes]:
    """Count what goes through the decoder, forwards and backwards, while the block runs."""
    passes = Passes()

    def backward(gradient: Tensor) -> None:
        passes.backwards += len(gradient)

    def forward(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states = output.last_hidden_state
        passes.forwards += len(states)
        if states.requires_grad:
            states.register_hook(backward)

    handle = decoder_of(hf_model).register_forward_hook(forward)
    try:
        yield passes
    finally:
        handle.remove()


@contextmanager
def eager_attention(hf_model: nn.Module) -> Iterator[None]:
    """Let the decoder compute its attention in the form that shows its weights."""
    decoder: Any = decoder_of(hf_model)
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


@contextmanager
def relevance_rules(hf_model: nn.Module) -> Iterator[None]:
    """Make gradient times input the relevance of AttnLRP (arXiv 2402.05602); what the decoder computes is unchanged.

    Norms and activations pass relevance on as if their factor were fixed (the identity rule); each side of a product
    gets half of it (the uniform rule): gate and up projection, attention weights and values, queries and keys. The
    softmax keeps its own gradient.
    """

    def norm(module: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        (states,) = inputs
        factor = torch.rsqrt(states.square().mean(-1, keepdim=True) + module.variance_epsilon)
        return states * (module.weight * factor).detach()

    def silu(_module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> Tensor:
        (states,) = inputs
        return states * states.sigmoid().detach()

    def weakened(share: float) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda _module, _inputs, output: share * output + (1 - share) * output.detach()

    def halved(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(0.5 * each + 0.5 * each.detach() for each in inputs)

    decoder: Any = decoder_of(hf_model)
    with ExitStack() as hooks:
        hooks.callback(decoder.norm.register_forward_hook(norm).remove)
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for each in (layer.input_layernorm, layer.post_attention_layernorm):
                hooks.callback(each.register_forward_hook(norm).remove)
            for each, share in ((attention.q_proj, 0.25), (attention.k_proj, 0.25), (attention.v_proj, 0.5)):
                hooks.callback(each.register_forward_hook(weakened(share)).remove)
            hooks.callback(mlp.act_fn.register_forward_hook(silu).remove)
            hooks.callback(mlp.down_proj.register_forward_pre_hook(halved).remove)
        yield
