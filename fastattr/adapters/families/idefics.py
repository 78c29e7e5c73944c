"""Idefics3 and SmolVLM: large pictures cut into rows and columns of tiles, the whole picture behind them."""

from __future__ import annotations

from typing import Any

from fastattr.adapters.families.family import Config, Family, Looks, Shown, Size, patch, whole


def cell(config: Config) -> int:
    return patch(config) * int(config.scale_factor)


def look(shown: Shown) -> list[Looks]:
    pixels = shown.inputs["pixel_values"]
    height, width = (int(length) // cell(shown.config) for length in pixels.shape[-2:])
    return whole([(1, height, width)] * (pixels.shape[0] * pixels.shape[1]))


def one_tile(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    longest = max(size)
    return {"size": {"longest_edge": longest}, "max_image_size": {"longest_edge": longest}}


IDEFICS3 = Family("Idefics3, SmolVLM", look, cell, one_tile, always={"do_image_splitting": False})

FAMILIES = {"idefics3": IDEFICS3, "smolvlm": IDEFICS3}
