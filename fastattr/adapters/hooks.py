"""Where the hidden states are, and hooks that are gone when their `with` block ends."""

from __future__ import annotations

import operator
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import chain
from threading import get_ident
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastattr.errors import InputError, UnsupportedModelError


def unwrap_peft(hf_model: nn.Module) -> Any:
    """The model inside wrappers of PEFT (its layers stay adapted) and `torch.compile`, or the model itself."""
    *_, model = wrappers_of(hf_model)
    return model


def wrappers_of(hf_model: nn.Module) -> Iterator[Any]:
    """A model and the models it wraps, outermost first."""
    model: Any = hf_model
    while True:
        yield model
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):  # a compiled wrapper
            model = inner
        elif callable(get_base_model := getattr(model, "get_base_model", None)):
            model = get_base_model()
        else:
            return


def modules_of(hf_model: nn.Module) -> list[nn.Module]:
    """Every module once, in no particular order. Faster than `modules()`, which also builds names."""
    found: dict[int, nn.Module] = {}
    left = [hf_model]
    while left:
        module = left.pop()
        if id(module) not in found:
            found[id(module)] = module
            left += [child for child in module._modules.values() if child is not None]
    return list(found.values())


def device_of(module: nn.Module) -> torch.device:
    """Where the inputs of a module belong: its weights' device, or where accelerate will bring them when it runs.

    Raises:
        UnsupportedModelError: its weights are nowhere.
    """
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):  # accelerate may have chained several
        execution_device = getattr(each, "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    held = next(chain(module.parameters(), module.buffers()), None)  # some quantised layers hold buffers alone
    if held is None or held.is_meta:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no weights (device {held.device if held is not None else 'none'}), and no hook "
            "of accelerate that brings them; load the weights, or dispatch the model with accelerate"
        )
    return held.device


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
    if isinstance(getattr(decoder, "lm_head", None), nn.Module):  # a whole language model, as in Llama 4
        return cast(nn.Module, decoder.model)
    return cast(nn.Module, decoder)


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
        (
            getattr(decoder, name)
            for name in ("norm", "final_layernorm", "ln_f", "embedding_norm")
            if hasattr(decoder, name)
        ),
        None,
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


def through_norm(norm: nn.Module, states: Tensor) -> Tensor:
    """States `[batch seq dim]` of an earlier layer through the final norm.

    Raises:
        UnsupportedModelError: the layer gives something else, as where several streams are joined behind the last one.
    """
    if states.ndim != 3:
        raise UnsupportedModelError(
            f"this layer gives {list(states.shape)}, expected [batch seq dim], so only layer=-1 can be read"
        )
    return cast(Tensor, norm(states))


@contextmanager
def record_output(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the `[batch seq dim]` outputs of a module while the block runs, of forwards in this thread alone.

    Within the block a decoder computes all positions (see `all_positions`), compiled modules run uncompiled, and `capture`
    does not record the forwards.
    """
    seen: list[Tensor] = []
    here = get_ident()

    def ask(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        return (args, all_positions(kwargs)) if get_ident() == here else None

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if get_ident() == here:  # a server may generate beside it
            states = output if isinstance(output, Tensor) else output[0]
            seen.append(states.detach())

    handles = [module.register_forward_pre_hook(ask, with_kwargs=True), module.register_forward_hook(keep)]
    try:
        with _nothing_compiled(), uncaptured():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def all_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a decoder, without `logits_to_keep`.

    Some models pass it on to their decoder, which then leaves out the other positions where later layers reuse the keys
    and values of earlier ones (Gemma 4). Logits are still made for the kept positions alone: the model slices what the
    decoder returns.
    """
    return {name: value for name, value in kwargs.items() if name != "logits_to_keep"}


_PATCHED = ("generate", "forward")  # set on an instance by `capture` and accelerate, perhaps in another thread
_ABSENT = object()
_TENSORS = {Tensor, nn.Parameter}


def state_dicts(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """The dicts that a forward may change: attributes and buffers of modules, and their configurations.

    Torch's own modules are skipped: they change nothing in eval mode.
    """
    found: list[dict[str, Any]] = []
    configs: dict[int, dict[str, Any]] = {}
    for module in modules:
        if type(module).__module__.startswith("torch.nn.modules."):
            continue
        own = vars(module)
        found.append(own)
        if module._buffers:
            found.append(cast("dict[str, Any]", module._buffers))
        for name in ("config", "generation_config"):
            if hasattr(config := own.get(name), "__dict__"):
                configs[id(config)] = vars(config)
    return found + list(configs.values())


@contextmanager
def undisturbed(states: Sequence[dict[str, Any]]) -> Iterator[None]:
    """Undo what forwards in the block set on a model, such as Qwen's `rope_deltas`, which a user's own loop still needs.

        with undisturbed(model.states):
            hf_model(...)

    Attributes that were set or deleted are put back; tensors that were changed in place are not.

    Args:
        states: from `state_dicts`.
    """
    before = [state.copy() for state in states]
    try:
        yield
    finally:
        for state, old in zip(states, before, strict=True):
            if len(state) == len(old) and all(map(operator.is_, state.values(), old.values())):
                continue
            for name in {**old, **state}:
                now, then = state.get(name, _ABSENT), old.get(name, _ABSENT)
                # private attributes that are not tensors hold what transformers sets up once: keep them
                if now is then or name in _PATCHED or (name[0] == "_" and not {type(now), type(then)} & _TENSORS):
                    continue
                if then is _ABSENT:
                    state.pop(name, None)
                else:
                    state[name] = then


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


# --- forwards that captures do not record, and positions kept between forwards -----------------------------------------------------------------------

_uncaptured: ContextVar[bool] = ContextVar("fastattr_uncaptured", default=False)


@contextmanager
def uncaptured() -> Iterator[None]:
    """Within the block, `capture` does not record the model: fastattr itself runs it."""
    token = _uncaptured.set(True)
    try:
        yield
    finally:
        _uncaptured.reset(token)


def is_uncaptured() -> bool:
    return _uncaptured.get()


class OwnPositions:
    """The `rope_deltas` of one sequence, which Qwen's and related models keep as an attribute between forwards.

    `rope_deltas` is the offset between positions and token counts, for the sequence that was read last. The block sets
    it to that of this sequence and afterwards restores the previous one. Enter it again for every forward.
    """

    def __init__(self, hf_model: nn.Module) -> None:
        self._modules = [each for each in unwrap_peft(hf_model).modules() if "rope_deltas" in vars(each)]
        self._own: list[Any] = [None for _ in self._modules]
        self._others: list[Any] = []

    def __enter__(self) -> None:
        self._others = self._exchange(self._own)

    def __exit__(self, *_error: object) -> None:
        self._own = self._exchange(self._others)

    def _exchange(self, values: list[Any]) -> list[Any]:
        held = [each.rope_deltas for each in self._modules]
        for module, value in zip(self._modules, values, strict=True):
            module.rope_deltas = value
        return held


# --- torch.compile --------------------------------------------------------------------------------------------

_eager: list[Any] = []  # the stance that was taken, and one None for every other block that is open
_eager_lock = threading.Lock()


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Run modules as they are written while the block runs, also those that `torch.compile` has compiled.

    A hook that comes and goes would have a compiled model compiled again each time, and outputs of captured graphs are
    overwritten by the next run. The stance belongs to the process, so the first block takes it and the last one ends it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it would take seconds
        yield
        return
    with _eager_lock:
        _eager.append(None if _eager else torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _eager_lock:
            if len(_eager) > 1:
                _eager.pop()
            else:
                _eager.pop().__exit__(None, None, None)


def _after_fork() -> None:
    """Another thread of the parent may have held it."""
    global _eager_lock
    _eager_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
