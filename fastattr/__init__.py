"""Why a multimodal LLM said each word: a heatmap, the context, and whether it was seen or made up.

>>> import fastattr
>>> model = fastattr.load("shapes")
>>> why = fastattr.attribute(model, "picture.png", "Describe the image.")
>>> why["red circle"].box, why["red circle"].score
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fastattr.errors import (
    BackendError,
    FastattrError,
    ImageError,
    InputError,
    PhraseError,
    SaveError,
    ScaleError,
    StatesError,
    TokenIndexError,
    TokenLayoutError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from fastattr.adapters import Family, Look, Model, Shown, StateBuffer, capture, load, register_adapter, wrap
    from fastattr.chat import Chat
    from fastattr.pipeline import attribute, attribute_batch, attribute_states
    from fastattr.streaming import Step, Stream, TokenStream, stream
    from fastattr.types import Attribution, AttributionConfig, ImageGroup, OutputHead, TokenLayout, View

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
    "TokenIndexError",
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

_NAMES_OF = {
    "fastattr.adapters": "Family Look Model Shown StateBuffer capture load register_adapter wrap",
    "fastattr.chat": "Chat",
    "fastattr.pipeline": "attribute attribute_batch attribute_states",
    "fastattr.streaming": "Step Stream TokenStream stream",
    "fastattr.types": "Attribution AttributionConfig ImageGroup OutputHead TokenLayout View",
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names.split()}


def __getattr__(name: str) -> object:
    # torch and transformers take seconds to import: a module is imported when one of its names is asked for
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'fastattr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
