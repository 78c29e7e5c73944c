"""How a processor cuts pictures: what it is set to, and a check of what came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastattr.adapters.families.family import Looks, Shown, image_half
from fastattr.errors import TokenLayoutError


def image_option(shown: Shown, family: str, name: str, usual: Any = None) -> Any:
    """The value of a processor's option for images, looked up in the order of transformers.

    Options given to `AutoProcessor.from_pretrained` are kept with the tokenizer and come first, then those of the
    processor, then those of its image half.

    Args:
        family: for errors.
        usual: taken where neither is.

    Raises:
        TokenLayoutError: the processor does not show its options, and nothing can be read from the model's inputs alone.
    """
    own = getattr(shown.processor, "images_kwargs", None) or {}
    merges = hasattr(shown.processor, "_merge_kwargs")  # only processors of transformers pass those options on
    given = getattr(shown.processor.tokenizer, "init_kwargs", {}) if merges else {}
    for value in (given.get(name), own.get(name), getattr(image_half(shown.processor), name, None), usual):
        if value is not None:
            return value
    raise TokenLayoutError(
        f"{family} cuts pictures by the option {name}, but {type(shown.processor).__name__} shows no image_processor that "
        "has it; give your processor the attribute image_processor, or let it make one tile of a picture"
    )


def check_count(family: str, shown: Shown, n_came: int, pictures: Sequence[Looks]) -> None:
    """That as many tiles came as the pictures are looked at.

    Raises:
        TokenLayoutError: the processor cut otherwise.
    """
    counts = [len(looks) for looks in pictures]
    if sum(counts) != n_came:
        raise TokenLayoutError(
            f"{type(shown.processor).__name__} made {n_came} tiles, but {family} makes {counts} of pictures of "
            f"{list(shown.sizes or ())} (height, width) as the processor is set: it was called with other options, or these "
            "are other pictures"
        )
