"""Qwen-VL and its kin: any size, patches merged two by two, grids given as `(t, h, w)` patches.

A video is one grid: a temporal patch holds two frames, so `t` counts pairs. Qwen3-VL writes the time of every pair
before its tokens, which changes nothing here, since those are found by their id. Of Omni models the thinker is meant.
"""

from __future__ import annotations

from typing import Any

from fastattr.adapters.families.family import Family, Looks, Shown, Size, merge, merged_patch, whole

UNLIMITED = {"shortest_edge": 1, "longest_edge": 2**40}  # pixels
EVERY_FRAME = {"do_sample_frames": False}


def look(shown: Shown) -> list[Looks]:
    return looks_from(shown, "image_grid_thw")


def watch(shown: Shown) -> list[Looks]:
    return looks_from(shown, "video_grid_thw")


def looks_from(shown: Shown, name: str) -> list[Looks]:
    """One look at every picture, from the input that holds `(t, h, w)` patches of each."""
    factor = merge(shown.config)
    return whole([(t, h // factor, w // factor) for t, h, w in shown.inputs[name].tolist()])


def no_limit(processor: Any, size: Size, scale: float) -> dict[str, Any]:
    """Options that keep the processor from resizing: pictures already have the size of their grid.

    `size` alone is not enough: `min_pixels` and `max_pixels` given to `AutoProcessor.from_pretrained` take precedence, and
    some video processors also limit each frame.
    """
    return {"size": UNLIMITED, "do_resize": False}


def qwen(name: str, *, films: bool = True, masked: bool = False) -> Family:
    return Family(
        name,
        look,
        merged_patch,
        no_limit,
        watch=watch if films else None,
        token_types="mm_token_type_ids",
        filmed=EVERY_FRAME,
        masked=masked,
        sized=True,
        keeps_aspect=True,
    )


QWEN2 = qwen("Qwen2-VL, Qwen2.5-VL")
QWEN3 = qwen("Qwen3-VL")
QWEN3_5 = qwen("Qwen3.5")
OMNI = qwen("Qwen2.5-Omni, Qwen3-Omni", masked=True)

FAMILIES = {
    "qwen2_vl": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen3_vl": QWEN3,
    "qwen3_vl_moe": QWEN3,
    "qwen3_5": QWEN3_5,
    "qwen3_5_moe": QWEN3_5,
    "qwen4_exp": qwen("Qwen4-Exp"),
    "qwen2_5_omni_thinker": OMNI,
    "qwen3_omni_moe_thinker": OMNI,
    "exaone4_5": qwen("EXAONE 4.5"),
    "paddleocr_vl": qwen("PaddleOCR-VL", films=False),  # reads no videos
    "ernie4_5_vl_moe": qwen("ERNIE 4.5 VL", films=False),  # its video half draws the time into the frames
}
