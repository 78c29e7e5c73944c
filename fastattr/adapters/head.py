"""The output head of a model as plain tensors, proven once against the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattr.adapters.hooks import decoder_of, record_output
from fastattr.errors import UnsupportedModelError
from fastattr.maps import check_head, class_activations
from fastattr.types import OutputHead

PROVEN_IDS = 4096


def read_head(hf_model: nn.Module, config: Any, valid_vocab: int | None) -> OutputHead:
    """The head as `softcap * tanh(logit_scale * (h @ weight.T + bias) / softcap)`.

    The module's own weight where it is a plain linear layer; otherwise (quantised, LoRA) the matrix it
    applies. Either way one tiny text-only forward must give the model's own logits back.

    Raises:
        UnsupportedModelError: there is no head, or it does something else.
        StatesError: it holds NaN or Inf.
    """
    module = hf_model.get_output_embeddings()  # type: ignore[operator]
    if module is None:
        raise UnsupportedModelError(
            f"{type(hf_model).__name__} has no output embeddings; pass the model that generates "
            "(...ForConditionalGeneration), not its base"
        )
    text_config = config.get_text_config()
    weight, bias = _linear(module, int(text_config.hidden_size))
    vocab = weight.shape[0]
    plain = OutputHead(
        weight, bias, valid_vocab=valid_vocab if valid_vocab is not None and valid_vocab < vocab else None
    )
    check_head(plain)
    configured = replace(
        plain,
        logit_scale=float(getattr(text_config, "logit_scale", None) or 1.0),
        softcap=getattr(text_config, "final_logit_softcapping", None),
    )
    return _proven(hf_model, config, (configured, plain))


def _linear(module: nn.Module, dim: int) -> tuple[Tensor, Tensor | None]:
    if type(module) is nn.Linear and not nn.utils.parametrize.is_parametrized(module):
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    parameter = next(module.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.get_default_dtype()
    with torch.no_grad():
        bias = module(torch.zeros(1, dim, dtype=dtype, device=parameter.device))[0]
        weight = (module(torch.eye(dim, dtype=dtype, device=parameter.device)) - bias).T.contiguous()
    return weight, bias if bool(bias.any()) else None


@torch.no_grad()
def _proven(hf_model: nn.Module, config: Any, candidates: Sequence[OutputHead]) -> OutputHead:
    """The candidate nearest to the model's own logits: some classes ignore the scale or soft-cap of their configuration."""
    weight = candidates[0].weight
    special = {getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")}
    ids = [i for i in range(min(64, candidates[0].vocab)) if i not in special][:4]
    input_ids = torch.tensor([ids], device=weight.device)
    with record_output(decoder_of(hf_model)) as seen:
        logits = hf_model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    # a spread of ids: the whole matrix in float32 would cost gigabytes in a large model
    sample = torch.linspace(0, len(weight) - 1, min(len(weight), PROVEN_IDS), device=weight.device).long()
    theirs = logits[sample].relu()

    def gap(head: OutputHead) -> float:
        ours = class_activations(seen[-1][0, -1:], head, sample)[:, 0]
        return (ours - theirs).abs().max().item()

    head = min(candidates, key=gap)
    size = logits.abs().max().item()
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-4}.get(weight.dtype, 3e-2) * size
    if not gap(head) <= tolerance:
        raise UnsupportedModelError(
            f"the logits of {type(hf_model).__name__} differ from its output embeddings times its last hidden states by "
            f"{gap(head):.3g} (largest logit {size:.3g}, expected at most {tolerance:.3g}): its head does more than a "
            "linear layer with bias, logit scale and soft-cap, so token activations would be wrong"
        )
    return head
