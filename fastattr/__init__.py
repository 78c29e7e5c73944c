"""Why a multimodal LLM said each word: a heatmap, the context, and whether it was seen or made up.

>>> import fastattr
>>> model = fastattr.load("shapes")
>>> why = fastattr.attribute(model, "picture.png", "Describe the image.", method="best")
>>> why["red circle"].box, why["red circle"].score
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastattr.chat import Chat
from fastattr.errors import (
    BackendError,
    FastattrError,
    ImageError,
    InputError,
    PhraseError,
    SaveError,
    ScaleError,
    StatesError,
    TokenLayoutError,
    UnsupportedModelError,
)
from fastattr.pipeline import attribute, attribute_batch, attribute_states
from fastattr.streaming import Step, Stream, TokenStream, stream
from fastattr.types import Attribution, AttributionConfig, ImageGroup, OutputHead, TokenLayout, View

if TYPE_CHECKING:
    from fastattr.adapters import Family, Look, Model, Shown, StateBuffer, capture, load, register_adapter, wrap

__all__ = [
    "Attribution",
    "AttributionConfig",
    "BackendError",
    "Chat",
    "Family",
    "FastattrError",
    "ImageError",
    "ImageGroup",
    "InputError",
    "Look",
    "Model",
    "OutputHead",
    "PhraseError",
    "SaveError",
    "ScaleError",
    "Shown",
    "StateBuffer",
    "StatesError",
    "Step",
    "Stream",
    "TokenLayout",
    "TokenLayoutError",
    "TokenStream",
    "UnsupportedModelError",
    "View",
    "attribute",
    "attribute_batch",
    "attribute_states",
    "capture",
    "load",
    "register_adapter",
    "stream",
    "wrap",
]

_FROM_ADAPTERS = ("Family", "Look", "Model", "Shown", "StateBuffer", "capture", "load", "register_adapter", "wrap")


def __getattr__(name: str) -> object:
    # models need transformers, which takes seconds to import: only when they are asked for
    if name in _FROM_ADAPTERS:
        from fastattr import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module 'fastattr' has no attribute {name!r}")
