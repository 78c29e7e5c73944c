"""Which family a model belongs to. One module a kind of model; `register_adapter` adds more."""

from __future__ import annotations

from collections.abc import Mapping

from fastattr.adapters.families import (
    aya,
    deepseek,
    docling,
    gemma,
    glm,
    got,
    hunyuan,
    idefics,
    internvl,
    kimi,
    lfm2,
    llama4,
    llava,
    llava_next,
    minicpm,
    mistral,
    molmo,
    ovis,
    paligemma,
    perception,
    pixtral,
    qwen,
    video_llama,
)
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, looks_of, video_looks_of
from fastattr.adapters.families.registry import register_adapter, registered_family, registered_types
from fastattr.adapters.families.unsupported import REASONS
from fastattr.errors import UnsupportedModelError

__all__ = [
    "FAMILIES",
    "REASONS",
    "Family",
    "Look",
    "Looks",
    "Shown",
    "family_of",
    "looks_of",
    "register_adapter",
    "registered_family",
    "registered_types",
    "video_looks_of",
]

FAMILIES: Mapping[str, Family] = {
    **qwen.FAMILIES,
    **glm.FAMILIES,
    **hunyuan.FAMILIES,
    **kimi.FAMILIES,
    **mistral.FAMILIES,
    **video_llama.FAMILIES,
    **llava.FAMILIES,
    **llava_next.FAMILIES,
    **got.FAMILIES,
    **aya.FAMILIES,
    **ovis.FAMILIES,
    **deepseek.FAMILIES,
    **perception.FAMILIES,
    **pixtral.FAMILIES,
    **idefics.FAMILIES,
    **internvl.FAMILIES,
    **gemma.FAMILIES,
    **paligemma.FAMILIES,
    **llama4.FAMILIES,
    **lfm2.FAMILIES,
    **docling.FAMILIES,
    **minicpm.FAMILIES,
    **molmo.FAMILIES,
}


def family_of(config: Config) -> Family:
    """The family of a model's configuration; one that was registered comes first.

    Raises:
        UnsupportedModelError: its form cannot be explained, no family is known for its `model_type`, or it reads no images.
    """
    model_type = str(getattr(config, "model_type", None))
    if (registered := registered_family(model_type)) is not None:
        return registered
    if model_type in REASONS:
        raise UnsupportedModelError(f"model_type {model_type!r} cannot be explained: {REASONS[model_type]}")
    family = FAMILIES.get(model_type)
    if family is not None:
        return pixtral.PIXTRAL if model_type == "llava" and config.vision_config.model_type == "pixtral" else family
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} has no vision_config: it reads no images, so there is nothing to map onto. "
            f"Known families: {', '.join(FAMILIES)}"
        )
    raise UnsupportedModelError(
        f"no adapter is known for model_type {model_type!r}, expected one of {', '.join(FAMILIES)}. Bring one with "
        "register_adapter, or explain its hidden states with attribute_states"
    )
