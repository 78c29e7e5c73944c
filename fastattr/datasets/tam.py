"""Folders as the reference of TAM (arXiv 2506.23270) lays them out: a picture and a label map for each sample.

COCO captions: `annotations/instances_minival2014.json`, `image/` and `seg_label/`, whose pixels are COCO's category ids.
GranDf and OpenPSG: `anno.json`, a list of `[picture, description, label map, {category: label}]`.
A label map is a grey or palette picture of 8 bits; 0 is the background. The model answers by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fastattr.datasets.files import digest, inside, read_json, read_picture, read_pixels
from fastattr.datasets.sample import Dataset, Sample
from fastattr.datasets.words import function_spans, noun_mentions
from fastattr.errors import DatasetError

CAPTION_PROMPT = "Write a one-sentence caption for this image:"
DESCRIPTION_PROMPTS = {
    "GranDf": "Write a description for this image using around two sentences:",
    "OpenPSG": "Write a description for this image using around three sentences:",
}
CAPTIONED = Path("annotations", "instances_minival2014.json")
DESCRIBED = Path("anno.json")
LABELS = Path("seg_label")

# In the order of COCO's ids from 1 on, some of which are not in use. COCO's sports ball and wine glass are shorter here.
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, -, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, -, backpack, umbrella, -, -,
handbag, tie, suitcase, frisbee, skis, snowboard, ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, -, glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, dining table, -, -, toilet, -, tv, laptop, mouse,
remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, -, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""
COCO_LABELS = {name: id for id, name in enumerate(" ".join(_NAMES.split()).split(", "), 1) if name != "-"}


def open_captioned(folder: Path, prompt: str | None = None) -> Dataset:
    """COCO captions; ids are those of COCO.

    Raises:
        DatasetError: the list of pictures cannot be read.
    """
    source = folder / CAPTIONED
    listed = read_json(source)
    pictures = listed.get("images") if isinstance(listed, dict) else None
    if not isinstance(pictures, list) or not all(
        isinstance(each, dict) and _is_id(each.get("id")) for each in pictures
    ):
        raise DatasetError(f"{str(source)!r} has no list of `images` with a whole number as `id` each")
    ids = {str(each["id"]): each["id"] for each in pictures}

    def files(id: str) -> tuple[Path, Path]:
        name = f"{ids[id]:012d}"
        return folder / "image" / f"{name}.jpg", folder / LABELS / f"{name}.png"

    def read(id: str) -> Sample:
        if id not in ids:
            raise DatasetError(f"{str(source)!r} has no picture {id!r}")
        return _sample(id, *files(id), COCO_LABELS, prompt or CAPTION_PROMPT)

    def content(id: str) -> str:
        return digest(files(id), prompt or CAPTION_PROMPT)

    return Dataset(folder.resolve().name, tuple(ids), read, content=content)


def open_described(folder: Path, prompt: str | None = None) -> Dataset:
    """GranDf, OpenPSG, or another folder like them; ids count the entries of `anno.json` from 0.

    Args:
        prompt: instead of that of the protocol, which is known by the folder's name.

    Raises:
        DatasetError: `anno.json` cannot be read, or there is neither a prompt nor a known name.
    """
    source = folder / DESCRIBED
    entries = read_json(source)
    if not isinstance(entries, list):
        raise DatasetError(f"{str(source)!r} holds a {type(entries).__name__}, expected a list of entries")
    name = folder.resolve().name
    asked = prompt or next((text for known, text in DESCRIPTION_PROMPTS.items() if known in name), None)
    if asked is None:
        raise DatasetError(
            f"the folder {name!r} is neither of {' and '.join(DESCRIPTION_PROMPTS)}, whose prompts are known; pass prompt="
        )

    def read(id: str) -> Sample:
        if not id.isdecimal() or int(id) >= len(entries):
            raise DatasetError(f"{str(source)!r} has no entry {id!r}, expected 0 to {len(entries) - 1}")
        match entries[int(id)]:
            case [str(picture), str(), str(labels), dict(names)] if all(_is_label(each) for each in names.values()):
                return _sample(id, inside(folder, picture, source), inside(folder, labels, source), names, asked)
        raise DatasetError(
            f"entry {id} of {str(source)!r} (from 0) is not [picture, description, label map, {{category: label}}] with "
            "labels from 1 to 255"
        )

    def content(id: str) -> str:
        entry = entries[int(id)]
        named = entry[::2][:2] if isinstance(entry, list) else ()  # picture and label map, of a valid entry
        return digest([folder / name for name in named if isinstance(name, str)], entry, asked)

    return Dataset(name, tuple(map(str, range(len(entries)))), read, content=content)


def _sample(id: str, picture: Path, labels: Path, names: Mapping[str, int], prompt: str) -> Sample:
    image = read_picture(picture)
    values = read_pixels(labels, ("L", "P"), image)
    shown = set(np.unique(values).tolist())
    masks = {name: values == label if label in shown else None for name, label in names.items()}
    return Sample(id, image, prompt, None, partial(noun_mentions, masks=masks, parts=True), function_spans)


def _is_id(value: Any) -> bool:
    return type(value) is int and value >= 0  # a bool is an int too


def _is_label(value: Any) -> bool:
    return type(value) is int and 0 < value < 256
