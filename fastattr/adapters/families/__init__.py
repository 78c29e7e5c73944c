"""Which family a model belongs to. One module a kind of model; `register_adapter` adds more."""

from __future__ import annotations

from collections.abc import Mapping

from fastattr.adapters.families import gemma, idefics, internvl, llava, pixtral, qwen
from fastattr.adapters.families.family import Config, Family, Look, Looks, Shown, looks_of, video_looks_of
from fastattr.adapters.families.unsupported import REASONS
from fastattr.errors import UnsupportedModelError

__all__ = ["FAMILIES", "Family", "Look", "Looks", "Shown", "family_of", "looks_of", "video_looks_of"]

FAMILIES: Mapping[str, Family] = {
    **qwen.FAMILIES,
    **llava.FAMILIES,
    **pixtral.FAMILIES,
    **idefics.FAMILIES,
    **internvl.FAMILIES,
    **gemma.FAMILIES,
}


def family_of(config: Config) -> Family:
    """The family of a model's configuration.

    Raises:
        UnsupportedModelError: its form cannot be explained, no family is known for its `model_type`, or it reads no images.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type in REASONS:
        raise UnsupportedModelError(f"model_type {model_type!r} cannot be explained: {REASONS[model_type]}")
    if getattr(config, "vision_config", None) is None:
        raise UnsupportedModelError(
            f"model_type {model_type!r} has no vision_config: it reads no images, so there is nothing to map onto. "
            f"Known families: {', '.join(FAMILIES)}"
        )
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedModelError(
            f"no adapter is known for model_type {model_type!r}, expected one of {', '.join(FAMILIES)}. Models of other "
            "forms can be explained from their hidden states with attribute_states"
        )
    if model_type == "llava" and config.vision_config.model_type == "pixtral":
        return pixtral.PIXTRAL
    return family
