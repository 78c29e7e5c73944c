"""Models with a Pixtral tower: any size, one token a (merged) patch, sizes given in pixels."""

from __future__ import annotations

from typing import Any

from fastattr.adapters.families.family import Family, Looks, Shown, Size, merged_patch, whole


def look(shown: Shown) -> list[Looks]:
    cell = merged_patch(shown.config)
    return whole([(1, height // cell, width // cell) for height, width in shown.inputs["image_sizes"].tolist()])


def longest_edge(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    return {"size": {"longest_edge": max(size)}}


PIXTRAL = Family("LLaVA with Pixtral, Mistral3", look, merged_patch, longest_edge, joint=True, keeps_aspect=True)

FAMILIES = {"mistral3": PIXTRAL}
