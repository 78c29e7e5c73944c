"""A reading that grows a token at a time, with the model's own cache."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastattr.adapters.encode import EncodedExample
from fastattr.adapters.hooks import (
    OwnPositions,
    decoder_of,
    interpolated_positions,
    layer_modules,
    record_output,
    through_norm,
    undisturbed,
    unwrap_peft,
)
from fastattr.adapters.model import Model
from fastattr.errors import UnsupportedModelError


class Rows:
    """A tensor that rows are added to, in memory that doubles."""

    def __init__(self, first: Tensor) -> None:
        self._held = first
        self._n = len(first)

    def add(self, rows: Tensor) -> None:
        n = self._n + len(rows)
        if n > len(self._held):
            larger = self._held.new_empty(max(n, 2 * len(self._held)), *self._held.shape[1:])
            larger[: self._n] = self._held[: self._n]
            self._held = larger
        self._held[self._n : n] = rows
        self._n = n

    @property
    def all(self) -> Tensor:
        """Every row so far, without a copy."""
        return self._held[: self._n]


def cache_name(hf_model: nn.Module) -> str:
    """The name of the cache in a model's `forward` arguments and output.

    transformers renamed `past_key_values` to `cache` in 5.24; remote code may still use the old name there.

    Raises:
        UnsupportedModelError: `forward` takes no cache.
    """
    model = unwrap_peft(hf_model)
    arguments = inspect.signature(type(model).forward).parameters
    for name in ("cache", "past_key_values"):
        if name in arguments:
            return name
    raise UnsupportedModelError(
        f"{type(model).__name__}.forward has no argument for a cache (cache, or past_key_values before transformers "
        "5.24), so it cannot be read token by token; use attribute"
    )


class Decoder:
    """The states of one prompt at one scale, and of what is said to it, as it is said.

    Attributes:
        encoded: the prompt.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, model: Model, encoded: EncodedExample, *, layer: int = -1) -> None:
        self.encoded = encoded
        self._hf_model = model.hf_model
        self._states = model.states
        self._module, self._norm = layer_modules(model.hf_model, layer)
        from transformers import DynamicCache

        # made here as `generate` does: some decoders make none by themselves
        self._cache_name = cache_name(model.hf_model)
        self._cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
        self._positions = OwnPositions(model.hf_model)
        inputs = dict(encoded.model_inputs)
        if model.family.masked:  # later steps count on from the cache
            inputs["attention_mask"] = torch.ones_like(encoded.input_ids)[None]
        interpolate = model.family.interpolates and encoded.scale != 1.0
        with interpolated_positions(model.hf_model, interpolate):
            last, chosen = self._read(encoded.input_ids, inputs)
        self._last = Rows(last)
        self._chosen = self._last if chosen is last else Rows(chosen)

    @torch.inference_mode(False)
    @torch.no_grad()
    def feed(self, token_id: int) -> None:
        """Read one more token."""
        last, chosen = self._read(torch.tensor([token_id], device=self.encoded.input_ids.device), {})
        self._last.add(last)
        if self._chosen is not self._last:
            self._chosen.add(chosen)

    @property
    def hidden_states(self) -> Tensor:
        """`[seq dim]` of the chosen layer, through the final norm."""
        return self._chosen.all

    @property
    def last_states(self) -> Tensor | None:
        """`[seq dim]` of the last layer, or None where that is the chosen one."""
        return None if self._chosen is self._last else self._last.all

    @property
    def next_state(self) -> Tensor:
        """`[1 dim]`, what the next token is predicted with."""
        return self._last.all[-1:]

    def _read(self, ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with (
            undisturbed(self._states),
            record_output(decoder_of(self._hf_model)) as last,
            record_output(self._module) as chosen,
            self._positions,
        ):
            inputs = {**inputs, self._cache_name: self._cache}
            out = self._hf_model(input_ids=ids[None], **inputs, use_cache=True, logits_to_keep=1)
        self._cache = getattr(out, self._cache_name, None)
        if self._cache is None:
            raise UnsupportedModelError(
                f"{type(self._hf_model).__name__} gives no cache back, so it cannot be read token by token; use attribute"
            )
        final = last[-1][0]
        return final, final if self._norm is None else through_norm(self._norm, chosen[-1])[0]
