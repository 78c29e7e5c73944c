"""A plain folder of anyone's own pictures.

    images/NAME.png            jpg, png or webp
    masks/NAME/red_circle.png  where the thing is that a response calls "red circle": every pixel that is not zero
    captions/NAME.txt          what the model is made to say; without it the model answers
    prompt.txt                 `Describe the image.` if missing

A mask without such a pixel says that the picture does not show the thing, so that a response that names it invents it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from fastattr.datasets.files import digest, read_picture, read_pixels, read_text
from fastattr.datasets.sample import Dataset, Sample
from fastattr.datasets.words import function_spans, noun_mentions
from fastattr.errors import DatasetError
from fastattr.storage import is_litter

IMAGES, MASKS = Path("images"), Path("masks")
DEFAULT_PROMPT = "Describe the image."

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_MODES = ("1", "L", "P", "I;16", "RGB")  # transparency is left out: is a clear pixel zero?


def open_folder(folder: Path, prompt: str | None = None) -> Dataset:
    """Pictures by name, in alphabetical order.

    Args:
        prompt: instead of the folder's own.

    Raises:
        DatasetError: there is no picture, or two of one name, or `prompt.txt` cannot be read.
    """
    asked = folder / "prompt.txt"
    prompt = prompt or (read_text(asked) if asked.exists() else DEFAULT_PROMPT)
    pictures: dict[str, Path] = {}
    n_litter = sum(is_litter(path.name) for part in (IMAGES, MASKS) for path in (folder / part).rglob("*"))
    for path in sorted((folder / IMAGES).iterdir()):
        if path.suffix.lower() in _SUFFIXES and not is_litter(path.name):
            if path.stem in pictures:
                raise DatasetError(
                    f"{str(path)!r} and {pictures[path.stem].name!r} have one name, but masks go by name; rename one"
                )
            pictures[path.stem] = path
    if not pictures:
        raise DatasetError(
            f"{str(folder / IMAGES)!r} holds no picture, expected files that end in {', '.join(_SUFFIXES)}"
        )
    if not any(_masks(folder, id) for id in pictures):
        raise DatasetError(
            f"{str(folder / MASKS)!r} holds no mask for any of the {len(pictures)} pictures, expected for each a folder with "
            f"its name that holds a png for each object, for example {next(iter(pictures))}/red_circle.png"
        )

    def read(id: str) -> Sample:
        if id not in pictures:
            raise DatasetError(f"{str(folder / IMAGES)!r} has no picture {id!r}")
        image = read_picture(pictures[id])
        files = _masks(folder, id)
        if not files:
            raise DatasetError(
                f"{str(folder / MASKS / id)!r} holds no mask, expected a png for each thing in the picture"
            )
        masks: dict[str, np.ndarray | None] = {}
        for file in files:
            values = read_pixels(file, _MODES, image)
            mask = values.reshape(image.height, image.width, -1).max(axis=-1) > 0
            masks[file.stem.replace("_", " ")] = mask if mask.any() else None
        caption = folder / "captions" / f"{id}.txt"
        response = read_text(caption) if caption.exists() else None
        return Sample(id, image, prompt, response, partial(noun_mentions, masks=masks), function_spans)

    def content(id: str) -> str:
        caption = folder / "captions" / f"{id}.txt"
        return digest([pictures[id], *_masks(folder, id), caption], prompt)

    return Dataset(folder.resolve().name, tuple(pictures), read, content=content, n_litter=n_litter)


def _masks(folder: Path, id: str) -> list[Path]:
    return sorted(path for path in (folder / MASKS / id).glob("*.png") if not is_litter(path.name))
