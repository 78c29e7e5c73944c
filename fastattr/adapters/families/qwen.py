"""Qwen-VL and its kin: any size, patches merged two by two, grids given as `(t, h, w)` patches."""

from __future__ import annotations

from typing import Any

from fastattr.adapters.families.family import Family, Looks, Shown, Size, merge, merged_patch, whole


def look(shown: Shown) -> list[Looks]:
    return _from_patches(shown, "image_grid_thw")


def _from_patches(shown: Shown, name: str) -> list[Looks]:
    factor = merge(shown.config)
    return whole([(t, h // factor, w // factor) for t, h, w in shown.inputs[name].tolist()])


def pixel_budget(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    area = size[0] * size[1]
    return {"size": {"shortest_edge": min(area, 56 * 56), "longest_edge": max(2 * area, 56 * 56)}}


QWEN2 = Family("Qwen2-VL, Qwen2.5-VL", look, merged_patch, pixel_budget, token_types="mm_token_type_ids")

FAMILIES = {"qwen2_vl": QWEN2, "qwen2_5_vl": QWEN2}
