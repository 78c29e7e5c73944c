"""HunYuan-VL: grids of patches, whose rows end with a token each, between a first and a last one for the picture."""

from __future__ import annotations

from dataclasses import replace

from fastattr.adapters.families.family import Family, Looks, Shown, merged_patch
from fastattr.adapters.families.qwen import looks_from, no_limit


def look(shown: Shown) -> list[Looks]:
    grids = looks_from(shown, "image_grid_thw")
    return [tuple(replace(each, start=1, row_end=1, end=1) for each in looks) for looks in grids]


# its images are counted on over the rows of a batch, so that a row would not be read as it is alone
HUNYUAN = Family(
    "HunYuan-VL", look, merged_patch, no_limit, token_types="mm_token_type_ids", stacks=False, keeps_aspect=True
)

FAMILIES = {"hunyuan_vl": HUNYUAN}
