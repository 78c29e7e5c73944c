"""PaliGemma: one square a picture; pictures and prompt are read in both directions, the answer is not seen from them."""

from __future__ import annotations

import math

from fastattr.adapters.families.family import Family, Looks, Shown, patch, whole
from fastattr.adapters.families.tiles import tile_grid


def look(shown: Shown) -> list[Looks]:
    n_images = math.prod(shown.inputs["pixel_values"].shape[:-3])
    return whole([tile_grid(shown, patch(shown.config))] * n_images)


PALIGEMMA = Family("PaliGemma", look, patch, None, answer_type=1)

FAMILIES = {"paligemma": PALIGEMMA}
