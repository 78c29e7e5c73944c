"""Models with a Pixtral tower: any size, one token a (merged) patch, sizes given in pixels."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fastattr.adapters.families.family import Family, Look, Looks, Shown, Size, merged_patch
from fastattr.errors import ImageError


def look(shown: Shown) -> list[Looks]:
    """One look each; incomplete cells at the right and bottom of a picture that is not resized are not shown."""
    cell = merged_patch(shown.config)
    pictures: list[Looks] = []
    for height, width in shown.inputs["image_sizes"].tolist():
        rows, columns = height // cell, width // cell
        pictures.append((Look((1, rows, columns), (0.0, 0.0, columns * cell / width, rows * cell / height)),))
    return pictures


def longest_edge(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    return {"size": {"longest_edge": max(size)}}


PIXTRAL = Family("LLaVA with Pixtral, Mistral3", look, merged_patch, longest_edge, joint=True, keeps_aspect=True)


def look_merged(shown: Shown) -> list[Looks]:
    """As `look`, for models that fail on a single image token because they squeeze its axis away.

    Raises:
        ImageError: the pictures of the prompt together become a single image token.
    """
    pictures = look(shown)
    if sum(math.prod(each.grid) for looks in pictures for each in looks) == 1:
        cell = merged_patch(shown.config)
        (height, width) = shown.inputs["image_sizes"].tolist()[0] if shown.sizes is None else shown.sizes[0]
        raise ImageError(
            f"a picture of {width} x {height} pixels becomes a single image token, of {cell} x {cell} pixels, which "
            f"{shown.config.model_type} cannot read alone; expected more than {cell} pixels in width or height"
        )
    return pictures


FAMILIES = {"mistral3": replace(PIXTRAL, look=look_merged)}
