"""Videos whose frames are each shown as one tile and written as an image is, with the image's own placeholder."""

from __future__ import annotations

import math

from fastattr.adapters.families.family import Look, Looks, Shown
from fastattr.errors import TokenLayoutError
from fastattr.types import Grid


def watch_frames(family: str, shown: Shown, frame: Grid) -> list[Looks]:
    """The looks at every video; none where nobody says that there are any.

    Args:
        family: for errors.
        frame: tokens of each frame.

    Raises:
        TokenLayoutError: the text shows other frames.
    """
    if not shown.n_frames:
        return []
    shows = shown.inputs["input_ids"][0] == shown.config.image_token_id
    which, lengths = shows.unique_consecutive(return_counts=True)
    runs = lengths[which].tolist()  # something is written between frames
    n_tokens = math.prod(frame)
    if runs != [n_tokens] * sum(shown.n_frames):
        raise TokenLayoutError(
            f"{family} shows {list(shown.n_frames)} frames in {n_tokens} tokens each, but input_ids holds {len(runs)} runs of "
            f"{sorted(set(runs))} image tokens: they were left out, or shown as images (pass them as such) or at another size"
        )
    return [(Look((n, *frame[1:])),) for n in shown.n_frames]
