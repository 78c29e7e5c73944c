"""VideoLLaMA 3: grids of patches, and for every picture how many of them a side are merged.

Its processor leaves out tokens of videos that hardly change from frame to frame; it is told to keep them, since the rest
is no grid.
"""

from __future__ import annotations

from fastattr.adapters.families.family import Config, Family, Looks, Shown, patch, whole
from fastattr.adapters.families.qwen import EVERY_FRAME, no_limit
from fastattr.errors import TokenLayoutError

NAME = "VideoLLaMA 3"


def look(shown: Shown) -> list[Looks]:
    return _grids(shown, "image")


def watch(shown: Shown) -> list[Looks]:
    """
    Raises:
        TokenLayoutError: tokens were left out.
    """
    kept = shown.inputs["video_compression_mask"]
    if not bool(kept.all()):
        raise TokenLayoutError(
            f"{NAME} left out {int((~kept).sum())} of {len(kept)} tokens of its videos, where hardly anything changes, "
            "and the rest is no grid; give its processor use_token_compression=False"
        )
    return _grids(shown, "video")


def _grids(shown: Shown, kind: str) -> list[Looks]:
    grids, merges = (shown.inputs[name].tolist() for name in (f"{kind}_grid_thw", f"{kind}_merge_sizes"))
    return whole([(t, h // merge, w // merge) for (t, h, w), merge in zip(grids, merges, strict=True)])


def film_cell(config: Config) -> int:
    """Of videos two patches a side are merged, of images none."""
    return 2 * patch(config)


VIDEO_LLAMA3 = Family(
    NAME,
    look,
    patch,
    no_limit,
    watch,
    filmed={**EVERY_FRAME, "use_token_compression": False},
    film_cell=film_cell,
    keeps_aspect=True,
)

FAMILIES = {"video_llama_3": VIDEO_LLAMA3}
