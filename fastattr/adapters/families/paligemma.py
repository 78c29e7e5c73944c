"""PaliGemma: one square a picture; pictures and prompt are read in both directions, the answer is not seen from them."""

from __future__ import annotations

import math

from fastattr.adapters.families.family import Family, Looks, Shown, patch, whole


def look(shown: Shown) -> list[Looks]:
    pixels = shown.inputs["pixel_values"]
    height, width = (int(length) // patch(shown.config) for length in pixels.shape[-2:])
    return whole([(1, height, width)] * math.prod(pixels.shape[:-3]))


PALIGEMMA = Family("PaliGemma", look, patch, None, answer_type=1)

FAMILIES = {"paligemma": PALIGEMMA}
