"""GLM-4V and GLM-OCR: grids of patches as in Qwen-VL.

A time step of a video is written as an image, with the image's own placeholder, between the marks of the video. So the
inputs tell whether those are images or a video; transformers takes no prompt that holds both.
"""

from __future__ import annotations

from fastattr.adapters.families.family import Family, Looks, Shown, merged_patch
from fastattr.adapters.families.qwen import EVERY_FRAME, looks_from, no_limit


def look(shown: Shown) -> list[Looks]:
    if "video_grid_thw" in shown.inputs and "image_grid_thw" not in shown.inputs:
        return []
    return looks_from(shown, "image_grid_thw")


def watch(shown: Shown) -> list[Looks]:
    return looks_from(shown, "video_grid_thw") if "video_grid_thw" in shown.inputs else []


def glm(name: str) -> Family:
    return Family(
        name,
        look,
        merged_patch,
        no_limit,
        watch=watch,
        token_types="mm_token_type_ids",
        film_token="image_token_id",
        filmed=EVERY_FRAME,
        sized=True,
        keeps_aspect=True,
    )


GLM4V = glm("GLM-4.1V, GLM-4.5V, GLM-4.6V")
GLM_OCR = glm("GLM-OCR")

FAMILIES = {"glm4v": GLM4V, "glm4v_moe": GLM4V, "glm46v": GLM4V, "glm_ocr": GLM_OCR}
