"""LLaVA-1.5: one square a picture, its centre or all of it squeezed."""

from __future__ import annotations

import math
from typing import Any

from fastattr.adapters.families.family import Family, Look, Looks, Shown, Size, image_half, patch
from fastattr.errors import UnsupportedModelError
from fastattr.types import WHOLE_IMAGE, Box


def look(shown: Shown) -> list[Looks]:
    pixels = shown.inputs["pixel_values"]
    height, width = pixels.shape[-2:]
    cell = patch(shown.config)
    n = math.prod(pixels.shape[:-3])
    boxes = [extent_of(shown.processor, size) for size in shown.sizes] if shown.sizes is not None else [WHOLE_IMAGE] * n
    if len(boxes) != n:  # said by whoever counts them
        boxes = [WHOLE_IMAGE] * n
    return [(Look((1, height // cell, width // cell), box),) for box in boxes]


def extent_of(processor: Any, size: Size) -> Box:
    """The part of a picture of `size` that is shown.

    Raises:
        UnsupportedModelError: the processor pads pictures, so that the grid covers more than the picture.
    """
    height, width = size
    if height == width:
        return WHOLE_IMAGE
    if getattr(image_half(processor), "do_pad", None):
        raise UnsupportedModelError(
            f"{type(processor).__name__} pads pictures to a square, expected one that crops or squeezes them; turn "
            "do_pad off, or pad the picture yourself"
        )
    if not keeps_centre(processor):
        return WHOLE_IMAGE
    shorter = min(height, width)
    return (
        (1 - shorter / width) / 2,
        (1 - shorter / height) / 2,
        (1 + shorter / width) / 2,
        (1 + shorter / height) / 2,
    )


def keeps_centre(processor: Any) -> bool:
    """Whether the shorter side is resized and the centre cropped, as in LLaVA-1.5, rather than everything squeezed.

    A processor that does not show its image half is taken to crop.
    """
    images = image_half(processor)
    if images is None:
        return True
    return bool(getattr(images, "do_center_crop", False)) and "shortest_edge" in images.size


def square_crop(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    square = {"height": max(size), "width": max(size)}
    if not keeps_centre(processor):
        return {"size": square}
    return {"size": {"shortest_edge": max(size)}, "crop_size": square}


LLAVA = Family("LLaVA-1.5", look, patch, square_crop, resized=False, interpolates=True)

FAMILIES = {"llava": LLAVA}
