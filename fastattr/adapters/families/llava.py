"""LLaVA-1.5: one square a picture: its centre, all of it squeezed, or all of it padded."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from fastattr.adapters.families.family import Family, Look, Looks, Shown, Size, image_half, patch
from fastattr.types import WHOLE_IMAGE, Box


def look(shown: Shown) -> list[Looks]:
    pixels = shown.inputs["pixel_values_images" if "pixel_values_images" in shown.inputs else "pixel_values"]
    height, width = (int(length) for length in pixels.shape[-2:])
    cell = patch(shown.config)
    n = math.prod(pixels.shape[:-3])
    sizes = shown.sizes_for("LLaVA", "pads pictures by their size") if pads(shown.processor) else shown.sizes
    boxes = (
        [extent_of(shown.processor, size, (height, width)) for size in sizes]
        if sizes is not None
        else [WHOLE_IMAGE] * n
    )
    if len(boxes) != n:  # said by whoever counts them
        boxes = [WHOLE_IMAGE] * n
    return [(Look((1, height // cell, width // cell), box),) for box in boxes]


def extent_of(processor: Any, size: Size, pixels: Size) -> Box:
    """The part of a picture of `size` that `pixels` (height, width) show; beyond 0 and 1 where it is padded to a square."""
    images = image_half(processor)
    if images is not None and not getattr(images, "do_resize", True) and getattr(images, "do_center_crop", False):
        return centre_of_pixels(size, pixels, padded=pads(processor))
    if pads(processor):
        return padded_to_square(size)
    return centre_square(size) if keeps_centre(processor) else WHOLE_IMAGE


def padded_to_square(size: Size) -> Box:
    """A square around a picture in its middle, as shares of the picture."""
    height, width = size
    edge = max(size)
    top, left = (edge - height) // 2, (edge - width) // 2
    return -left / width, -top / height, (edge - left) / width, (edge - top) / height


def centre_square(size: Size) -> Box:
    """The largest square in the middle of a picture, as shares of the picture."""
    height, width = size
    shorter = min(size)
    return (
        (1 - shorter / width) / 2,
        (1 - shorter / height) / 2,
        (1 + shorter / width) / 2,
        (1 + shorter / height) / 2,
    )


def centre_of_pixels(size: Size, crop: Size, *, padded: bool) -> Box:
    """The box, in fractions of the picture, of the central `crop` of a picture that is not resized, perhaps padded to a square."""
    edges = []
    for length, cut in zip(size, crop, strict=True):
        room = max(size) if padded else length
        start = (room - cut) // 2 - (room - length) // 2
        edges.append((start / length, (start + cut) / length))
    (top, bottom), (left, right) = edges
    return left, top, right, bottom


def pads(processor: Any) -> bool:
    """Whether pictures are padded to a square."""
    return bool(getattr(image_half(processor), "do_pad", None))


def keeps_centre(processor: Any) -> bool:
    """Whether the shorter side is resized and the centre cropped, as in LLaVA-1.5, rather than everything squeezed.

    A processor that does not show its image half is taken to crop.
    """
    images = image_half(processor)
    return images is None or crops(images)


def crops(half: Any) -> bool:
    """Whether an image or video processor resizes the shorter side and crops the centre."""
    return bool(getattr(half, "do_center_crop", False)) and "shortest_edge" in half.size


def square_crop(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    square = {"height": max(size), "width": max(size)}
    if not keeps_centre(processor):
        return {"size": square}
    return {"size": {"shortest_edge": max(size)}, "crop_size": square}


LLAVA = Family("LLaVA-1.5", look, patch, square_crop, resized=False, interpolates=True)

VIP_LLAVA = replace(LLAVA, name="ViP-LLaVA")

VIDEO_LLAVA = replace(LLAVA, name="Video-LLaVA")  # its tokens for videos begin every frame with one that shows nothing

FAMILIES = {"llava": LLAVA, "vipllava": VIP_LLAVA, "video_llava": VIDEO_LLAVA}
