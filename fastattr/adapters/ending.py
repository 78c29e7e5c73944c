"""Where a response ends: end tokens and the padding after them are not explained."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattr.adapters.model import Model


@dataclass(frozen=True)
class EndTokens:
    """The ids that end a response, and the ids that pad it after its end."""

    ends: frozenset[int]
    pads: frozenset[int]

    def cut(self, ids: Iterable[int]) -> Generator[int, None, None]:
        """The ids without the trailing end tokens and the padding after them.

        An end token that another token follows is kept, so it is held back until the next token is known. Padding
        without an end token before it is kept too: many models pad with an ordinary token.
        """
        held: list[int] = []
        for token_id in ids:
            held.append(token_id)
            if token_id in self.ends or (token_id in self.pads and len(held) > 1):
                continue
            yield from held
            held = []

    def length(self, ids: Tensor) -> int:
        """How many of `ids [n]` are left by `cut`."""
        return sum(1 for _ in self.cut(ids.tolist()))


def end_tokens(model: Model, options: Mapping[str, Any] | None = None) -> EndTokens:
    """The end tokens that apply to a call of the model's `generate`.

    Args:
        options: arguments of that call; they take precedence over the model's `generation_config`.
    """
    ends, pads = (_ids(setting(model, options or {}, name)) for name in ("eos_token_id", "pad_token_id"))
    return EndTokens(ends, pads)


def setting(model: Model, options: Mapping[str, Any], name: str) -> Any:
    """A generation parameter as `generate(**options)` reads it: an argument, `generation_config=`, or the model's own."""
    if name in options:
        return options[name]
    given = getattr(options.get("generation_config"), name, None)
    return getattr(getattr(model.hf_model, "generation_config", None), name, None) if given is None else given


def _ids(value: Any) -> frozenset[int]:
    return frozenset() if value is None else frozenset(torch.as_tensor(value, device="cpu").flatten().tolist())
