"""Gemma: one square a picture, always the same number of tokens."""

from __future__ import annotations

import math

from fastattr.adapters.families.family import Config, Family, Looks, Shown, side, whole


def cell(config: Config) -> int:
    return side(config.vision_config.image_size) // math.isqrt(config.mm_tokens_per_image)


def look(shown: Shown) -> list[Looks]:
    edge = math.isqrt(shown.config.mm_tokens_per_image)
    return whole([(1, edge, edge)] * math.prod(shown.inputs["pixel_values"].shape[:-3]))


GEMMA3 = Family("Gemma3", look, cell, None, token_types="token_type_ids")

FAMILIES = {"gemma3": GEMMA3}
