"""VideoLLaMA 3: grids of patches, and for every picture how many of them a side are merged.

Its videos lose tokens that hardly change between frames, so that they are no grid any more: their frames are shown as
images.
"""

from __future__ import annotations

from fastattr.adapters.families.family import Family, Looks, Shown, patch, whole
from fastattr.adapters.families.qwen import no_limit


def look(shown: Shown) -> list[Looks]:
    grids, merges = shown.inputs["image_grid_thw"].tolist(), shown.inputs["image_merge_sizes"].tolist()
    return whole([(t, h // merge, w // merge) for (t, h, w), merge in zip(grids, merges, strict=True)])


VIDEO_LLAMA3 = Family("VideoLLaMA 3", look, patch, no_limit)  # images are not merged

FAMILIES = {"video_llama_3": VIDEO_LLAMA3}
