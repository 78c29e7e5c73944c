"""Where the hidden states are, and hooks that are gone when their `with` block ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from fastattr.errors import InputError, UnsupportedModelError


def unwrap_peft(hf_model: nn.Module) -> Any:
    """The model inside a PEFT wrapper (its layers stay adapted), or the model itself."""
    inner = getattr(hf_model, "get_base_model", None)
    return inner() if callable(inner) else hf_model


def decoder_of(hf_model: nn.Module) -> nn.Module:
    """The text decoder, whose output is what the output head consumes (last layer, final norm).

    Raises:
        UnsupportedModelError: the model is not built that way.
    """
    model = unwrap_peft(hf_model)
    get_decoder = getattr(model, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if decoder is None or decoder is model:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no text decoder of its own (get_decoder); explain it from its hidden states "
            "with attribute_states"
        )
    return decoder


def layer_modules(hf_model: nn.Module, layer: int) -> tuple[nn.Module, nn.Module | None]:
    """The module whose output is `hidden_states[layer]`, and the norm still to be applied to it.

    Args:
        layer: as in `hidden_states`: -1 the last (after the norm), -2 the one before, 1 the first.

    Raises:
        InputError: there is no such layer.
        UnsupportedModelError: the decoder does not show its layers and norm.
    """
    decoder = decoder_of(hf_model)
    layers = getattr(decoder, "layers", None)
    norm = next(
        (getattr(decoder, name) for name in ("norm", "final_layernorm", "ln_f") if hasattr(decoder, name)), None
    )
    if layer == -1 or (layers is not None and layer == len(layers)):
        return decoder, None
    if layers is None or norm is None:
        raise UnsupportedModelError(
            f"{type(decoder).__name__} does not expose `layers` and `norm`, so only layer=-1 can be read"
        )
    index = layer - 1 if layer > 0 else len(layers) + layer
    if layer == 0 or not 0 <= index < len(layers):
        raise InputError(f"layer is {layer}, expected 1 to {len(layers)} or -1 to -{len(layers)}")
    return layers[index], norm


@contextmanager
def record_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the `[batch seq dim]` outputs of a module while the block runs, of forwards in this thread alone."""
    seen: list[Tensor] = []
    here = get_ident()

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if get_ident() == here:  # a server may generate beside it
            states = output if isinstance(output, Tensor) else output[0]
            seen.append(states.detach())

    handle = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def interpolated_positions(hf_model: nn.Module, needed: bool) -> Iterator[None]:
    """Ask the vision tower to interpolate its position embeddings, for one forward of a larger image."""
    if not needed:
        yield
        return
    model = unwrap_peft(hf_model)
    tower = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else None
    if tower is None or tower is model:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not expose its vision tower, so its image size is fixed; use scales=(1.0,)"
        )

    here = get_ident()

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, {**kwargs, "interpolate_pos_encoding": True}) if get_ident() == here else None

    handle = tower.register_forward_pre_hook(ask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
