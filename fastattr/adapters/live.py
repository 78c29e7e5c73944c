"""What may change on a model after `wrap`, checked before every explanation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from fastattr.adapters.head import HeadReading, read_head
from fastattr.adapters.hooks import modules_of, state_dicts, unwrap_peft, wrappers_of
from fastattr.errors import InputError, UnsupportedModelError
from fastattr.types import OutputHead


class Live:
    """The output head of a model and the state dicts of its modules, as of the last call of `look`."""

    def __init__(self, hf_model: nn.Module, config: Any, tokenizer: Any) -> None:
        self._hf_model, self._config, self._tokenizer = hf_model, config, tokenizer
        self._n_tokens = _length(tokenizer)
        self.states: list[dict[str, Any]] = []
        self._reading: HeadReading | None = None
        self.look()

    @property
    def reading(self) -> HeadReading:
        """The head, with what is needed to check that the model still has it."""
        assert self._reading is not None
        return self._reading

    @property
    def head(self) -> OutputHead:
        return self.reading.head

    def look(self) -> None:
        """Check that the model can be explained as it is now, and read its output head again if it changed.

        Raises:
            InputError: it is in training mode, or one of its modules is whose output depends on the mode.
            UnsupportedModelError: an adapter puts virtual tokens in front, or the head changed into another form.
            StatesError: the head now holds NaN or Inf.
        """
        modules = modules_of(self._hf_model)
        training = [type(module).__name__ for module in modules if module.training and _differs_in_training(module)]
        if self._hf_model.training or training:
            where = "" if self._hf_model.training else f" in {len(training)} of its modules ({training[0]})"
            raise InputError(
                f"{type(unwrap_peft(self._hf_model)).__name__} is in training mode{where}, where dropout makes maps random; "
                "call .eval() on it first"
            )
        refuse_virtual_tokens(self._hf_model)
        self.states = state_dicts(modules)
        base, n_tokens = unwrap_peft(self._hf_model), _length(self._tokenizer)
        if self._reading is None or n_tokens != self._n_tokens or not self._reading.holds(base, self._config):
            self._reading = read_head(base, self._config, vocabulary_of(self._tokenizer), self.states)
            self._n_tokens = n_tokens


def _differs_in_training(module: nn.Module) -> bool:
    """Whether the output of a module depends on training mode: batch statistics or dropout."""
    if isinstance(module, _NormBase):
        return True
    if isinstance(module, _DropoutNd):
        return module.p > 0
    return any("drop" in name and isinstance(share, int | float) and share > 0 for name, share in vars(module).items())


def refuse_virtual_tokens(hf_model: nn.Module) -> None:
    """Check that no PEFT adapter puts virtual tokens in front of the prompt.

    Raises:
        UnsupportedModelError: one does.
    """
    for wrapper in wrappers_of(hf_model):
        configs = getattr(wrapper, "peft_config", None)
        if not isinstance(configs, dict) or getattr(wrapper, "_adapters_disabled", False):
            continue
        for name, config in configs.items():
            if getattr(config, "is_prompt_learning", False):
                kind = getattr(config.peft_type, "value", config.peft_type)
                raise UnsupportedModelError(
                    f"the adapter {name!r} ({kind}) puts {config.num_virtual_tokens} virtual tokens in front of the prompt, "
                    "so the model's states do not line up with its input_ids; explain the model without it "
                    "(get_base_model()), or train an adapter of weights, such as LoRA"
                )


def adapters_of(hf_model: nn.Module) -> frozenset[Any]:
    """A fingerprint of the PEFT adapters that are active in the layers of a model and of their weights; empty without any."""
    if not getattr(hf_model, "peft_config", None):
        return frozenset()
    found = set()
    for module in modules_of(hf_model):
        own = vars(module)
        if "_disable_adapters" in own:
            weights = tuple((each.data_ptr(), version_of(each)) for each in module.parameters())
            active, merged = own.get("_active_adapter"), own.get("merged_adapters")
            found.add((id(module), str(active), own["_disable_adapters"], str(merged), weights))
    return frozenset(found)


def acting(hf_model: nn.Module, head: OutputHead) -> tuple[Any, ...]:
    """What must stay as it is while a response is read on token by token: mode, adapters and the head's memory."""
    return hf_model.training, adapters_of(unwrap_peft(hf_model)), version_of(head.weight)


def vocabulary_of(tokenizer: Any) -> int | None:
    """One more than the largest token id. Where the tokenizer does not list its tokens, its length; None where it has none.

    Not `len(tokenizer)` in general: ids may have gaps.
    """
    get_vocab = getattr(tokenizer, "get_vocab", None)
    ids = {int(id) for id in get_vocab().values()} if callable(get_vocab) else set()
    ids |= {int(id) for id in getattr(tokenizer, "added_tokens_decoder", ())}
    return max(ids) + 1 if ids else _length(tokenizer)


def _length(tokenizer: Any) -> int | None:
    return len(tokenizer) if hasattr(tokenizer, "__len__") else None


def version_of(tensor: torch.Tensor) -> int:
    """How often its memory was written to, as far as torch counts that."""
    return 0 if tensor.is_inference() else tensor._version
