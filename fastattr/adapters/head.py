"""The output head of a model as plain tensors, proven once against the model itself."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from fastattr.adapters.hooks import decoder_of, device_of, record_output, undisturbed
from fastattr.errors import UnsupportedModelError
from fastattr.maps import check_head, class_activations
from fastattr.types import OutputHead

PROVEN_IDS = 4096
COLUMNS_AT_ONCE = 1024  # of a matrix that a module only applies: `vocab x 1024` numbers beside the matrix itself


@dataclass(frozen=True, eq=False)
class HeadReading:
    """An output head, and how to tell whether the model still has it.

    Attributes:
        module: the output embeddings it was read from.
        form: logit scale and soft-cap of the configuration.
        answer: output `[vocab]` for one fixed state, of a module that is not a plain linear layer; None for a plain one,
            whose weight shares memory with the head's.
    """

    head: OutputHead
    module: weakref.ref[Any]
    form: tuple[float, float | None]
    answer: Tensor | None

    def holds(self, hf_model: Any, config: Any) -> bool:
        """Whether reading the head again would give the same. Costs at most one product of the matrix with one state."""
        module = self.module()
        if module is None or module is not hf_model.get_output_embeddings() or _form(config) != self.form:
            return False
        if self.answer is not None:
            before, now = self.answer, _answer(module, self.head.weight.shape[1], hf_model.dtype)
            return (before.dtype, before.device) == (now.dtype, now.device) and torch.equal(before, now)
        return (
            _is_plain(module)
            and _is_same_memory(self.head.weight, module.weight)
            and (module.bias is None if self.head.bias is None else _is_same_memory(self.head.bias, module.bias))
        )


def _is_same_memory(held: Tensor, now: Tensor | None) -> bool:
    """Whether two tensors are the same memory with the same layout and dtype."""
    return now is not None and (held.data_ptr(), held.shape, held.stride(), held.dtype, held.device) == (
        now.data_ptr(),
        now.shape,
        now.stride(),
        now.dtype,
        now.device,
    )


def read_head(
    hf_model: Any, config: Any, valid_vocab: int | None, states: Sequence[dict[str, Any]] = ()
) -> HeadReading:
    """The head as `softcap * tanh(logit_scale * (h @ weight.T + bias) / softcap)`.

    The module's own weight where it is a plain linear layer in memory; otherwise (quantised, LoRA, offloaded) the matrix
    it applies. Either way one tiny text-only forward must give the model's own logits back.

    Args:
        valid_vocab: number of valid ids; those from here on are padding. None where all are valid.
        states: the model's, from `hooks.state_dicts`; they are put back after the forward.

    Raises:
        UnsupportedModelError: there is no head, its weights are not on this machine, it computes something else, or the
            model's own forward fails.
        StatesError: it holds NaN or Inf.
    """
    module = hf_model.get_output_embeddings()
    if module is None:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} has no output embeddings; pass the model that generates "
            "(...ForConditionalGeneration), not its base"
        )
    if type(getattr(module, "weight", None)).__name__ == "DTensor":
        raise UnsupportedModelError(
            f"the output embeddings of {type(hf_model).__name__} are spread over processes (FSDP, tensor parallelism), so "
            "no process has the whole matrix; load the model without it, or explain its states with attribute_states"
        )
    text_config = config.get_text_config()
    device = device_of(module)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False), undisturbed(states):
        return _read(module, hf_model, config, int(text_config.hidden_size), valid_vocab)


def _read(module: Any, hf_model: Any, config: Any, dim: int, valid_vocab: int | None) -> HeadReading:
    answer = None
    if _is_plain(module):
        weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
    else:
        weight, bias = _applied(module, dim, hf_model.dtype)
        answer = _answer(module, dim, hf_model.dtype)
    vocab = weight.shape[0]
    plain = OutputHead(
        weight, bias, valid_vocab=valid_vocab if valid_vocab is not None and valid_vocab < vocab else None
    )
    check_head(plain)
    scale, softcap = form = _form(config)
    # some classes ignore the scale or the soft-cap of their configuration
    forms = dict.fromkeys([(scale, softcap), (scale, None), (1.0, softcap), (1.0, None)])
    head = _proven(hf_model, config, [replace(plain, logit_scale=scale, softcap=cap) for scale, cap in forms])
    return HeadReading(head, weakref.ref(module), form, answer)


def _form(config: Any) -> tuple[float, float | None]:
    """Logit scale and soft-cap of a configuration."""
    text_config = config.get_text_config()
    factor = float(getattr(text_config, "logit_scale", None) or 1.0)  # Cohere
    factor *= float(getattr(text_config, "lm_head_multiplier", None) or 1.0)  # Falcon H1
    factor /= float(getattr(text_config, "logits_scaling", None) or 1.0)  # Granite
    return factor, getattr(text_config, "final_logit_softcapping", None)


def _is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer and nothing else, with its weight in memory."""
    return (
        type(module) is nn.Linear
        and not nn.utils.parametrize.is_parametrized(module)
        and type(module.weight) is nn.Parameter  # some quantisers keep the layer and put in another kind of tensor
        and not module.weight.is_meta
    )


def _dtype_of(module: nn.Module, model_dtype: torch.dtype) -> torch.dtype:
    """The dtype a module computes in."""
    held = next(module.parameters(), None)  # bytes, or None, where the module is quantised
    return held.dtype if held is not None and held.is_floating_point() else model_dtype


def _answer(module: nn.Module, dim: int, model_dtype: torch.dtype) -> Tensor:
    """Output `[vocab]` of a module for one fixed random state, by which a change of its matrix is noticed."""
    state = torch.randn(1, dim, generator=torch.Generator("cpu").manual_seed(0), dtype=torch.float32, device="cpu")
    device = device_of(module)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return module(state.to(device, _dtype_of(module, model_dtype)))[0]


def _applied(module: nn.Module, dim: int, model_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The matrix `[vocab dim]` and the bias that a module applies: its answers to one-hot states, a few at a time."""
    nothing = torch.zeros(1, dim, dtype=_dtype_of(module, model_dtype), device=device_of(module))
    bias = module(nothing)[0]
    biased = bool(bias.any())
    weight = bias.new_empty(len(bias), dim)
    for start in range(0, dim, COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, dim)
        one_hot = nothing.repeat(stop - start, 1)
        one_hot.diagonal(start).fill_(1)
        columns = module(one_hot)
        weight[:, start:stop] = (columns - bias if biased else columns).T
    return weight, bias if biased else None


def _proven(hf_model: Any, config: Any, candidates: Sequence[OutputHead]) -> OutputHead:
    """The candidate nearest to the model's own logits.

    Raises:
        UnsupportedModelError: none is near enough, or the model's own forward fails.
    """
    weight = candidates[0].weight
    special = {getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")}
    ids = [i for i in range(min(64, candidates[0].vocab)) if i not in special][:4]
    input_ids = torch.tensor([ids], device=device_of(hf_model.get_input_embeddings()))
    with record_output(decoder_of(hf_model)) as seen:
        logits = _forward(hf_model, input_ids).logits[0, -1].float()
    states, logits = seen[-1][0, -1:].to(weight.device), logits.to(weight.device)
    # a spread of ids: the whole matrix in float32 would cost gigabytes in a large model
    sample = torch.linspace(
        0, len(weight) - 1, min(len(weight), PROVEN_IDS), dtype=torch.float64, device=weight.device
    ).long()
    theirs = logits[sample]

    def gaps(head: OutputHead) -> Tensor:
        bias = None if head.bias is None else head.bias[sample]
        part = replace(head, weight=head.weight[sample], bias=bias, valid_vocab=None)
        return (_logits(states, part) - theirs).abs()

    head = min(candidates, key=lambda each: gaps(each).square().mean().item())
    size = logits.abs().max().item()
    gap = gaps(head).max().item()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(weight.dtype, 3e-2) * size
    if not gap <= tolerance:
        raise UnsupportedModelError(
            f"the logits of {type(hf_model).__name__} differ from its output embeddings times its last hidden states by "
            f"{gap:.3g} (largest logit {size:.3g}, expected at most {tolerance:.3g}): its head does more than a "
            "linear layer with bias, logit scale and soft-cap, so token activations would be wrong"
        )
    return head


def _forward(hf_model: Any, input_ids: Tensor) -> Any:
    """The model's own output for a few text tokens `[1 seq]`.

    Raises:
        UnsupportedModelError: the model's own code fails, as Llama 4's does in transformers 5.24.0.
    """
    try:
        return hf_model(input_ids=input_ids, use_cache=False, logits_to_keep=1)
    except (AttributeError, LookupError, NameError, TypeError) as error:  # typical of a bug in the model's code
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} does not run with transformers {version('transformers')}: its own forward of "
            f"{input_ids.shape[1]} text tokens raised {type(error).__name__}: {error}. Install another release of "
            "transformers; `fastattr models` says which one each family was proven with"
        ) from error


def _logits(states: Tensor, head: OutputHead) -> Tensor:
    """`[vocab]` of one state `[1 dim]`. Class activations are cut off at 0; those of the turned head are the others."""
    turned = replace(head, weight=-head.weight, bias=None if head.bias is None else -head.bias)
    every = torch.arange(len(head.weight), device=head.weight.device)
    return (class_activations(states, head, every) - class_activations(states, turned, every))[:, 0]
